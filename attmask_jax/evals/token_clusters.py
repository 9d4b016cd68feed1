"""Patch tokens in clusters, as colours over the pictures."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.evals import drawing, pictures
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.evals.pictures import Picture

COLOURS = "tab20"  # of matplotlib; as many clusters at most
MOST = 20


@dataclasses.dataclass(frozen=True)
class Keys(pictures.Keys):
  """Patch tokens in clusters."""

  clusters: tuple[int, ...] = schema.key(
    (3, 6, 12), "numbers of clusters", low=2, high=MOST
  )
  seed: int = schema.key(0, "of k-means", low=0)


def run(job: Job) -> Result:
  """Draws figures/token_clusters.png: image, one column per cluster count.

  Tokens of the last block, after the final norm and of length 1, of all
  pictures together go through k-means; a colour is a cluster in all pictures.
  Reads evals.images, count, every, clusters and seed.

  Returns:
    explained/K: share of the tokens' variance that lies between K clusters.

  Raises:
    InputError: a number of clusters out of range.
  """
  evals = job.config.evals
  wrong = [k for k in evals.clusters if not 2 <= k <= MOST]
  if wrong or not evals.clusters:
    raise InputError(
      f"evals.clusters {tuple(evals.clusters)} must be numbers from 2 to {MOST}"
    )
  params = pictures.one_copy(job)
  if jax.process_index():
    return pictures.NOTHING
  selected, _ = pictures.given(job)
  method = job.weights.method
  tokens = pictures.forward(
    lambda weights, images: method.features(weights, images)[1],
    params,
    [picture.image for picture in selected],
  )
  ends = np.cumsum([len(t) for t in tokens])[:-1]
  found = {
    k: cluster(np.concatenate(tokens), k, seed=evals.seed)
    for k in evals.clusters
  }
  path = job.figure("token_clusters.png")
  some = pictures.some(len(selected))
  by_picture = {k: np.split(ids, ends) for k, (ids, _) in found.items()}
  _draw(
    path,
    [selected[i] for i in some],
    {k: [ids[i] for i in some] for k, ids in by_picture.items()},
    patch_size=method.backbone.patch_size,
  )
  values = {f"explained/{k}": share for k, (_, share) in found.items()}
  rows = [(str(k), f"{100 * s:.1f} %") for k, (_, s) in found.items()]
  return Result(
    values,
    {"pictures": len(selected), "tokens": int(sum(map(len, tokens)))},
    Table(("clusters", "variance between them"), tuple(rows)),
    (path,),
    pictures.notes(len(selected)),
  )


def cluster(
  tokens: np.ndarray, k: int, *, seed: int
) -> tuple[np.ndarray, float]:
  """k-means of tokens scaled to length 1.

  Args:
    tokens: [T, D].
    k: clusters.
    seed: of the start.

  Returns:
    Cluster of each token [T], numbered by falling size, and the share of the
    variance that lies between clusters, 0 to 1.

  Raises:
    InputError: fewer tokens than clusters.
  """
  from sklearn.cluster import KMeans  # slow import

  if len(tokens) < k:
    raise InputError(
      f"evals.clusters {k} is more than the {len(tokens)} tokens of all "
      "pictures: lower it, or give more pictures"
    )
  norms = np.linalg.norm(tokens, axis=1, keepdims=True)
  unit = np.asarray(tokens / np.maximum(norms, 1e-12), np.float64)
  fitted = KMeans(k, n_init=10, random_state=seed).fit(unit)
  total = np.square(unit - unit.mean(axis=0)).sum()
  sizes = np.bincount(fitted.labels_, minlength=k)
  rank = np.argsort(np.argsort(-sizes, kind="stable"))
  share = 1 - fitted.inertia_ / total if total > 0 else 0.0
  return rank[fitted.labels_], float(share)


def _draw(
  path: pathlib.Path,
  selected: Sequence[Picture],
  clusters: dict[int, list[np.ndarray]],
  *,
  patch_size: int,
) -> None:
  """The gallery; colours are common to all pictures of a column."""
  import matplotlib

  colours = matplotlib.colormaps[COLOURS].colors
  figure, axes = drawing.grid(
    [p.image.shape[0] / p.image.shape[1] for p in selected],
    1 + len(clusters),
    headings={0: ("Image", *(f"{k} clusters" for k in clusters))},
    labels=[p.name for p in selected],
    title="Clusters of patch tokens",
    caption="A colour is one cluster in all pictures of a column.",
  )
  palette = np.array([*colours[::2], *colours[1::2]])
  for row, picture in enumerate(selected):
    height, width, _ = picture.image.shape
    grid = height // patch_size, width // patch_size
    axes[row][0].imshow(picture.image)
    for axis, ids in zip(axes[row][1:], clusters.values(), strict=True):
      axis.imshow(palette[ids[row].reshape(grid)], interpolation="nearest")
  drawing.save(figure, path)


EVAL = Eval(run, keys=(Keys,))
