"""Reads and writes .safetensors files, with the safetensors package."""

import json
import math
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from attmask_jax import atomic
from attmask_jax.errors import InputError
from attmask_jax.weights.torch_io.lazy import Tensor
from attmask_jax.weights.torch_io.unpickling import quoted


def _package(path: str | os.PathLike[str]) -> types.ModuleType:
  """safetensors, imported only here, since .pth files do not need it."""
  try:
    import safetensors.numpy
  except ImportError as error:
    raise InputError(
      f"{path} needs the safetensors package: pip install safetensors"
    ) from error
  return safetensors


# Types of the format -> of NumPy.
_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16,
  "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
  "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
  "U16": np.uint16, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip


def read(
  path: str | os.PathLike[str], *, lazy: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
  """Tensors by name, and the file's notes.

  Args:
    path: of the file.
    lazy: return `lazy.Tensor`s, each of which reads its own numbers on demand.

  Raises:
    InputError: the file is missing or damaged, or the package is missing.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path} is not a file: give a .safetensors checkpoint")
  package = _package(path)
  try:
    with package.safe_open(path, framework="numpy") as file:
      notes = dict(file.metadata() or {})
      if lazy:  # opened anyway, so that the package checks the header
        return _later(path), notes
      return {name: file.get_tensor(name) for name in file.keys()}, notes
  except AttributeError as error:  # the package looks up numpy.float8...
    raise InputError(
      f"{path} holds a type that NumPy lacks ({error}): convert it to float32"
    ) from error
  except (package.SafetensorError, ValueError, OSError, TypeError) as error:
    raise InputError(
      f"{path} is not a .safetensors file, or is damaged ({quoted(error)})"
    ) from error


def _later(path: pathlib.Path) -> dict[str, Tensor]:
  """Lazy tensors of a file whose header is valid."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
  header.pop("__metadata__", None)
  loaded = {}
  for name, entry in header.items():
    if entry["dtype"] not in _DTYPES:
      raise AttributeError(entry["dtype"])
    start = 8 + size + entry["data_offsets"][0]
    loaded[name] = _tensor(path, entry["dtype"], tuple(entry["shape"]), start)
  return loaded


def _tensor(
  path: pathlib.Path, kind: str, shape: tuple[int, ...], start: int
) -> Tensor:
  """A lazy tensor at an offset of a file."""
  dtype = np.dtype(_DTYPES[kind])

  def later() -> np.ndarray:
    try:
      values = np.fromfile(path, dtype, math.prod(shape), offset=start)
      values = values.reshape(shape)
    except (OSError, ValueError) as error:
      raise InputError(
        f"{path} was changed or removed while it was read ({error}): start "
        "again"
      ) from error
    return values != 0 if kind == "BOOL" else values

  return Tensor(shape, np.dtype(bool) if kind == "BOOL" else dtype, later)


def write(
  path: str | os.PathLike[str],
  tensors: Mapping[str, np.ndarray],
  notes: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors by name, atomically; makes the folder.

  Raises:
    InputError: the file cannot be written, or the package is missing.
  """
  package = _package(path)
  # The package writes the bytes of a view without regard to its strides.
  plain = {
    name: np.ascontiguousarray(array) if np.ndim(array) else np.array(array)
    for name, array in tensors.items()
  }
  try:
    with atomic.replaced(path) as temporary:
      temporary.touch()  # the package would make it private
      mode = temporary.stat().st_mode
      package.numpy.save_file(plain, temporary, dict(notes or {}))
      temporary.chmod(mode)
  except (OSError, TypeError, package.SafetensorError) as error:
    raise InputError(
      f"{path} cannot be written ({error}): give another file"
    ) from error
