"""Comparisons of precisions notice what is wrong, and pass what is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from attmask_jax.gpu_check import parity
from attmask_jax.gpu_check.parity import Check
from attmask_jax.models import ops

SHAPE = (2, 9, 2, 16)
METHOD = {"run.scan": False, "data.batch_size": 8, "evals.knn": False}


def test_relative_error_by_hand():
  got = {"a": np.array([1.0, 2.0]), "b": np.array([3.0])}
  want = {"a": np.array([1.0, 0.0]), "b": np.array([2.0])}
  # Differences 0, 2, 1 and values 1, 0, 2.
  assert parity.relative_error(got, want) == pytest.approx((5 / 5) ** 0.5)
  assert parity.relative_error(want, want) == 0


def test_a_check_that_is_no_number_fails():
  assert Check("", 0.1, 0.1).passed
  assert not Check("", 0.11, 0.1).passed
  assert not Check("", float("nan"), 0.1).passed


def test_the_formula_is_that_of_numpy():
  q, k, v = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype("f4")
  want = np.empty(SHAPE)
  for r in range(SHAPE[0]):
    for a in range(SHAPE[2]):
      weights = np.exp(q[r, :, a] @ k[r, :, a].T / 4)  # the root of 16
      weights /= weights.sum(axis=1, keepdims=True)
      want[r, :, a] = weights @ v[r, :, a]
  # Float32, sums of 16 and 9 terms.
  np.testing.assert_allclose(parity.plain_attention(q, k, v), want, rtol=1e-4)


def test_attention_is_within_its_tolerance():
  checks = parity.attention(SHAPE, cudnn=False)
  assert [c.name for c in checks] == [
    "9 tokens, float32, output", "9 tokens, float32, gradient",
    "9 tokens, bfloat16, output", "9 tokens, bfloat16, gradient",
  ]  # fmt: skip
  assert all(check.passed for check in checks), checks
  # bfloat16 really took part: a rounding is 2^-9 at most, on average a third.
  assert all(check.error > 2**-11 for check in checks[2:])


@pytest.mark.parametrize(
  "wrong",
  [
    lambda q, k, v: parity.plain_attention(1.05 * q, k, v),  # of another scale
    lambda q, k, v: parity.plain_attention(q, k, v)[:, ::-1],
    lambda q, k, v: parity.plain_attention(q, k, v) * jnp.nan,
  ],
)
def test_wrong_attention_is_noticed(monkeypatch, wrong):
  monkeypatch.setattr(ops, "attention", wrong)
  assert not any(c.passed for c in parity.attention(SHAPE, cudnn=False))


def test_cudnn_is_compared_too(monkeypatch):
  """On this machine with another function in its place."""
  monkeypatch.setattr(parity, "fused_attention", ops.attention)
  checks = parity.attention(SHAPE, cudnn=True)
  assert [c.error for c in checks[4:]] == [c.error for c in checks[2:4]]
  assert [c.name for c in checks[4:]] == [
    "9 tokens, cudnn, output", "9 tokens, cudnn, gradient",
  ]  # fmt: skip


def test_a_kernel_that_does_not_run_leaves_the_others(monkeypatch):
  def missing(q, k, v):
    raise RuntimeError("cuDNN is not detected.\nmore")

  monkeypatch.setattr(parity, "fused_attention", missing)
  checks = parity.attention(SHAPE, cudnn=True)
  assert [c.passed for c in checks] == [True] * 4 + [False] * 2
  assert checks[4].name == "9 tokens, cudnn (cuDNN is not detected.), output"


@pytest.mark.parametrize("arg", ["random", "mae", "extrema"])
def test_methods_in_bfloat16(arg):
  family = "attmask" if arg == "random" else arg
  config = small.config(METHOD, arg=family)
  if arg == "random":
    config.method.mask = "random"
  loss, gradient = parity.method(config, cudnn=False)
  assert loss.name == "bfloat16, loss"
  assert 0 < loss.error and loss.passed
  # Networks of width 16 average few roundings.
  assert 2**-11 < gradient.error < 3 * gradient.tolerance


def test_a_wrong_method_in_bfloat16_is_noticed(monkeypatch):
  attention = ops.attention

  def wrong(q, k, v):
    """Scales by the root of twice the width, in bfloat16 alone."""
    return attention(q * (0.7 if q.dtype == jnp.bfloat16 else 1), k, v)

  # Pronounced attention, unlike that of a fresh network.
  init = jax.nn.initializers.normal(1.0)
  monkeypatch.setattr(parity.ops, "attention", wrong)
  from attmask_jax.models import layers

  monkeypatch.setattr(layers, "linear_init", lambda kind: init)
  checks = parity.method(small.config(METHOD, arg="mae"), cudnn=False)
  assert not checks[1].passed
