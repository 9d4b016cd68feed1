"""Cache of features on disk, keyed by everything that they depend on."""

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

FORMAT = 1  # increment when features are computed differently


@dataclasses.dataclass(frozen=True)
class Keys:
  """Cache of features."""

  cache: str = schema.key("", 'folder to cache features in, "" = none')


def key(*, config: Any, indices: np.ndarray | None, **parts: Any) -> str:
  """Hex digest over everything that features depend on.

  Args:
    config: section `method` of the weights' run (architecture, dtype).
    indices: [n] of the images, None = all.
    parts: weights' digest, data fingerprint, transform, feature kind.
  """
  subset = None
  if indices is not None:
    array = np.ascontiguousarray(indices, np.int64)
    subset = hashlib.sha256(array.tobytes()).hexdigest()
  content = parts | {
    "format": FORMAT,
    "indices": subset,
    "config": json.loads(config.to_json_best_effort()),
    "platform": jax.default_backend(),  # kernels round differently
  }
  text = json.dumps(content, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(folder: str, name: str) -> Features | None:
  """Features of this key, or None; a damaged file counts as missing.

  With several processes, either all of them get features or none does.
  """
  if not folder:
    return None
  cached = _read(folder, name)
  if jax.process_count() > 1:
    hits = multihost_utils.process_allgather(np.array(cached is not None))
    cached = cached if np.all(hits) else None
  return cached


def _read(folder: str, name: str) -> Features | None:
  path = pathlib.Path(folder).expanduser() / f"{name}.npz"
  if not path.is_file():
    return None
  try:
    with np.load(path) as file:
      cached = Features(*(file[field] for field in Features._fields))
  except Exception as error:  # zipfile, NumPy and the OS raise many types
    logging.warning("feature cache %s is damaged (%s): not used", path, error)
    return None
  logging.info("features from the cache: %s", path)
  return cached


def write(folder: str, name: str, features: Features) -> None:
  """Writes features atomically, on process 0.

  Raises:
    InputError: the folder cannot be written.
  """
  if not folder or jax.process_index():
    return
  path = pathlib.Path(folder).expanduser() / f"{name}.npz"
  try:
    # An open file: np.savez appends .npz to the name of a path.
    with atomic.replaced(path) as temporary, temporary.open("wb") as file:
      np.savez(file, **features._asdict())
  except OSError as error:
    raise InputError(
      f"evals.cache={folder} cannot be written ({error.strerror}): give a "
      "folder you may write to"
    ) from error
