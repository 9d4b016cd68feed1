"""MAE against recorded numbers, plain loops, and itself."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small import loss_of

from attmask_jax import mesh, trees
from attmask_jax.errors import InputError
from attmask_jax.evals import nearest
from attmask_jax.methods import losses, mae, masking
from attmask_jax.models import embedding, vit
from attmask_jax.rows import gather
from attmask_jax.training import optim, schedules, setup, train_step
from configs import tiny

FORWARD, TRAINED = 2e-5, 1e-4  # tests/golden/mae/README.md


class GivenOrder(mae.Mae):
  """Takes the order of patches from the batch."""

  def order(self, teacher, images, batch, rng):
    return batch["order"]


def params_of(file, prefix):
  """A recorded model as our parameters; fixed positions are none."""
  tree = reference.load(file, prefix)
  encoder = {k: v for k, v in tree["encoder"].items() if k != "pos_embed"}
  decoder = tree["decoder"] | {
    "mask_token": tree["mask_token"],
    "embed": tree["encoder_to_decoder"],
  }
  return {"backbone": encoder, "decoder": decoder}


def method_of(file, variant="gap", cls=mae.Mae):
  cfg = lambda name: file[f"cfg/{name}"].item()
  backbone = vit.ViT(
    width=cfg("dim"),
    depth=cfg("depth"),
    num_heads=cfg("heads"),
    patch_size=cfg("patch"),
    image_size=cfg("img"),
    class_token="input" if cfg(f"{variant}/cls") else "none",
    positions="yx",
    key_bias=False,
    initial="xavier",
  )
  decoder = mae.Decoder(
    cfg("ddim"), cfg("ddepth"), cfg("dheads"), 3 * cfg("patch") ** 2
  )
  return cls(
    backbone,
    decoder,
    mask_ratio=cfg("ratio"),
    norm_target=bool(cfg(f"{variant}/norm")),
  )


def close(got, want, atol=FORWARD, name=""):
  np.testing.assert_allclose(
    np.asarray(got), want, rtol=0, atol=atol, err_msg=name
  )


@pytest.mark.parametrize("variant", ["gap", "cls"])
def test_golden_forward(golden, variant):
  file = golden("mae/pretrain_forward.npz")
  method = method_of(file, variant, GivenOrder)
  params = params_of(file, f"sd/{variant}/")
  shapes = jax.eval_shape(method.init, jax.random.key(0))[0]
  assert jax.tree.structure(shapes) == jax.tree.structure(params)
  images = reference.nhwc(file[f"in/{variant}/images"])
  order = jnp.asarray(file[f"in/{variant}/shuffle"], jnp.int32)
  pred = method.predict(params, images, order)
  close(pred, file[f"out/{variant}/pred"])
  batch = {"images": images[:, None], "order": order}
  loss, *_ = loss_of(method, params, {}, {}, batch, jax.random.key(0), {})
  close(loss, file[f"out/{variant}/loss"])


def test_golden_targets(golden):
  file = golden("mae/target_loss.npz")
  forward = golden("mae/pretrain_forward.npz")
  images = reference.nhwc(file["in/images"])
  for norm, name in ((True, "norm"), (False, "raw")):
    method = dataclasses.replace(method_of(forward), norm_target=norm)
    target = method.target(images)
    close(target, file[f"out/target_{name}"])
    pred = jnp.asarray(file["in/pred"])
    close(losses.pixel_loss(pred, target), file[f"out/loss_all_{name}"])
    # Every image hides as many patches as the others.
    hidden = jnp.asarray([np.flatnonzero(mask) for mask in file["in/mask"]])
    got = losses.pixel_loss(gather(pred, hidden), gather(target, hidden))
    close(got, file[f"out/loss_{name}"])


def test_golden_pictures_of_the_release(golden):
  """Its visualisation, errors and all; ours is `Mae.reconstruct`.

  It takes a patch's values for (pixel, channel), scales by the root of the
  standard deviation of each channel, and hides nothing in the masked picture.
  """
  file = golden("mae/target_loss.npz")
  forward = golden("mae/pretrain_forward.npz")
  method = method_of(forward)
  images = reference.nhwc(file["in/vis/image"])
  order = jnp.asarray(np.argsort(file["in/vis/noise"], axis=1), jnp.int32)
  pred = method.predict(params_of(forward, "sd/gap/"), images, order)
  close(pred, file["out/vis/pred"])
  picture = vit.denormalize_images(images)
  p, grid = method.backbone.patch_size, method.grid
  pixels = mae.patchify(picture, p, "hwc").reshape(*pred.shape[:2], p * p, 3)
  scale = jnp.sqrt(jnp.std(pixels, axis=2, keepdims=True, ddof=1)) + 1e-6
  values = pred.reshape(pixels.shape) * scale
  values = values + jnp.mean(pixels, axis=2, keepdims=True)
  painted = mae.unpatchify(values.reshape(pred.shape), p, grid, "hwc")
  for got, name in (
    (picture, "ori_img"), (picture, "mask_img"), (painted, "re_img"),
  ):  # fmt: skip
    close(np.moveaxis(got[0], -1, 0), file[f"out/vis/{name}"], 1e-4)


@pytest.mark.parametrize("variant", ["gap", "cls"])
def test_golden_training_steps(golden, variant):
  file = golden("mae/train_steps.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  forward = golden("mae/pretrain_forward.npz")
  method = method_of(forward, variant, GivenOrder)
  schedule = schedules.Schedules(
    lr=cfg("scaled_lr"),
    min_lr=cfg("min_lr"),
    warmup_epochs=cfg("warmup_epochs"),
    weight_decay=(cfg("wd"), cfg("wd_end")),
    momentum=(1.0, 1.0),
    freeze_epochs=0,
    epochs=cfg("epochs"),
    steps_per_epoch=cfg("niter"),
  )
  recipe = optim.Optimizer(
    clip=0.0, betas=tuple(file["cfg/betas"].tolist()), eps=cfg("eps")
  )
  tx = recipe.build(undecayed=method.undecayed)
  devices = mesh.make_mesh(devices=jax.devices()[:1])
  state, shardings = train_step.init_state(method, tx, devices, seed=0)
  start = {"params": params_of(file, f"sd/{variant}/start/")}
  state = train_step.overlay(state, start)
  step = train_step.make_step(method, tx, devices, shardings, seed=0)
  for i in range(schedule.total_steps):
    batch = {
      "images": reference.nhwc(file["in/images"][i])[:, None],
      "order": jnp.asarray(file[f"in/{variant}/shuffle"][i], jnp.int32),
    }
    state, values, _ = step(state, batch, schedule.at(i))
    close(values["loss"], file[f"out/{variant}/loss"][i], FORWARD)
    want = file[f"out/{variant}/grad_norm"][i]
    np.testing.assert_allclose(values["grad_norm"], want, rtol=1e-4)
    lr = file[f"out/{variant}/lr"][i]
    assert schedule.values(i)["lr"] == pytest.approx(lr, rel=1e-9)
  end = params_of(file, f"sd/{variant}/end/")
  jax.tree_util.tree_map_with_path(
    lambda path, got, want: close(got, want, TRAINED, trees.path_name(path)),
    jax.device_get(state.params),
    end,
  )


def test_golden_weight_decay_groups(golden):
  file = golden("mae/layer_decay.npz")
  for job in ("pretrain_gap", "pretrain_cls"):
    names = file[f"out/{job}/names"].tolist()
    decays = file[f"out/{job}/weight_decay"].tolist()
    for name, decay in zip(names, decays, strict=True):
      ours = re.sub(r"norm\d?\.weight$", "norm.scale", name).replace(".", "/")
      ours = re.sub(r"[qv]_bias$", "bias", ours)
      assert bool(re.search(mae.Mae.undecayed, ours)) == (decay == 0), name


def small(**changes):
  backbone = vit.ViT(
    16, 2, 2, patch_size=4, image_size=32, class_token="none", positions="yx",
    key_bias=False, initial="xavier",
  )  # fmt: skip
  return mae.Mae(backbone, mae.Decoder(8, 1, 2, 48), **changes)


def batch_of(rows, size=32):
  images = np.random.default_rng(0).integers(0, 255, (rows, 1, size, size, 3))
  return {
    "images": jnp.asarray(images, jnp.uint8),
    "position": jnp.arange(rows, dtype=jnp.int32),
  }


@pytest.mark.parametrize("policy", masking.VISIBLE_POLICIES)
def test_every_policy_hides_the_same_count(policy):
  method = small(mask=policy, mask_ratio=0.75, show_max=0.2)
  params, teacher, aux = method.init(jax.random.key(0))
  assert bool(teacher) == policy.startswith("attmask")
  batch = batch_of(4)
  extras = [method.item_extras(0, i) for i in range(4)]
  if extras[0]:
    masks = np.stack([e["masks"] for e in extras])
    batch["masks"] = jnp.asarray(masks)
  images = vit.normalize_images(batch["images"][:, 0])
  order = method.order(teacher, images, batch, jax.random.key(1))
  assert order.shape == (4, 64) and method.n_hidden == 48
  np.testing.assert_array_equal(np.sort(order, axis=1), [np.arange(64)] * 4)
  hidden = np.zeros((4, 64), bool)
  np.put_along_axis(hidden, np.asarray(order[:, 16:]), True, axis=1)
  if policy == "grid":
    keep = np.zeros((8, 8), bool)
    keep[::2, ::2] = True
    np.testing.assert_array_equal(~hidden, [keep.ravel()] * 4)
  if policy == "block":
    drawn = masks[:, 0]  # as many of the drawn ones as there is room for
    np.testing.assert_array_equal(
      (hidden & drawn).sum(1), np.minimum(drawn.sum(1), 48)
    )
  if policy.startswith("attmask"):
    scores = embedding.class_attention(
      method.backbone, teacher["backbone"], images
    )
    place = np.asarray(masking.rank(jnp.mean(scores, axis=1)))
    if policy == "attmask_high":
      np.testing.assert_array_equal(hidden, place < 48)
    if policy == "attmask_low":
      np.testing.assert_array_equal(hidden, place >= 16)
    if policy == "attmask_hint":
      # int(.2 * 48) = 9 of the 12 most attended are shown, 9 others hidden.
      assert ((~hidden) & (place < 12)).sum(1).tolist() == [9] * 4
      assert (hidden & (place >= 48)).sum(1).tolist() == [9] * 4
  loss, *_ = loss_of(method, params, teacher, aux, batch, jax.random.key(2), {})
  assert np.isfinite(loss)


def test_block_masks_follow_seed_epoch_and_image():
  masks = lambda seed, epoch: np.stack([
    small(mask="block", seed=seed).item_extras(epoch, i)["masks"]
    for i in range(8)
  ])  # fmt: skip
  np.testing.assert_array_equal(masks(0, 1), masks(0, 1))
  assert (masks(0, 1) != masks(0, 2)).any()
  assert (masks(0, 1) != masks(1, 1)).any()
  assert (masks(0, 1)[1:] != masks(0, 1)[:1]).any((1, 2)).all()


def test_masks_are_per_image_unless_shared():
  batch = batch_of(6)
  images = batch["images"][:, 0]
  for shared in (False, True):
    order = small(shared_mask=shared).order(
      {}, images, batch, jax.random.key(0)
    )
    assert len(np.unique(np.asarray(order), axis=0)) == (1 if shared else 6)


def test_patches_and_back():
  images = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3)
  for layout in ("chw", "hwc"):
    patches = mae.patchify(images, 4, layout)
    block = np.asarray(images)[1, 4:, :4]  # third patch of the second image
    want = block.transpose(2, 0, 1) if layout == "chw" else block
    np.testing.assert_array_equal(patches[1, 2], want.ravel())
    back = mae.unpatchify(patches, 4, (2, 2), layout)
    np.testing.assert_array_equal(back, images)


def test_a_perfect_prediction_paints_the_image(monkeypatch):
  for norm in (True, False):
    method = small(norm_target=norm)
    images = batch_of(2)["images"][:, 0]
    true = method.target(vit.normalize_images(images))
    monkeypatch.setattr(mae.Mae, "predict", lambda *_, true=true: true)
    painted = method.reconstruct({}, images, None)
    close(painted, np.asarray(images) / 255, 1e-4)


def test_variance_of_the_official_release():
  patches = np.random.default_rng(1).normal(size=(1, 2, 48)).astype("f4")
  _, std = small(target_variance="unbiased").statistics(jnp.asarray(patches))
  want = np.sqrt(patches.var(axis=-1, ddof=1) + 1e-6)
  close(std[..., 0], want, 1e-6)


@pytest.mark.slow
def test_decoder_of_the_official_release_reads_the_class_token():
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
  order = jnp.asarray([rng.permutation(9) for _ in range(2)])
  plain = mae.Decoder(16, 1, 2, 12)
  official = plain.clone(class_token=True)
  params = official.init(jax.random.key(0), tokens, order, (3, 3))
  got = official.apply(params, tokens, order, (3, 3))
  assert got.shape == (2, 9, 12)
  moved = official.apply(params, tokens.at[:, 0].add(1), order, (3, 3))
  assert (np.abs(got - moved).max(axis=2) > 1e-6).all()
  # Where it cannot be told from the rest, patches are where they were.
  still = jax.tree.map(jnp.zeros_like, params["params"]["blocks"])
  params = {"params": params["params"] | {"blocks": still}}
  got = official.apply(params, tokens, order, (3, 3))
  want = plain.apply(params, tokens[:, 1:], order, (3, 3))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(mask_ratio=1.0), "mask_ratio 1.0"),
    (dict(mask_ratio=0.01), "mask_ratio 0.01 hides 0 of 16"),
    (dict(mask="attended"), '"attended" is unknown'),
    (dict(mask="block", shared_mask=True), '"block" depends on the image'),
    (dict(mask="attmask_low", shared_mask=True), "shared_mask=False"),
    (dict(show_max=2.0), "show_max 2.0 must be between 0 and 1"),
    (dict(variant="30x2x2"), "variant is 30: choose 28 or 32"),
    (dict(decoder_width=0), "decoder_width 0 must be at least 1"),
    (dict(decoder_width=30), "a decoder of width 30"),
    (dict(decoder_num_heads=5), "5 heads is impossible"),
    (dict(decoder_depth=0), "decoder_depth 0 must be at least 1"),
    (dict(decoder_class_token=True), "class_token is off"),
    (dict(target_layout="hcw"), '"hcw" is unknown: use chw or hwc'),
    (dict(image_size=30), "image_size 30 is not a multiple.*choose 24 or 32"),
  ],
)
def test_what_is_refused(changes, match):
  config = tiny.get_config("mae")
  mae.Mae.from_config(config, steps_per_epoch=1)
  changes = dict(changes)
  if "image_size" in changes:
    config.data.image_size = changes.pop("image_size")
  config.method.update(changes)
  with pytest.raises(InputError, match=match):
    mae.Mae.from_config(config, steps_per_epoch=1)


def test_online_evaluation_of_an_absent_class_token_is_refused():
  config = tiny.get_config("mae")
  config.evals.pool = "cls"
  with pytest.raises(InputError, match="evals.pool cls reads the class.*=mean"):
    setup.build(config)


def test_golden_schedules(golden):
  file = golden("mae/schedules.npz")
  cases = [k.removeprefix("cfg/") for k in file if k.startswith("cfg/")]
  assert len(cases) > 6
  for case in cases:
    cfg = file[f"cfg/{case}"]
    base, final, epochs, steps, warmup, start, warmup_steps = cfg
    if start:  # only 0 is used by a recipe
      continue
    warmup = int(warmup_steps if warmup_steps > 0 else warmup * steps)
    total = int(epochs * steps)
    where = file["in/full_index"] if case == "full" else range(total)
    got = [
      schedules.cosine(
        int(i), base=base, final=final, warmup=warmup, total=total
      )
      for i in where
    ]
    want = file[f"out/{case}"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9, err_msg=case)


def test_golden_knn(golden):
  file = golden("mae/knn.npz")
  ks = tuple(int(k) for k in file["cfg/k"])
  scores = nearest.knn(
    file["in/train_features_raw"],
    file["in/train_labels"],
    file["in/test_features_raw"],
    file["in/test_labels"],
    ks=ks,
    temp=file["cfg/temperature"].item(),
    num_classes=file["cfg/num_classes"].item(),
  )
  queries = len(file["in/test_labels"])
  for i, k in enumerate(ks):
    for j, name in enumerate(("top1", "top5")):
      slack = 100 * file["out/tie_ambiguous"][i, j] / queries + 1e-4
      want = file[f"out/{name}"][i]
      assert abs(scores[f"k{k}/{name}"] - want) <= slack, (k, name)


def test_only_visible_patches_are_encoded():
  """ViT-S/16, 224 px, 75 % hidden: a quarter of the encoder's operations."""
  model = vit.ViT(
    384, 12, 6, 16, 224, class_token="none", positions="yx", scan=False
  )
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)
  keep = jax.ShapeDtypeStruct((1, 1, 49), jnp.int32)
  count = lambda *args: (
    jax.jit(lambda p, x, ids=None: model.apply(p, x, keep_ids=ids).tokens)
    .lower(params, images, *args)
    .cost_analysis()["flops"]
  )
  assert count(keep) / count() == pytest.approx(0.25, rel=0.05)
