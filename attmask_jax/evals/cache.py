"""Features kept on disk, under a key that says all they depend on."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from attmask_jax import atomic, schema
from attmask_jax.errors import InputError
from attmask_jax.evals.features import Features

FORMAT = 1  # of the files; raise it when features are computed differently


@dataclasses.dataclass(frozen=True)
class Keys:
  """Features on disk."""

  cache: str = schema.key("", 'folder that keeps features, "" = none')


def key(*, config: Any, indices: np.ndarray | None, **parts: Any) -> str:
  """Hex digest over everything that features depend on.

  Args:
    config: section `method` of the weights' run (architecture, dtype).
    indices: [n] which images, None = all.
    parts: weights' digest, data fingerprint, transform, feature kind.
  """
  which = None
  if indices is not None:
    array = np.ascontiguousarray(indices, np.int64)
    which = hashlib.sha256(array.tobytes()).hexdigest()
  said = parts | {
    "format": FORMAT,
    "indices": which,
    "config": json.loads(config.to_json_best_effort()),
    "platform": jax.default_backend(),  # kernels round differently
  }
  text = json.dumps(said, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(folder: str, name: str) -> Features | None:
  """Features of this key, or None; a damaged file counts as none.

  Several processes read them together or not at all.
  """
  if not folder:
    return None
  cached = _read(folder, name)
  if jax.process_count() > 1:
    there = multihost_utils.process_allgather(np.array(cached is not None))
    cached = cached if np.all(there) else None
  return cached


def _read(folder: str, name: str) -> Features | None:
  path = pathlib.Path(folder).expanduser() / f"{name}.npz"
  if not path.is_file():
    return None
  try:
    with np.load(path) as file:
      cached = Features(*(file[field] for field in Features._fields))
  except Exception as error:  # zip, numpy and the disk have a dozen kinds
    logging.warning("feature cache %s is damaged (%s): not used", path, error)
    return None
  logging.info("features from the cache: %s", path)
  return cached


def write(folder: str, name: str, features: Features) -> None:
  """Keeps features, in one move; process 0 writes.

  Raises:
    InputError: the folder cannot be written.
  """
  if not folder or jax.process_index():
    return
  path = pathlib.Path(folder).expanduser() / f"{name}.npz"
  try:
    # A stream: np.savez would end the name of a path in .npz.
    with atomic.replaced(path) as temporary, temporary.open("wb") as file:
      np.savez(file, **features._asdict())
  except OSError as error:
    raise InputError(
      f"evals.cache={folder} cannot be written ({error.strerror}): give a "
      "folder you may write to"
    ) from error
