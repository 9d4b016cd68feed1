"""What a run evaluates on its own teacher: k-NN, and where its masks fall."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from PIL import Image

from attmask_jax import Params, augment, data, masking, vit
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import features, knn, visualize


def enabled(
  config: ml_collections.ConfigDict, val_source: data.Source | None
) -> bool:
  """Whether online k-NN runs: asked for, and the images have labels."""
  return bool(
    config.evals.knn and val_source is not None and val_source.class_names
  )


def check(
  config: ml_collections.ConfigDict,
  train_source: data.Source,
  val_source: data.Source | None,
) -> None:
  """Refuses evaluations that would fail after the first epoch.

  Raises:
    InputError: k beyond the bank, other classes in the validation set, or a
      period that is not positive.
  """
  evals = config.evals
  if evals.eval_epochs < 1:
    raise InputError(
      f"evals.eval_epochs {evals.eval_epochs} must be at least 1"
    )
  if evals.avgpool not in (0, 1, 2):
    raise InputError(f"evals.avgpool {evals.avgpool} is unknown: use 0, 1 or 2")
  depth = vit.variant_size(config.method.variant)["depth"]
  if not 1 <= evals.last_blocks <= depth:
    raise InputError(
      f"evals.last_blocks {evals.last_blocks} must lie between 1 and the "
      f"{depth} blocks of method.variant {config.method.variant}"
    )
  if not enabled(config, val_source):
    return
  if len(train_source.class_names) < 2:
    raise InputError(
      f"{train_source.name} has one class, so there is nothing to vote on: "
      "set evals.knn=False"
    )
  bank = len(_spread(len(train_source), evals.knn_bank))
  if (
    not evals.knn_ks or not 1 <= min(evals.knn_ks) <= max(evals.knn_ks) <= bank
  ):
    raise InputError(
      f"evals.knn_ks {tuple(evals.knn_ks)} must lie between 1 and the k-NN "
      f"bank's {bank} images: lower k or enlarge the bank"
    )
  one_sided = set(val_source.class_names) ^ set(train_source.class_names)
  if one_sided:
    raise InputError(
      f'class "{min(one_sided)}" and {len(one_sided) - 1} more are in only one '
      "of training and validation set: give both the same class folders"
    )


class Evaluator:
  """Evaluates teachers of one run; compiles once."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    method: Any,
    train_source: data.Source,
    val_source: data.Source | None,
    mesh: jax.sharding.Mesh,
  ) -> None:
    self._config, self._method, self._mesh = config, method, mesh
    self._train, self._val = train_source, val_source
    self._embed = jax.jit(functools.partial(embed, method, config.evals))
    if config.evals.knn and val_source and not val_source.class_names:
      logging.warning(
        "online k-NN is off: %s has no labels", config.data.source
      )

  def knn(self, weights: Params) -> dict[str, float]:
    """Weighted k-NN of validation on training images, in percent.

    Returns:
      "knn/k10/top1" and "knn/k10/top5" for every k of `evals.knn_ks`, and
      "knn/top1", "knn/top5" for the first; {} where k-NN is off.
    """
    config = self._config
    if not enabled(config, self._val):
      return {}
    bank = self._features(weights, self._train, config.evals.knn_bank)
    queries = self._features(weights, self._val, config.evals.knn_queries)
    # quirk: the reference takes the class temperature of the teacher here.
    temp = config.evals.knn_temp or self._method.teacher_temp[1]
    scores = knn.knn(
      bank.features,
      bank.labels,
      queries.features,
      queries.labels,
      ks=config.evals.knn_ks,
      temp=temp,
      num_classes=len(self._train.class_names),
      mesh=self._mesh,
    )
    first = f"k{config.evals.knn_ks[0]}/"
    scores |= {k: scores[first + k] for k in ("top1", "top5")}
    return {f"knn/{k}": float(v) for k, v in scores.items()}

  def masks(
    self, weights: Params, path: pathlib.Path | None = None
  ) -> dict[str, float]:
    """Measures where the masks fall, and draws the mask gallery.

    Args:
      weights: a teacher.
      path: the PNG to write; None draws nothing.

    Returns:
      "overlap/POLICY": share of the hidden area that lies on the object, and
      "overlap/object": share of the image the object covers; {} for images
      without object masks.
    """
    evals = self._config.evals
    source = self._val or self._train
    count = evals.mask_images if path else 0
    if hasattr(source, "object_mask"):
      count = max(count, evals.overlap_images)
    if not count:
      return {}
    weights = meshes.to_host(self._mesh, weights)  # every process takes part
    if jax.process_index():
      return {}
    indices = _spread(len(source), count)
    images, objects = _load(source, indices, self._config.data.image_size)
    attention = np.asarray(self._attention(weights, images))
    grid = (self._method.backbone.grid,) * 2
    hidden = policy_masks(
      attention,
      grid,
      ratio=max(self._method.mask_ratio),
      show_max=self._method.show_max,
    )
    if path and evals.mask_images:
      self._draw(path, images, attention, hidden, objects)
    if objects is None:
      return {}
    overlap = {
      f"overlap/{name}": visualize.mask_overlap(mask, objects, grid=grid)[
        "precision"
      ]
      for name, mask in hidden.items()
    }
    return overlap | {"overlap/object": float(objects.mean())}

  def _draw(
    self,
    path: pathlib.Path,
    images: np.ndarray,
    attention: np.ndarray,
    hidden: dict[str, np.ndarray],
    objects: np.ndarray | None,
  ) -> None:
    """Writes the gallery of the first `evals.mask_images` images."""
    n = self._config.evals.mask_images
    visualize.mask_gallery(
      path,
      images[:n],
      attention[:n],
      {name: mask[:n] for name, mask in hidden.items()},
      patch_size=self._method.backbone.patch_size,
      object_masks=None if objects is None else objects[:n],
      title="Class-token attention of the teacher, and what each policy hides",
    )

  def _attention(self, weights: Params, images: np.ndarray) -> jax.Array:
    """[n, H, W, 3] -> [n, N], mean over heads. On one device."""
    attend = jax.jit(self._method.attention)
    return jnp.mean(attend(weights, jnp.asarray(images)), axis=1)

  def _features(
    self, weights: Params, source: data.Source, limit: int
  ) -> features.Features:
    """Features of at most `limit` images, spread over the source."""
    config = self._config
    processes, me = jax.process_count(), jax.process_index()
    chosen = _spread(len(source), limit)
    # Equal numbers of batches on every process; -1 is a padding row.
    chosen = np.pad(chosen, (0, -len(chosen) % processes), constant_values=-1)
    devices = jax.local_device_count()
    rows = -(-config.evals.batch_size // (devices * processes)) * devices
    batches = data.eval_batches(
      source,
      image_size=config.data.image_size,
      batch_size=rows,
      indices=np.split(chosen, processes)[me],
      threads=config.run.threads,
      max_broken=config.data.max_broken,
    )
    embed_images = functools.partial(self._embed, weights)
    return features.extract(embed_images, batches, mesh=self._mesh)


def embed(
  method: Any,
  evals: ml_collections.ConfigDict,
  weights: Params,
  images: jax.Array,
) -> jax.Array:
  """Frozen feature of an image: [B, H, W, 3] uint8 -> [B, F] float32.

  `evals.avgpool` 0: class tokens of the last `evals.last_blocks` blocks, each
  after the final norm; 1: mean patch of the last block, before the norm; 2:
  the former followed by the mean patch after the norm.
  """
  if evals.avgpool == 1:
    _, patches = method.features(weights, images, norm=False)
    return jnp.mean(patches, axis=1)
  cls, patches = method.features(weights, images, last=evals.last_blocks)
  if evals.avgpool == 0:
    return cls
  return jnp.concatenate([cls, jnp.mean(patches, axis=1)], axis=-1)


def policy_masks(
  attention: np.ndarray,
  grid: tuple[int, int],
  *,
  ratio: float,
  show_max: float,
) -> dict[str, np.ndarray]:
  """What each policy would hide, for pictures: policy -> [n, N] bool.

  Args:
    attention: [n, N] float32.
    grid: (h, w) with h * w = N.
    ratio: share to hide, the same for all.
    show_max: share of most attended patches that hints come from.
  """
  n, patches = attention.shape
  n_mask, n_show = masking.attention_counts(patches, ratio, ratio, show_max)
  keys = masking.row_keys(jax.random.key(0), jnp.arange(n))
  masks = {
    policy: np.asarray(
      masking.attention_mask(
        jnp.asarray(attention),
        policy=policy,
        n_mask=n_mask,
        keys=keys,
        n_show=n_show,
        n_eligible=int(patches * show_max),
      )
    )
    for policy in masking.ATTENTION_POLICIES
  }
  rng = np.random.RandomState(0)
  random_masks = [masking.random_mask(rng, grid, ratio) for _ in range(n)]
  return masks | {"random": np.stack(random_masks).reshape(n, patches)}


def _spread(size: int, limit: int) -> np.ndarray:
  """A fixed random choice of indices, all of them for limit 0: [n] int64.

  Random, since any regular stride may meet a data set's own period.
  """
  if not limit or limit >= size:
    return np.arange(size)
  return np.random.default_rng([0, size, 4]).permutation(size)[:limit]


def _load(
  source: data.Source, indices: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray | None]:
  """Evaluation crops [n, H, W, 3] uint8 and, if known, objects [n, H, W]."""
  images, objects = [], []
  for index in map(int, indices):
    try:
      picture = source.load(index)
    except data.BrokenImage:
      continue
    images.append(np.asarray(augment.eval_crop(picture, size)))
    if hasattr(source, "object_mask"):
      shape = Image.fromarray(source.object_mask(index).astype(np.uint8) * 255)
      objects.append(np.asarray(augment.eval_crop(shape, size)) > 127)
  return np.stack(images), np.stack(objects) if objects else None
