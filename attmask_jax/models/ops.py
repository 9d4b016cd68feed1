"""Operations of a block whose backward passes store little.

Automatic differentiation keeps every intermediate array of an operation. These
keep their inputs, attention also its output, and statistics of a row, and
recompute the rest, which costs less than writing it to memory and reading it
back. Only reverse mode: no jvp, jacfwd or jax.hessian.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "attention"


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x times the normal distribution function: any shape."""
  return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
  """Gradient [...]: distribution function plus x times the density."""
  wide = x.astype(jnp.float32)
  below = 0.5 * jax.lax.erfc(-math.sqrt(0.5) * wide)
  density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
  return (((below + wide * density) * grad).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Normalises the last axis: [..., D], scale [D], bias [D] -> [..., D].

  The variance is taken in two passes: E[x^2] - E[x]^2 loses three digits.
  """
  return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The result; the input, its mean and 1 / std [..., 1], and the scale."""
  mean = jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
  y = (x - mean) * inverse * _as_row(scale, x) + _as_row(bias, x)
  return y, (x, mean, inverse, scale)


def _layer_norm_backward(
  saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  x, mean, inverse, scale = saved
  unit = (x - mean) * inverse
  rows = tuple(range(x.ndim - 1))
  inner = grad * _as_row(scale, x)
  average = lambda a: jnp.mean(a, axis=-1, keepdims=True)
  dx = inverse * (inner - average(inner) - unit * average(inner * unit))
  return dx, jnp.sum(grad * unit, axis=rows), jnp.sum(grad, axis=rows), None


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _as_row(vector: jax.Array, x: jax.Array) -> jax.Array:
  """[D] -> [1, ..., 1, D], of the rank of `x`."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(D / A)) v, per head.

  Products run in the type of the arguments, the softmax in float32.

  Args:
    q: [R, L', A, D / A]; L' is L, or 1 for a class token alone.
    k, v: [R, L, A, D / A].

  Returns:
    [R, L', A, D / A]. For policies of `jax.checkpoint` it and the softmax's
    maxima and sums have the name KEPT.
  """
  return _attention_forward(q, k, v)[0]


def _attention_forward(
  q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The result; and q, k, v, the result, maxima and sums with heads first."""
  # Heads first: products of contiguous matrices, without hidden transposes.
  q, k, v = map(_swap_heads, (q, k, v))
  logits = _product("raqc,rakc->raqk", q, k) * q.shape[-1] ** -0.5
  largest = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - largest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = _product("raqk,rakc->raqc", (weights / total).astype(v.dtype), v)
  kept = out.astype(v.dtype), largest, total
  out, largest, total = (checkpoint_name(x, KEPT) for x in kept)
  return _swap_heads(out), (q, k, v, out, largest, total)


def _attention_backward(
  saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, ...]:
  q, k, v, out, largest, total = saved
  dtype, scale = q.dtype, q.shape[-1] ** -0.5
  grad = _swap_heads(grad)
  logits = _product("raqc,rakc->raqk", q, k) * scale
  # Not exp(logits - log-sum-exp), which loses digits where logits are large.
  weights = jnp.exp(logits - largest) / total
  # The gradient of a softmax takes off its mean, which is <grad, out>.
  mean = jnp.sum(
    grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True
  )
  dlogits = weights * (_product("raqc,rakc->raqk", grad, v) - mean) * scale
  dlogits = dlogits.astype(dtype)
  dq = _product("raqk,rakc->raqc", dlogits, k)
  dk = _product("raqk,raqc->rakc", dlogits, q)
  dv = _product("raqk,raqc->rakc", weights.astype(dtype), grad)
  return tuple(_swap_heads(x.astype(dtype)) for x in (dq, dk, dv))


attention.defvjp(_attention_forward, _attention_backward)


def _swap_heads(x: jax.Array) -> jax.Array:
  """[R, L, A, D / A] <-> [R, A, L, D / A]."""
  return jnp.swapaxes(x, 1, 2)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """A matrix product that adds up in float32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
