"""Losses and centres against recorded numbers and plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attmask_jax.methods import losses

TOLERANCE = 2e-5  # tests/golden/attmask/README.md


def image_major(x, views):
  """[V * B, ...] view-major -> [B, V, ...]."""
  return jnp.asarray(x.reshape(views, -1, *x.shape[1:]).swapaxes(0, 1))


@pytest.mark.parametrize("case", ["A", "B", "C"])
def test_golden_loss(golden, case):
  file = golden("attmask/loss.npz")
  cfg = lambda name: file[f"cfg/{case}/{name}"]
  given = lambda name: file[f"in/{case}/{name}"]
  want = lambda name: file[f"out/{case}/{name}"]
  g, local = int(cfg("ng")), int(cfg("nl"))
  center, center2 = given("center")[0], given("center2")[0, 0]
  teacher = image_major(given("teacher_cls"), g)
  teacher_patch = image_major(given("teacher_patch"), g)
  masks = file[f"in/{case}/masks"].swapaxes(0, 1)  # [B, G, h, w]
  masks = jnp.asarray(masks.reshape(*masks.shape[:2], -1))
  student = {
    "global": image_major(given("student_cls"), g),
    "patch": image_major(given("student_patch"), g),
  }
  if local:
    student["local"] = image_major(given("student_local_cls"), local)

  def loss(student):
    temp = float(cfg("student_temp"))
    views = [student["global"]] + ([student["local"]] if local else [])
    cls = losses.cls_cross_entropy(
      losses.teacher_probs(teacher, center, temp=want("teacher_temp")),
      jnp.concatenate(views, axis=1),
      temp=temp,
    )
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    probs = losses.teacher_probs(
      rows(teacher_patch), center2, temp=want("teacher_patch_temp")
    )
    total = losses.masked_cross_entropy(
      probs, rows(student["patch"]), rows(masks), temp=temp
    )
    patch = jnp.mean(total / jnp.maximum(rows(masks).sum(-1), 1))
    cls, patch = cls * float(cfg("l1")), patch * float(cfg("l2"))
    return cls + patch, (cls, patch)

  (total, (cls, patch)), grads = jax.value_and_grad(loss, has_aux=True)(student)
  check = lambda got, name: np.testing.assert_allclose(
    got, want(name), rtol=0, atol=TOLERANCE, err_msg=name
  )
  check(total, "loss")
  check(cls, "cls")
  check(patch, "patch")
  back = lambda x: np.moveaxis(x, 1, 0).reshape(-1, *x.shape[2:])
  check(back(grads["global"]), "grad_student_cls")
  check(back(grads["patch"]).sum(1), "grad_student_patch_sum")
  if local:
    check(back(grads["local"]), "grad_student_local_cls")
  for name, old, mean, key in (
    ("center", center, teacher.mean((0, 1)), "center_momentum"),
    ("center2", center2, teacher_patch.mean((0, 1, 2)), "center_momentum2"),
  ):
    new = losses.update_center(old, mean, momentum=float(cfg(key)))
    np.testing.assert_allclose(
      new, want(name).reshape(-1), rtol=0, atol=TOLERANCE
    )


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_cls_cross_entropy_is_the_loop_over_pairs():
  rng = np.random.default_rng(0)
  b, g, v, k, temp = 3, 2, 5, 7, 0.1
  probs = softmax(rng.normal(size=(b, g, k)))
  logits = rng.normal(size=(b, v, k))
  total, pairs = 0.0, 0
  for i in range(g):
    for j in range(v):
      if i != j:
        log_q = np.log(softmax(logits[:, j] / temp))
        total += np.mean(-np.sum(probs[:, i] * log_q, axis=-1))
        pairs += 1
  got = losses.cls_cross_entropy(
    jnp.asarray(probs, jnp.float32), jnp.asarray(logits, jnp.float32), temp=temp
  )
  np.testing.assert_allclose(got, total / pairs, rtol=1e-5)  # float32 sums


def test_masked_cross_entropy_is_the_loop_over_hidden_patches():
  rng = np.random.default_rng(0)
  r, m, k, temp = 4, 6, 9, 0.1
  probs = softmax(rng.normal(size=(r, m, k)))
  logits = rng.normal(size=(r, m, k))
  valid = rng.random((r, m)) < 0.5
  valid[0] = False
  want = [
    sum(-probs[i, j] @ np.log(softmax(logits[i, j] / temp)) for j in hidden)
    for i, hidden in enumerate(map(np.flatnonzero, valid))
  ]
  got = losses.masked_cross_entropy(
    jnp.asarray(probs, jnp.float32),
    jnp.asarray(logits, jnp.float32),
    jnp.asarray(valid),
    temp=temp,
  )
  assert got[0] == 0
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_no_gradient_reaches_the_teacher():
  grad = jax.grad(lambda t: losses.teacher_probs(t, jnp.zeros(3), temp=0.1)[0])
  assert not grad(jnp.array([1.0, 2.0, 3.0])).any()


def test_entropy_of_a_uniform_and_of_a_certain_distribution():
  np.testing.assert_allclose(
    losses.entropy(jnp.full((2, 8), 1 / 8)), np.log(8), rtol=1e-6
  )
  assert losses.entropy(jnp.eye(4)) == 0
