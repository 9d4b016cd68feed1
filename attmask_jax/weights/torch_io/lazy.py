"""Tensors of a file that are read on demand."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Tensor:
  """Placeholder of an array, which `np.asarray` reads; caches nothing.

  Attributes:
    shape: of the array.
    dtype: of the array.
  """

  __slots__ = ("_read", "dtype", "shape")

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype: np.dtype,
    read: Callable[[], np.ndarray],
  ) -> None:
    self.shape, self.dtype, self._read = shape, dtype, read

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Reads the numbers; InputError if the file is damaged."""
    del copy  # always a new array
    return np.asarray(self._read(), dtype)


ARRAYS = (np.ndarray, Tensor)
