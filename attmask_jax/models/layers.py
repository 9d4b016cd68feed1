"""Layers of the Vision Transformer; parameter names follow timm."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from attmask_jax.models import ops

LAYER_NORM_EPS = 1e-6
ATTENTION = ("auto", "xla", "cudnn")
INITS = ("normal", "xavier")
Initializer = Callable[..., jax.Array]


def trunc_normal(std: float = 0.02) -> Initializer:
  """Normal values clamped at +-2.

  quirk: the bounds are absolute, so at std 0.02 nothing is ever clamped.
  """

  def init(
    key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    return jnp.clip(std * jax.random.normal(key, shape, dtype), -2.0, 2.0)

  return init


def clipped_normal(
  key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
  """Normal values of std 0.02, truncated at one standard deviation: `shape`."""
  return 0.02 * jax.random.truncated_normal(key, -1.0, 1.0, shape, dtype)


def linear_init(kind: str) -> Initializer:
  """Initialiser of the linear layers in blocks: one of INITS.

  "xavier" is uniform in +-sqrt(6 / (in + out)); a fused projection to queries,
  keys and values counts as one matrix (MAE, ExtreMA).
  """
  return (
    trunc_normal() if kind == "normal" else nn.initializers.xavier_uniform()
  )


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
  xavier: bool = False  # initialises the flattened kernel

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    p = self.patch_size
    rows, height, width, channels = images.shape
    init = uniform_fan_in(channels * p * p)
    # flax would multiply fan out by the receptive field P * P.
    bound = (6 / (self.width + channels * p * p)) ** 0.5
    flat = lambda key, shape: jax.random.uniform(
      key, shape, float, -bound, bound
    )
    kernel = self.param(
      "kernel", flat if self.xavier else init, (p, p, channels, self.width)
    )
    # quirk: the bias has the convolution's default initialisation, not 0.
    bias = self.param("bias", init, (self.width,))
    gy, gx = height // p, width // p
    x = images[:, : gy * p, : gx * p].reshape(rows, gy, p, gx, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, gy * gx, p * p * channels)
    kernel = kernel.reshape(p * p * channels, self.width)
    x = x.astype(self.dtype) @ kernel.astype(self.dtype)
    return x.astype(jnp.float32) + bias[None, None]


class Qkv(nn.Module):
  """Fused projection to [q | k | v]: [R, L, D] -> [R, L, 3 D].

  Without a key bias, that third of the bias is still a parameter, so parameter
  trees are the same, but stays exactly 0.
  """

  dtype: Any
  initial: str
  key_bias: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d = x.shape[-1]
    kernel = self.param("kernel", linear_init(self.initial), (d, 3 * d))
    bias = self.param("bias", nn.initializers.zeros, (3 * d,))
    if not self.key_bias:
      bias = bias * jnp.repeat(jnp.asarray([1.0, 0.0, 1.0]), d)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
    return x @ kernel + bias.astype(self.dtype)


class Attention(nn.Module):
  """Multi-head self-attention with a fused [q | k | v] projection."""

  num_heads: int
  dtype: Any
  implementation: str
  initial: str = "normal"
  key_bias: bool = True
  drop: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    return_attention: str,
    logit_bias: jax.Array | None = None,
    drop_keys: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """[R, L, D] -> [R, L, D], attention.

    Args:
      x: tokens.
      return_attention: which weights to return, float32: "none"; "cls"
        [R, A, L - 1], from the first token to the others; "received" [R, A, L],
        the mean over queries; "full" [R, A, L, L].
      logit_bias: [R, A, L, L] float32 added to the scaled logits; zeros give
        access to their gradient.
      drop_keys: [R] keys, one per row, that drop weights at the rate `drop`;
        None = no dropout. The attention that is returned is that before it.
    """
    rows, tokens, d = x.shape
    qkv = Qkv(self.dtype, self.initial, self.key_bias, name="qkv")(x)
    # Cut apart before the heads are: a TPU would first rearrange the whole of
    # [R, L, 3, A, D/A] in memory.
    split = lambda x: x.reshape(rows, tokens, self.num_heads, -1)
    q, k, v = map(split, jnp.split(qkv, 3, axis=-1))  # [R, L, A, D/A]
    dropped = self.drop and drop_keys is not None
    if dropped or logit_bias is not None:
      weights = _weights(q, k, logit_bias)
      if dropped:
        weights = dropout(weights, drop_keys, rate=self.drop)
      out = jnp.einsum("raqk,rkad->rqad", weights.astype(v.dtype), v)
    elif self._implementation() == "cudnn":
      out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    else:
      out = ops.attention(q, k, v)
    out = nn.Dense(
      d, dtype=self.dtype, kernel_init=linear_init(self.initial), name="proj"
    )(out.reshape(rows, tokens, d))
    if return_attention == "none":
      return out, None
    # The fused kernels return no weights, and masking needs one row of them.
    queries = q[:, :1] if return_attention == "cls" else q
    weights = _weights(queries, k, logit_bias)
    if return_attention == "received":
      return out, jnp.mean(weights, axis=2)
    return out, weights[:, :, 0, 1:] if return_attention == "cls" else weights

  def _implementation(self) -> str:
    if self.implementation != "auto":
      return self.implementation
    nvidia = jax.devices()[0].device_kind.startswith("NVIDIA")
    return "cudnn" if nvidia and self.dtype == jnp.bfloat16 else "xla"


def _weights(
  q: jax.Array, k: jax.Array, logit_bias: jax.Array | None
) -> jax.Array:
  """Attention [R, A, Q, L] float32 of queries [R, Q, A, D / A] to keys."""
  logits = jnp.einsum(
    "rqad,rkad->raqk", q, k, preferred_element_type=jnp.float32
  )
  logits = logits * q.shape[-1] ** -0.5
  if logit_bias is not None:
    logits = logits + logit_bias
  return jax.nn.softmax(logits, axis=-1)


def dropout(x: jax.Array, keys: jax.Array, *, rate: float) -> jax.Array:
  """Zeroes values at random and scales the rest: [R, ...] -> [R, ...].

  Args:
    x: any values.
    keys: [R], one stream of draws per row.
    rate: share of zeros, in [0, 1); the others are divided by 1 - rate.
  """
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:])
  return jnp.where(jax.vmap(draw)(keys), x / (1 - rate), 0.0)


class Mlp(nn.Module):
  """Two linear layers around an exact GELU: [..., D] -> [..., D]."""

  hidden: int
  dtype: Any
  initial: str = "normal"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(
      nn.Dense, dtype=self.dtype, kernel_init=linear_init(self.initial)
    )
    hidden = ops.gelu(dense(self.hidden, name="fc1")(x))
    return dense(x.shape[-1], name="fc2")(hidden)


class LayerNorm(nn.Module):
  """LayerNorm in float32: [..., D] -> [..., D]."""

  epsilon: float = LAYER_NORM_EPS

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (d,))
    bias = self.param("bias", nn.initializers.zeros, (d,))
    return ops.layer_norm(x.astype(jnp.float32), scale, bias, self.epsilon)


class Block(nn.Module):
  """Pre-norm transformer block; the residual stream stays float32."""

  num_heads: int
  mlp_ratio: float
  dtype: Any
  implementation: str
  initial: str = "normal"
  key_bias: bool = True
  attn_drop: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    keep: jax.Array | None = None,
    logit_bias: jax.Array | None = None,
    drop_keys: jax.Array | None = None,
    *,
    return_attention: str = "none",
  ) -> tuple[jax.Array, jax.Array | None]:
    """[R, L, D] -> ([R, L, D], attention); keep [2, R] scales the branches.

    For logit_bias, drop_keys and return_attention see `Attention`.
    """

    def residual(x: jax.Array, y: jax.Array, branch: int) -> jax.Array:
      y = y.astype(jnp.float32)
      return x + (y if keep is None else y * keep[branch][:, None, None])

    y, attention = Attention(
      self.num_heads,
      self.dtype,
      self.implementation,
      self.initial,
      self.key_bias,
      self.attn_drop,
      name="attn",
    )(
      LayerNorm(name="norm1")(x),
      return_attention=return_attention,
      logit_bias=logit_bias,
      drop_keys=drop_keys,
    )
    x = residual(x, y, 0)
    hidden = int(x.shape[-1] * self.mlp_ratio)
    y = Mlp(hidden, self.dtype, self.initial, name="mlp")(
      LayerNorm(name="norm2")(x)
    )
    return residual(x, y, 1), attention


class ClassAttention(nn.Module):
  """Attention of the class token: [R, 1, D], [R, L, D] -> [R, 1, D].

  Source: the class-attention layers of CaiT (arXiv:2103.17239).
  """

  num_heads: int
  dtype: Any
  initial: str

  @nn.compact
  def __call__(
    self, cls: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """`tokens` hold the class token first; also its weights [R, A, L - 1]."""
    rows, _, d = cls.shape
    dense = functools.partial(
      nn.Dense, d, dtype=self.dtype, kernel_init=linear_init(self.initial)
    )
    split = lambda x: x.reshape(rows, -1, self.num_heads, d // self.num_heads)
    q = split(dense(name="q")(cls))
    k, v = split(dense(name="k")(tokens)), split(dense(name="v")(tokens))
    out = dense(name="proj")(ops.attention(q, k, v).reshape(rows, 1, d))
    return out, _weights(q, k, None)[:, :, 0, 1:]


class ReadoutBlock(nn.Module):
  """One class-attention block with layer scale; patches are unchanged."""

  num_heads: int
  mlp_ratio: float
  dtype: Any
  initial: str
  layer_scale: float

  @nn.compact
  def __call__(
    self, cls: jax.Array, patches: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """[R, 1, D], [R, N, D] -> [R, 1, D], attention [R, A, N]."""
    d = cls.shape[-1]
    constant = nn.initializers.constant(self.layer_scale)
    scales = [self.param(f"gamma_{i}", constant, (d,)) for i in (1, 2)]
    tokens = LayerNorm(name="norm1")(jnp.concatenate([cls, patches], axis=1))
    y, attention = ClassAttention(
      self.num_heads, self.dtype, self.initial, name="attn"
    )(tokens[:, :1], tokens)
    cls = cls + scales[0][None, None] * y.astype(jnp.float32)
    mlp = Mlp(int(d * self.mlp_ratio), self.dtype, self.initial, name="mlp")
    y = mlp(LayerNorm(name="norm2")(cls))
    return cls + scales[1][None, None] * y.astype(jnp.float32), attention
