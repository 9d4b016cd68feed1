"""The method: recorded training runs, its random draws, its temperatures."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small import loss_of

from attmask_jax import mesh as meshes
from attmask_jax import rows, trees
from attmask_jax.errors import InputError
from attmask_jax.methods import attmask, masking
from attmask_jax.models import heads, vit
from attmask_jax.runs import metrics
from attmask_jax.training import epoch, optim, train_step
from attmask_jax.training.schedules import Schedules

# Tolerances of the recorded runs: tests/golden/attmask/README.md.
LOSSES, ATTENTION, PARAMETERS, GRADIENT_NORMS = 5e-5, 1e-5, 5e-6, 1e-3


def build(file, scenario):
  """Method, schedules and optimiser of a recorded run."""
  cfg = lambda name: file[f"cfg/{name}"].item()
  own = lambda name: cfg(f"{scenario}/{name}")
  size = dict(out_dim=cfg("out_dim"), hidden=cfg("hidden"))
  ratio = own("pred_ratio")
  if scenario == "block":
    # The recorded block masks do not follow the ratio; the most hidden do.
    masks = file["out/block/masks"]
    ratio = masks.sum((-2, -1)).max() / masks[0, 0, 0].size
  head = heads.Head(**size, bottleneck=cfg("bottleneck"))
  method = attmask.AttMask(
    backbone=vit.ViT(
      width=cfg("dim"),
      depth=cfg("depth"),
      num_heads=cfg("heads"),
      patch_size=cfg("patch"),
      image_size=cfg("img"),
      drop_path=cfg("drop_path"),
    ),
    head=head,
    teacher_head=head,
    epochs=cfg("epochs"),
    steps_per_epoch=cfg("iters"),
    local_crops=sum(k.startswith("in/step0/local") for k in file.files),
    mask=scenario,
    mask_ratio=(float(ratio),),
    mask_ratio_var=(0.0,),
    mask_prob=cfg("masking_prob"),
    norm_last_layer=own("norm_last_layer"),
    cls_weight=cfg("lambda1"),
    patch_weight=cfg("lambda2"),
    student_temp=cfg("student_temp"),
    teacher_temp=(cfg("warmup_teacher_temp"), own("teacher_temp")),
    teacher_patch_temp=(
      cfg("warmup_teacher_patch_temp"),
      cfg("teacher_patch_temp"),
    ),
    temp_warmup_epochs=own("warmup_temp_epochs"),
    center_momentum=cfg("center_momentum"),
  )
  schedules = Schedules(
    lr=own("lr"),
    min_lr=cfg("min_lr"),
    warmup_epochs=own("warmup_epochs"),
    weight_decay=(cfg("weight_decay"), cfg("weight_decay_end")),
    momentum=(own("momentum"), 1.0),
    freeze_epochs=own("freeze_last_layer"),
    epochs=cfg("epochs"),
    steps_per_epoch=cfg("iters"),
  )
  optimizer = optim.Optimizer(
    clip=own("clip_grad"),
    betas=tuple(file["cfg/adamw_betas"].tolist()),
    eps=cfg("adamw_eps"),
  )
  return method, schedules, optimizer


def start(file, method, tx):
  """The recorded start state."""
  params, teacher = (
    reference.load(file, f"{name}/") for name in ("student", "teacher")
  )
  for tree in (params, teacher):
    del tree["head"]["last_layer2"]  # the shared layer, recorded twice
  _, _, aux = jax.jit(method.init)(jax.random.key(0))
  make = lambda tree: jax.tree.map(jnp.array, tree)
  params, teacher = make(params), make(teacher)
  zero = jnp.zeros((), jnp.int32)
  return train_step.TrainState(zero, params, teacher, aux, tx.init(params))


def batch_at(file, t):
  """Step t's crops, view-major there and image-major here."""

  def crops(name):
    keys = [k for k in file.files if k.startswith(f"in/step{t}/{name}")]
    views = [reference.nhwc(file[key]) for key in sorted(keys)]
    return np.stack(views, axis=1)

  images = crops("global")
  masks = file[f"in/step{t}/block_masks"].swapaxes(0, 1)
  return {
    "images": images,
    "local_images": crops("local"),
    "masks": masks.reshape(*masks.shape[:2], -1),
    "position": np.arange(len(images), dtype=np.int32),
    "label": file[f"in/step{t}/labels"],
  }


def image_major(x, crops=2):
  return x.reshape(crops, -1, *x.shape[1:]).swapaxes(0, 1)


def without_key_bias(tree, width):
  """Zeroes the key third of qkv biases.

  Its true gradient is 0; Adam blows rounding noise up to steps of size lr.
  """
  bias = np.array(tree["backbone"]["blocks"]["attn"]["qkv"]["bias"])
  bias[:, width : 2 * width] = 0
  tree["backbone"]["blocks"]["attn"]["qkv"]["bias"] = bias
  return tree


def gradient_norms(method, state, batch, scalars):
  """{reference name: norm before clipping} of one step."""
  rng = jax.random.fold_in(jax.random.key(0), state.step)
  loss = lambda params: (
    method.loss(params, state.teacher, state.aux, batch, rng, scalars).loss
  )
  grads = jax.grad(loss)(state.params)
  norms = reference.norms(grads)
  return {
    trees.path_name(path): leaf
    for path, leaf in jax.tree.leaves_with_path(norms)
  }


def norm_of(norms, reference_name):
  """Looks a reference parameter up in our stacked norms."""
  name, _ = reference._leaf(reference_name, np.zeros((1, 1, 1, 1)))
  parts = name.split(".")
  if "blocks" in parts:
    layer = int(parts.pop(parts.index("blocks") + 1))
    return norms["/".join(parts)][layer]
  return norms["/".join(parts)]


@pytest.mark.parametrize("scenario", ["attmask_high", "block"])
def test_golden_train_steps(golden, scenario):
  file = golden("attmask/train_steps.npz")
  want = lambda name: file[f"out/{scenario}/{name}"]
  method, schedules, optimizer = build(file, scenario)
  tx = optimizer.build(
    frozen_at_start=method.frozen_at_start, untrained=method.untrained
  )
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  state = start(file, method, tx)
  step_fn = train_step.make_step(
    method,
    tx,
    mesh,
    jax.tree.map(lambda _: meshes.replicated(mesh), state),
    seed=0,
  )
  norms_fn = jax.jit(gradient_norms, static_argnums=0)
  s = method.steps_per_epoch
  b = file["cfg/B"].item()
  track = epoch.Epoch(method, steps=s, positions=np.arange(b), batch_size=b)
  for t in range(schedules.total_steps):
    batch, scalars = batch_at(file, t), schedules.at(t) | method.at(t)
    norms = norms_fn(method, state, batch, scalars)
    for i, name in enumerate(want("param_names")):
      got = norm_of(norms, name)
      np.testing.assert_allclose(
        got, want("grad_norms_preclip")[t, i], rtol=GRADIENT_NORMS, atol=1e-6,
        err_msg=f"step {t}: {name}",
      )  # fmt: skip
    check_masks(file, scenario, method, state, batch, scalars, t)
    state, values, per_image = step_fn(state, batch, scalars)
    for name in ("loss", "cls", "patch"):
      np.testing.assert_allclose(
        values[name], want(name)[t], rtol=0, atol=LOSSES, err_msg=f"{name} {t}"
      )
    for name, key in (("center", "center"), ("center_patch", "center2")):
      np.testing.assert_allclose(
        state.aux[name], want(f"{key}_per_step")[t], rtol=0, atol=LOSSES
      )
    numbers = {k: float(v) for k, v in (values | scalars).items()}
    track.add(t, numbers, jnp.asarray(batch["label"]), per_image)
    if (t + 1) % s == 0:
      check_epoch(want, track.scores(), t // s)
      track.reset()
  check_parameters(file, scenario, state)


@functools.partial(jax.jit, static_argnums=0)
def hide(method, teacher, batch, scalars):
  attention = method.teacher_forward(
    teacher, rows.flatten(batch["images"])
  ).attention
  hidden = method.select_masks(attention, batch, jax.random.key(0), scalars)
  return attention, hidden.mask


def check_masks(file, scenario, method, state, batch, scalars, t):
  if scenario == "block":
    return
  attention, mask = hide(method, state.teacher, batch, scalars)
  want = file[f"out/{scenario}/cls_attention"][t]
  want = rows.flatten(image_major(want))
  np.testing.assert_allclose(attention, want, rtol=0, atol=ATTENTION)
  masks = file[f"out/{scenario}/masks"][t].swapaxes(0, 1)
  np.testing.assert_array_equal(mask, masks.reshape(mask.shape))


def check_epoch(want, scores, index):
  """The averages the reference's loop returns for its log."""
  ours = {
    "loss": "loss", "cls": "cls", "patch": "patch", "lr": "lr", "wd": "wd",
    "acc": "agreement", "nmi": "nmi", "ari": "ari", "fscore": "fscore",
  }  # fmt: skip
  for name, value in zip(
    want("epoch_stat_names"), want("epoch_stats")[index], strict=True
  ):
    if name in ours:
      np.testing.assert_allclose(
        scores[ours[name]], value, rtol=0, atol=LOSSES, err_msg=name
      )


def check_parameters(file, scenario, state):
  width = file["cfg/dim"].item()
  for name, tree in (("student", state.params), ("teacher", state.teacher)):
    want = reference.load(file, f"out/{scenario}/{name}/")
    want["head"].pop("last_layer2")
    got = jax.tree.map(np.asarray, tree)
    jax.tree.map_with_path(
      lambda path, a, b, name=name: np.testing.assert_allclose(
        a, b, rtol=0, atol=PARAMETERS, err_msg=f"{name} {trees.path_name(path)}"
      ),
      without_key_bias(got, width),
      without_key_bias(want, width),
    )


@pytest.mark.parametrize("scenario", ["attmask_high", "block"])
def test_golden_rates_of_the_train_steps(golden, scenario):
  file = golden("attmask/train_steps.npz")
  _, schedules, _ = build(file, scenario)
  for t in range(schedules.total_steps):
    values = schedules.values(t)
    for name in ("lr", "wd", "momentum"):
      want = file[f"out/{scenario}/{name}"][t]
      np.testing.assert_allclose(values[name], want, rtol=0, atol=1e-12)


def small(**changes):
  """A method small enough to run by the dozen."""
  head = heads.Head(out_dim=12, hidden=16, bottleneck=8)
  fields = dict(
    backbone=vit.ViT(16, 2, 2, 4, 16),
    head=head,
    teacher_head=head,
    epochs=10,
    steps_per_epoch=4,
    local_crops=1,
    temp_warmup_epochs=5,
  )
  return attmask.AttMask(**(fields | changes))


def small_batch(method, b=4):
  rng = np.random.default_rng(0)
  g, local = method.global_crops, method.local_crops
  side = method.backbone.image_size
  batch = {
    "images": rng.integers(0, 256, (b, g, side, side, 3), np.uint8),
    "position": np.arange(b, dtype=np.int32),
  }
  if local:
    shape = (b, local, 8, 8, 3)
    batch["local_images"] = rng.integers(0, 256, shape, np.uint8)
  if method.mask in masking.HOST_POLICIES:
    extras = [method.item_extras(0, i)["masks"] for i in range(b)]
    batch["masks"] = np.stack(extras)
  return batch


def run_loss(method, batch, key=0):
  params, teacher, aux = jax.jit(method.init)(jax.random.key(1))
  teacher = jax.tree.map(lambda t: t + 0.01, teacher)
  return loss_of(
    method, params, teacher, aux, batch, jax.random.key(key), method.at(0)
  )


def test_golden_temperatures(golden):
  file = golden("attmask/schedules.npz")
  for run in sorted({k.split("/")[1] for k in file.files}):
    cfg = lambda name, run=run: file[f"cfg/{run}/{name}"].item()
    method = small(
      epochs=cfg("epochs"),
      temp_warmup_epochs=cfg("warmup_teacher_temp_epochs"),
      teacher_temp=(0.04, cfg("tt")),
    )
    got, patch = method.temperatures
    want = file[f"out/{run}/teacher_temp"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    want = file[f"out/{run}/teacher_patch_temp"]
    np.testing.assert_allclose(patch, want, rtol=0, atol=1e-12)


def test_golden_loss_temperatures_with_a_late_start(golden):
  file = golden("attmask/loss.npz")
  for case in ("A", "B", "C"):
    cfg = lambda name, case=case: file[f"cfg/{case}/{name}"].item()
    method = small(
      epochs=cfg("nep"),
      temp_warmup_epochs=cfg("wep"),
      teacher_temp=(cfg("wt"), cfg("tt")),
      teacher_patch_temp=(cfg("wt2"), cfg("tt2")),
      mask_start_epoch=cfg("mim0"),
    )
    tables = method.temperatures
    for table, name in zip(
      tables, ("teacher_temp", "teacher_patch_temp"), strict=True
    ):
      want = file[f"out/{case}/{name}"].item()
      assert table[cfg("epoch")] == pytest.approx(want, abs=1e-12)


def test_no_masks_before_their_start_epoch():
  method = small(mask_start_epoch=2)
  assert method.at(7)["n_mask"] == 0
  assert method.at(8)["n_mask"] > 0
  assert method.ratio(random.Random(0), 1) == 0.0


def test_ratio_draws_stay_in_range_and_follow_the_step_alone():
  method = small(mask_ratio=(0.3,), mask_ratio_var=(0.2,))
  counts = [int(method.at(t)["n_mask"]) for t in range(40)]
  low, high = int(16 * 0.1), int(16 * 0.5)
  assert low <= min(counts) < max(counts) <= high == method.max_hidden
  assert counts == [int(method.at(t)["n_mask"]) for t in range(40)]


@pytest.mark.parametrize("mask", masking.POLICIES)
def test_every_policy_gives_a_finite_loss_and_its_own_mask(mask):
  method = small(mask=mask)
  loss, stats, values, per_image = run_loss(method, small_batch(method))
  assert np.isfinite(loss)
  assert ("masked_share" in values) == (mask != "none")
  assert mask == "none" or values["masked_share"] > 0
  assert ("center_patch" in stats) == (mask != "none")
  assert per_image["assignment"].shape == (4,)


def test_patch_loss_in_chunks_is_the_same():
  batch = small_batch(small())
  whole = run_loss(small(), batch)[0]
  parts = run_loss(small(patch_loss_chunks=3), batch)[0]
  np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_draws_follow_the_position_and_not_the_place_in_the_batch():
  method = small(mask_prob=0.5, mask="attmask_hint", show_max=0.5)
  batch = small_batch(method, b=8)
  flat = rows.flatten(batch["images"]).astype(np.float32)
  scalars = {"n_mask": np.int32(6), "n_show": np.int32(2)}
  score = jax.random.normal(jax.random.key(5), (len(flat), 16))
  hide = lambda s, position: (
    method.select_masks(
      s, {"position": position}, jax.random.key(3), scalars
    ).mask
  )
  whole = hide(score, batch["position"])
  order = np.array([6, 1, 4, 3])
  part = hide(
    score.reshape(8, 2, 16)[order].reshape(8, 16), batch["position"][order]
  )
  np.testing.assert_array_equal(
    np.asarray(whole).reshape(8, 2, 16)[order].reshape(8, 16), part
  )


def test_views_of_an_image_are_cleared_independently():
  method = small(mask_prob=0.5)
  score = jnp.zeros((2000, 16))
  batch = {"position": jnp.arange(1000)}
  scalars = {"n_mask": np.int32(6), "n_show": np.int32(0)}
  mask = method.select_masks(score, batch, jax.random.key(0), scalars).mask
  masked = np.asarray(mask.any(-1)).reshape(1000, 2)
  both = (masked[:, 0] & masked[:, 1]).mean()
  assert abs(both - 0.25) < 5 * (0.25 * 0.75 / 1000) ** 0.5


def test_dino_has_neither_masks_nor_a_patch_loss():
  method = small(mask="none", patch_weight=0.0)
  params, teacher, aux = jax.jit(method.init)(jax.random.key(0))
  assert "mask_token" not in params["backbone"]
  assert set(aux) == {"center"}
  _, _, values, _ = run_loss(method, small_batch(method))
  assert values["patch"] == 0 and values["loss"] == values["cls"]


def test_mask_input_off_leaves_the_student_its_whole_view():
  # quirk Q18: the patch loss still applies where the mask is.
  seen = small(mask_input=False, mask_prob=1.0)
  params, _, _ = jax.jit(seen.init)(jax.random.key(1))
  assert "mask_token" not in params["backbone"]
  _, _, values, _ = run_loss(seen, small_batch(seen))
  assert values["masked_share"] == 1 and values["patch"] > 0


@pytest.mark.slow
def test_separate_student_with_shared_teacher_starts_from_the_patch_layer():
  head = heads.Head(out_dim=12, patch_out_dim=12, hidden=16, bottleneck=8)
  method = small(head=head, teacher_head=head.clone(patch_out_dim=0))
  params, teacher, _ = jax.jit(method.init)(jax.random.key(0))
  assert set(teacher["head"]) == {"mlp", "last_layer"}
  np.testing.assert_array_equal(
    teacher["head"]["last_layer"]["weight_v"],
    params["head"]["last_layer2"]["weight_v"],
  )
  loss, *_ = run_loss(method, small_batch(method))
  assert np.isfinite(loss)


def test_the_teacher_is_a_copy_without_mask_token():
  params, teacher, _ = jax.jit(small().init)(jax.random.key(0))
  assert "mask_token" in params["backbone"]
  assert "mask_token" not in teacher["backbone"]
  same = jax.tree.map(
    lambda t, p: bool((t == p).all()), teacher["head"], params["head"]
  )
  assert all(jax.tree.leaves(same))


def test_features_of_the_last_blocks():
  method = small()
  params, _, _ = jax.jit(method.init)(jax.random.key(0))
  images = small_batch(method)["images"][:, 0]
  cls, patches = method.features(params, images, last=2)
  assert cls.shape == (4, 2 * 16) and patches.shape == (4, 16, 16)
  one, _ = method.features(params, images, last=1)
  np.testing.assert_allclose(cls[:, 16:], one, atol=1e-6)


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(mask="blocks"), ["blocks", "attmask_high"]),
    (dict(mask_ratio=(0.1,), mask_ratio_var=(0.2,)), ["0.1", "0.2"]),
    (dict(mask_ratio=(0.9,), mask_ratio_var=(0.2,)), ["0.9", "at most 1"]),
    (dict(mask_ratio=(0.1, 0.2, 0.3), mask_ratio_var=(0, 0)), ["3", "2"]),
    (dict(mask_prob=1.5), ["mask_prob", "1.5"]),
    (dict(global_crops=1, local_crops=0), ["1", "0", "global"]),
    (dict(temp_warmup_epochs=11), ["11", "10"]),
    (dict(temp_warmup_epochs=8, mask_start_epoch=3), ["8", "3", "10"]),
  ],
)
def test_bad_fields(change, words):
  with pytest.raises(InputError) as error:
    small(**change)
  assert all(word in str(error.value) for word in words)


def test_averager_is_a_plain_mean_over_steps():
  sums = metrics.Averager()
  for value in (1.0, 2.0, 6.0):
    sums.add({"loss": value})
  assert sums.mean() == {"loss": 3.0}
