"""The projection head against recorded numbers and hand-made ones."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from attmask_jax.models import heads

TOLERANCE = 1e-5  # tests/golden/attmask/README.md


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_golden_head(golden, kind):
  file = golden("attmask/head.npz")
  weights = reference.load(file, f"sd/{kind}/")
  if kind == "shared":
    del weights["last_layer2"]  # the same tensor twice
  head = heads.Head(
    out_dim=int(file["cfg/out_dim"]),
    patch_out_dim=int(file["cfg/patch_out_dim"]) * (kind == "separate"),
    hidden=int(file["cfg/hidden"]),
    bottleneck=int(file["cfg/bottleneck"]),
  )
  cls, patch = head.apply({"params": weights}, file["in/tokens"])
  z = head.apply({"params": weights}, file["in/cls_only"], method="project")
  only = head.apply({"params": weights}, z, method="cls_logits")
  for name, got in (("cls", cls), ("patch", patch), ("cls_only", only)):
    want = file[f"out/{kind}/{name}"]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_prototypes_are_cosines_times_gains():
  z = np.array([[3.0, 4.0]], np.float32)
  weights = {
    "weight_v": jnp.array([[2.0, 0.0], [0.0, -0.5]]),
    "weight_g": jnp.array([1.0, 3.0]),
  }
  got = heads.Prototypes(2).apply({"params": weights}, z)
  np.testing.assert_allclose(got, [[3.0, -12.0]], rtol=1e-6)


def test_mean_logit_is_logit_of_the_mean():
  # What the patch centre rests on: the last layer is linear.
  head = heads.Head(out_dim=12, hidden=8, bottleneck=4)
  tokens = jax.random.normal(jax.random.key(0), (3, 5, 6))
  variables = head.init(jax.random.key(1), tokens)
  z = head.apply(variables, tokens, method="project")
  logits = head.apply(variables, z, method="patch_logits")
  mean = head.apply(variables, z.mean((0, 1)), method="patch_logits")
  np.testing.assert_allclose(mean, logits.mean((0, 1)), atol=1e-6)


def test_gradients_of_the_prototypes_product_by_hand():
  rng = np.random.default_rng(0)
  x, w, slope = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((2, 3, 4), (4, 5), (2, 3, 5))
  )
  f = lambda x, w: jnp.sum(heads.matmul(x, w) * slope)
  dx, dw = jax.grad(f, (0, 1))(x, w)
  np.testing.assert_allclose(dx, slope @ w.T, rtol=1e-5, atol=1e-6)
  want = x.reshape(-1, 4).T @ slope.reshape(-1, 5)
  np.testing.assert_allclose(dw, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared, teacher", [(1, 1), (0, 1), (0, 0)])
def test_patch_prototypes_of_student_and_teacher(shared, teacher):
  config = small.config(
    {
      "method.shared_head": bool(shared),
      "method.shared_head_teacher": bool(teacher),
    }
  )
  made = heads.from_config(config.method)
  for head, alone in zip(made, (not shared, not teacher), strict=True):
    shapes = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, 2, 8)))[
      "params"
    ]
    assert ("last_layer2" in shapes) == alone


def test_one_norm_serves_all_hidden_layers():
  head = heads.Head(out_dim=4, hidden=8, bottleneck=4, norm="ln")
  variables = head.init(jax.random.key(0), jnp.ones((1, 2, 6)))
  mlp = variables["params"]["mlp"]
  assert set(mlp) == {"layer_0", "layer_1", "layer_2", "norm"}
  assert mlp["norm"]["scale"].shape == (8,)


def dense(x, weights):
  """float64 by hand."""
  kernel, bias = (np.float64(weights[name]) for name in ("kernel", "bias"))
  return x @ kernel + bias


def normed(x, weights, eps):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  scale, bias = (np.float64(weights[name]) for name in ("scale", "bias"))
  return (x - mean) / np.sqrt(var + eps) * scale + bias


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


# Hidden values of about 1e-3: a variance at which another epsilon shows.
FAINT = 1e-3 * np.random.default_rng(0).normal(size=(3, 6))


def noise(module):
  """Its parameters, of noise; norms keep their scales near 1."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(module.init, jax.random.key(0), FAINT)["params"]
  return jax.tree_util.tree_map_with_path(
    lambda path, x: np.float32(
      ("scale" in str(path))
      + (0 if "layer_0" in str(path) and "bias" in str(path) else 0.3)
      * rng.normal(size=x.shape)
    ),
    shapes,
  )


def test_norm_of_the_projection_by_hand():
  """PyTorch's default epsilon, 1e-5, and one norm for both hidden layers."""
  module = heads.ProjectionMlp(8, 4, 3, "gelu", "ln", jnp.float32, "normal")
  weights = noise(module)
  x = FAINT
  for i in range(2):
    x = gelu(normed(dense(x, weights[f"layer_{i}"]), weights["norm"], 1e-5))
  x = dense(x, weights["layer_2"])
  want = x / np.linalg.norm(x, axis=-1, keepdims=True)
  got = module.apply({"params": weights}, np.float32(FAINT))
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layers", [2, 3])
def test_projector_and_predictor_of_extrema_by_hand(layers):
  module = heads.Projector(hidden=8, out=4, layers=layers)
  weights = noise(module)
  x = FAINT
  for i in range(layers - 1):
    x = dense(x, weights[f"layer_{i}"])
    x = gelu(normed(x, weights[f"norm_{i}"], 1e-5))
  want = dense(x, weights[f"layer_{layers - 1}"])
  got = module.apply({"params": weights}, np.float32(FAINT))
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
