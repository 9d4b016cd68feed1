"""Tensors of a file that are read when their numbers are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Tensor:
  """What stands for an array until `np.asarray` reads it; keeps nothing.

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
    """Reads the numbers: InputError where the file is damaged."""
    del copy  # what is read is new
    return np.asarray(self._read(), dtype)


ARRAYS = (np.ndarray, Tensor)
