"""Accuracy of classifiers: top-1, top-5 and loss over a validation set.

Source: validate_network of AttMask eval_linear.py.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from attmask_jax import Batch, Params, data
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import inputs
from attmask_jax.evals.features import HostBatch
from attmask_jax.evals.job import Job, State
from attmask_jax.methods import base
from attmask_jax.methods.classify import Classify
from attmask_jax.weights.classifier import Classifier, crop_of

LogitsFn = Callable[[Params, dict[str, jax.Array]], jax.Array]
Counter = Callable[[Params, Batch], dict[str, jax.Array]]
TOP5_CLASSES = 5  # least number of classes for top-5


def counter(logits_fn: LogitsFn, mesh: jax.sharding.Mesh) -> Counter:
  """Compiled (weights, batch) -> sums over the batch, for `scores`.

  Args:
    logits_fn: (weights, batch) -> [B, J, C]; the batch has "images"
      [B, H, W, 3] uint8 and "index" [B].
    mesh: each batch is split over all of its devices.
  """
  return jax.jit(
    functools.partial(_count, logits_fn),
    out_shardings=meshes.replicated(mesh),
  )


def scores(
  count: Counter,
  weights: Params,
  batches: Iterable[HostBatch],
  *,
  mesh: jax.sharding.Mesh,
) -> dict[str, np.ndarray]:
  """Scores of J classifiers that share their images.

  Args:
    count: returned by `counter`.
    weights: first argument of `count`.
    batches: padded batches, see `features.extract`.
    mesh: the one that `count` was built for.

  Returns:
    top1, top5 in percent and loss, [J] each (top5 only for 5 classes or
    more), and images, the number of valid rows [].

  Raises:
    InputError: there is no valid row.
  """
  total: dict[str, np.ndarray] = {}
  for batch in batches:
    rows = {name: batch[name] for name in ("images", "label", "index", "valid")}
    sums = jax.device_get(count(weights, meshes.shard(mesh, rows)))
    total = {k: np.float64(v) + total.get(k, 0.0) for k, v in sums.items()}
  images = total.pop("images", 0)
  if not images:
    raise InputError(
      "the validation set holds no images: check data.path and data.source"
    )
  percent = {"top1": 100, "top5": 100, "loss": 1}
  means = {k: percent[k] * v / images for k, v in total.items()}
  return means | {"images": images}


def measure(job: Job) -> dict[str, np.ndarray]:
  """Scores of all linear layers of the job's classifier, see `scores`."""
  classifier = job.classifier
  count = _layers(classifier.method, job.mesh)
  options = dict(desc="validation", crop=classifier.crop)
  with job.batches(job.source("val"), **options) as batches:
    return scores(count, classifier.params, batches, mesh=job.mesh)


@functools.lru_cache(maxsize=8)
def _layers(method: Classify, mesh: jax.sharding.Mesh) -> Counter:
  """`counter` of all linear layers; compiled once for equal methods."""
  return counter(
    lambda weights, batch: method.all_logits(weights, batch["images"]), mesh
  )


def _count(
  logits_fn: LogitsFn, weights: Params, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Sums over the valid rows of a batch: [J] each, images []."""
  logits = logits_fn(weights, batch).astype(jnp.float32)  # [B, J, C]
  label, valid = batch["label"], batch["valid"][:, None]
  classes = logits.shape[-1]
  true_logit = jnp.take_along_axis(
    logits, jnp.maximum(label, 0)[:, None, None], axis=-1
  )
  # Equal logits are ranked by class, as in argmax.
  lower = jnp.arange(classes)[None] < label[:, None]
  tied = (logits == true_logit) & lower[:, None]
  rank = jnp.sum((logits > true_logit) | tied, axis=-1)  # [B, J]
  # Comparisons with NaN are false, which would give the best rank.
  rank = jnp.where(jnp.isnan(logits).any(axis=-1), classes, rank)
  targets = jax.nn.one_hot(label, classes)[:, None]
  sums = {
    "top1": jnp.sum((rank < 1) & valid, axis=0),
    "loss": jnp.sum(
      jnp.where(
        valid, optax.losses.softmax_cross_entropy(logits, targets), 0.0
      ),
      axis=0,
    ),
    "images": jnp.sum(valid),
  }
  if classes >= TOP5_CLASSES:
    sums["top5"] = jnp.sum((rank < 5) & valid, axis=0)
  return sums


def check(
  config: ml_collections.ConfigDict,
  method: base.Method,
  train_source: data.Source,
  val_source: data.Source | None,
) -> None:
  """Refuses data that a classifier cannot be measured on.

  Raises:
    InputError: there are no labels, the classes of training and validation
      set differ, or one has no validation images.
  """
  if val_source is None or not len(val_source.class_names):
    raise InputError(
      f"data.source={config.data.source} has no labels to train a classifier "
      "on: set --config.data.source=folder and --config.data.path"
    )
  del method  # any network can be measured
  inputs.same_classes(train_source, val_source)
  inputs.every_class(val_source)


class Evaluator:
  """Measures the classifier of a run during training, see `measure`.

  Attributes:
    best: metric whose maximum marks the best checkpoint.
    best_label: its name in the log.
  """

  best, best_label = "val/top1", "accuracy"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    method: Classify,
    train_source: data.Source,
    val_source: data.Source,
    mesh: jax.sharding.Mesh,
  ) -> None:
    self._method = method
    sources = {"train": train_source, "val": val_source}
    self._job = Job(config, mesh, pathlib.Path(), sources=sources)

  def before(self, state: State) -> dict[str, float]:
    """No scores: the linear layer is not trained yet."""
    return {}

  def figures(self, state: State, folder: pathlib.Path) -> dict[str, float]:
    """Draws nothing."""
    return {}

  def scores(self, state: State) -> dict[str, float]:
    """Accuracy of every linear layer, and of the moving average.

    Returns:
      "val/top1", "val/top5", "val/loss" of the best layer; "val/J/top1", ...
      of layer J where there are several; "ema/top1", ... of the average.
    """
    values = _named("val", self._measure(state.params, state.aux))
    if state.teacher:
      values |= _named("ema", self._measure(state.teacher, state.aux))
    return values

  def _measure(self, params: Params, aux: Params) -> dict[str, np.ndarray]:
    source = self._job.source("val")
    classifier = Classifier(
      self._method,
      self._method.assemble(params, aux),
      tuple(source.class_names),
      digest="",
      where="this run",
      crop=crop_of(self._job.config.data),
    )
    return measure(dataclasses.replace(self._job, classifier=classifier))


def _named(prefix: str, parts: dict[str, np.ndarray]) -> dict[str, float]:
  """Scores for the log; the bare prefix is for those of the best layer."""
  layers, best = len(parts["top1"]), int(np.argmax(parts["top1"]))
  values = {k: v for k, v in parts.items() if k != "images"}
  named = {f"{prefix}/{k}": float(v[best]) for k, v in values.items()}
  for j in range(layers if layers > 1 else 0):
    named |= {f"{prefix}/{j}/{k}": float(v[j]) for k, v in values.items()}
  return named
