"""Recognises fixed position tables, which other code bases store."""

import jax.numpy as jnp
import numpy as np

from attmask_jax.errors import InputError
from attmask_jax.models.positions import fixed_table


def square(tokens: int) -> tuple[int, int] | None:
  """(side, num_prefix_tokens) of a table with 0 or 1 class tokens."""
  for num_prefix_tokens in (0, 1):
    side = round(max(tokens - num_prefix_tokens, 0) ** 0.5)
    if side and side**2 == tokens - num_prefix_tokens:
      return side, num_prefix_tokens
  return None


def order_of(array: np.ndarray) -> str:
  """Order of a fixed table [1, L, D], "yx" or "xy", or "learned"."""
  for order in ("yx", "xy"):
    if _distance(array, order) <= _tolerance(array):
      return order
  return "learned"


def check(name: str, array: np.ndarray, order: str) -> None:
  """Raises InputError unless the table is the fixed one."""
  distance = _distance(array, order)
  if not distance <= _tolerance(array):
    raise InputError(
      f'{name} is not the fixed position table of order "{order}" (off by '
      f"{distance:.2g}): load it into a network with learned positions"
    )


def _distance(array: np.ndarray, order: str) -> float:
  """Largest difference to the fixed table; infinite for other shapes."""
  if array.ndim != 3 or len(array) != 1 or array.shape[2] % 4:
    return float("inf")
  sizes = square(array.shape[1])
  if sizes is None or not array.shape[2]:
    return float("inf")
  side, num_prefix_tokens = sizes
  expected = fixed_table(
    (side, side), array.shape[2], order, num_prefix_tokens=num_prefix_tokens
  )
  return float(np.max(np.abs(np.asarray(array, np.float32) - expected)))


def _tolerance(array: np.ndarray) -> float:
  """For values up to 1: sines in float32 differ, and files may be rounded."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return 0.0
  return max(2e-5, float(jnp.finfo(array.dtype).eps))
