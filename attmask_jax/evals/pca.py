"""PCA of patch tokens: three components as red, green and blue.

Source: the idea of DINOv2 (arXiv:2304.07193, figure 1), without its removal
of the background.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from attmask_jax.errors import InputError
from attmask_jax.evals import drawing, pictures
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.evals.pictures import Picture

COMPONENTS = 3
RANGE = (1, 99)  # percentiles mapped to black and to full colour


@dataclasses.dataclass(frozen=True)
class Keys(pictures.Keys):
  """PCA of patch tokens."""


def run(job: Job) -> Result:
  """Draws figures/pca.png: image, three components, first component.

  Reads evals.images, count and every. Tokens are those of the last block after
  the final norm; the components are common to all pictures.

  Returns:
    component_1, component_2, component_3: shares of the tokens' variance.
  """
  params = pictures.params_on_one_device(job)
  if jax.process_index():
    return pictures.EMPTY
  selected, _ = pictures.load(job)
  method = job.weights.method
  tokens = pictures.forward(
    lambda weights, images: method.features(weights, images)[1],
    params,
    [picture.image for picture in selected],
  )
  scores, shares = components(np.concatenate(tokens))
  colours = stretch(scores)
  ends = np.cumsum([len(t) for t in tokens])[:-1]
  per_picture = np.split(colours, ends)
  path = job.figure("pca.png")
  gallery = pictures.gallery_rows(len(selected))
  _draw(
    path,
    [selected[i] for i in gallery],
    [per_picture[i] for i in gallery],
    patch_size=method.backbone.patch_size,
    shares=shares,
  )
  named = {f"component_{i}": float(s) for i, s in enumerate(shares, start=1)}
  rows = [(name[-1], f"{100 * share:.1f} %") for name, share in named.items()]
  rows.append(("sum", f"{100 * shares.sum():.1f} %"))
  return Result(
    named,
    {"pictures": len(selected), "tokens": len(scores)},
    Table(("component", "share of the variance"), tuple(rows)),
    (path,),
    pictures.notes(len(selected)),
  )


def components(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Projections onto the first three principal components.

  The sign of a component makes its largest loading positive, so that the same
  tokens always have the same colours.

  Args:
    tokens: [T, D] with T and D of at least 3.

  Returns:
    [T, 3] float64, and the shares [3] of the variance that they explain.

  Raises:
    InputError: fewer tokens than components.
  """
  tokens = np.asarray(tokens, np.float64)
  if min(tokens.shape) < COMPONENTS:
    raise InputError(
      f"{tokens.shape[0]} patch tokens of width {tokens.shape[1]} do not have "
      f"{COMPONENTS} components: give more or larger pictures"
    )
  centred = tokens - tokens.mean(axis=0)
  _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
  directions = directions[:COMPONENTS]
  largest = np.abs(directions).argmax(axis=1)
  signs = np.sign(directions[np.arange(COMPONENTS), largest])
  variance = sizes**2
  shares = variance[:COMPONENTS] / max(variance.sum(), 1e-30)
  return centred @ (signs[:, None] * directions).T, shares


def stretch(scores: np.ndarray) -> np.ndarray:
  """Scales components from their 1st to 99th percentile: [T, 3] in 0..1.

  A component without any spread becomes 0.5.
  """
  low, high = np.percentile(scores, RANGE, axis=0)
  spread = high - low
  flat = spread <= 1e-9 * np.abs(scores).max()
  colours = (scores - low) / np.where(flat, 1.0, spread)
  return np.where(flat, 0.5, np.clip(colours, 0, 1))


def _draw(
  path: pathlib.Path,
  selected: Sequence[Picture],
  colours: Sequence[np.ndarray],
  *,
  patch_size: int,
  shares: np.ndarray,
) -> None:
  """Draws the gallery.

  Args:
    path: the PNG.
    selected: n pictures.
    colours: n times [N, 3] in 0..1.
    patch_size: P.
    shares: [3], explained shares of the variance.
  """
  percent = ", ".join(f"{100 * share:.0f} %" for share in shares)
  figure, axes = drawing.grid(
    [p.image.shape[0] / p.image.shape[1] for p in selected],
    3,
    headings={0: ["Image", "Components\n1, 2, 3", "Component 1"]},
    labels=[picture.name for picture in selected],
    title="Principal components of the patch tokens",
    caption="Components 1, 2, 3 as red, green, blue, common to all pictures; "
    f"they explain {percent} of the variance.",
  )
  for row, picture, values in zip(axes, selected, colours, strict=True):
    height, width, _ = picture.image.shape
    shape = height // patch_size, width // patch_size
    row[0].imshow(picture.image)
    row[1].imshow(values.reshape(*shape, 3), interpolation="nearest")
    first = values[:, 0].reshape(shape)
    row[2].imshow(
      first, cmap="viridis", vmin=0, vmax=1, interpolation="nearest"
    )
  drawing.save(figure, path)


EVAL = Eval(run, keys=(Keys,))
