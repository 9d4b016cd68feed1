"""Linear probe and fine-tuning: recorded numbers, and what must hold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import loss_of

from attmask_jax import evaluate, mesh, trees
from attmask_jax.errors import InputError
from attmask_jax.methods import METHODS
from attmask_jax.methods.classify import Classify
from attmask_jax.models import embedding, vit
from attmask_jax.training import optim, schedules, supervised, train_step
from attmask_jax.weights import classifier as classifiers
from attmask_jax.weights import loading
from configs import evals, tiny


class OfTokens(Classify):
  """Takes the backbone's outputs from the batch: tokens [B, n, L, D]."""

  def embed(self, weights, images, batch, rng):
    tokens = batch["tokens"]
    cls = tokens[:, :, 0].reshape(len(tokens), -1)
    return embedding.pool(cls, tokens[:, -1, 1:], pool=self.pool)


def backbone(width=10, depth=3, **changes):
  sizes = dict(
    width=width, depth=depth, num_heads=2, patch_size=4, image_size=8
  )
  return vit.ViT(**sizes | changes)


def classifier(cls=Classify, **changes):
  fields = dict(
    backbone=backbone(), num_classes=7, epochs=4, steps_per_epoch=4,
    image_size=8, batch_size=8,
  )  # fmt: skip
  return cls(**fields | changes)


def sgd(method, **changes):
  recipe = optim.Optimizer(name="sgd", clip=0.0, sgd_momentum=0.9)
  recipe = dataclasses.replace(recipe, **changes)
  return recipe.build(lr_scale=method.lr_scale)


def one_device():
  return mesh.make_mesh(devices=jax.devices()[:1])


def start(method, tx, head=None, given=None):
  state, shardings = train_step.init_state(method, tx, one_device(), seed=0)
  if head is not None:
    state = train_step.overlay(state, {"params": {"head": head}})
  if given is not None:
    state = train_step.overlay(state, given)
  step = train_step.make_step(method, tx, one_device(), shardings, seed=0)
  return state, step


def scalars(lr, wd=0.0, momentum=1.0):
  values = dict(lr=lr, wd=wd, momentum=momentum)
  named = {k: np.float32(v) for k, v in values.items()}
  return named | {"frozen": np.bool_(False)}


@pytest.mark.parametrize(
  "recorded, pool", [(0, "cls"), (1, "mean"), (2, "cls+mean")]
)
def test_golden_linear_probe(golden, recorded, pool):
  file = golden("attmask/linear.npz")
  cfg = {k[4:]: file[k].item() for k in file if k.startswith("cfg/")}
  out = lambda name: file[f"out/avgpool{recorded}/{name}"]
  method = classifier(
    OfTokens,
    backbone=backbone(width=cfg["dim"], depth=cfg["n"], num_heads=1),
    num_classes=cfg["classes"],
    last_blocks=cfg["n"],
    pool=pool,
  )
  schedule = schedules.Schedules(
    lr=cfg["lr"] * cfg["bs"] / 256,
    min_lr=0.0,
    warmup_epochs=0,
    weight_decay=(0.0, 0.0),
    momentum=(1.0, 1.0),
    freeze_epochs=0,
    epochs=cfg["epochs"],
    steps_per_epoch=cfg["batches"],
    schedule="epoch_cosine",
  )
  head = {
    "kernel": out("init_weight").T[None],
    "bias": out("init_bias")[None],
  }
  state, step = start(method, sgd(method), head)
  losses = []
  for i in range(schedule.total_steps):
    which = i % cfg["batches"]
    batch = {
      "images": jnp.zeros((cfg["bs"], 1, 8, 8, 3)),
      "tokens": jnp.asarray(file["in/tokens"][which], jnp.float32),
      "label": jnp.asarray(file["in/labels"][which], jnp.int32),
    }
    state, values, _ = step(state, batch, schedule.at(i))
    losses.append(float(values["loss"]))
  lrs = [schedule.values(i)["lr"] for i in range(schedule.total_steps)]
  np.testing.assert_allclose(lrs[:: cfg["batches"]], out("lr_per_epoch"))
  np.testing.assert_allclose(losses, out("losses"), rtol=0, atol=1e-5)
  trained = state.params["head"]
  np.testing.assert_allclose(
    trained["kernel"][0].T, out("weight"), rtol=0, atol=1e-5
  )
  np.testing.assert_allclose(trained["bias"][0], out("bias"), rtol=0, atol=1e-5)


def image_batch(rng, rows=8, classes=7):
  return {
    "images": jnp.asarray(rng.integers(0, 255, (rows, 1, 8, 8, 3)), jnp.uint8),
    "label": jnp.asarray(rng.integers(0, classes, rows), jnp.int32),
    "position": jnp.arange(rows, dtype=jnp.int32),
  }


@pytest.mark.slow
def test_layers_with_their_own_rates_train_as_if_alone():
  rng = np.random.default_rng(0)
  batches = [image_batch(rng) for _ in range(3)]

  def train(rates):
    method = classifier(rates=rates, last_blocks=2)
    state, step = start(method, sgd(method))
    for batch in batches:
      state, _, _ = step(state, batch, scalars(0.1))
    return np.asarray(state.params["head"]["kernel"])

  together = train((0.5, 1.0, 4.0))
  for j, rate in enumerate((0.5, 1.0, 4.0)):
    alone = train((rate,))
    np.testing.assert_allclose(together[j], alone[0], rtol=0, atol=1e-6)
  assert np.abs(together[0] - together[2]).max() > 1e-3


def test_a_probe_leaves_the_backbone_bit_for_bit():
  method = classifier()
  state, step = start(method, sgd(method))
  before = jax.device_get(state.aux)
  head = jax.device_get(state.params["head"])
  batch = image_batch(np.random.default_rng(1))
  for _ in range(2):
    state, _, _ = step(state, batch, scalars(0.5))
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.aux))
  assert "backbone" not in state.params
  assert np.abs(head["kernel"] - state.params["head"]["kernel"]).max() > 1e-4


def test_fine_tuning_moves_everything_and_averages_it():
  method = classifier(
    frozen=False, ema=True, mixup=0.8, cutmix=1.0, smoothing=0.1,
    backbone=backbone(drop_path=0.1),
  )  # fmt: skip
  tx = optim.Optimizer(clip=0.0).build(lr_scale=method.lr_scale)
  state, step = start(method, tx)
  before = jax.device_get(state.params)
  batch = image_batch(np.random.default_rng(2))
  batch["erase"] = jnp.tile(jnp.asarray([[0, 0, 4, 4]], jnp.int32), (8, 1))
  s = scalars(0.01, momentum=0.75) | method.at(0)
  state, values, _ = step(state, batch, s)
  after, average = jax.device_get((state.params, state.teacher))

  def moved(path, old, new, mean):
    name = trees.path_name(path)
    assert np.abs(old - new).max() > 0, name
    np.testing.assert_allclose(
      mean, 0.75 * old + 0.25 * new, atol=1e-7, err_msg=name
    )

  jax.tree_util.tree_map_with_path(moved, before, after, average)
  assert np.isfinite(values["loss"])


def test_layer_decay_by_hand():
  method = classifier(layer_decay=0.5, frozen=False)  # 3 blocks
  params, _, _ = jax.eval_shape(method.init, jax.random.key(0))
  scale = trees.map_named(method.lr_scale, params)
  assert scale["backbone"]["pos_embed"] == 0.5**4
  assert scale["backbone"]["patch_embed"]["kernel"] == 0.5**4
  blocks = scale["backbone"]["blocks"]["mlp"]["fc1"]["bias"]
  np.testing.assert_allclose(blocks.ravel(), [0.125, 0.25, 0.5])
  assert scale["backbone"]["norm"]["scale"] == 1
  assert scale["head"]["kernel"].ravel() == [1]


def test_loss_against_a_loop():
  method = classifier(smoothing=0.1, last_blocks=1)
  params, teacher, aux = method.init(jax.random.key(3))
  batch = image_batch(np.random.default_rng(3))
  loss, _, metrics, _ = loss_of(
    method, params, teacher, aux, batch, jax.random.key(0), {}
  )
  weights = method.assemble(params, aux)
  logits = np.asarray(method.logits(weights, batch["images"][:, 0]), np.float64)
  total = 0.0
  for row, label in zip(logits, np.asarray(batch["label"]), strict=True):
    log_sum = math.log(sum(math.exp(x) for x in row))
    wanted = [0.1 / 7 + 0.9 * (c == label) for c in range(7)]
    total -= sum(w * (x - log_sum) for w, x in zip(wanted, row, strict=True))
  assert float(loss) == pytest.approx(total / 8, rel=1e-5)
  right = logits.argmax(1) == np.asarray(batch["label"])
  assert float(metrics["acc"]) == pytest.approx(right.mean())


@pytest.mark.parametrize("frozen", [False, True])
def test_fine_tuning_drops_branches_and_a_probe_none(frozen):
  batch = image_batch(np.random.default_rng(4))
  noise = np.random.default_rng(5).normal(size=(1, 10, 7))
  ends = []
  for rate in (0.0, 0.5):
    method = classifier(frozen=frozen, backbone=backbone(drop_path=rate))
    params, teacher, aux = jax.jit(method.init)(jax.random.key(3))
    # Its start is too small to tell features apart.
    params["head"]["kernel"] += noise
    for key in (0, 1):
      loss, *_ = loss_of(
        method, params, teacher, aux, batch, jax.random.key(key), {}
      )
      ends.append(float(loss))
  assert ends[0] == ends[1]
  assert len(set(ends)) == (1 if frozen else 3)


def test_targets_are_mixed_as_the_images_are():
  """A box of the whole image makes its partner of it; the share blends."""
  method = classifier(frozen=False, mixup=0.8)
  params, teacher, aux = jax.jit(method.init)(jax.random.key(3))
  params["head"]["kernel"] += np.random.default_rng(5).normal(size=(1, 10, 7))
  batch = image_batch(np.random.default_rng(4))
  whole = np.array([0, 0, 8, 8], np.int32)
  mix = {"mix_lam": np.float32(0.25), "mix_box": whole}
  loss, *_ = loss_of(
    method, params, teacher, aux, batch, jax.random.key(0), mix
  )
  weights = method.assemble(params, aux)
  logits = np.asarray(jax.jit(method.logits)(weights, batch["images"][::-1, 0]))
  log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  hot = np.eye(7)[np.asarray(batch["label"])]
  want = -np.sum((0.25 * hot + 0.75 * hot[::-1]) * log_probs, axis=1).mean()
  assert float(loss) == pytest.approx(want, rel=1e-5)


def test_erased_boxes_are_filled_by_the_key_of_the_step():
  method = classifier(frozen=False)
  params, teacher, aux = jax.jit(method.init)(jax.random.key(3))
  params["head"]["kernel"] += np.random.default_rng(5).normal(size=(1, 10, 7))
  batch = image_batch(np.random.default_rng(4))
  boxes = {
    side: batch | {"erase": jnp.tile(jnp.array([[0, 0, side, side]]), (8, 1))}
    for side in (0, 6)
  }
  loss = lambda side, key: float(
    loss_of(method, params, teacher, aux, boxes[side], jax.random.key(key), {})[
      0
    ]
  )
  assert loss(0, 0) == loss(0, 1)
  assert len({loss(0, 0), loss(6, 0), loss(6, 1)}) == 3


def test_every_step_mixes_otherwise():
  method = classifier(frozen=False, mixup=0.8)
  shares = [float(method.at(step)["mix_lam"]) for step in range(8)]
  assert len(set(shares)) == 8
  assert shares == [float(method.at(step)["mix_lam"]) for step in range(8)]
  other = dataclasses.replace(method, seed=1)
  assert shares[0] != float(other.at(0)["mix_lam"])


@pytest.mark.slow
def test_one_device_and_eight_agree():
  method = classifier(frozen=False, mixup=0.8, mixup_group=8)
  tx = optim.Optimizer(name="sgd", clip=0.0).build(lr_scale=method.lr_scale)
  batch = image_batch(np.random.default_rng(4), rows=64)
  batch = {k: np.asarray(v) for k, v in batch.items()}
  ends = []
  for devices in (1, 8):
    m = mesh.make_mesh(devices=jax.devices()[:devices])
    state, shardings = train_step.init_state(method, tx, m, seed=0)
    step = train_step.make_step(method, tx, m, shardings, seed=0)
    for i in range(2):
      s = mesh.put(m, scalars(0.1) | method.at(i))
      state, _, _ = step(state, mesh.shard(m, batch), s)
    ends.append(jax.device_get(state.params))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
  jax.tree.map(close, *ends)


def test_learning_rates_of_fine_tuning_by_hand():
  schedule = schedules.Schedules(
    lr=1.0, min_lr=0.1, warmup_epochs=2, weight_decay=(0.05, 0.05),
    momentum=(0.9, 0.9), freeze_epochs=0, epochs=8, steps_per_epoch=3,
    schedule="late_epoch_cosine", warmup_lr=0.2,
  )  # fmt: skip
  got = [schedule.values(3 * e + 1)["lr"] for e in range(8)]
  cosine = lambda e: 0.1 + 0.45 * (1 + math.cos(math.pi * e / 8))
  want = [0.2, 0.2, 0.6, cosine(2), cosine(3), cosine(4), cosine(5), cosine(6)]
  assert got == pytest.approx(want)
  assert schedule.values(5)["momentum"] == pytest.approx(0.9)


def test_combine_takes_one_layer_and_refuses_another_width():
  method = classifier(rates=(1.0, 2.0))
  params, _, aux = method.init(jax.random.key(0))
  params["head"]["bias"] = params["head"]["bias"].at[1, 3].set(50.0)
  whole = classifiers.combine(
    aux["backbone"], params["head"], width=method.feature_width, layer=1
  )
  images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
  single = dataclasses.replace(method, rates=(1.0,))
  assert single.logits(whole, images).argmax(-1).tolist() == [3, 3]
  with pytest.raises(InputError, match="width 10.*give 20"):
    classifiers.combine(aux["backbone"], params["head"], width=20)


def completed(family, name, **changes):
  """Config of a supervised evaluation on a network of this family."""
  theirs = tiny.get_config(family)
  theirs.data.update(shapes_train=8, shapes_val=8)
  method = METHODS[theirs.method.name].from_config(theirs, steps_per_epoch=1)
  source = loading.Weights(
    method, {}, {}, theirs, "0" * 16, 0, "teacher", "nowhere", None
  )
  config = evals.get_config(name)
  config.update_from_flattened_dict(changes)
  return supervised.complete(evaluate.complete(config, source), source)


@pytest.mark.parametrize(
  "family, name, offset",
  [
    ("attmask", "finetune", 0.1),
    ("mae", "finetune_mae_50e_gap", 0.0),
    ("extrema", "finetune_extrema", 0.0),
  ],
)
def test_positions_are_resampled_as_the_family_does(family, name, offset):
  config = completed(family, name, **{"method.positions": "learned"})
  method = Classify.from_config(config, steps_per_epoch=1)
  assert method.backbone.positions == "learned"
  assert method.backbone.grid_offset == offset
  del config.method.grid_offset  # a run from before there was a choice
  method = Classify.from_config(config, steps_per_epoch=1)
  assert method.backbone.grid_offset == 0.1


@pytest.mark.parametrize(
  "family, name, changes, match",
  [
    ("extrema", "linear", {}, "last_blocks 4 .*last_blocks=1.*linear_extrema"),
    ("extrema", "tokens", {"method.pool": "cls+mean", "method.last_blocks": 2},
     "only after the last"),
    ("mae", "linear_mae_lars_gap", {"method.lrs": (0.1, 0.2)},
     r"lrs \(0.1, 0.2\) with optim.optimizer=lars would share .*=sgd"),
    ("mae", "linear_mae_sgd_gap",
     {"method.lrs": (0.1, 0.2), "optim.optimizer": "lars_mae"},
     "optimizer=lars_mae would share"),
  ],
)  # fmt: skip
def test_what_a_family_cannot_do_is_refused(family, name, changes, match):
  config = completed(family, name, **changes)
  with pytest.raises(InputError, match=match):
    Classify.from_config(config, steps_per_epoch=1)


@pytest.mark.parametrize(
  "family, name, changes",
  [
    ("extrema", "linear", {"method.last_blocks": 1}),
    ("extrema", "linear", {"method.pool": "mean"}),
    ("extrema", "linear_extrema", {"method.lrs": (0.1, 0.2)}),
    ("attmask", "linear", {}),
    ("mae", "linear_mae_lars_gap", {"method.lrs": (0.1,)}),
  ],
)
def test_features_have_the_width_of_the_linear_layer(family, name, changes):
  config = completed(family, name, **changes)
  method = Classify.from_config(config, steps_per_epoch=1)
  params, _, aux = jax.eval_shape(method.init, jax.random.key(0))
  weights_of = method.assemble(params, aux)
  side = method.image_size
  images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
  logits = jax.eval_shape(method.all_logits, weights_of, images)
  layers = max(len(config.method.lrs), 1)
  assert logits.shape == (2, layers, method.num_classes)
