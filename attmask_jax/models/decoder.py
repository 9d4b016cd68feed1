"""Decoder of a masked autoencoder.

Source: MAE-priv; some options follow the official MAE.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.models import blocks, layers, positions, vit
from attmask_jax.rows import gather


@dataclasses.dataclass(frozen=True)
class DecoderKeys:
  """Decoder of MAE."""

  decoder_width: int = schema.key(192, "token width", low=1)
  decoder_depth: int = schema.key(4, "blocks", low=1)
  decoder_num_heads: int = schema.key(
    0, "heads of its attention, 0 = width / 64", low=0
  )
  decoder_class_token: bool = schema.key(
    False, "decode the encoder's class token, too (official MAE)"
  )


class Decoder(nn.Module):
  """Predicts the pixels of every patch from the encoded visible ones.

  Attributes:
    width: of its tokens; a multiple of 4 and of num_heads.
    depth: blocks.
    num_heads: of its attention.
    pixels: values per patch, 3 P^2.
    positions: order of the fixed positions, "yx" or "xy".
    class_token: the encoder's is decoded, too, with zeros as its position.
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
  remat: str = "auto"
  attention: str = "auto"

  @nn.compact
  def __call__(
    self, tokens: jax.Array, order: jax.Array, grid: tuple[int, int]
  ) -> jax.Array:
    """Pixels of all patches.

    Args:
      tokens: [B, M, D] float32, encoded visible patches; [B, 1 + M, D] with the
        class token first.
      order: [B, N] int32, all patches, first the M visible ones in the order of
        `tokens`.
      grid: (h, w) with h * w = N.

    Returns:
      [B, N, 3 P^2] float32, in the order of the grid.
    """
    d = tokens.shape[-1]
    # quirk: this layer keeps PyTorch's default initialisation, bias included.
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
    x = gather(x, jnp.argsort(order, axis=1))  # back to grid order
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
    x = layers.LayerNorm(name="norm")(x)
    head = nn.Dense(
      self.pixels,
      dtype=self.dtype,
      kernel_init=layers.linear_init("xavier"),
      name="head",
    )
    return head(x[:, num_prefix_tokens:]).astype(jnp.float32)


def from_config(
  section: ml_collections.ConfigDict, encoder: vit.ViT
) -> Decoder:
  """Builds the decoder from the section `method`.

  Args:
    section: `method`.
    encoder: gives patch size, positions and compute options.

  Raises:
    InputError: a width that is no such multiple, or no class token to decode.
  """
  schema.check("method", section, DecoderKeys)
  width, class_token = section.decoder_width, section.decoder_class_token
  if class_token and encoder.class_token != "input":
    raise InputError(
      "method.decoder_class_token is on and method.class_token is off: the "
      "decoder takes the encoder's class token, so set both alike"
    )
  num_heads = section.decoder_num_heads or max(width // 64, 1)
  if width % 4 or width % num_heads:
    raise InputError(
      f"a decoder of width {width} and {num_heads} heads is impossible: "
      "method.decoder_width must be a multiple of 4 and of the heads"
    )
  return Decoder(
    width=width,
    depth=section.decoder_depth,
    num_heads=num_heads,
    pixels=3 * encoder.patch_size**2,
    positions=encoder.positions,
    class_token=class_token,
    dtype=encoder.dtype,
    scan=encoder.scan,
    remat=encoder.remat,
    attention=encoder.attention,
  )
