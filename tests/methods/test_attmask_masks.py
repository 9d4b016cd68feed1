"""What AttMask's student sees, read off the loss, and what it is drawn from."""

import collections

import jax
import numpy as np
import pytest
import small

from attmask_jax.methods import METHODS, masking

HINTS = {
  "method.mask": "attmask_hint",
  "method.mask_prob": 1.0,
  "method.show_max": 0.25,
  "data.local_crops": 0,
}


def places(method, teacher, images):
  """Rank of each patch in the teacher's attention, 0 = most: [B, V, N]."""
  attention = jax.jit(method.attention)
  scores = [
    np.asarray(attention(teacher, images[:, v])).mean(1)
    for v in range(images.shape[1])
  ]
  order = np.argsort(-np.stack(scores, axis=1), axis=-1, kind="stable")
  return np.argsort(order, axis=-1, kind="stable")


def scalars_of(method, n_mask, n_show=0):
  counts = {"n_mask": np.int32(n_mask), "n_show": np.int32(n_show)}
  return method.at(0) | counts


@pytest.mark.parametrize("policy", ["attmask_high", "attmask_low"])
def test_the_teacher_decides_what_the_student_sees(policy):
  changes = HINTS | {"method.mask": policy}
  method, trees, batch = small.example(changes)
  place = places(method, trees[1], batch["images"])
  if policy == "attmask_low":
    place = 15 - place
  assert (place != places(method, trees[0], batch["images"])).any()
  for n_mask in (0, 5, 8):
    visible = small.visible(
      method, trees, batch, jax.random.key(2), scalars_of(method, n_mask)
    )
    np.testing.assert_array_equal(visible, place >= n_mask)


def test_hints_are_among_the_most_attended():
  """A quarter of 16 patches may be revealed: the first 4, of 8 hidden."""
  method, trees, batch = small.example(HINTS)
  place = places(method, trees[1], batch["images"])
  sets = set()
  for key in range(4):
    visible = small.visible(
      method, trees, batch, jax.random.key(key), scalars_of(method, 8, 2)
    )
    revealed = visible & (place < 8)
    assert (revealed.sum(-1) == 2).all()
    assert not (revealed & (place >= 4)).any()
    assert (visible[place >= 8]).all()
    sets |= {tuple(row) for row in (place[revealed].reshape(-1, 2) % 4)}
  assert len(sets) > 3  # of 12 ordered pairs


def test_rows_are_masked_or_whole_and_views_by_themselves():
  changes = {"method.mask_prob": 0.5, "data.local_crops": 0}
  method, trees, batch = small.example(changes, rows=32)
  visible = small.visible(
    method, trees, batch, jax.random.key(0), scalars_of(method, 6)
  )
  hidden = 16 - visible.sum(-1)
  assert set(np.unique(hidden)) == {0, 6}
  assert len({tuple(row) for row in hidden.tolist()}) == 4
  # 64 fair coins: 5 standard deviations are 20.
  assert abs((hidden == 6).sum() - 32) < 20


def test_hidden_patches_of_the_loss_are_those_of_its_metrics():
  method, trees, batch = small.example(HINTS | {"method.mask_prob": 0.5})
  key, scalars = jax.random.key(1), scalars_of(method, 6, 2)
  visible = small.visible(method, trees, batch, key, scalars)
  _, _, values, _ = small.loss_of(method, *trees, batch, key, scalars)
  assert float(values["mask_ratio"]) == pytest.approx(1 - visible.mean())
  share = (~visible).any(-1).mean()
  assert float(values["masked_share"]) == pytest.approx(share)


@pytest.mark.parametrize("policy", masking.HOST_POLICIES)
def test_masks_of_the_batch_are_those_of_the_loss(policy):
  changes = {"method.mask": policy, "data.local_crops": 0}
  method, trees, batch = small.example(changes)
  visible = small.visible(method, trees, batch, jax.random.key(0), method.at(0))
  np.testing.assert_array_equal(~visible, batch["masks"])


def method_of(changes):
  config = small.config(changes)
  return METHODS["attmask"].from_config(config, steps_per_epoch=8)


def drawn(method, epoch, count=8):
  return np.stack([method.item_extras(epoch, i)["masks"] for i in range(count)])


@pytest.mark.parametrize("policy", masking.HOST_POLICIES)
def test_host_masks_follow_seed_epoch_image_and_view(policy):
  changes = {
    "method.mask": policy,
    "method.mask_ratio": (0.5,),
    "method.mask_ratio_var": (0.0,),
  }
  method = method_of(changes)
  masks = drawn(method, 1)
  np.testing.assert_array_equal(masks, drawn(method_of(changes), 1))
  assert (masks != drawn(method, 2)).any()
  assert (masks != drawn(method_of(changes | {"method.seed": 1}), 1)).any()
  assert (masks[:1] != masks[1:]).any((1, 2)).all()
  assert (masks[:, 0] != masks[:, 1]).any()


@pytest.mark.parametrize("policy", masking.HOST_POLICIES)
def test_no_host_masks_before_their_start_epoch(policy):
  changes = {
    "method.mask": policy,
    "method.mask_start_epoch": 1,
    "method.mask_ratio": (0.5,),
    "method.mask_ratio_var": (0.3,),
  }
  method = method_of(changes)
  assert not drawn(method, 0).any()
  assert drawn(method, 1).any((-2, -1)).all()


def test_hints_are_counted_by_a_ratio_of_their_own():
  method = method_of(HINTS | {
    "method.show_max": 0.5,
    "method.mask_ratio": (0.5,),
    "method.mask_ratio_var": (0.4,),
  })  # fmt: skip
  hints = collections.defaultdict(set)
  for step in range(200):
    now = method.at(step)
    hints[int(now["n_mask"])].add(int(now["n_show"]))
  assert len(hints) > 8
  assert all(len(counts) > 2 for counts in hints.values())
  assert set().union(*hints.values()) == set(range(8))  # .5 * .9 * 16 = 7.2


def test_ratios_follow_the_seed():
  counts = lambda seed: [
    int(method_of({"method.seed": seed}).at(step)["n_mask"])
    for step in range(20)
  ]
  assert counts(0) == counts(0) != counts(1)


def test_room_for_more_hidden_patches_adds_nothing():
  """A ratio that varies leaves padding behind the patches of a step."""
  losses = []
  for spread in (0.0, 0.3):
    changes = HINTS | {
      "method.mask_ratio": (0.5,), "method.mask_ratio_var": (spread,),
      "method.mask_prob": 0.5,
    }  # fmt: skip
    method, trees, batch = small.example(changes)
    _, _, values, _ = small.loss_of(
      method, *trees, batch, jax.random.key(1), scalars_of(method, 8, 2)
    )
    losses.append(float(values["patch"]))
  assert losses[0] > 0
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_losses_are_weighted_and_added():
  plain, *weighted = (
    small.loss_of(
      method, *trees, batch, jax.random.key(1), scalars_of(method, 6)
    )[2]
    for cls, patch in ((1.0, 1.0), (2.0, 3.0))
    for method, trees, batch in [
      small.example({"method.cls_weight": cls, "method.patch_weight": patch})
    ]
  )
  (values,) = weighted
  np.testing.assert_allclose(values["cls"], 2 * plain["cls"], rtol=1e-6)
  np.testing.assert_allclose(values["patch"], 3 * plain["patch"], rtol=1e-6)
  total = values["cls"] + values["patch"]
  np.testing.assert_allclose(values["loss"], total, rtol=1e-6)


def test_local_crops_drop_other_branches_than_global_ones():
  """Of four equal crops: two teachers' terms reach a local one, one a global.

  So its gradient is twice a global crop's, unless their branches differ.
  """
  ratio = {}
  for rate in (0.0, 0.5):
    changes = {
      "method.mask": "none", "method.patch_weight": 0.0,
      "method.drop_path": rate, "data.local_size": 16,
      "method.variant": "16x2x2",
    }  # fmt: skip
    method, trees, batch = small.example(changes)
    one = np.repeat(batch["images"][:1, :1], 2, axis=1).repeat(4, axis=0)
    batch = small.floats(batch | {"images": one, "local_images": one})
    *_, grads = small.gradient(
      method, trees, batch, jax.random.key(0), method.at(0)
    )
    near, far = (np.asarray(grads[k]) for k in ("images", "local_images"))
    ratio[rate] = np.abs(far - 2 * near).max() / np.abs(far).max()
  assert ratio[0.0] < 1e-4 and ratio[0.5] > 1e-2
