"""The interface of all evaluations: a job goes in, a result comes out.

An evaluation is a module of this package that ends in `EVAL = Eval(run, ...)`.
Its `run(job) -> Result` asks the job for images, features and figure paths, and
returns numbers, counts and a table; the caller writes, prints and reports them.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import jax
import ml_collections
import numpy as np
from PIL import Image

from attmask_jax import Params, data
from attmask_jax.errors import InputError
from attmask_jax.evals import cache, features, inputs
from attmask_jax.methods import base
from attmask_jax.models import embedding
from attmask_jax.runs import progress
from attmask_jax.weights.classifier import Classifier
from attmask_jax.weights.loading import Weights

Needs = Literal["none", "weights", "classifier"]


class State(Protocol):
  """The part of a run's `TrainState` that evaluations read."""

  params: Params
  teacher: Params
  aux: Params


class Table(NamedTuple):
  """The printed table: headings, and rows with as many cells."""

  headings: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


class Result(NamedTuple):
  """What an evaluation measured.

  Attributes:
    values: metric -> number; relative names such as "k20/top1".
    counts: numbers of images, classes, ...
    table: the same numbers, formatted.
    figures: PNG files below the job's folder.
    notes: caveats for the reader, e.g. that a short probe was trained.
  """

  values: dict[str, float]
  counts: dict[str, int]
  table: Table
  figures: tuple[pathlib.Path, ...] = ()
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Job:
  """One evaluation of one network.

  Attributes:
    config: sections evals (name and settings), data (complete: keys that the
      user left open are taken from the run of the weights) and run.
    mesh: all devices.
    folder: the evaluation's own directory.
    weights: what is evaluated; None where the evaluation needs none.
    classifier: backbone and trained probe, where the evaluation needs it.
    sources: split -> images that a training run has already built and checked;
      other splits are built from the config.
    guide: weights whose attention selects the visible patches of a
      reconstruction; None = the evaluated ones.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  folder: pathlib.Path
  weights: Weights | None = None
  classifier: Classifier | None = None
  sources: Mapping[str, data.Source | None] = dataclasses.field(
    default_factory=dict
  )
  guide: Params | None = None

  def build(self, split: str) -> data.Source | None:
    """Images of a split, with or without labels; None where there are none."""
    if split in self.sources:
      return self.sources[split]
    return data.build(self.config.data, split)

  def source(self, split: str) -> data.Source:
    """Labelled images of a split, "train" or "val".

    Raises:
      InputError: there are none, or they have no labels.
    """
    source = self.build(split)
    if source is None or not len(source.class_names):
      raise InputError(
        f"evaluation {self.config.evals.name} needs labelled images, and "
        f"data.source={self.config.data.source} has none: set "
        "--config.data.source=folder and --config.data.path"
      )
    return source

  def pair(self) -> tuple[data.Source, data.Source]:
    """Training and validation images with the same classes."""
    train, val = self.source("train"), self.source("val")
    if self.sources:
      return train, val  # checked before the run began
    inputs.same_classes(train, val)
    inputs.every_class(val)
    return train, val

  @contextlib.contextmanager
  def batches(
    self,
    source: data.Source,
    indices: np.ndarray | None = None,
    *,
    desc: str,
    crop: Callable[[Image.Image, int], Image.Image] | None = None,
    views: Callable[[Image.Image, int], np.ndarray] | None = None,
  ) -> Iterator[Iterator[features.HostBatch]]:
    """This process's rows of padded batches, behind a progress bar.

    A context manager, so that threads end when the evaluation stops early:
    `with job.batches(source, desc="bank") as batches: ...`.

    Args:
      source: images.
      indices: of the images, all by default.
      desc: label of the bar.
      crop: (image, size) -> square, by default the evaluation crop.
      views: see `inputs.batches`.
    """
    host, total = inputs.batches(
      source, self.config, indices, crop=crop, views=views
    )
    with contextlib.closing(host):
      yield progress.track(host, total, desc)

  def embedder(self) -> features.FeaturesFn:
    """[B, H, W, 3] uint8 -> [B, F] by evals.last_blocks, pool and final_norm.

    Raises:
      InputError: the network does not have such features.
    """
    evals, weights = self.config.evals, self.weights
    network = weights.method.backbone
    features.check(evals, depth=network.depth, class_token=network.class_token)
    return functools.partial(
      _embed,
      weights.method,
      evals.last_blocks,
      evals.pool,
      evals.final_norm,
      weights.params,
    )

  def embed(
    self, source: data.Source, indices: np.ndarray | None = None, *, desc: str
  ) -> features.Features:
    """Features by evals.last_blocks, pool and final_norm; uses the cache."""
    evals, weights = self.config.evals, self.weights
    embed = self.embedder()
    key = cache.key(
      weights=weights.digest,
      config=weights.config.method,
      data=source.fingerprint() if evals.cache else "",
      indices=indices,
      image_size=self.config.data.image_size,
      resample=self.config.data.eval_resample,
      last=evals.last_blocks,
      pool=evals.pool,
      final_norm=evals.final_norm,
      precision=self.config.run.matmul_precision,
    )
    cached = cache.read(evals.cache, key)
    if cached is not None:
      return cached
    with self.batches(source, indices, desc=desc) as batches:
      extracted = features.extract(embed, batches, mesh=self.mesh)
    cache.write(evals.cache, key, extracted)
    return extracted

  def figure(self, name: str) -> pathlib.Path:
    """Path of a figure: FOLDER/figures/NAME."""
    return self.folder / "figures" / name


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _embed(
  method: base.Method,
  last: int,
  pool: str,
  final_norm: bool,
  params: Params,
  images: jax.Array,
) -> jax.Array:
  """[B, H, W, 3] uint8 -> [B, F]; compiled once for equal methods."""
  read = functools.partial(method.features, params)
  return embedding.embed(
    read, images, last=last, pool=pool, final_norm=final_norm
  )


@dataclasses.dataclass(frozen=True)
class Eval:
  """Declaration of an evaluation, at the end of its module.

  Attributes:
    run: measures; all processes call it, and the first one's result is used.
    check: refuses settings before a probe is trained or images are read.
    needs: what the job must hold: "weights", "classifier" (weights and a
      classifier on them) or "none"; or a function of the section evals.
    trains: whether a run in the job's folder, by the sections method and optim,
      comes first; `run` then measures its checkpoints.
    keys: dataclasses of the config keys in the section evals, see schema.py.
  """

  run: Callable[[Job], Result]
  check: Callable[[Job], None] | None = None
  needs: Needs | Callable[[ml_collections.ConfigDict], Needs] = "weights"
  trains: bool = False
  keys: tuple[type, ...] = ()

  def needed(self, evals: ml_collections.ConfigDict) -> Needs:
    """`needs`, given these settings."""
    return self.needs(evals) if callable(self.needs) else self.needs
