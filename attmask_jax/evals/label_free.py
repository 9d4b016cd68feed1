"""What features are like, measured without labels.

Each image is augmented twice, as in training. How many directions the features
use, how evenly they spread, and how near the two views of an image are, needs
no classes. See docs/training.md for how to read the numbers.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from attmask_jax import Params, schema
from attmask_jax.augment import TRANSFORMS
from attmask_jax.augment.transforms import Recipe
from attmask_jax.data.keys import BatchKeys
from attmask_jax.errors import InputError
from attmask_jax.evals import features, inputs
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.methods import base
from attmask_jax.runs.metrics import percent

VIEWS = 2
EPSILON = 1e-7  # of RankMe, for float32
ROWS = 1024  # images compared with all others at a time
VIEW_TAG = 5  # last word of a generator's key, see data/pipeline.py


@dataclasses.dataclass(frozen=True)
class SizeKeys:
  """How many images are looked at."""

  label_free_images: int = schema.key(
    512, "images for label_free/*; all if there are fewer", low=2
  )


@dataclasses.dataclass(frozen=True)
class Keys(SizeKeys, features.Keys):
  """Measures without labels."""


def run(job: Job) -> Result:
  """Rank, alignment, uniformity, retrieval and prototypes of two views.

  Of the validation images or, where there are none, the training images. Views
  are those of the run that trained the weights, and a pure function of
  data.seed and the image: the measure is the same at every step of a run.
  Reads evals.label_free_images, last_blocks, pool and final_norm.

  Raises:
    InputError: fewer than two images, or features that are not finite.
  """
  source = job.build("val") or job.build("train")
  chosen = inputs.spread(len(source), job.config.evals.label_free_images)
  method = job.weights.method
  embed = job.embedder()
  if method.assigns_prototypes:
    embed = functools.partial(
      _with_prototype, method, job.weights.params, embed
    )
  with job.batches(
    source, chosen, desc="two views", views=_views(job)
  ) as batches:
    found = features.extract(embed, _flat(batches), mesh=job.mesh)
  # By image and view: the order over several processes is that of the mesh.
  rows = found.features[np.argsort(found.index)]
  prototypes = None
  if method.assigns_prototypes:
    rows, prototypes = rows[:, :-1], rows[::VIEWS, -1].astype(np.int64)
  values = measures(rows[::VIEWS], rows[1::VIEWS], prototypes)
  counts = {"images": len(rows) // VIEWS, "feature width": rows.shape[1]}
  return Result(values, counts, _table(values))


def measures(
  first: np.ndarray, second: np.ndarray, prototypes: np.ndarray | None = None
) -> dict[str, float]:
  """All measures of n images.

  Args:
    first: [n, F] features of one view of each image, n >= 2.
    second: [n, F] of the other.
    prototypes: [n] int, the most probable one of each first view; None for a
      method without.

  Returns:
    "rankme" of the first views, "alignment", "uniformity" of the first views,
    "retrieval" in percent and, with prototypes, "prototypes_used" and
    "prototypes_effective".

  Raises:
    InputError: fewer than two images, or features that are not finite.
  """
  if len(first) < 2:
    raise InputError(
      f"measures without labels compare images, and there is {len(first)}: "
      "set evals.label_free=False or add images"
    )
  if not (np.isfinite(first).all() and np.isfinite(second).all()):
    raise InputError(
      "the features are not finite: the model has diverged or the weights are "
      "broken; use an earlier checkpoint"
    )
  one, other = _unit(first), _unit(second)
  values = {
    "rankme": rankme(first),
    "alignment": alignment(one, other),
    "uniformity": uniformity(one),
    "retrieval": retrieval(one, other),
  }
  if prototypes is not None:
    used, effective = in_use(prototypes)
    values |= {"prototypes_used": used, "prototypes_effective": effective}
  return values


def rankme(x: np.ndarray) -> float:
  """Effective rank of features: the exponential entropy of singular values.

  Args:
    x: [n, F], neither centred nor normalised.

  Returns:
    1 (all features are multiples of one) to min(n, F) (all directions count
    alike).

  Source: equation 1 of RankMe (arXiv:2210.02885).
  """
  values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
  p = values / max(values.sum(), np.finfo(np.float64).tiny) + EPSILON
  return float(np.exp(-np.sum(p * np.log(p))))


def alignment(one: np.ndarray, other: np.ndarray) -> float:
  """Mean squared distance of two views of an image: 0 (equal) to 4.

  Args:
    one: [n, F], unit length.
    other: [n, F], unit length.

  Source: L_align of arXiv:2005.10242 with alpha = 2.
  """
  return float(np.mean(np.sum((one - other) ** 2, axis=1)))


def uniformity(unit: np.ndarray) -> float:
  """Logarithm of the mean of exp(-2 d^2) over the distances d of all pairs.

  Args:
    unit: [n, F], unit length, n >= 2.

  Returns:
    -8 to 0; 0 = all are equal, about -4 = spread over the whole sphere.

  Source: L_uniform of arXiv:2005.10242 with t = 2.
  """
  n = len(unit)
  total = -float(n)  # no image is a pair with itself
  for start in range(0, n, ROWS):
    cosine = unit[start : start + ROWS] @ unit.T
    total += np.sum(np.exp(-4 * (1 - cosine)))  # d^2 = 2 - 2 cos
  return float(np.log(total / (n * (n - 1))))


def retrieval(one: np.ndarray, other: np.ndarray) -> float:
  """Share of images whose view finds its other view first, in percent.

  Args:
    one: [n, F], unit length.
    other: [n, F], unit length; of equally near ones the first counts.

  Returns:
    0 to 100; 100 / n for features that know nothing of the image.
  """
  hits = 0
  for start in range(0, len(one), ROWS):
    nearest = np.argmax(one[start : start + ROWS] @ other.T, axis=1)
    hits += int(np.sum(nearest == start + np.arange(len(nearest))))
  return 100 * hits / len(one)


def in_use(prototypes: np.ndarray) -> tuple[int, float]:
  """Prototypes in use: [n] int -> their number, and how many in effect.

  The second is the exponential entropy of their shares: as many prototypes in
  equal use would have it.
  """
  _, counts = np.unique(prototypes, return_counts=True)
  p = counts / len(prototypes)
  return len(counts), float(np.exp(-np.sum(p * np.log(p))))


def _unit(x: np.ndarray) -> np.ndarray:
  """[n, F] -> float64 rows of length 1, in float64 so that sums are exact."""
  x = x.astype(np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class _Views:
  """Two views of an image, from its own generator."""

  recipe: Recipe
  seed: int

  def __call__(self, image: Image.Image, index: int) -> np.ndarray:
    rng = np.random.default_rng([self.seed, 0, index, VIEW_TAG])
    return self.recipe.pair(image, rng)


def _views(job: Job) -> _Views:
  """The augmentation that trained the weights, with the job's image size.

  Weights that do not say how they were trained get the default recipe.
  """
  theirs: ml_collections.ConfigDict = job.weights.config.get("data", {})
  recipe = TRANSFORMS[theirs.get("transform", BatchKeys.transform)]
  settings = schema.take(recipe, theirs)
  settings["image_size"] = job.config.data.image_size
  return _Views(recipe(**settings), job.config.data.seed)


def _flat(
  batches: Iterable[features.HostBatch],
) -> Iterator[features.HostBatch]:
  """Views as rows of their own: [B, 2, H, W, 3] -> [2 B, H, W, 3]."""
  for batch in batches:
    views = np.arange(len(batch["index"]) * VIEWS, dtype=np.int32) % VIEWS
    rows = {name: np.repeat(batch[name], VIEWS) for name in ("label", "valid")}
    rows["index"] = np.repeat(batch["index"], VIEWS) * VIEWS + views
    images = batch["images"]
    yield rows | {"images": images.reshape(-1, *images.shape[2:])}


def _with_prototype(
  method: base.Method,
  params: Params,
  embed: features.FeaturesFn,
  images: jax.Array,
) -> jax.Array:
  """Features and the prototype of each image: [B, H, W, 3] -> [B, F + 1]."""
  return _append(method, params, images, embed(images))


@functools.partial(jax.jit, static_argnums=0)
def _append(
  method: base.Method, params: Params, images: jax.Array, x: jax.Array
) -> jax.Array:
  """Prototypes as a last column of [B, F]; float32 is exact below 2^24."""
  chosen = method.assignments(params, images).astype(jnp.float32)
  return jnp.concatenate([x, chosen[:, None]], axis=1)


def _table(values: dict[str, float]) -> Table:
  """The printed table."""
  rows = {
    "effective rank (RankMe)": f"{values['rankme']:.2f}",
    "alignment": f"{values['alignment']:.4f}",
    "uniformity": f"{values['uniformity']:.4f}",
    "retrieval of the other view, %": percent(values["retrieval"]),
  }
  if "prototypes_used" in values:
    rows["prototypes in use"] = f"{values['prototypes_used']}"
    rows["in effect"] = f"{values['prototypes_effective']:.2f}"
  return Table(("measure", "value"), tuple(rows.items()))


EVAL = Eval(run, keys=(Keys,))
