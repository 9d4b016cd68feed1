"""Evaluations during pretraining: k-NN, measures without labels, pictures."""

import pathlib
from typing import Any

import jax
import ml_collections
from absl import logging

from attmask_jax import data
from attmask_jax.errors import InputError
from attmask_jax.evals import (
  features,
  inputs,
  knn,
  label_free,
  masks,
  nearest,
  pictures,
  reconstruct,
)
from attmask_jax.evals.job import Job, Result, State
from attmask_jax.methods import base, masking
from attmask_jax.weights.loading import Weights

POLICIES = (*masking.ATTENTION_POLICIES, "random")  # columns of masks.png
# Settings of `reconstruct`, as in training.
_PICTURES = dict(images="", every=1, mask="", ratio=0.0, seed=0, target="")


def enabled(
  config: ml_collections.ConfigDict, val_source: data.Source | None
) -> bool:
  """Whether online k-NN runs: it is requested and the images have labels."""
  return bool(
    config.evals.knn and val_source is not None and val_source.class_names
  )


def check(
  config: ml_collections.ConfigDict,
  method: base.Method,
  train_source: data.Source,
  val_source: data.Source | None,
) -> None:
  """Refuses evaluations that would fail after the first epoch.

  Raises:
    InputError: k exceeds the bank, or the validation set has other classes.
  """
  evals = config.evals
  network = method.backbone
  features.check(evals, depth=network.depth, class_token=network.class_token)
  if not enabled(config, val_source):
    return
  if len(train_source.class_names) < 2:
    raise InputError(
      f"{train_source.name} has one class, so there is nothing to vote on: "
      "set evals.knn=False"
    )
  bank = len(inputs.spread(len(train_source), evals.knn_bank))
  if (
    not evals.knn_ks or not 1 <= min(evals.knn_ks) <= max(evals.knn_ks) <= bank
  ):
    raise InputError(
      f"evals.knn_ks {tuple(evals.knn_ks)} must lie between 1 and the k-NN "
      f"bank's {bank} images: lower k or enlarge the bank"
    )
  inputs.same_classes(train_source, val_source)


class Evaluator:
  """Evaluates the teacher of a pretraining run during training.

  Each evaluation is that of --mode=eval, given a job for the current state of
  the run; it is compiled once.

  Attributes:
    best: metric whose maximum marks the best checkpoint, "" = none.
    best_label: its name in the log.
  """

  best_label = "k-NN top-1"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    method: base.Method,
    train_source: data.Source,
    val_source: data.Source | None,
    mesh: jax.sharding.Mesh,
  ) -> None:
    self._config, self._method, self._mesh = config, method, mesh
    self._sources = {"train": train_source, "val": val_source}
    self.best = "knn/top1" if enabled(config, val_source) else ""
    # Two images are the least to compare.
    self._label_free = (
      config.evals.label_free and len(val_source or train_source) > 1
    )
    if config.evals.knn and val_source and not val_source.class_names:
      logging.warning(
        "online k-NN is off: %s has no labels", config.data.source
      )

  def before(self, state: State) -> dict[str, float]:
    """Scores of the untrained network, see `scores`, and what they are worth.

    Returns:
      `scores`, and the constants of all evaluations: "knn/queries", their
      number; "knn/chance", the share of the largest class among them, in
      percent; "knn/teacher", 1 if the teacher is measured, 0 if the student;
      "label_free/images", the number of images that are compared.
    """
    scores: dict[str, float] = {}
    if self.best:
      result = self._knn(state)
      queries = result.counts["queries"]
      largest = result.counts[knn.LARGEST_CLASS]
      scores = self._named(result) | {
        "knn/queries": queries,
        "knn/chance": 100 * largest / queries,
        "knn/teacher": float(bool(state.teacher)),
      }
    if self._label_free:
      result = self._without_labels(state)
      scores |= _prefixed(result)
      scores["label_free/images"] = result.counts["images"]
    return scores

  def scores(self, state: State) -> dict[str, float]:
    """After an epoch: weighted k-NN of validation images, in percent.

    Returns:
      "knn/k10/top1" and "knn/k10/top5" for every k of `evals.knn_ks`, and
      "knn/top1", "knn/top5" for the first; "label_free/NAME", see
      `label_free.measures`. What is off is left out.
    """
    scores = self._named(self._knn(state)) if self.best else {}
    if self._label_free:
      scores |= _prefixed(self._without_labels(state))
    return scores

  def _without_labels(self, state: State) -> Result:
    """The measures without labels of the current state."""
    return label_free.run(self._job("label_free", state))

  def _knn(self, state: State) -> Result:
    """The k-NN evaluation of the current state."""
    chunks = dict(
      bank_chunk=nearest.BANK_CHUNK, query_chunk=nearest.QUERY_CHUNK
    )
    return knn.run(self._job("knn", state, cache="", **chunks))

  def _named(self, result: Result) -> dict[str, float]:
    """Values of `_knn` by their logged names, see `scores`."""
    first = f"k{self._config.evals.knn_ks[0]}/"
    values = result.values
    values = values | {k: values[first + k] for k in ("top1", "top5")}
    return {f"knn/{k}": v for k, v in values.items()}

  def figures(self, state: State, folder: pathlib.Path) -> dict[str, float]:
    """Draws folder/masks.png and, for an autoencoder, reconstructions.png.

    Called at every evaluation, so that the figures follow the run.

    Args:
      state: of the run; attention is that of the teacher, or of the encoder if
        there is no teacher.
      folder: RUN/figures.

    Returns:
      "overlap/POLICY": share of the hidden area that lies on the object, and
      "overlap/object": share of the image the object covers; {} for images
      without object masks.
    """
    count = self._config.evals.mask_images
    if self._method.reconstructs and count:
      job = self._job("reconstruct", state, folder, **_PICTURES, count=count)
      _rename(reconstruct.run(job), folder / "reconstructions.png")
    source = self._sources["val"] or self._sources["train"]
    known = hasattr(source, "object_mask")
    images = max(count, self._config.evals.overlap_images if known else 0)
    if not images:
      return {}
    ratio = self._method.picture_mask_ratio
    job = self._job(
      "masks",
      state,
      folder,
      images="",
      every=1,
      count=images,
      gallery=count,
      ratios=(ratio,),
      show_max=self._method.picture_show_max,
      policies=POLICIES,
    )
    result = masks.run(job)
    _rename(result, folder / "masks.png")
    return _overlap(result, pictures.percent(ratio)) if known else {}

  def _job(
    self,
    name: str,
    state: State,
    figures: pathlib.Path = pathlib.Path("figures"),
    **settings: Any,
  ) -> Job:
    """A job for the current state of the run.

    Args:
      name: of the evaluation.
      state: of the run. The student is evaluated where the decoder is needed
        or there is no teacher.
      figures: folder of the figures.
      **settings: of the evaluation, added to `evals` of the run.
    """
    plain = self._config.to_dict()
    plain["evals"] = plain["evals"] | settings | {"name": name}
    config = ml_collections.ConfigDict(plain)
    student = name == "reconstruct" or not state.teacher
    weights = Weights(
      self._method,
      state.params if student else state.teacher,
      {},
      config,
      digest="",
      step=0,
      network="student" if student else "teacher",
      where="this run",
      run_dir=None,
    )
    return Job(
      config,
      self._mesh,
      figures.parent,
      weights,
      sources=self._sources,
      guide=state.teacher or None,
    )


def _prefixed(result: Result) -> dict[str, float]:
  """Values of `label_free` by their logged names."""
  return {f"label_free/{k}": v for k, v in result.values.items()}


def _rename(result: Result, path: pathlib.Path) -> None:
  """Renames the figure of a result, if it has one."""
  for figure in result.figures:
    figure.replace(path)


def _overlap(result: Result, percent: str) -> dict[str, float]:
  """Values of evaluation `masks` to log; {} on all processes but the first."""
  if not result.values:
    return {}
  logged = {
    f"overlap/{policy}": result.values[f"{policy}_{percent}/precision"]
    for policy in POLICIES
  }
  return logged | {"overlap/object": result.values["object_share"]}
