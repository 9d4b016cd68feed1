"""Files of tensors by name: .safetensors, with the safetensors package."""

import os
import pathlib
import types
from collections.abc import Mapping

import numpy as np

from attmask_jax import atomic
from attmask_jax.errors import InputError


def _package(path: str | os.PathLike[str]) -> types.ModuleType:
  """safetensors, imported where it is used: .pth files need none."""
  try:
    import safetensors.numpy
  except ImportError as error:
    raise InputError(
      f"{path} needs the safetensors package: pip install safetensors"
    ) from error
  return safetensors


def read(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Tensors by name, and the file's notes.

  Raises:
    InputError: the file is missing or damaged, or the package is missing.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path} is no file: give a .safetensors checkpoint")
  package = _package(path)
  try:
    with package.safe_open(path, framework="numpy") as file:
      notes = dict(file.metadata() or {})
      return {name: file.get_tensor(name) for name in file.keys()}, notes
  except AttributeError as error:  # the package looks numpy.float8... up
    raise InputError(
      f"{path} holds a type that NumPy lacks ({error}): convert it to float32"
    ) from error
  except (package.SafetensorError, ValueError, OSError, TypeError) as error:
    raise InputError(
      f"{path} is no .safetensors file, or is damaged ({error})"
    ) from error


def write(
  path: str | os.PathLike[str],
  tensors: Mapping[str, np.ndarray],
  notes: Mapping[str, str] | None = None,
) -> None:
  """Writes tensors by name, in one move; makes the folder.

  Raises:
    InputError: the file cannot be written, or the package is missing.
  """
  package = _package(path)
  # The package writes the bytes of a view as they lie, whatever its strides.
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
