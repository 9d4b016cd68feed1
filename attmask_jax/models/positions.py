"""Position tables: fixed ones, and learned ones for another image or network.

`interpolate` fits a table to images of another size, `adapt` to a network with
another class token or with learned positions instead of fixed ones.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax.errors import InputError

DINO_OFFSET = 0.1  # of interpolate_pos_encoding in DINO, iBOT and AttMask


class Network(Protocol):
  """The attributes of `vit.ViT` that `adapt` reads, documented there."""

  width: int
  positions: str

  @property
  def grid(self) -> int:
    """Patches along one side of an image."""

  @property
  def num_prefix_tokens(self) -> int:
    """Tokens in front of the patches."""


def bicubic_weights(size: int, grid: int, offset: float) -> np.ndarray:
  """Bicubic resampling of one axis: [grid, size] float64.

  Keys kernel with a = -0.75, half-pixel centres, taps clamped at the border,
  no antialiasing.

  quirk: with DINO_OFFSET the sampling grid follows the scale factor
  (grid + 0.1) / size and not the ratio of the sizes.

  Args:
    size: length of the axis.
    grid: its new length.
    offset: 0 for plain bicubic (MAE, ExtreMA), or DINO_OFFSET.

  Source: interpolate_pos_encoding of DINO and AttMask; load_state_dict of
  MAE-priv and ExtreMA's fine-tuning.
  """
  scale, a = (grid + offset) / size, -0.75
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


def check_width(width: int) -> None:
  """Rejects a width that the sines and cosines of two axes do not fill.

  Raises:
    InputError: `width` is not a multiple of 4.
  """
  if width % 4:
    raise InputError(
      f"fixed positions need a width that is a multiple of 4, and that of "
      f"method.variant is {width}: choose {max(width // 4, 1) * 4} or "
      f"{(width // 4 + 1) * 4}"
    )


def sin_cos(grid: tuple[int, int], width: int, order: str) -> np.ndarray:
  """Fixed two-dimensional positions: [1, N, D] float32, row-major.

  Each axis gives [sin(c w), cos(c w)] with w_k = 10000^(-k / (D / 4)) of its
  coordinate c.

  Args:
    grid: (rows, columns).
    width: D, a multiple of 4.
    order: which axis comes first: "yx" (MAE-priv) or "xy" (the official MAE,
      ExtreMA).
  """
  rates = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  y, x = np.indices(grid).reshape(2, -1, 1) * rates
  axes = {"y": (np.sin(y), np.cos(y)), "x": (np.sin(x), np.cos(x))}
  table = np.concatenate(
    [part for axis in order for part in axes[axis]], axis=1
  )
  return table[None].astype(np.float32)


def fixed_table(
  grid: tuple[int, int], width: int, order: str, *, num_prefix_tokens: int
) -> np.ndarray:
  """`sin_cos` after zeros for the class token: [1, L, D] float32."""
  patches = sin_cos(grid, width, order)
  return np.pad(patches, ((0, 0), (num_prefix_tokens, 0), (0, 0)))


def adapt(
  table: jax.Array | None, network: Network, *, num_prefix_tokens: int
) -> jax.Array:
  """Initial learned positions of another network.

  Args:
    table: learned positions of `network`, [1, L, D]; None for fixed ones, which
      are computed.
    network: the network that the positions come from.
    num_prefix_tokens: of the other network. A class token that it alone has
      gets zeros, as in fixed tables; one that it lacks is dropped.

  Returns:
    [1, num_prefix_tokens + N, D], of the patches that `network` has.
  """
  if table is None:
    grid, order = (network.grid,) * 2, network.positions
    return jnp.asarray(
      fixed_table(
        grid, network.width, order, num_prefix_tokens=num_prefix_tokens
      )
    )
  more = num_prefix_tokens - network.num_prefix_tokens
  if more < 0:
    return table[:, -more:]
  return jnp.pad(table, ((0, 0), (more, 0), (0, 0))) if more else table


def interpolate(
  table: jax.Array,
  height: int,
  width: int,
  patch_size: int,
  *,
  num_prefix_tokens: int = 1,
  offset: float = DINO_OFFSET,
) -> jax.Array:
  """Position table for an image of height x width pixels.

  Args:
    table: [1, num_prefix_tokens + side^2, D], patches last.
    height: image height in pixels.
    width: image width in pixels.
    patch_size: patch side in pixels.
    num_prefix_tokens: positions in front of the patches'.
    offset: see `bicubic_weights`.

  Returns:
    [1, num_prefix_tokens + N, D]. A square image with as many patches as the
    table gets the table itself; any other, non-square ones with the same count
    included, is resampled.
  """
  _, tokens, d = table.shape
  grid = (height // patch_size, width // patch_size)
  if grid[0] * grid[1] == tokens - num_prefix_tokens and height == width:
    return table
  side = round((tokens - num_prefix_tokens) ** 0.5)
  rows, columns = (
    jnp.asarray(bicubic_weights(side, g, offset), jnp.float32) for g in grid
  )
  patches = jnp.einsum(
    "ys,xt,std->yxd",
    rows,
    columns,
    table[0, num_prefix_tokens:].reshape(side, side, d),
    precision=jax.lax.Precision.HIGHEST,
  )
  patches = patches.reshape(1, -1, d)
  return jnp.concatenate([table[:, :num_prefix_tokens], patches], axis=1)
