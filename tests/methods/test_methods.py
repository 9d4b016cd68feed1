"""What every method promises the loop, see attmask_jax/methods/__init__.py."""

import inspect

import jax
import numpy as np
import pytest
import small

from attmask_jax import trees
from attmask_jax.methods import METHODS

PRETRAINING = sorted(set(METHODS) - {"classify"})
DECLARED = (
  "teacher_first", "batch_coupled", "frozen_at_start", "untrained",
  "undecayed", "lr_scale", "classifies",
)  # fmt: skip
CALLED = {
  "from_config": ["config", "steps_per_epoch"],
  "init": ["rng"],
  "at": ["step"],
  "item_extras": ["epoch", "index"],
  "loss": ["params", "teacher", "aux", "batch", "rng", "scalars"],
  "update_aux": ["aux", "stats"],
}


@pytest.mark.parametrize("name", METHODS)
def test_members_of_the_contract(name):
  method = METHODS[name]
  for member, wanted in CALLED.items():
    found = list(inspect.signature(getattr(method, member)).parameters)
    assert [x for x in found if x != "self"] == wanted, member
  for member in DECLARED:
    assert hasattr(method, member), member


def paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {trees.path_name(path): np.shape(leaf) for path, leaf in leaves}


def tiny(name):
  """A run of a method on generated images, as small as it goes."""
  from configs import tiny

  config = tiny.get_config(name)
  known = config.to_dict()
  changes = {
    key: value
    for key, value in small.SIZES.items()
    if key.split(".")[1] in known[key.split(".")[0]]
  }
  changes |= {"data.batch_size": 8, "data.shapes_train": 16}
  config.update_from_flattened_dict(changes)
  return config.lock()


@pytest.mark.parametrize("name", PRETRAINING)
def test_trees_and_one_loss(name):
  built, state, _ = small.parts(tiny(name))
  params, teacher, aux = jax.eval_shape(built.method.init, jax.random.key(0))
  # The moving average walks the teacher's paths.
  assert paths(teacher).items() <= paths(params).items()
  (batch, _), *_ = small.arguments(built, 1)
  loss, stats, metrics, per_image = small.loss_of(
    built.method,
    state.params,
    state.teacher,
    state.aux,
    batch,
    jax.random.key(1),
    built.method.at(0),
  )
  assert loss.shape == () and np.isfinite(loss)
  assert np.isfinite(metrics["loss"])
  assert set(per_image) == set(built.method.per_image)
  moved = jax.eval_shape(built.method.update_aux, state.aux, stats)
  assert paths(moved) == paths(aux)


@pytest.mark.parametrize("family", PRETRAINING)
def test_bytes_are_normalised_inside_the_loss(family):
  method, trees, batch = small.example(arg=family)
  key, scalars = jax.random.key(1), method.at(0)
  got, *_ = small.loss_of(method, *trees, batch, key, scalars)
  batch = small.floats(batch)
  want, *_ = small.loss_of(method, *trees, batch, key, scalars)
  np.testing.assert_allclose(got, want, rtol=1e-5)


# No mask is drawn, and all rows are masked alike.
SAME_MASKS = {
  "attmask": {"method.mask": "none", "method.patch_weight": 0.0},
  "extrema": {"method.mask_ratio": 0.0, "method.num_masks": 1},
  "mae": {"method.mask": "grid"},
}
OF_TEACHER = {"attmask": "teacher_entropy", "extrema": "target_std"}


@pytest.mark.parametrize("family", PRETRAINING)
def test_drop_path_is_drawn_for_each_row_of_the_student(family):
  """Of the same image in all rows, each row drops other branches."""

  def run(rate, key):
    changes = {"method.drop_path": rate, "method.variant": "16x2x2"}
    changes |= SAME_MASKS[family]
    method, trees, batch = small.example(changes, arg=family, rows=8)
    same = {k: np.repeat(x[:1], 8, axis=0) for k, x in batch.items()}
    batch = small.floats(same | {"position": batch["position"]})
    loss, values, grads = small.gradient(
      method, trees, batch, jax.random.key(key), method.at(0)
    )
    rows = {k: np.asarray(g[:, 0]).reshape(8, -1) for k, g in grads.items()}
    return float(loss), values.get(OF_TEACHER.get(family)), rows

  loss, of_teacher, rows = run(0.0, 0)
  (first, also, dropped), (second, *_) = run(0.5, 0), run(0.5, 1)
  assert len({loss, first, second}) == 3
  if family in OF_TEACHER:  # which drops nothing
    # Of equal rows: ExtreMA's is 0 but for rounding.
    np.testing.assert_allclose(also, of_teacher, rtol=1e-6, atol=1e-6)
  for name, whole in rows.items():
    scale = np.abs(whole).max()
    np.testing.assert_allclose(whole - whole[:1], 0, atol=1e-4 * scale)
    # Two blocks, of which one drops: 4 ways for a row.
    apart = dropped[name][:, None] - dropped[name][None]
    apart = np.abs(apart).max(-1) > 1e-3 * scale
    assert 2 <= len({tuple(row) for row in apart.tolist()}) <= 4, name


@pytest.mark.parametrize("family", PRETRAINING)
def test_the_loss_of_a_batch_is_the_mean_of_its_images(family):
  """With drop path and masks that leave some rows whole, too."""
  changes = {"method.drop_path": 0.5}
  if family == "attmask":
    changes |= {"method.mask_prob": 0.5, "data.local_crops": 0}
  method, trees, batch = small.example(changes, arg=family)
  key, scalars = jax.random.key(1), method.at(0)
  if family == "attmask":
    scalars = scalars | {"n_mask": np.int32(6)}
  run = lambda batch: small.loss_of(method, *trees, batch, key, scalars)[2]
  whole = run(batch)
  parts = [run({k: x[i : i + 1] for k, x in batch.items()}) for i in range(4)]
  for name in {"loss", "cls", "patch", "mask_ratio"} & whole.keys():
    got = np.mean([part[name] for part in parts])
    np.testing.assert_allclose(whole[name], got, rtol=1e-5, err_msg=name)
  if family == "attmask":
    assert len({float(part["masked_share"]) for part in parts}) > 1


def visible_by_contrast(method, trees, batch, key):
  """[B, N] bool: patches whose contrast moves the loss.

  A target scaled by its own patch's contrast does not see it: the encoder
  does, of what is visible.
  """
  batch = small.floats(batch)
  *_, grads = small.gradient(method, trees, batch, key, {})
  pixels = small.in_patches(batch["images"])
  pixels = pixels - pixels.mean(-1, keepdims=True)
  slope = np.abs(
    (small.in_patches(np.asarray(grads["images"])) * pixels).sum(-1)
  )
  return slope[:, 0] > 1e-3 * slope.max()


def test_guided_masks_of_mae_ask_the_average_of_the_encoder():
  method, trees, batch = small.example(
    {"method.mask": "attmask_high"}, arg="mae"
  )
  attention = jax.jit(method.attention)

  def visible(weights):
    scores = np.asarray(attention(weights, batch["images"][:, 0])).mean(1)
    return np.argsort(np.argsort(scores)) < 16 - method.n_hidden

  got = visible_by_contrast(method, trees, batch, jax.random.key(0))
  np.testing.assert_array_equal(got, visible(trees[1]))
  assert (visible(trees[0]) != visible(trees[1])).any()


def test_guided_masks_of_extrema_follow_the_teacher_and_its_view():
  method, trees, batch = small.example(
    {"method.mask": "attmask_high"}, arg="extrema"
  )
  attention = jax.jit(method.attention)

  def rule(weights, view):
    scores = np.asarray(attention(weights, batch["images"][:, view])).mean(1)
    return np.argsort(np.argsort(scores)) < 8  # two subsets of 4

  visible = small.visible(method, trees, batch, jax.random.key(0), {})
  np.testing.assert_array_equal(visible[:, 0], rule(trees[1], 1))
  assert not visible[:, 1].any()  # no gradient reaches what the teacher sees
  for weights, view in ((trees[1], 0), (trees[0], 1)):
    assert (rule(weights, view) != rule(trees[1], 1)).any()


def test_each_subset_of_extrema_drops_its_own_branches():
  changes = {"method.drop_path": 0.5}
  method, (params, *_), batch = small.example(changes, arg="extrema")
  same = np.tile(np.arange(4, dtype=np.int32), (4, 2, 1))
  images = small.normalised(batch["images"][:, 0])
  predict = jax.jit(method.predict)
  pred = predict(params, images, same, batch, jax.random.key(0))
  assert (np.abs(pred[:, 0] - pred[:, 1]).max(-1) > 1e-4).any()
