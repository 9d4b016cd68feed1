"""Position tables, and how they fit images of another size."""

import jax
import jax.numpy as jnp
import numpy as np


def bicubic_weights(size: int, grid: int) -> np.ndarray:
  """Bicubic resampling of one axis: [grid, size] float64.

  quirk: the sampling grid follows the scale factor (grid + 0.1) / size and not
  the ratio of the sizes; Keys kernel with a = -0.75, taps clamped at the
  border, no antialiasing.

  Source: interpolate_pos_encoding of DINO and AttMask.
  """
  scale, a = (grid + 0.1) / size, -0.75
  weights = np.zeros((grid, size))
  for i in range(grid):
    x = (i + 0.5) / scale - 0.5
    for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
      t = abs(x - tap)
      if t <= 1:
        w = (a + 2) * t**3 - (a + 3) * t**2 + 1
      else:
        w = a * (t**3 - 5 * t**2 + 8 * t - 4)
      weights[i, min(max(tap, 0), size - 1)] += w
  return weights


def interpolate(
  table: jax.Array, height: int, width: int, patch_size: int
) -> jax.Array:
  """Position table for an image of height x width pixels.

  Args:
    table: [1, 1 + S*S, D], class slot first.
    height: image height in pixels.
    width: image width in pixels.
    patch_size: patch side in pixels.

  Returns:
    [1, 1 + N, D]. A square image with as many patches as the table gets the
    table itself; any other, non-square ones with the same count included, is
    resampled.
  """
  _, tokens, d = table.shape
  grid = (height // patch_size, width // patch_size)
  if grid[0] * grid[1] == tokens - 1 and height == width:
    return table
  side = round((tokens - 1) ** 0.5)
  rows, columns = (
    jnp.asarray(bicubic_weights(side, g), jnp.float32) for g in grid
  )
  patches = jnp.einsum(
    "ys,xt,std->yxd",
    rows,
    columns,
    table[0, 1:].reshape(side, side, d),
    precision=jax.lax.Precision.HIGHEST,
  )
  return jnp.concatenate([table[:, :1], patches.reshape(1, -1, d)], axis=1)
