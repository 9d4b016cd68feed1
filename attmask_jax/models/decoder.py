"""Decoder of a masked autoencoder.

Source: MAE-priv, and the official MAE where options say so.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attmask_jax.models import blocks, layers, positions
from attmask_jax.rows import gather


class Decoder(nn.Module):
  """Predicts the pixels of every patch from the encoded visible ones.

  Attributes:
    width: of its tokens; divides by 4 and over the heads.
    depth: blocks.
    num_heads: of its attention.
    pixels: values per patch, 3 P^2.
    positions: order of the fixed positions, "yx" or "xy".
    class_token: the encoder's runs through the decoder, too, at position 0.
    dtype: of matrix products.
    scan: see `blocks.apply`.
    remat: see `blocks.apply`.
    attention: see `vit.ViT`.
  """

  width: int
  depth: int
  num_heads: int
  pixels: int
  positions: str = "yx"
  class_token: bool = False
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = "none"
  attention: str = "auto"

  @nn.compact
  def __call__(
    self, tokens: jax.Array, order: jax.Array, grid: tuple[int, int]
  ) -> jax.Array:
    """Pixels of all patches.

    Args:
      tokens: [B, M, D] float32, encoded visible patches; [B, 1 + M, D] with the
        class token first.
      order: [B, N] int32, all patches, the M visible ones first and in the
        order in `tokens`.
      grid: (h, w) with h * w = N.

    Returns:
      [B, N, 3 P^2] float32, in the order of the grid.
    """
    d = tokens.shape[-1]
    # quirk: this layer keeps PyTorch's default start values, bias included.
    init = layers.uniform_fan_in(d)
    x = nn.Dense(
      self.width, dtype=self.dtype, kernel_init=init, bias_init=init,
      name="embed",
    )(tokens)  # fmt: skip
    token = self.param("mask_token", layers.clipped_normal, (1, 1, self.width))
    b, n = order.shape
    num_prefix_tokens = int(self.class_token)
    cls, x = jnp.split(x.astype(jnp.float32), [num_prefix_tokens], axis=1)
    hidden = jnp.broadcast_to(token, (b, n - x.shape[1], self.width))
    x = jnp.concatenate([x, hidden], axis=1)
    x = gather(x, jnp.argsort(order, axis=1))  # back to their places
    x = x + jnp.asarray(positions.sin_cos(grid, self.width, self.positions))
    x = jnp.concatenate([cls, x], axis=1)
    block = layers.Block(
      self.num_heads,
      4.0,
      self.dtype,
      self.attention,
      "xavier",
      False,
      parent=None,
    )
    (x,), _ = blocks.apply(
      self, block, x, depth=self.depth, scan=self.scan, remat=self.remat
    )
    x = layers.layer_norm("norm")(x)
    head = nn.Dense(
      self.pixels,
      dtype=self.dtype,
      kernel_init=layers.linear_init("xavier"),
      name="head",
    )
    return head(x[:, num_prefix_tokens:]).astype(jnp.float32)
