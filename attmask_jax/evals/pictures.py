"""Shared by evaluations that draw pictures: selection, attention, masks."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from attmask_jax import Params, data, schema
from attmask_jax import mesh as meshes
from attmask_jax.augment import transforms
from attmask_jax.data import pictures as picture_files
from attmask_jax.data.decoding import Reading
from attmask_jax.errors import InputError
from attmask_jax.evals import inputs
from attmask_jax.evals.job import Job, Result, Table
from attmask_jax.methods import masking
from attmask_jax.rows import row_keys

# Pictures per forward pass; bounds memory for large ones.
CHUNK = 8
# Longer pictures are not drawn: each is enlarged until its shorter side has
# `data.image_size` pixels, and memory grows with the square of its patches.
MAX_ASPECT = 16
GALLERY_ROWS = 16  # largest number of pictures in a gallery
POLICIES = tuple(p for p in masking.POLICIES if p != "none")
TABLE_ROWS = 20  # largest number of pictures in a table

# Returned by all processes but the first, which does the work.
EMPTY = Result({}, {}, Table((), ()))


@dataclasses.dataclass(frozen=True)
class Keys:
  """Which pictures are drawn."""

  images: str = schema.key(
    "", 'image, folder or video; "" = the run\'s validation images'
  )
  count: int = schema.key(8, "largest number of pictures, 0 = all", low=0)
  every: int = schema.key(1, "take every n-th frame or file", low=1)


@dataclasses.dataclass(frozen=True)
class MaskKeys:
  """Which masks are compared."""

  ratios: tuple[float, ...] = schema.key(
    (0.1, 0.3, 0.5), "shares of patches that each policy hides", above=0, high=1
  )
  show_max: float = schema.key(
    0.1, "hints come from this share of most attended patches", low=0, high=1
  )


class Picture(NamedTuple):
  """One picture as the network sees it.

  Attributes:
    name: for display.
    image: [H, W, 3] uint8.
    object_mask: [H, W] bool, True = object, or None where unknown.
  """

  name: str
  image: np.ndarray
  object_mask: np.ndarray | None = None


def load(job: Job) -> tuple[list[Picture], bool]:
  """The pictures that `evals.images` names, or validation images of the run.

  Sides are multiples of the patch size. Pictures given by path keep their
  aspect ratio: the shorter side becomes `data.image_size`. Validation images
  get the evaluation crop.

  Returns:
    The pictures, and whether they are frames of a video.

  Raises:
    InputError: no picture exists, or none can be read.
  """
  evals, size = job.config.evals, job.config.data.image_size
  patch = job.weights.method.backbone.patch_size
  if evals.images:
    path = os.path.expanduser(evals.images)
    loaded = picture_files.load(
      path,
      every=evals.every,
      limit=evals.count,
      reading=Reading.of(job.config.data),
    )
    selected = [
      Picture(name, fit(image, size, patch))
      for name, image in loaded
      if _drawable(name, image)
    ]
    if not selected:
      raise InputError(
        f"evals.images={path} holds only pictures that are more than "
        f"{MAX_ASPECT} times as long as wide: cut them"
      )
    return selected, len(selected) > 1 and os.path.isfile(path)
  source = _source(job)
  chosen = inputs.spread(len(source), evals.count)
  selected = crops(source, chosen, size - size % patch)
  if not selected:
    raise InputError(f"none of the images of {source.name} can be read")
  return selected, False


def _drawable(name: str, image: Image.Image) -> bool:
  """Whether a whole picture fits a network; says so where it does not."""
  fits = max(image.size) <= MAX_ASPECT * min(image.size)
  if not fits:
    logging.warning(
      "left out: %s has %d x %d pixels, and is more than %d times as long as "
      "wide: cut it",
      name,
      *image.size,
      MAX_ASPECT,
    )
  return fits


def _source(job: Job) -> data.Source:
  """Validation images, with or without labels, or else training images."""
  return job.build("val") or job.build("train")


def object_source(job: Job) -> data.Source:
  """The data source, which must have object masks.

  Raises:
    InputError: it has no object masks.
  """
  source = _source(job)
  if not hasattr(source, "object_mask"):
    raise InputError(
      f"evaluation {job.config.evals.name} needs object masks, and "
      f"{source.name} has none: set --config.data.source=segmented and "
      "--config.data.path to a folder with images/ and masks/"
    )
  return source


def gallery_rows(count: int, limit: int = GALLERY_ROWS) -> np.ndarray:
  """Evenly spaced indices of the pictures in a gallery: [<= limit]."""
  rows = min(count, limit)
  return np.linspace(0, count - 1, rows).round().astype(int)


def notes(count: int, limit: int = GALLERY_ROWS) -> tuple[str, ...]:
  """A note if the gallery leaves out some of `count` pictures."""
  if not 0 < limit < count:
    return ()
  return (f"The gallery shows {limit} of {count} pictures.",)


def crops(source: data.Source, indices: np.ndarray, size: int) -> list[Picture]:
  """Evaluation crops of images and, where known, of their objects.

  Images that cannot be read are left out, and named in the log.
  """
  outputs = []
  for index in map(int, indices):
    try:
      image = source.load(index)
    except data.BrokenImage as error:
      name = source.describe(index)
      logging.warning("left out: %s cannot be read: %s", name, error)
      continue
    known = hasattr(source, "object_mask")
    outputs.append(
      Picture(
        os.path.basename(source.describe(index)),
        np.asarray(transforms.eval_crop(image, size)),
        object_crop(source, index, size) if known else None,
      )
    )
  return outputs


def object_crop(source: Any, index: int, size: int) -> np.ndarray:
  """The object mask of an image, cropped as the image is: [H, W] bool."""
  shape = Image.fromarray(source.object_mask(index).astype(np.uint8) * 255)
  return np.asarray(transforms.eval_crop(shape, size)) > 127


def fit(image: Image.Image, size: int, patch_size: int) -> np.ndarray:
  """Resizes a picture for the network, keeping its aspect ratio.

  The shorter side becomes `size` (bicubic); then a centre crop makes the sides
  multiples of the patch size.

  Returns:
    [H, W, 3] uint8.
  """
  scale = size / min(image.size)
  width, height = (max(size, round(side * scale)) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  w, h = (side // patch_size * patch_size for side in (width, height))
  left, top = (width - w) // 2, (height - h) // 2
  return np.asarray(image.crop((left, top, left + w, top + h)))


def params_on_one_device(job: Job) -> Params:
  """The weights on one device, for the few pictures of a gallery.

  All processes must call this; the first one then works alone.
  """
  return to_one_device(job.mesh, job.weights.params)


def to_one_device(mesh: jax.sharding.Mesh, params: Params) -> Params:
  """Parameters on this process's first device; all processes must call it."""
  whole = meshes.to_host(mesh, params)
  return jax.device_put(whole, jax.local_devices()[0])


@functools.partial(jax.jit, static_argnums=0)
def _compiled(
  fn: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  images: jax.Array,
) -> jax.Array:
  """Applies a function to a batch; compiled once per function and size."""
  return fn(params, images)


def forward(
  fn: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  images: Sequence[np.ndarray],
) -> list[np.ndarray]:
  """Applies a function to pictures of any size; compiled once per size.

  Args:
    fn: (params, [B, H, W, 3] uint8) -> [B, ...]. A bound method of the same
      object, such as `attention` of a run's method, is not compiled again.
    params: on one device.
    images: n times [H, W, 3] uint8.

  Returns:
    n rows of the output of `fn`, in the order of the images.
  """
  shapes: dict[tuple[int, ...], list[int]] = {}
  for index, image in enumerate(images):
    shapes.setdefault(image.shape, []).append(index)
  outputs: dict[int, np.ndarray] = {}
  for indices in shapes.values():
    rows = min(CHUNK, len(indices))
    for start in range(0, len(indices), rows):
      chunk = indices[start : start + rows]
      # The last chunk is padded, since another size would compile again.
      filled = [images[i] for i in (chunk + chunk[:1] * rows)[:rows]]
      out = np.asarray(_compiled(fn, params, np.stack(filled)))
      outputs |= dict(zip(chunk, out, strict=False))
  return [outputs[index] for index in range(len(images))]


def attention(
  job: Job, params: Params, images: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Attention of the last block to each patch: n times [A, N] float32."""
  return forward(job.weights.method.attention, params, images)


def percent(ratio: float) -> str:
  """A ratio as written in names: 0.3 -> "30", 0.125 -> "12.5"."""
  return f"{100 * ratio:g}"


def policy_masks(
  attention: np.ndarray,
  grid: tuple[int, int],
  *,
  ratio: float,
  show_max: float,
  policies: Sequence[str] = POLICIES,
  rows: np.ndarray | None = None,
  seed: int = 0,
  refill: bool = False,
) -> dict[str, np.ndarray]:
  """Masks of each policy: policy -> [n, N] bool.

  Args:
    attention: [n, N] float32, mean over heads.
    grid: (h, w) with h * w = N.
    ratio: share to hide, the same for all.
    show_max: share of most attended patches that hints come from.
    policies: of POLICIES.
    rows: [n] numbers of the images, which key the random draws; 0 to n-1 by
      default.
    seed: of the random draws.
    refill: see `Method.refills_hints`.
  """
  n, patches = attention.shape
  rows = np.arange(n) if rows is None else rows
  n_mask, n_show = masking.attention_counts(patches, ratio, ratio, show_max)
  keys = row_keys(jax.random.key(seed), jnp.asarray(rows, jnp.int32))
  scores = jnp.asarray(attention)

  def on_host(policy: str) -> np.ndarray:
    options = dict(grid=grid, views=1, ratios=(ratio,), variances=(0.0,))
    mask = lambda row: masking.host_masks(
      policy, seeds=(seed, 0, int(row)), **options
    )
    return np.concatenate([mask(row) for row in rows])

  def ordered(policy: str) -> np.ndarray:
    options = dict(grid=grid, n_hidden=n_mask, show_max=show_max)
    order = masking.visible_first(policy, keys=keys, scores=scores, **options)
    return masking.hidden_of(np.asarray(order), n_mask)

  def ranked(policy: str) -> np.ndarray:
    options = dict(n_show=n_show, n_eligible=int(patches * show_max))
    return np.asarray(
      masking.attention_mask(
        scores, policy=policy, n_mask=n_mask, keys=keys, **options
      )
    )

  by_attention = ordered if refill else ranked
  return {
    policy: on_host(policy)
    if policy in masking.HOST_POLICIES
    else by_attention(policy)
    for policy in policies
  }
