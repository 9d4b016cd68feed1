"""Masks against recorded ones, set relations and hand counts."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attmask_jax.methods import masking
from attmask_jax.rows import row_keys


def cases(file):
  return sorted({k.split("/")[1] for k in file.files if "/case" in k})


def hints(file, case):
  keys = (k for k in file.files if k.startswith(f"cfg/{case}/hint"))
  return sorted({k.split("/")[2] for k in keys})


def test_golden_attention_masks(golden):
  file = golden("attmask/masks.npz")
  assert cases(file)
  for case in cases(file):
    scores = jnp.asarray(file[f"in/{case}/attention"])
    for i, ratio in enumerate(file[f"cfg/{case}/ratios"]):
      n, _ = masking.attention_counts(scores.shape[1], float(ratio), 0.0, 0.0)
      assert n == file[f"out/{case}/count/r{i}"]
      for policy in ("attmask_high", "attmask_low"):
        got = masking.attention_mask(scores, policy=policy, n_mask=n)
        want = file[f"out/{case}/{policy}/r{i}"]
        np.testing.assert_array_equal(got, want, err_msg=f"{case} {policy}")


def test_golden_hints(golden):
  file = golden("attmask/masks.npz")
  for case in cases(file):
    scores = jnp.asarray(file[f"in/{case}/attention"])
    rows, patches = scores.shape
    for hint in hints(file, case):
      ratio, second, show_max = (
        float(file[f"cfg/{case}/{hint}/{name}"])
        for name in ("ratio", "ratio_second_draw", "show_max")
      )
      n_mask, n_show = masking.attention_counts(
        patches, ratio, second, show_max
      )
      assert n_show == file[f"out/{case}/{hint}/n_reveal"]
      top = file[f"out/{case}/{hint}/top_set"]
      base = file[f"out/{case}/{hint}/base_mask"]
      n_eligible = int(patches * show_max)
      place = masking.rank(scores)
      np.testing.assert_array_equal(place < n_eligible, top)
      np.testing.assert_array_equal(place < n_mask, base)
      mask = masking.attention_mask(
        scores,
        policy="attmask_hint",
        n_mask=n_mask,
        keys=row_keys(jax.random.key(0), jnp.arange(rows)),
        n_show=n_show,
        n_eligible=n_eligible,
      )
      revealed = base & ~np.asarray(mask)
      assert not (np.asarray(mask) & ~base).any()
      assert not (revealed & ~top).any()
      if not (top & ~base).any():
        assert (revealed.sum(1) == n_show).all()
      assert (revealed.sum(1) <= n_show).all()


def draw_item(file, name, py_rng, np_rng):
  """One item of the reference's loader: ratio and mask for every crop."""
  ratios = np.atleast_1d(file[f"cfg/{name}/pred_ratio"]).tolist()
  variances = np.atleast_1d(file[f"cfg/{name}/pred_ratio_var"]).tolist()
  if len(variances) == 1:
    variances *= len(ratios)
  patch = int(file[f"cfg/{name}/patch"])
  for height, width in file[f"cfg/{name}/crop_hw"].tolist():
    ratio = masking.draw_ratio(py_rng, ratios, variances)
    grid = (height // patch, width // patch)
    if name.startswith("block"):
      yield masking.block_mask(py_rng, grid, ratio)
    else:
      yield masking.random_mask(np_rng, grid, ratio)


def test_golden_host_masks(golden):
  file = golden("attmask/masks.npz")
  names = [k.split("/")[1] for k in file.files if k.endswith("/crop_hw")]
  assert names
  np.testing.assert_array_equal(
    masking.BLOCK_LOG_ASPECT, file["cfg/log_aspect"]
  )
  for name in names:
    seed = int(file[f"cfg/{name}/seed"])
    py_rng, np_rng = random.Random(seed), np.random.RandomState(seed)
    for i, mask in enumerate(draw_item(file, name, py_rng, np_rng)):
      np.testing.assert_array_equal(mask, file[f"out/{name}/mask{i}"])
    assert py_rng.random() == file[f"out/{name}/next_python_random"]


def test_counts_truncate_in_double_precision():
  # 100 * 0.29 is 28.999999999999996; in float32 it would be 29.
  assert masking.attention_counts(100, 0.29, 0.0, 0.0) == (28, 0)
  # (0.1 * 0.3) * 100 is 3.0 but 0.1 * (0.3 * 100) may not be: order matters.
  assert masking.attention_counts(196, 0.5, 0.45, 0.1) == (98, 8)


def test_rank_ties_go_to_the_lowest_index():
  scores = jnp.array([[0.2, 0.5, 0.5, 0.1, 0.5]])
  np.testing.assert_array_equal(masking.rank(scores), [[3, 0, 1, 4, 2]])


def test_low_is_high_of_the_negative():
  scores = jax.random.normal(jax.random.key(0), (4, 30))
  low = masking.attention_mask(scores, policy="attmask_low", n_mask=7)
  for row, mask in zip(np.asarray(scores), np.asarray(low), strict=True):
    assert set(np.flatnonzero(mask)) == set(np.argsort(row)[:7])


def test_rows_are_cleared_with_the_given_probability():
  rows = 4000
  scores = jax.random.normal(jax.random.key(0), (rows, 10))
  keys = row_keys(jax.random.key(1), jnp.arange(rows))
  draw = lambda p: masking.attention_mask(
    scores, policy="attmask_high", n_mask=3, keys=keys, probability=p
  )
  assert (draw(1.0).sum(1) == 3).all()
  assert not draw(0.0).any()
  counts = np.asarray(draw(0.5).sum(1))
  assert set(counts) == {0, 3}
  # 4000 fair coins: 5 standard deviations are 158.
  assert abs((counts == 3).sum() - rows / 2) < 158


def test_every_eligible_patch_is_revealed_equally_often():
  rows, n_show, n_eligible = 6000, 2, 5
  place = jnp.tile(jnp.arange(8)[::-1][None], (rows, 1))  # rank 0 comes last
  draws = jax.random.uniform(jax.random.key(0), (rows, 8))
  shown = masking.reveal(place, draws, n_show=n_show, n_eligible=n_eligible)
  assert (shown.sum(1) == n_show).all()
  counts = np.asarray(shown.sum(0))
  assert not counts[:3].any()
  # Binomial(6000, 0.4): 5 standard deviations are 190.
  assert np.abs(counts[3:] - rows * 0.4).max() < 190


def test_hints_do_not_share_the_draw_that_keeps_a_row():
  """Among the rows that keep their mask every patch is revealed as often."""
  rows = 12000
  scores = jnp.tile(jnp.arange(8.0)[::-1][None], (rows, 1))  # 0 leads
  mask = masking.attention_mask(
    scores,
    policy="attmask_hint",
    n_mask=5,
    keys=row_keys(jax.random.key(2), jnp.arange(rows)),
    probability=0.5,
    n_show=1,
    n_eligible=4,
  )
  kept = np.asarray(mask)[np.asarray(mask).any(1)]
  assert abs(len(kept) - rows / 2) < 5 * (rows / 4) ** 0.5
  assert (kept.sum(1) == 4).all() and kept[:, 4].all()
  revealed = (~kept[:, :4]).sum(0)
  # Binomial(6000, 1/4): 5 standard deviations are 168.
  spread = 5 * (len(kept) * 3 / 16) ** 0.5
  assert np.abs(revealed - len(kept) / 4).max() < spread


def test_revealing_nothing_is_allowed():
  scores = jax.random.normal(jax.random.key(0), (2, 10))
  keys = row_keys(jax.random.key(1), jnp.arange(2))
  mask = masking.attention_mask(
    scores, policy="attmask_hint", n_mask=4, keys=keys
  )
  assert (mask.sum(1) == 4).all()


def test_hidden_ids_list_the_hidden_patches_first():
  mask = jnp.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
  _, ids, valid = masking.Hidden.of(mask, 2)
  np.testing.assert_array_equal(ids, [[1, 3], [0, 1], [0, 1]])
  np.testing.assert_array_equal(valid, [[1, 1], [0, 0], [1, 0]])


@pytest.mark.parametrize("ratio", [0.0, 0.13, 0.5, 0.75])
def test_block_masks_never_exceed_their_target(ratio):
  rng = random.Random(0)
  masks = [masking.block_mask(rng, (14, 14), ratio) for _ in range(50)]
  counts = np.array([m.sum() for m in masks])
  assert (counts <= ratio * 196).all()
  if ratio:
    assert counts.mean() > 0.8 * ratio * 196


def hidden_by(order, n_hidden):
  hidden = np.zeros(order.shape, bool)
  ids = np.asarray(order)[:, order.shape[1] - n_hidden :]
  np.put_along_axis(hidden, ids, True, axis=1)
  return hidden


@pytest.mark.parametrize("n_hidden, visible", [(14, 2), (8, 4)])
def test_hints_fill_no_more_places_than_are_visible(n_hidden, visible):
  """Of 16 patches, half may be hints: 7 (4) of the 8 most attended ones."""
  rows = 4000
  scores = jnp.tile(jnp.arange(16.0)[None], (rows, 1))
  order = masking.visible_first(
    "attmask_hint",
    keys=row_keys(jax.random.key(0), jnp.arange(rows)),
    grid=(4, 4),
    n_hidden=n_hidden,
    scores=scores,
    show_max=0.5,
  )
  shown = ~hidden_by(order, n_hidden)
  assert (shown.sum(1) == 16 - n_hidden).all()
  assert (shown[:, 8:].sum(1) == visible).all()
  # Each of the 8 as often: 5 standard deviations of the binomial.
  p = visible / 8
  spread = 5 * (rows * p * (1 - p)) ** 0.5
  assert np.abs(shown[:, 8:].sum(0) - rows * p).max() < spread


def test_the_grid_draws_nothing():
  orders = [
    masking.visible_first(
      "grid",
      keys=row_keys(jax.random.key(seed), jnp.arange(3)),
      grid=(5, 5),
      n_hidden=18,
    )
    for seed in (0, 1)
  ]
  assert orders[0].shape == (3, 25) and orders[0].dtype == np.int32
  np.testing.assert_array_equal(orders[0], orders[1])
  assert (orders[0] == orders[0][:1]).all()
