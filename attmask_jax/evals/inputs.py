"""Input batches of an evaluation: padded, this process's rows."""

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
  """Settings of all evaluations that read images."""

  batch_size: int = schema.key(256, "images over all devices", low=1)


def batches(
  source: data.Source,
  config: ml_collections.ConfigDict,
  indices: np.ndarray | None = None,
  *,
  crop: Callable[[Image.Image, int], Image.Image] | None = None,
  views: Callable[[Image.Image, int], np.ndarray] | None = None,
) -> tuple[Generator[HostBatch, None, None], int]:
  """Padded batches, the same number on every process, and this number.

  Close the generator when leaving it early.

  Args:
    source: images.
    config: evals.batch_size, data.image_size, data.eval_resample,
      data.max_broken, run.threads.
    indices: of the images, all by default.
    crop: (image, size) -> square, by default the evaluation crop.
    views: see `data.eval_batches`; a batch then has half as many images, so
      that the network sees as many rows.
  """
  resample = config.data.eval_resample
  if crop is None:
    crop = functools.partial(transforms.eval_crop, resample=resample)
  processes, devices = jax.process_count(), jax.local_device_count()
  chosen = np.arange(len(source)) if indices is None else np.asarray(indices)
  # Equal numbers of batches on every process; -1 is a padding row.
  chosen = np.pad(chosen, (0, -len(chosen) % processes), constant_values=-1)
  mine = np.split(chosen, processes)[jax.process_index()]
  size = (
    config.evals.batch_size
    if views is None
    else (-(-config.evals.batch_size // 2))
  )
  rows = -(-size // (devices * processes)) * devices
  host = data.eval_batches(
    source,
    image_size=config.data.image_size,
    batch_size=rows,
    indices=mine,
    threads=config.run.threads,
    max_broken=config.data.max_broken,
    crop=crop,
    views=views,
  )
  return host, -(-len(mine) // rows)


def spread(size: int, limit: int) -> np.ndarray:
  """A fixed random choice of indices, all of them for limit 0: [n] int64.

  Random, because a regular stride may coincide with a period of the data.
  """
  if not limit or limit >= size:
    return np.arange(size)
  return np.random.default_rng([0, size, 4]).permutation(size)[:limit]


def same_classes(train: data.Source, val: data.Source) -> None:
  """Refuses splits whose classes differ.

  Raises:
    InputError: names a class that only one of them has.
  """
  one_sided = set(val.class_names) ^ set(train.class_names)
  if one_sided:
    raise InputError(
      f'class "{min(one_sided)}" and {len(one_sided) - 1} more are in only one '
      f"of {train.name} and {val.name}: give both the same class folders"
    )


def every_class(source: data.Source) -> None:
  """Refuses a labelled data set in which a class has no images.

  Raises:
    InputError: names such a class.
  """
  counts = np.bincount(source.labels, minlength=len(source.class_names))
  empty = np.flatnonzero(counts == 0)
  if len(empty):
    raise InputError(
      f"{source.name} has no images of class {source.class_names[empty[0]]} "
      f"({len(empty)} of {len(source.class_names)} classes are empty): an "
      "accuracy over fewer classes is not comparable; add images"
    )
