"""ExtreMA against recorded numbers, plain loops, and itself."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small import loss_of

from attmask_jax import mesh, trees
from attmask_jax.errors import InputError
from attmask_jax.methods import extrema, losses, masking
from attmask_jax.models import heads, vit
from attmask_jax.training import optim, schedules, train_step
from configs import tiny

CLOSE = dict(rtol=1e-4, atol=2e-5)  # tests/golden/extrema/README.md


class GivenSubsets(extrema.ExtreMA):
  """Takes the visible patches from the batch."""

  def subsets(self, attention, batch, rng):
    return batch["keep_ids"]


def mlp_of(tensors):
  """Linear layers and LayerNorms of a projector, in their order."""
  parts = {}
  for name, value in tensors.items():
    number, kind = name.split(".")
    parts.setdefault(int(number), {})[kind] = np.asarray(value)
  tree = {}
  linear = norm = 0
  for _, part in sorted(parts.items()):
    if part["weight"].ndim == 2:
      tree[f"layer_{linear}"] = {
        "kernel": part["weight"].T, "bias": part["bias"],
      }  # fmt: skip
      linear += 1
    else:
      tree[f"norm_{norm}"] = {"scale": part["weight"], "bias": part["bias"]}
      norm += 1
  return tree


def under(file, prefix):
  return {k[len(prefix) :]: file[k] for k in file if k.startswith(prefix)}


def network_of(file, prefix):
  """A recorded encoder with its projector as our parameters."""
  tensors = under(file, prefix)
  head = {k[5:]: v for k, v in tensors.items() if k.startswith("head.")}
  body = {
    k: v
    for k, v in tensors.items()
    if not k.startswith("head.") and k != "pos_embed"
  }
  return {"backbone": reference.tree(body), "head": mlp_of(head)}


def method_of(file, cls=extrema.ExtreMA, **changes):
  cfg = lambda name: file[f"cfg/{name}"].item()
  backbone = vit.ViT(
    width=cfg("embed_dim"),
    depth=cfg("depth"),
    num_heads=cfg("num_heads"),
    patch_size=cfg("patch_size"),
    image_size=cfg("img_size"),
    class_token="readout",
    positions="xy",
    readout_layers=cfg("class_attention_layers"),
  )
  head = dict(hidden=cfg("mlp_dim"), out=cfg("proj_dim"))
  return cls(
    backbone,
    heads.Projector(layers=3, **head),
    heads.Projector(layers=2, **head),
    num_masks=cfg("num_masks"),
    **changes,
  )


def image_major(x, masks):
  """[M * B, ...] mask-major, as recorded -> [B, M, ...]."""
  x = np.asarray(x)
  return x.reshape(masks, -1, *x.shape[1:]).swapaxes(0, 1)


def test_golden_heads_and_losses(golden):
  file = golden("extrema/loss.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  m, temp = cfg("num_masks"), cfg("contrast_temp")
  shape = dict(hidden=cfg("mlp_dim"), out=cfg("proj_dim"))
  projector = heads.Projector(layers=3, **shape)
  predictor = heads.Projector(layers=2, **shape)
  weights = {k: mlp_of(under(file, f"{k}/")) for k in ("base", "momentum")}
  weights["predictor"] = mlp_of(under(file, "predictor/"))
  apply = lambda module, name, x: module.apply({"params": weights[name]}, x)
  teacher = apply(projector, "momentum", file["in/teacher_features"])
  np.testing.assert_allclose(teacher, file["out/teacher_proj"], **CLOSE)

  def loss(x, kind):
    z = apply(projector, "base", x)
    q = apply(predictor, "predictor", z)
    q = q.reshape(m, -1, q.shape[-1]).swapaxes(0, 1)
    if kind == "byol":
      return losses.byol(q, teacher)
    return losses.info_nce(q, teacher, temp=temp)

  x = jnp.asarray(file["in/student_features"])
  for kind, value, grad in (
    ("byol", "byol_from_features", "grad_student_features"),
    ("infonce", "infonce_from_features", "infonce_grad_student_features"),
  ):
    got, slope = jax.value_and_grad(loss)(x, kind)
    np.testing.assert_allclose(got, file[f"out/{value}"], **CLOSE)
    np.testing.assert_allclose(slope, file[f"out/{grad}"], **CLOSE)
  q = image_major(file["in/q"], m)
  np.testing.assert_allclose(
    losses.byol(q, file["in/k"]), file["out/byol"], **CLOSE
  )
  degenerate = file["in/q_degenerate"][:, None]
  got, slope = jax.value_and_grad(losses.byol)(degenerate, file["in/k"])
  np.testing.assert_allclose(got, file["out/byol_degenerate"], **CLOSE)
  assert np.isfinite(slope).all()


def test_golden_masks(golden, monkeypatch):
  file = golden("extrema/masks.npz")
  for i in range(file["cfg/num_cases"].item()):
    ratio = file[f"cfg/{i}/mask_ratio"].item()
    m = file[f"cfg/{i}/num_masks"].item()
    for kind in ("disjoint", "independent"):
      want = file[f"out/{i}/{kind}"]  # [M, B, K]
      noise = file[f"in/{i}/noise_{kind}"]
      if kind == "independent":
        noise = noise.swapaxes(0, 1).reshape(-1, noise.shape[-1])
      order = lambda *_, noise=noise: jnp.argsort(noise, axis=1)
      monkeypatch.setattr(extrema.ExtreMA, "_order", order)
      method = small(
        size=224, patch=16, mask_ratio=ratio, num_masks=m,
        disjoint=kind == "disjoint",
      )  # fmt: skip
      batch = {"position": jnp.arange(want.shape[1])}
      got = method.subsets(None, batch, jax.random.key(0))
      np.testing.assert_array_equal(got, want.swapaxes(0, 1))


def test_golden_schedules(golden):
  file = golden("extrema/schedules.npz")
  cfg = lambda name: file[f"cfg/pretrain/{name}"].item()
  schedule = schedules.Schedules(
    lr=cfg("base_lr") * cfg("batch_size") / 256,
    min_lr=cfg("min_lr"),
    warmup_epochs=cfg("warmup_epochs"),
    weight_decay=(
      file["cfg/wd_variant/weight_decay"].item(),
      file["cfg/wd_variant/weight_decay_end"].item(),
    ),
    momentum=(cfg("ema_momentum"), 1.0),
    freeze_epochs=0,
    epochs=cfg("epochs"),
    steps_per_epoch=cfg("iters_per_epoch"),
    schedule="smooth_cosine",
  )
  got = [schedule.values(int(i)) for i in file["in/pretrain/iter"]]
  for name, key in (
    ("lr", "pretrain/lr"),
    ("momentum", "pretrain/ema_momentum"),
    ("wd", "wd_variant/weight_decay"),
  ):
    values = [v[name] for v in got]
    np.testing.assert_allclose(values, file[f"out/{key}"], rtol=0, atol=1e-12)


def test_golden_training_steps(golden):
  file = golden("extrema/train_steps.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  method = method_of(file, GivenSubsets)
  schedule = schedules.Schedules(
    lr=cfg("lr"),
    min_lr=cfg("min_lr"),
    warmup_epochs=cfg("warmup_epochs"),
    weight_decay=(
      cfg("weight_decay"),
      cfg("weight_decay_end" if cfg("adjust_weight_decay") else "weight_decay"),
    ),
    momentum=(cfg("ema_momentum"), 1.0),
    freeze_epochs=0,
    epochs=cfg("epochs"),
    steps_per_epoch=cfg("iters_per_epoch"),
    schedule="smooth_cosine",
  )
  tx = optim.Optimizer(
    clip=max(cfg("clip_grad"), 0.0),
    clip_by="global",
    betas=tuple(file["cfg/betas"].tolist()),
    eps=cfg("eps"),
  ).build(undecayed=method.undecayed)
  devices = mesh.make_mesh(devices=jax.devices()[:1])
  state, shardings = train_step.init_state(method, tx, devices, seed=0)
  read = lambda name: {
    **network_of(file, f"base/{name}/"),
    "predictor": mlp_of(under(file, f"predictor/{name}/")),
  }
  start = {
    "params": read("start"),
    "teacher": network_of(file, "momentum/start/"),
  }
  state = train_step.overlay(state, start)
  step = train_step.make_step(method, tx, devices, shardings, seed=0)
  for i in range(cfg("epochs_run") * cfg("iters_per_epoch")):
    views = [reference.nhwc(file[f"in/images{v}"][i]) for v in (1, 2)]
    batch = {
      "images": jnp.asarray(np.stack(views, axis=1)),
      "keep_ids": jnp.asarray(file["in/masks"][i].swapaxes(0, 1)),
      "position": jnp.arange(len(views[0]), dtype=jnp.int32),
    }
    state, values, _ = step(state, batch, schedule.at(i))
    np.testing.assert_allclose(values["loss"], file["out/loss"][i], **CLOSE)
    np.testing.assert_allclose(
      values["grad_norm"], file["out/grad_norm"][i], rtol=1e-4
    )
  width = method.backbone.width

  def same(path, got, want):
    got, want = np.array(got), np.array(want)
    name = trees.path_name(path)
    if name.endswith("qkv/bias"):  # of keys: no gradient but rounding
      got[..., width : 2 * width] = want[..., width : 2 * width] = 0
    if not name.endswith("attn/k/bias"):
      np.testing.assert_allclose(got, want, **CLOSE, err_msg=name)

  compare = jax.tree_util.tree_map_with_path
  compare(same, jax.device_get(state.params), read("end"))
  compare(
    same, jax.device_get(state.teacher), network_of(file, "momentum/end/")
  )


def test_golden_weight_decay_groups(golden):
  file = golden("extrema/train_steps.npz")
  names, decayed = file["out/param_names"], file["out/param_decayed"]
  for name, decays in zip(names.tolist(), decayed.tolist(), strict=True):
    ours = re.sub(r"norm\d?\.weight$", "norm.scale", name)
    ours = re.sub(r"(head\.[14]|predictor\.1)\.weight", "norm.scale", ours)
    undecayed = re.search(extrema.ExtreMA.undecayed, ours.replace(".", "/"))
    assert bool(undecayed) == (not decays), name


def small(size=32, patch=4, **changes):
  backbone = vit.ViT(
    16, 2, 2, patch_size=patch, image_size=size, class_token="readout",
    positions="xy", initial="xavier", xavier_embed=True,
  )  # fmt: skip
  head = dict(hidden=32, out=8)
  return extrema.ExtreMA(
    backbone,
    heads.Projector(layers=3, **head),
    heads.Projector(layers=2, **head),
    **changes,
  )


def batch_of(rows, views=2, size=32):
  shape = (rows, views, size, size, 3)
  images = np.random.default_rng(0).integers(0, 255, shape)
  return {
    "images": jnp.asarray(images, jnp.uint8),
    "position": jnp.arange(rows, dtype=jnp.int32),
  }


def test_subsets_of_an_image_are_disjoint_and_its_own():
  method = small(mask_ratio=0.8, num_masks=5)
  ids = method.subsets(None, batch_of(4), jax.random.key(0))
  assert ids.shape == (4, 5, 12)  # int(64 * .2)
  for row in np.asarray(ids).reshape(4, -1):
    assert len(set(row.tolist())) == 60
  assert len(np.unique(np.asarray(ids)[:, 0], axis=0)) == 4


@pytest.mark.parametrize("policy", masking.ATTENTION_POLICIES)
def test_attention_chooses_what_the_student_sees(policy):
  method = small(mask=policy, mask_ratio=0.75, num_masks=2, show_max=0.25)
  batch = batch_of(3)
  params, teacher, aux = method.init(jax.random.key(0))
  attention = method.attention(teacher, batch["images"][:, -1])
  ids = method.subsets(attention, batch, jax.random.key(1))
  place = np.asarray(masking.rank(jnp.mean(attention, axis=1)))
  seen = np.take_along_axis(place, np.asarray(ids).reshape(3, -1), axis=1)
  for row in seen:  # 32 of 64 are seen
    if policy == "attmask_high":
      assert sorted(row) == list(range(32, 64))
    elif policy == "attmask_low":
      assert sorted(row) == list(range(32))
    else:  # 8 = int(.25 * 32) of the 16 most attended in the others' place
      assert (row < 16).sum() == 8 and (row >= 40).sum() == 24
  assert not np.array_equal(np.sort(seen[0]), seen[0])  # dealt at random
  loss, *_ = loss_of(method, params, teacher, aux, batch, jax.random.key(2), {})
  assert 0 <= float(loss) <= 4


def test_one_view_serves_both_networks():
  method = small(mask_ratio=0.0, num_masks=1)
  params, teacher, aux = method.init(jax.random.key(0))
  batch = batch_of(4, views=1)
  whole = method.predict(
    params, vit.normalize_images(batch["images"][:, 0]), None, batch,
    jax.random.key(0),
  )  # fmt: skip
  out = method.backbone.apply(
    {"params": teacher["backbone"]},
    vit.normalize_images(batch["images"][:, 0]),
  )
  target = method.projector.apply({"params": teacher["head"]}, out.tokens[:, 0])
  loss, *_ = loss_of(method, params, teacher, aux, batch, jax.random.key(1), {})
  q, k = np.asarray(whole)[:, 0], np.asarray(target)
  cos = [
    a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    for a, b in zip(q, k, strict=True)
  ]
  assert float(loss) == pytest.approx(2 - 2 * np.mean(cos), abs=1e-5)


@pytest.mark.slow
def test_one_device_and_eight_agree_on_infonce():
  method = small(mask_ratio=0.75, num_masks=2, contrast="infonce")
  tx = optim.Optimizer(name="sgd", clip=0.0).build(undecayed=method.undecayed)
  batch = {k: np.asarray(v) for k, v in batch_of(16).items()}
  ends = []
  for devices in (1, 8):
    m = mesh.make_mesh(devices=jax.devices()[:devices])
    state, shardings = train_step.init_state(method, tx, m, seed=0)
    step = train_step.make_step(method, tx, m, shardings, seed=0)
    rates_now = dict(lr=0.1, wd=0.0, momentum=0.9)
    scalars = {k: np.float32(v) for k, v in rates_now.items()}
    scalars["frozen"] = np.bool_(False)
    for _ in range(2):
      state, values, _ = step(state, mesh.shard(m, batch), mesh.put(m, scalars))
    ends.append((float(values["loss"]), jax.device_get(state.params)))
  assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  jax.tree.map(close, ends[0][1], ends[1][1])


@pytest.mark.parametrize("disjoint", [True, False])
def test_share_of_patches_that_some_subset_shows(disjoint):
  method = small(mask_ratio=0.75, num_masks=3, disjoint=disjoint)
  batch = batch_of(5)
  key = jax.random.key(7)
  params, teacher, aux = method.init(key)
  ids = method.subsets(None, batch, jax.random.split(key)[0])
  want = np.mean([len(set(np.ravel(row).tolist())) for row in ids]) / 64
  _, _, metrics, _ = loss_of(method, params, teacher, aux, batch, key, {})
  assert float(metrics["seen"]) == pytest.approx(want, rel=1e-6)
  if disjoint:
    assert want == 48 / 64
  else:  # 1 - 0.75^3 of all on average
    assert want == pytest.approx(0.578, abs=0.1)
  assert method.seen(None) == 1


def from_config(**changes):
  config = tiny.get_config("extrema")  # 64 patches
  batch_size = changes.pop("batch_size", None)
  if batch_size:
    config.data.batch_size = batch_size
  if "image_size" in changes:
    config.data.image_size = changes.pop("image_size")
  config.method.update(changes)
  return extrema.ExtreMA.from_config(config, steps_per_epoch=1)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(num_masks=5), "5 times 4 .* more than the 16 .* at most 4"),
    (dict(mask_ratio=1.0), "mask_ratio 1.0 leaves none of 16 patches"),
    (dict(mask_ratio=0.99), "mask_ratio 0.99 leaves none"),
    (dict(mask_ratio=-0.1), "mask_ratio -0.1"),
    (dict(mask_ratio=0.0), "mask_ratio 0 hides nothing.*num_masks to 1"),
    (dict(mask_ratio=0.0, num_masks=1, mask="attmask_high"),
     "mask_ratio 0 leaves nothing for .*attmask_high"),
    (dict(mask="block"), '"block" is unknown: use random'),
    (dict(mask="attmask_low", disjoint=False), "disjoint=True"),
    (dict(contrast="infonce", batch_size=1), "data.batch_size is 1"),
    (dict(contrast="simclr"), '"simclr" is unknown: use byol or infonce'),
    (dict(contrast_temp=0.0), "contrast_temp 0.0 must be above 0"),
    (dict(readout_layers=0), "readout_layers 0 must be at least 1"),
    (dict(num_masks=0), "num_masks 0 must be at least 1"),
    (dict(head_hidden=0), "head_hidden 0 must be at least 1"),
    (dict(out_dim=0), "out_dim 0 must be at least 1"),
    (dict(show_max=2.0), "show_max 2.0 must be between 0 and 1"),
    (dict(variant="30x2x2"), "variant is 30: choose 28 or 32"),
    (dict(image_size=30), "image_size 30 is not a multiple"),
    (dict(dtype="float16"), '"float16" is unknown'),
  ],
)  # fmt: skip
def test_what_is_refused(changes, match):
  from_config()
  with pytest.raises(InputError, match=match):
    from_config(**changes)


def test_attention_with_next_to_nothing_to_decide_is_warned_of(caplog):
  with caplog.at_level("WARNING"):
    from_config(mask="attmask_high", num_masks=3)  # hides 4 of 16
    from_config(mask="random", num_masks=4)
    assert not caplog.messages
    from_config(mask="attmask_high", num_masks=4)
  (message,) = caplog.messages
  assert "attmask_high hides only 0 of 16 patches" in message
  assert "num_masks" in message
