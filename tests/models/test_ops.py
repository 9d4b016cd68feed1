"""Values and gradients of ops.py against NumPy formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from attmask_jax.models import blocks, layers, ops, vit

STEP = 1e-6  # of difference quotients in float64


def draw(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape)


def gelu(x):
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, scale, bias):
  rows = x.reshape(-1, x.shape[-1])
  out = [
    (row - row.mean()) / math.sqrt(row.var() + 1e-5) * scale + bias
    for row in rows
  ]
  return np.stack(out).reshape(x.shape)


def attention(q, k, v):
  out = np.empty_like(q)
  for r, a in np.ndindex(q.shape[0], q.shape[2]):
    logits = q[r, :, a] @ k[r, :, a].T / math.sqrt(q.shape[-1])
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    out[r, :, a] = weights @ v[r, :, a]
  return out


CASES = {
  "gelu": (ops.gelu, gelu, [3 * draw(2, 3, 5)]),
  "layer_norm": (
    lambda *args: ops.layer_norm(*args, 1e-5),
    layer_norm,
    [2 + 3 * draw(2, 3, 8), draw(8), draw(8, seed=1)],
  ),
  "attention": (
    ops.attention,
    attention,
    [draw(2, 5, 3, 4, seed=i) for i in range(3)],
  ),
  "one query": (
    ops.attention,
    attention,
    [draw(2, 1, 3, 4), draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)],
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name):
  op, formula, arguments = CASES[name]
  got = op(*map(jnp.float32, arguments))
  np.testing.assert_allclose(got, formula(*arguments), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_difference_quotients(name):
  op, formula, arguments = CASES[name]
  weight = draw(*arguments[0].shape)
  score = lambda *args: jnp.sum(op(*args) * jnp.float32(weight))
  arrays = list(map(jnp.float32, arguments))
  grads = jax.grad(score, argnums=tuple(range(len(arrays))))(*arrays)
  for i, grad in enumerate(grads):
    assert grad.shape == arrays[i].shape
    want = np.empty(grad.shape)
    for place in np.ndindex(grad.shape):
      moved = [a.copy() for a in arguments]
      moved[i][place] += STEP
      above = np.sum(formula(*moved) * weight)
      moved[i][place] -= 2 * STEP
      below = np.sum(formula(*moved) * weight)
      want[place] = (above - below) / (2 * STEP)
    np.testing.assert_allclose(grad, want, atol=2e-5, rtol=0)


def test_large_values():
  """Where exponentials overflow or underflow in float32."""
  x = jnp.float32([-100.0, -20.0, 0.0, 20.0, 100.0])
  np.testing.assert_array_equal(ops.gelu(x), [-0.0, 0, 0, 20, 100])
  np.testing.assert_array_equal(
    jax.grad(lambda x: jnp.sum(ops.gelu(x)))(x), [0, 0, 0.5, 1, 1]
  )
  q = 1000 * jnp.ones((1, 3, 1, 4))
  k = q.at[0, 1].multiply(-1)
  v = jnp.arange(12.0).reshape(1, 3, 1, 4)
  out, back = jax.vjp(ops.attention, q, k, v)
  np.testing.assert_allclose(out[0, :, 0], (v[0, [0, 0, 0], 0] + v[0, 2]) / 2)
  for grad in back(jnp.ones_like(out)):
    assert np.isfinite(grad).all()
  np.testing.assert_allclose(grad[0, :, 0, 0], [1.5, 0, 1.5])  # of v


def products(closed, found):
  """Types of the operands of all matrix products of a jaxpr."""
  for equation in closed.eqns:
    if equation.primitive.name == "dot_general":
      found.append({str(x.aval.dtype) for x in equation.invars})
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        products(inner, found)
  return found


def test_products_in_bfloat16_are_so_backwards_as_well():
  q = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
  score = lambda *args: jnp.sum(ops.attention(*args).astype(jnp.float32))
  grads = jax.make_jaxpr(jax.grad(score, argnums=(0, 1, 2)))(q, q, q)
  assert [str(x.dtype) for x in grads.out_avals] == ["bfloat16"] * 3
  found = products(grads.jaxpr, [])
  assert len(found) == 7  # 2 forward, 5 backward
  assert all(types == {"bfloat16"} for types in found)


@pytest.mark.parametrize(
  "arg, wide",
  # AttMask: positions of local views 4, the class loss 2, with gradients.
  [("attmask", 6), ("mae", 0), ("extrema", 0)],
)
def test_products_of_a_step_in_bfloat16(arg, wide):
  config = small.config({"method.dtype": "bfloat16"}, arg=arg)
  run, state, step = small.parts(config)
  batch = next(run.pipeline.batches(0, 1))
  scalars = run.schedules.at(0) | run.method.at(0)
  found = products(jax.make_jaxpr(step)(state, batch, scalars).jaxpr, [])
  assert all(len(types) == 1 for types in found)  # none is converted on the way
  assert found.count({"float32"}) == wide


def test_bfloat16_is_close_to_float32():
  arrays = [jnp.bfloat16(draw(2, 5, 3, 4, seed=i)) for i in range(3)]
  wide = [x.astype(jnp.float32) for x in arrays]

  def outputs(arrays):
    out, back = jax.vjp(ops.attention, *arrays)
    return [np.float32(x) for x in (out, *back(jnp.ones_like(out)))]

  for got, want in zip(outputs(arrays), outputs(wide), strict=True):
    np.testing.assert_allclose(got, want, atol=0.04, rtol=0)


@pytest.mark.parametrize(
  "remat, largest",
  # In units of the block's input. Input 1, q k v 3, before GELU 4; with
  # "elementwise" and "dots" the projection 1, with the former attention 1 and
  # the softmax's statistics 1/2. "none": also the residual stream 1, outputs of
  # both norms 2, attention once more by tokens 1 (instead of the projection),
  # after GELU 4, and the norms' statistics 1/2.
  [("none", 18), ("elementwise", 10.5), ("dots", 9), ("full", 1)],
)
def test_what_a_scanned_block_keeps(remat, largest):
  depth, rows, tokens, width = 3, 2, 64, 8
  model = vit.ViT(width, depth, 2, 4, 32, remat=remat, scan=True)
  images = jnp.zeros((rows, 32, 32, 3))
  params = jax.eval_shape(model.init, jax.random.key(0), images)

  def score(params):
    return jnp.sum(model.apply(params, images).tokens)

  grads = jax.make_jaxpr(jax.grad(score))(params)
  scans = [e for e in grads.jaxpr.eqns if e.primitive.name == "scan"]
  forward = scans[0]
  stacked = forward.outvars[forward.params["num_carry"] :]
  size = sum(x.aval.size for x in stacked if x.aval.shape[1:2] == (rows,))
  kept = size / ((depth - 1) * rows * (tokens + 1) * width)
  assert kept == largest, [x.aval.shape for x in stacked]


def test_what_auto_stands_for(monkeypatch):
  assert blocks.recomputed("auto", scan=True) == "elementwise"
  assert blocks.recomputed("auto", scan=False) == "none"
  assert blocks.recomputed("dots", scan=True) == "dots"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert blocks.recomputed("auto", scan=True) == "none"


def test_explicit_weights_give_the_same():
  """A bias of zeros takes the path whose weights can be differentiated."""
  block = layers.Block(2, 4.0, jnp.float32, "xla")
  x = jnp.float32(draw(2, 5, 8))
  params = block.init(jax.random.key(0), x)
  want, _ = block.apply(params, x)
  got, _ = block.apply(params, x, None, jnp.zeros((2, 2, 5, 5)))
  np.testing.assert_allclose(got, want, atol=1e-6, rtol=0)
