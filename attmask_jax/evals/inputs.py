"""Images of an evaluation: this process's rows of padded batches."""

import dataclasses
import functools
from collections.abc import Callable, Generator

import jax
import ml_collections
import numpy as np
from PIL import Image

from attmask_jax import data, schema
from attmask_jax.augment import transforms
from attmask_jax.data.pipeline import HostBatch
from attmask_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Keys:
  """What all evaluations on images have."""

  batch_size: int = schema.key(256, "images over all devices", low=1)


def batches(
  source: data.Source,
  config: ml_collections.ConfigDict,
  indices: np.ndarray | None = None,
  *,
  crop: Callable[[Image.Image, int], Image.Image] | None = None,
) -> tuple[Generator[HostBatch, None, None], int]:
  """Padded batches, as many on every process, and their number.

  Close the generator when leaving it early.

  Args:
    source: images.
    config: evals.batch_size, data.image_size, data.eval_resample,
      data.max_broken, run.threads.
    indices: which images, all by default.
    crop: (image, size) -> square, by default the evaluation crop.
  """
  resample = config.data.eval_resample
  if crop is None:
    crop = functools.partial(transforms.eval_crop, resample=resample)
  processes, devices = jax.process_count(), jax.local_device_count()
  chosen = np.arange(len(source)) if indices is None else np.asarray(indices)
  # Equal numbers of batches on every process; -1 is a padding row.
  chosen = np.pad(chosen, (0, -len(chosen) % processes), constant_values=-1)
  mine = np.split(chosen, processes)[jax.process_index()]
  rows = -(-config.evals.batch_size // (devices * processes)) * devices
  host = data.eval_batches(
    source,
    image_size=config.data.image_size,
    batch_size=rows,
    indices=mine,
    threads=config.run.threads,
    max_broken=config.data.max_broken,
    crop=crop,
  )
  return host, -(-len(mine) // rows)


def spread(size: int, limit: int) -> np.ndarray:
  """A fixed random choice of indices, all of them for limit 0: [n] int64.

  Random, since any regular stride may meet a data set's own period.
  """
  if not limit or limit >= size:
    return np.arange(size)
  return np.random.default_rng([0, size, 4]).permutation(size)[:limit]


def same_classes(train: data.Source, val: data.Source) -> None:
  """Refuses splits whose classes differ.

  Raises:
    InputError: names a class that is in one of them only.
  """
  one_sided = set(val.class_names) ^ set(train.class_names)
  if one_sided:
    raise InputError(
      f'class "{min(one_sided)}" and {len(one_sided) - 1} more are in only one '
      f"of {train.name} and {val.name}: give both the same class folders"
    )


def every_class(source: data.Source) -> None:
  """Refuses labelled images with a class that none of them shows.

  Raises:
    InputError: names one.
  """
  counts = np.bincount(source.labels, minlength=len(source.class_names))
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise InputError(
      f"{source.name} has no images of class {source.class_names[empty[0]]} "
      f"({len(empty)} of {len(source.class_names)} classes are empty): an "
      "accuracy over fewer classes would be another number; add images"
    )
