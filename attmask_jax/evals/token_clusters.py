"""Clusters of patch tokens, drawn as colours."""

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

COLOURS = "tab20"  # of matplotlib; limits the number of clusters
MAX_CLUSTERS = 20


@dataclasses.dataclass(frozen=True)
class Keys(pictures.Keys):
  """Clusters of patch tokens."""

  clusters: tuple[int, ...] = schema.key(
    (3, 6, 12), "numbers of clusters", low=2, high=MAX_CLUSTERS
  )
  seed: int = schema.key(0, "seed of k-means", low=0)


def run(job: Job) -> Result:
  """Draws figures/token_clusters.png: image, one column per cluster count.

  k-means runs on the tokens of the last block, after the final norm and scaled
  to length 1, of all pictures together: a colour is the same cluster in every
  picture. Reads evals.images, count, every, clusters and seed.

  Returns:
    explained/K: share of the tokens' variance that lies between K clusters.

  Raises:
    InputError: a number of clusters is out of range.
  """
  evals = job.config.evals
  invalid = [k for k in evals.clusters if not 2 <= k <= MAX_CLUSTERS]
  if invalid or not evals.clusters:
    raise InputError(
      f"evals.clusters {tuple(evals.clusters)} must be numbers from 2 to "
      f"{MAX_CLUSTERS}"
    )
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
  ends = np.cumsum([len(t) for t in tokens])[:-1]
  clusterings = {
    k: cluster(np.concatenate(tokens), k, seed=evals.seed)
    for k in evals.clusters
  }
  path = job.figure("token_clusters.png")
  gallery = pictures.gallery_rows(len(selected))
  by_picture = {k: np.split(ids, ends) for k, (ids, _) in clusterings.items()}
  _draw(
    path,
    [selected[i] for i in gallery],
    {k: [ids[i] for i in gallery] for k, ids in by_picture.items()},
    patch_size=method.backbone.patch_size,
  )
  values = {f"explained/{k}": share for k, (_, share) in clusterings.items()}
  rows = [(str(k), f"{100 * s:.1f} %") for k, (_, s) in clusterings.items()]
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
    k: number of clusters.
    seed: of the initial centres.

  Returns:
    Cluster of each token [T], numbered by decreasing size, and the share of the
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
  """Draws the gallery; colours are common to all pictures of a column."""
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
