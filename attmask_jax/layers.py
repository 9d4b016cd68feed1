"""Layers of the Vision Transformer; parameter names follow timm."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

LAYER_NORM_EPS = 1e-6
ATTENTION = ("auto", "xla", "cudnn")
Initializer = Callable[..., jax.Array]


def trunc_normal(std: float = 0.02) -> Initializer:
  """Normal values clamped at +-2.

  quirk: the bounds are absolute, so at std 0.02 nothing is ever cut.
  """

  def init(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    return jnp.clip(std * jax.random.normal(key, shape, dtype), -2.0, 2.0)

  return init


def uniform_fan_in(fan_in: int) -> Initializer:
  """Uniform in +-1/sqrt(fan_in): the convolution default of the references."""
  bound = fan_in**-0.5

  def init(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class PatchEmbed(nn.Module):
  """[R, H, W, 3] -> [R, N, D]: a convolution of stride = kernel = P.

  Written as one matrix product over cut-out patches, row-major. Pixels beyond
  the last whole patch are dropped.
  """

  width: int
  patch_size: int
  dtype: Any

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    p = self.patch_size
    rows, height, width, channels = images.shape
    init = uniform_fan_in(channels * p * p)
    kernel = self.param("kernel", init, (p, p, channels, self.width))
    bias = self.param("bias", init, (self.width,))
    gy, gx = height // p, width // p
    x = images[:, : gy * p, : gx * p].reshape(rows, gy, p, gx, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, gy * gx, p * p * channels)
    kernel = kernel.reshape(p * p * channels, self.width)
    x = x.astype(self.dtype) @ kernel.astype(self.dtype)
    return x.astype(jnp.float32) + bias[None, None]


class Attention(nn.Module):
  """Multi-head self-attention with a fused [q | k | v] projection."""

  heads: int
  dtype: Any
  implementation: str

  @nn.compact
  def __call__(
    self, x: jax.Array, *, want: str
  ) -> tuple[jax.Array, jax.Array | None]:
    rows, tokens, d = x.shape
    dense = functools.partial(
      nn.Dense, dtype=self.dtype, kernel_init=trunc_normal()
    )
    qkv = dense(3 * d, name="qkv")(x)
    qkv = qkv.reshape(rows, tokens, 3, self.heads, d // self.heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [R, L, A, D/A]
    out = jax.nn.dot_product_attention(
      q, k, v, implementation=self._implementation()
    )
    out = dense(d, name="proj")(out.reshape(rows, tokens, d))
    if want == "none":
      return out, None
    # The fused kernels return no weights, and masking needs one row of them.
    queries = q[:, :1] if want == "cls" else q
    logits = jnp.einsum(
      "rqad,rkad->raqk", queries, k, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits * (d // self.heads) ** -0.5, axis=-1)
    return out, weights[:, :, 0, 1:] if want == "cls" else weights

  def _implementation(self) -> str:
    if self.implementation != "auto":
      return self.implementation
    nvidia = jax.devices()[0].device_kind.startswith("NVIDIA")
    return "cudnn" if nvidia and self.dtype == jnp.bfloat16 else "xla"


class Mlp(nn.Module):
  """Two linear layers around an exact GELU."""

  hidden: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(
      nn.Dense, dtype=self.dtype, kernel_init=trunc_normal()
    )
    hidden = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
    return dense(x.shape[-1], name="fc2")(hidden)


def layer_norm(name: str) -> nn.LayerNorm:
  """LayerNorm in float32 with the reference's epsilon.

  The two-pass variance keeps parity: E[x^2] - E[x]^2 loses three digits.
  """
  return nn.LayerNorm(
    epsilon=LAYER_NORM_EPS, use_fast_variance=False, name=name
  )


class Block(nn.Module):
  """Pre-norm transformer block; the residual stream stays float32."""

  heads: int
  mlp_ratio: float
  dtype: Any
  implementation: str

  @nn.compact
  def __call__(
    self, x: jax.Array, keep: jax.Array | None = None, *, want: str = "none"
  ) -> tuple[jax.Array, jax.Array | None]:
    """[R, L, D] -> ([R, L, D], attention); keep [2, R] scales the branches."""

    def residual(x: jax.Array, y: jax.Array, branch: int) -> jax.Array:
      y = y.astype(jnp.float32)
      return x + (y if keep is None else y * keep[branch][:, None, None])

    y, attention = Attention(
      self.heads, self.dtype, self.implementation, name="attn"
    )(layer_norm("norm1")(x), want=want)
    x = residual(x, y, 0)
    hidden = int(x.shape[-1] * self.mlp_ratio)
    y = Mlp(hidden, self.dtype, name="mlp")(layer_norm("norm2")(x))
    return residual(x, y, 1), attention
