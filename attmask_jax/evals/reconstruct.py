"""Pictures of the reconstructions of a masked autoencoder.

Source: the visualisation tool of MAE-priv, as its authors intended it. differs:
the evaluation crop instead of a random one; the second picture does hide the
hidden patches; normalised targets are scaled back with the statistics that they
were normalised with.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax import Batch, Params, schema
from attmask_jax.errors import InputError
from attmask_jax.evals import drawing, pictures
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.methods import masking
from attmask_jax.methods.mae import Mae

TARGETS = {"normalised": True, "raw": False}
HEADINGS = (
  "Image",
  "Visible",
  "Reconstruction",
  "Reconstruction\nwith visible",
)


@dataclasses.dataclass(frozen=True)
class Keys(pictures.Keys):
  """Reconstructions of a masked autoencoder."""

  mask: str = schema.key(
    "",
    'mask policy; "" = as in the run',
    choices=("", *masking.VISIBLE_POLICIES),
  )
  ratio: float = schema.key(
    0.0, "share of hidden patches; 0 = as in the run", low=0, high=1
  )
  seed: int = schema.key(0, "seed of the masks", low=0)
  target: str = schema.key(
    "",
    'pixels that the decoder predicts; "" = as in the run. Weight files do not '
    'say: normalised is assumed ("visualize" models are raw)',
    choices=("", *TARGETS),
  )


class Reconstruction(NamedTuple):
  """Output of the decoder for n pictures.

  Attributes:
    hidden: [n, h, w] bool.
    pixels: [n, H, W, 3] uint8, predicted at visible patches, too.
    error: [n] mean squared error over the hidden patches, pixels in 0-1.
  """

  hidden: np.ndarray
  pixels: np.ndarray
  error: np.ndarray


def run(job: Job) -> Result:
  """Draws figures/reconstruct.png, with the columns in HEADINGS.

  Reads evals.images, count, every, mask, ratio, seed and target.

  Returns:
    mse, psnr: of the hidden patches, pixels in 0-1; psnr in decibels.

  Raises:
    InputError: the weights have no decoder, or a policy, ratio or target is
      wrong.
  """
  source, evals = job.weights, job.config.evals
  if not source.method.reconstructs:
    raise InputError(
      f"weights of method {source.config.method.name} have no decoder, which "
      "evaluation reconstruct needs: give those of an MAE pretraining run"
    )
  if "decoder" not in source.params:
    raise InputError(
      f"the {source.network} of {source.where} has no decoder: set "
      "--config.network=student"
    )
  params, guide = pictures.params_on_one_device(job), None
  if job.guide:
    # Other weights have no moving average of the encoder: they guide
    # themselves.
    guide = pictures.to_one_device(job.mesh, job.guide)
  if jax.process_index():
    return pictures.EMPTY
  selected, _ = pictures.load(job)
  p = source.method.backbone.patch_size
  side = min(min(picture.image.shape[:2]) for picture in selected) // p * p
  images = np.stack([_square(picture.image, side) for picture in selected])
  method = dataclasses.replace(
    source.method,
    backbone=source.method.backbone.clone(image_size=side),
    mask=evals.mask or source.method.mask,
    mask_ratio=evals.ratio or source.method.mask_ratio,
    norm_target=TARGETS.get(evals.target, source.method.norm_target),
  )
  guide = params if guide is None else guide
  output = reconstruct(method, params, guide, images, seed=evals.seed)
  path = job.figure("reconstruct.png")
  gallery = pictures.gallery_rows(len(selected))
  draw(
    path,
    images[gallery],
    Reconstruction(*(x[gallery] for x in output)),
    labels=[selected[i].name for i in gallery],
    title=f"{method.n_hidden} of {method.num_patches} patches hidden, "
    f"{job.weights.network} network",
    note=note_of(method),
  )
  result = _result([p.name for p in selected], output, path)
  notes = (note_of(method),) if note_of(method) else ()
  return result._replace(notes=result.notes + notes)


def note_of(method: Mae) -> str:
  """A caveat on the colours of a reconstruction; "" = none."""
  if not method.norm_target:
    return ""
  return (
    "Each patch is drawn with the mean and contrast of the true patch, which "
    "the decoder does not predict: even an untrained one gets these right."
  )


def reconstruct(
  method: Mae, params: Params, guide: Params, images: np.ndarray, *, seed: int
) -> Reconstruction:
  """Masks and reconstructs pictures of the size that the method is built for.

  Args:
    method: as in training, for images of this size.
    params: encoder and decoder, on one device.
    guide: weights whose attention selects the patches, if the policy needs it.
    images: [n, H, W, 3] uint8.
    seed: of the masks.
  """
  n = len(images)
  batch = {"position": jnp.arange(n)}
  extras = [method.item_extras(seed, row) for row in range(n)]
  if extras[0]:
    batch["masks"] = jnp.stack([jnp.asarray(e["masks"]) for e in extras])

  parts = []
  rows = min(n, pictures.CHUNK)
  for start in range(0, n, rows):
    # The last chunk is padded, since another size would compile again.
    chosen = np.minimum(np.arange(start, start + rows), n - 1)
    chunk = jax.tree.map(lambda x, chosen=chosen: x[chosen], batch)
    rng = jax.random.key(seed)
    outputs = _reconstruct(method, params, guide, images[chosen], chunk, rng)
    parts.append([np.asarray(x)[: n - start] for x in outputs])
  order, pixels = (np.concatenate(x) for x in zip(*parts, strict=True))
  hidden = masking.hidden_of(order, method.n_hidden)
  grid = method.backbone.grid
  hidden = hidden.reshape(n, grid, grid)
  where = _pixels(hidden, method.backbone.patch_size)[..., None]
  squared = np.square(pixels - images / 255) * where
  error = squared.sum(axis=(1, 2, 3)) / (3 * where.sum(axis=(1, 2, 3)))
  return Reconstruction(hidden, np.round(255 * pixels).astype(np.uint8), error)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(
  method: Mae,
  params: Params,
  guide: Params,
  images: jax.Array,
  batch: Batch,
  rng: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Order of patches [B, N] and reconstructions [B, H, W, 3], 0-1."""
  order = method.order(guide, images, batch, rng)
  return order, method.reconstruct(params, images, order)


def draw(
  path: pathlib.Path,
  images: np.ndarray,
  output: Reconstruction,
  *,
  labels: Sequence[str] = (),
  title: str = "",
  note: str = "",
) -> None:
  """Writes the gallery: a row per picture, columns as in HEADINGS."""
  p = images.shape[1] // output.hidden.shape[1]
  where = _pixels(output.hidden, p)[..., None]
  combined = np.where(where, output.pixels, images)
  figure, axes = drawing.grid(
    [1.0] * len(images),
    len(HEADINGS),
    headings={0: HEADINGS},
    labels=labels,
    title=title,
    caption="The decoder is trained on hidden patches only: its output at "
    f"visible ones, in the third picture, means little. {note}".rstrip(),
  )
  for row, image in enumerate(images):
    visible = drawing.grey_out(image, output.hidden[row], p)
    cells = image, visible, output.pixels[row], combined[row]
    for axis, cell in zip(axes[row], cells, strict=True):
      axis.imshow(cell, interpolation="nearest")
  drawing.save(figure, path)


def _square(image: np.ndarray, side: int) -> np.ndarray:
  """Centre crop of a picture: [H, W, 3] -> [side, side, 3]."""
  top, left = ((length - side) // 2 for length in image.shape[:2])
  return image[top : top + side, left : left + side]


def _pixels(mask: np.ndarray, p: int) -> np.ndarray:
  """[n, h, w] -> [n, h * p, w * p]."""
  return mask.repeat(p, axis=1).repeat(p, axis=2)


def _result(
  names: Sequence[str], output: Reconstruction, path: pathlib.Path
) -> Result:
  psnr = -10 * np.log10(np.maximum(output.error, 1e-12))
  rows = [
    (name, f"{e:.4f}", f"{d:.2f}")
    for name, e, d in zip(names, output.error, psnr, strict=True)
  ][: pictures.TABLE_ROWS]
  mse, decibels = float(output.error.mean()), float(psnr.mean())
  rows.append(("mean", f"{mse:.4f}", f"{decibels:.2f}"))
  return Result(
    {"mse": mse, "psnr": decibels},
    {
      "pictures": len(names),
      "hidden patches": int(output.hidden[0].sum()),
      "patches": int(output.hidden[0].size),
    },
    Table(("picture", "mse of hidden", "psnr, dB"), tuple(rows)),
    (path,),
    pictures.notes(len(names)),
  )


EVAL = Eval(run, keys=(Keys,))
