"""What every evaluation gets and gives: one shape for all of them.

An evaluation is a function `run(job) -> Result`. It asks the job for images,
features and figure paths, and answers with numbers, counts and a table; the
caller writes, prints and reports them.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from PIL import Image

from attmask_jax import data
from attmask_jax.errors import InputError
from attmask_jax.evals import cache, features, inputs
from attmask_jax.models import vit
from attmask_jax.runs import progress
from attmask_jax.weights.loading import Weights


class Table(NamedTuple):
  """What is printed: headings, and rows of as many cells."""

  headings: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


class Result(NamedTuple):
  """What an evaluation found.

  Attributes:
    values: metric -> number; relative names such as "k20/top1".
    counts: what was counted: images, classes, ...
    table: the numbers for people.
    figures: PNG files below the job's folder.
    notes: sentences a reader must know, e.g. that a short probe was trained.
  """

  values: dict[str, float]
  counts: dict[str, int]
  table: Table
  figures: tuple[pathlib.Path, ...] = ()
  notes: tuple[str, ...] = ()


class Classifier(NamedTuple):
  """A backbone with a linear layer.

  Attributes:
    method: `logits(params, images [B, H, W, 3]) -> [B, C]`.
    params: its parameters, whole on every device.
    class_names: [C], of the images it was trained on.
    digest: of the parameters.
    where: its checkpoint.
    crop: (image, size) -> square, as its validation images were cut; None for
      the evaluation crop.
    trained_here: epochs of a probe that was trained for this evaluation alone.
  """

  method: Any
  params: Any
  class_names: tuple[str, ...]
  digest: str
  where: str
  crop: Callable[[Image.Image, int], Image.Image] | None = None
  trained_here: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
  """One evaluation of one network.

  Attributes:
    config: sections evals (name and settings), data (complete: what the user
      left open is that of the weights' own run) and run.
    mesh: all devices.
    folder: the evaluation's own directory.
    weights: what is evaluated; None where the evaluation needs none.
    classifier: backbone and trained probe, where the evaluation asks for it.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  folder: pathlib.Path
  weights: Weights | None = None
  classifier: Classifier | None = None

  def source(self, split: str) -> data.Source:
    """Labelled images of a split, "train" or "val".

    Raises:
      InputError: there are none, or they have no labels.
    """
    source = data.build(self.config.data, split)
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
  ) -> Iterator[Iterator[features.HostBatch]]:
    """This process's rows of padded batches, behind a progress bar.

    As a context, so that threads end when the evaluation stops early:
    `with job.batches(source, desc="bank") as batches: ...`.

    Args:
      source: images.
      indices: which of them, all by default.
      desc: first word of the bar.
      crop: (image, size) -> square, by default the evaluation crop.
    """
    host, total = inputs.batches(source, self.config, indices, crop=crop)
    with contextlib.closing(host):
      yield progress.track(host, total, desc)

  def embed(
    self, source: data.Source, indices: np.ndarray | None = None, *, desc: str
  ) -> features.Features:
    """Features as evals.last_blocks, pool, final_norm say; cached or not."""
    evals, weights = self.config.evals, self.weights
    network = weights.method.backbone
    features.check(evals, depth=network.depth, class_token=network.class_token)
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
    found = cache.read(evals.cache, key)
    if found is not None:
      return found
    compiled = jax.jit(
      lambda params, images: vit.embed(
        functools.partial(weights.method.features, params),
        images,
        last=evals.last_blocks,
        pool=evals.pool,
        final_norm=evals.final_norm,
      )
    )
    with self.batches(source, indices, desc=desc) as batches:
      found = features.extract(
        functools.partial(compiled, weights.params), batches, mesh=self.mesh
      )
    cache.write(evals.cache, key, found)
    return found

  def figure(self, name: str) -> pathlib.Path:
    """Where a picture goes: FOLDER/figures/NAME."""
    return self.folder / "figures" / name
