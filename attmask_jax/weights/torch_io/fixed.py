"""Fixed position tables that other code bases store, and how to tell them."""

import jax.numpy as jnp
import numpy as np

from attmask_jax.errors import InputError
from attmask_jax.models import positions


def table(
  grid: tuple[int, int], width: int, order: str, *, lead: int
) -> np.ndarray:
  """Sine-cosine table with `lead` zero slots: [1, lead + N, D] float32."""
  patches = positions.sin_cos(grid, width, order)
  return np.pad(patches, ((0, 0), (lead, 0), (0, 0)))


def square(tokens: int) -> tuple[int, int] | None:
  """(side, lead) of a table for side^2 patches and 0 or 1 class tokens."""
  for lead in (0, 1):
    side = round(max(tokens - lead, 0) ** 0.5)
    if side and side**2 == tokens - lead:
      return side, lead
  return None


def order_of(array: np.ndarray) -> str:
  """Its order, "yx" or "xy", if [1, T, D] is a fixed one, or "learned"."""
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
  side, lead = sizes
  want = table((side, side), array.shape[2], order, lead=lead)
  return float(np.max(np.abs(np.asarray(array, np.float32) - want)))


def _tolerance(array: np.ndarray) -> float:
  """Of values up to 1: sines in float32 differ, and files may be rounded."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return 0.0
  return max(2e-5, float(jnp.finfo(array.dtype).eps))
