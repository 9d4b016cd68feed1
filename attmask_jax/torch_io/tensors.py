"""Files of tensors by name: .safetensors, with the safetensors package."""

import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from attmask_jax import atomic
from attmask_jax.errors import InputError


def read(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Tensors by name, and the file's notes.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path} is no file: give a .safetensors checkpoint")
  try:
    with safe_open(path, framework="numpy") as file:
      notes = dict(file.metadata() or {})
      return {name: file.get_tensor(name) for name in file.keys()}, notes
  except (SafetensorError, ValueError, OSError, json.JSONDecodeError) as error:
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
    InputError: the file cannot be written.
  """
  # The package writes the bytes of a view as they lie, whatever its strides.
  plain = {
    name: np.ascontiguousarray(array) if np.ndim(array) else np.array(array)
    for name, array in tensors.items()
  }
  try:
    with atomic.replaced(path) as temporary:
      temporary.touch()  # the package would make it private
      mode = temporary.stat().st_mode
      save_file(plain, temporary, dict(notes or {}))
      temporary.chmod(mode)
  except (OSError, SafetensorError) as error:
    raise InputError(
      f"{path} cannot be written ({error}): give another file"
    ) from error
