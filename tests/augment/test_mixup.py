"""Mixing and erasing against recorded numbers, plain loops, statistics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attmask_jax import mesh
from attmask_jax.augment import mixup

NO_BOX = np.zeros(4, np.int32)
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


def _rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


def _images(rows: int = 8, side: int = 6) -> np.ndarray:
  return _rng(1).normal(size=(rows, side, side + 2, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_golden_images_and_targets(golden, kind: str) -> None:
  file = golden("mae/finetune_extras.npz")
  images = jnp.asarray(file["in/mix/x"].transpose(0, 2, 3, 1))
  box, lam = NO_BOX, file["in/mixup/lam"]
  if kind == "cutmix":
    box = file["in/cutmix/bbox"][[0, 2, 1, 3]].astype(np.int32)
    lam = file["out/cutmix/lam"]
  got = mixup.mix_images(images, jnp.float32(lam), box, group=None)
  want = file[f"out/{kind}/x"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  targets = mixup.soft_targets(
    jnp.asarray(file["in/mix/target"], jnp.int32),
    int(file["cfg/ncls"]),
    smoothing=0.1,
  )
  got = mixup.mix_targets(targets, jnp.float32(lam), group=None)
  np.testing.assert_allclose(got, file[f"out/{kind}/target"], rtol=0, atol=1e-6)


def test_golden_losses_of_mixed_smoothed_and_plain_targets(golden) -> None:
  file = golden("mae/finetune_extras.npz")
  logits = jnp.asarray(file["in/ce/logits"])
  labels = jnp.asarray(file["in/mix/target"], jnp.int32)
  classes = int(file["cfg/ncls"])
  targets = {
    "soft": jnp.asarray(file["out/mixup/target"]),
    "smooth": mixup.soft_targets(labels, classes, smoothing=0.1),
    "plain": mixup.soft_targets(labels, classes, smoothing=0.0),
  }
  for name, rows in targets.items():
    got = jnp.mean(optax.losses.softmax_cross_entropy(logits, rows))
    np.testing.assert_allclose(got, file[f"out/ce/{name}"], rtol=1e-6)


# --- draws ------------------------------------------------------------------


def test_both_kinds_come_as_often_as_asked() -> None:
  rng, size = _rng(), (40, 60)
  draws = [
    mixup.draw(
      rng,
      mixup_alpha=0.8,
      cutmix_alpha=1.0,
      prob=0.9,
      switch_prob=0.3,
      size=size,
    )  # fmt: skip
    for _ in range(4000)
  ]
  lam = np.array([d["mix_lam"] for d in draws])
  top, left, bottom, right = np.array([d["mix_box"] for d in draws]).T
  assert lam.dtype == np.float32 and draws[0]["mix_box"].dtype == np.int32
  area = (bottom - top) * (right - left)
  assert top.min() == left.min() == 0
  assert bottom.max() == 40 and right.max() == 60
  # Five standard deviations of 4,000 draws. A box less than 2 px high is none:
  # sqrt(1 - lam) < 2 / 40, which lam does once in 400.
  assert abs(np.mean(area > 0) - 0.9 * 0.3) < 5 * math.sqrt(0.2 / 4000) + 1e-3
  assert abs(np.mean((lam == 1) & (area == 0)) - 0.1) < 0.025
  cut = area > 0
  np.testing.assert_allclose(lam[cut], 1 - area[cut] / 2400, atol=1e-6)
  # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1)).
  blended = lam[(area == 0) & (lam < 1)]
  assert abs(blended.mean() - 0.5) < 5 * math.sqrt(0.0962 / len(blended))
  assert abs(blended.var() - 1 / 10.4) < 0.008


def test_the_box_is_a_clipped_rectangle_around_the_drawn_centre() -> None:
  size, clipped = (21, 30), 0
  for seed in range(200):
    got = mixup.draw(
      _rng(seed), mixup_alpha=0, cutmix_alpha=0.6, prob=1.0, switch_prob=0.5,
      size=size,
    )  # fmt: skip
    rng = _rng(seed)
    rng.random(2)
    share = math.sqrt(1 - rng.beta(0.6, 0.6))
    inside = np.zeros(size, bool)
    cy, cx = rng.integers(21), rng.integers(30)
    half_y, half_x = int(21 * share) // 2, int(30 * share) // 2
    for y in range(21):
      for x in range(30):
        inside[y, x] = -half_y <= y - cy < half_y and -half_x <= x - cx < half_x
    clipped += inside.sum() < 4 * half_y * half_x
    top, left, bottom, right = got["mix_box"]
    want = np.zeros(size, bool)
    want[top:bottom, left:right] = True
    np.testing.assert_array_equal(inside, want)
    assert got["mix_lam"] == pytest.approx(1 - inside.mean())
  assert 50 < clipped < 200


@pytest.mark.parametrize(
  ("alphas", "prob", "kinds"),
  [
    ((0.8, 0.0), 1.0, {"mixup"}),
    ((0.0, 1.0), 1.0, {"cutmix"}),
    ((0.0, 0.0), 1.0, {"none"}),
    ((0.8, 1.0), 0.0, {"none"}),
    ((0.8, 1.0), 1.0, {"mixup", "cutmix"}),
  ],
)
def test_a_kind_is_off_at_zero(
  alphas: tuple[float, float], prob: float, kinds: set[str]
) -> None:
  seen = set()
  for seed in range(40):
    got = mixup.draw(
      _rng(seed), mixup_alpha=alphas[0], cutmix_alpha=alphas[1], prob=prob,
      switch_prob=0.5, size=(224, 224),
    )  # fmt: skip
    blended = "none" if got["mix_lam"] == 1 else "mixup"
    seen.add("cutmix" if got["mix_box"].any() else blended)
  assert seen == kinds


# --- mixing -----------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 2, 4, 7), (0, 0, 6, 8)])
@pytest.mark.parametrize("group", [2, 4, None])
def test_mixing_against_a_loop(box: tuple, group: int | None) -> None:
  images, lam = _images(), 0.3
  top, left, bottom, right = box
  want = images.copy()
  for i in range(8):
    g = group or 8
    j = i // g * g + (g - 1 - i % g)
    if bottom > top:
      want[i, top:bottom, left:right] = images[j, top:bottom, left:right]
    else:
      want[i] = 0.3 * images[i] + 0.7 * images[j]
  mix = jax.jit(functools.partial(mixup.mix_images, group=group))
  got = mix(images, jnp.float32(lam), jnp.asarray(box, jnp.int32))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_lambda_one_changes_no_bit() -> None:
  images = _images()
  got = mixup.mix_images(jnp.asarray(images), jnp.float32(1), NO_BOX, group=8)
  np.testing.assert_array_equal(got, images)


def test_soft_targets_by_hand() -> None:
  got = mixup.soft_targets(jnp.asarray([2, 0]), 4, smoothing=0.2)
  want = [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]
  np.testing.assert_allclose(got, want, atol=1e-7)
  mixed = mixup.mix_targets(got, jnp.float32(0.25), group=2)
  want = [[0.65, 0.05, 0.25, 0.05], [0.25, 0.05, 0.65, 0.05]]
  np.testing.assert_allclose(mixed, want, atol=1e-7)


# --- erasing ----------------------------------------------------------------


def test_noise_fills_the_box_and_nothing_else() -> None:
  images = np.full((3, 64, 80, 3), 7, np.float32)
  boxes = np.array([[0, 0, 64, 80], [5, 8, 60, 71], [0, 0, 0, 0]], np.int32)
  key, rows = jax.random.key(0), jnp.arange(3)
  got = np.asarray(mixup.erase(images, boxes, key, rows))
  inside = np.zeros(images.shape, bool)
  for i, (top, left, bottom, right) in enumerate(boxes):
    inside[i, top:bottom, left:right] = True
  np.testing.assert_array_equal(got[~inside], images[~inside])
  for i in range(2):
    values = got[i][inside[i]]
    # N(0, 1), each value its own: five standard errors of the moments.
    assert len(np.unique(values)) > 0.99 * len(values)
    assert abs(values.mean()) < 5 / math.sqrt(len(values))
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / len(values))
  channels = got[0].reshape(-1, 3)
  assert np.abs(np.corrcoef(channels.T) - np.eye(3)).max() < 0.07
  both = inside[0] & inside[1]
  assert abs(np.corrcoef(got[0][both], got[1][both])[0, 1]) < 0.05


def test_noise_belongs_to_the_row_and_the_step() -> None:
  images = jnp.zeros((4, 5, 5, 3))
  boxes = jnp.tile(jnp.asarray([[0, 0, 5, 5]], jnp.int32), (4, 1))
  rows = jnp.asarray([3, 0, 2, 9], jnp.int32)
  noise = mixup.erase(images, boxes, jax.random.key(0), rows)
  turned = mixup.erase(images, boxes, jax.random.key(0), rows[::-1])
  np.testing.assert_array_equal(noise, turned[::-1])
  later = mixup.erase(images, boxes, jax.random.key(1), rows)
  assert not np.any(np.asarray(noise) == np.asarray(later))


# --- devices ----------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 2, 4, 7)])
def test_one_device_and_eight_agree_without_talking(box: tuple) -> None:
  def prepare(batch: dict, lam: jax.Array, box: jax.Array, group: int | None):
    key = jax.random.key(0)
    x = mixup.erase(batch["images"], batch["erase"], key, batch["position"])
    y = mixup.soft_targets(batch["label"], 5, smoothing=0.1)
    return (
      mixup.mix_images(x, lam, box, group=group),
      mixup.mix_targets(y, lam, group=group),
    )

  host = {
    "images": _images(32),
    "erase": np.tile(np.array([[1, 1, 5, 4]], np.int32), (32, 1)),
    "label": np.arange(32, dtype=np.int32) % 5,
    "position": np.arange(32, dtype=np.int32),
  }
  results, programs = [], []
  for count, group in ((1, 4), (8, 4), (8, None)):
    m = mesh.make_mesh(devices=jax.devices()[:count])
    whole, split = mesh.replicated(m), mesh.batch_sharding(m)
    step = jax.jit(
      functools.partial(prepare, group=group),
      in_shardings=(split, whole, whole),
      out_shardings=split,
    )
    given = (mesh.shard(m, host), jnp.float32(0.3), jnp.asarray(box, jnp.int32))
    programs.append(step.lower(*given).compile().as_text())
    results.append(jax.device_get(step(*given)))
  for one, eight in zip(*results[:2], strict=True):
    np.testing.assert_allclose(one, eight, rtol=0, atol=1e-6)
  assert not [name for name in COLLECTIVES if name in programs[1]]
  # The whole batch as one group does need it: the words are the right ones.
  assert "collective-permute" in programs[2] or "all-" in programs[2]
