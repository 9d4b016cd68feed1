"""Recipes build, hold the published settings, and train.

Expected settings are those of the commands in the AttMask release and of the
config files and commands of MAE-priv, the official MAE and ExtreMA; expected
steps those of their loaders for 1281167 and 260000 images.
"""

import importlib
import json
import re

import jax
import numpy as np
import pytest
import small

from attmask_jax import train
from attmask_jax.errors import InputError
from attmask_jax.methods import METHODS
from attmask_jax.training import optim
from attmask_jax.training.schedules import Schedules

SMALL = ("attmask", "hint", "ibot", "dino", "mae", "extrema")
LAPTOP = ("attmask_laptop", "mae_laptop", "extrema_laptop")
ARGUMENTS = {  # the first is the default
  "attmask_vits16": (
    *("high_100", "hint_100", "high_300", "hint_20pct", "high_20pct"),
    *("low_20pct", "random_20pct", "random75_20pct", "block_20pct"),
    *("high_10pct", "block_10pct", "high_5pct", "block_5pct"),
  ),
  "ibot_vits16": ("100ep", "20pct"),
  "dino_vits16": ("100ep", "20pct"),
  "small_images": SMALL + LAPTOP,
  "cifar10": SMALL,
  "tiny": (
    *("attmask", "hint", "low", "random", "ibot", "dino"),
    *("mae", "extrema"),
  ),
  "mae": (
    *("small_100e_gap", "small_100e_cls", "small_200e_gap", "small_400e_gap"),
    *("small_800e_gap", "small_1600e_gap", "base_400e_gap", "large_100e_gap"),
    *("large_100e_raw", "huge_100e_gap", "giant_100e_gap"),
    *("official_base", "official_large", "official_huge"),
  ),
  "extrema": ("80x5_colour", "80x5", "90x8_colour", "80x5_colour_22k"),
}
EVALS = (
  *("knn", "knn_mae", "knn_mae_cls", "fewshot", "linear", "linear_vits16"),
  *("linear_mae_sgd_gap", "linear_mae_sgd_cls", "linear_mae_lars_gap"),
  *("linear_mae_lars_cls", "linear_extrema", "finetune", "cifar10"),
  *("cifar100", "flowers", "finetune_mae_50e_gap", "finetune_mae_50e_cls"),
  *("finetune_mae_50e_gap_erasing", "finetune_mae_100e_gap"),
  "finetune_mae_150e_gap",
  *("finetune_extrema", "masked", "masked_30", "masked_70", "backgrounds"),
  *("clusters", "attention", "masks", "overlap", "pca", "reconstruct"),
  *("rollout", "tokens", "token_clusters", "compare"),
)
CHOICES = ARGUMENTS | {"evals": EVALS}
RECIPES = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]
STEPS = 7  # steps per epoch, where no data set says

IMAGENET = 1281167
WIDE, NARROW = ((0.25, 1.0), (0.05, 0.25)), ((0.32, 1.0), (0.05, 0.32))
# batch, epochs, momentum, local crops, scales, images per class, S, peak lr
PUBLISHED = {
  "hint_100": (4 * 60, 100, 0.996, 10, WIDE, 0, 5338, 4.6875e-4),
  "high_100": (4 * 60, 100, 0.996, 10, WIDE, 0, 5338, 4.6875e-4),
  "high_300": (8 * 100, 300, 0.996, 10, NARROW, 0, 1601, 1.5625e-3),
  "hint_20pct": (4 * 60, 100, 0.99, 6, WIDE, 260, 1083, 4.6875e-4),
  "high_20pct": (4 * 60, 100, 0.99, 6, WIDE, 260, 1083, 4.6875e-4),
}


def recipe(name):
  return importlib.import_module(f"configs.{name}")


def build(config, steps=STEPS):
  """The method and the schedules that a config describes."""
  schedules = Schedules.from_config(config, steps_per_epoch=steps)
  method = METHODS[config.method.name].from_config(
    config, steps_per_epoch=steps
  )
  return method, schedules


def rows(config, method):
  """Shapes of a batch of two images."""
  data = config.data
  views = lambda n, side: jax.ShapeDtypeStruct((2, n, side, side, 3), np.uint8)
  pair = 2 if data.get("transform") == "two_colours" else 1
  batch = {
    "images": views(data.get("global_crops", pair), data.image_size),
    "position": jax.ShapeDtypeStruct((2,), np.int32),
  }
  if "local_crops" in data:
    batch["local_images"] = views(data.local_crops, data.local_size)
  extras = method.item_extras(0, 0)
  return batch | {k: np.stack([v, v]) for k, v in extras.items()}


@pytest.mark.parametrize("name, arg", RECIPES)
def test_builds(name, arg):
  config = recipe(name).get_config(arg).lock()
  method, schedules = build(config)
  optim.Optimizer.from_config(config).build(
    frozen_at_start=method.frozen_at_start,
    untrained=method.untrained,
    undecayed=method.undecayed,
    lr_scale=method.lr_scale,
  )
  for step in (0, schedules.total_steps - 1):
    scalars = schedules.at(step) | method.at(step)
    assert all(np.isfinite(value) for value in scalars.values())
  for name in ("image_size", "local_size"):
    assert config.data.get(name, 0) % config.method.patch_size == 0
  assert config.data.batch_size % 8 == 0  # a node of 8 devices


@pytest.mark.parametrize("name", ARGUMENTS)
def test_loss_of_the_full_size_has_shapes(name):
  """Traced, not run; millions of weights in the encoder as published."""
  config = recipe(name).get_config()
  method, schedules = build(config)
  key = jax.random.key(0)
  params, teacher, aux = jax.eval_shape(method.init, key)
  count = sum(x.size for x in jax.tree.leaves(params["backbone"]))
  vit_s, vit_ti = 21.7e6, 5.4e6
  if name != "tiny":
    want = {"small_images": vit_ti, "cifar10": vit_ti, "extrema": 99.8e6}
    assert count == pytest.approx(want.get(name, vit_s), rel=0.02)

  scalars = schedules.at(0) | method.at(0)
  loss, _, stats, per_image = jax.eval_shape(
    method.loss, params, teacher, aux, rows(config, method), key, scalars
  )
  assert (loss.shape, loss.dtype) == ((), np.float32)
  prototypes = config.method.name == "attmask"
  assert set(per_image) == ({"assignment"} if prototypes else set())
  for value in per_image.values():
    assert value.shape == (2,)
  assert jax.eval_shape(method.update_aux, aux, stats) == aux


@pytest.mark.parametrize("name", CHOICES)
def test_first_argument_is_the_default(name):
  get_config = recipe(name).get_config
  first = CHOICES[name][0]
  assert get_config().to_dict() == get_config(first).to_dict()


@pytest.mark.parametrize("name", EVALS)
def test_evaluations_have_a_name_and_every_key_of_one(name):
  config = recipe("evals").get_config(name).lock()
  assert {"weights", "network", "probe", "evals", "data"} <= set(config)
  trains = name.startswith(("linear", "finetune", "cifar", "flowers"))
  if name in ("cifar10", "cifar100", "flowers"):  # AttMask's fine-tuning
    assert config.evals.name == "finetune"
  else:
    assert name.startswith(config.evals.name)
  if trains:
    schedules = Schedules.from_config(config, steps_per_epoch=STEPS)
    assert np.isfinite(schedules.at(schedules.total_steps - 1)["lr"])
    optim.Optimizer.from_config(config)
  student = name in ("reconstruct", "finetune_extrema")
  assert config.network == ("student" if student else "")


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_argument_is_one_sentence_with_the_known_ones(name):
  with pytest.raises(ValueError) as caught:
    recipe(name).get_config("hihg_100")
  message = str(caught.value)
  assert '"hihg_100"' in message and "\n" not in message
  for arg in CHOICES[name]:
    assert re.search(rf"\b{arg}\b", message)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_docstring_is_a_page(name):
  page = recipe(name).__doc__
  assert f"python main.py --config=configs/{name}.py" in page
  for word in ("--workdir=", "Hardware:", "Expected:"):
    assert word in page
  if name != "tiny":  # which repeats no published run
    assert "arXiv:" in page
  for arg in ARGUMENTS[name]:
    assert arg in page.lower()


@pytest.mark.parametrize("arg", PUBLISHED)
def test_published_settings(arg):
  batch, epochs, momentum, crops, scales, subset, steps, lr = PUBLISHED[arg]
  config = recipe("attmask_vits16").get_config(arg)
  data = config.data
  assert (data.batch_size, data.subset) == (batch, subset)
  assert (data.global_crops, data.local_crops) == (2, crops)
  assert (data.global_scale, data.local_scale) == scales
  assert (data.image_size, data.local_size) == (224, 96)
  images = 1000 * subset if subset else IMAGENET
  assert images // batch == steps

  method, schedules = build(config, steps)
  assert schedules.total_steps == epochs * steps
  end = epochs * steps - 1
  start, peak, last = map(schedules.values, (0, 10 * steps - 1, end))
  assert start == pytest.approx({"lr": 0, "wd": 0.04, "momentum": momentum})
  assert peak["lr"] == pytest.approx(lr, rel=1e-12)
  # One step before the end of a cosine: its value up to (1 / steps)^2.
  assert last["lr"] == pytest.approx(1e-6, rel=1e-3)
  assert last["wd"] == pytest.approx(0.4, rel=1e-6)
  assert last["momentum"] == pytest.approx(1.0, rel=1e-6)
  frozen = [bool(schedules.at(i)["frozen"]) for i in (steps - 1, steps)]
  assert frozen == [True, False]  # one epoch
  for key in ("teacher_temp", "teacher_patch_temp"):
    temps = [method.at(e * steps)[key] for e in (0, 28, 29, epochs - 1)]
    # linspace(0.04, 0.07, 30): the 29th of 30 values is a 29th short.
    want = [0.04, 0.07 - 0.03 / 29, 0.07, 0.07]
    np.testing.assert_allclose(temps, want, rtol=1e-6)


@pytest.mark.parametrize("arg", ARGUMENTS["attmask_vits16"])
def test_published_settings_common_to_all(arg):
  config = recipe("attmask_vits16").get_config(arg)
  policy = arg.split("_")[0].removesuffix("75")
  mask = policy if policy in ("random", "block") else f"attmask_{policy}"
  want = dict(
    mask=mask,
    variant="small",
    patch_size=16,
    drop_path=0.1,
    norm_last_layer=False,
    shared_head=True,
    shared_head_teacher=True,
    out_dim=8192,
    head_hidden=2048,
    head_bottleneck=256,
    student_temp=0.1,
    mask_prob=0.5,
    show_max=0.1,
    mask_start_epoch=0,
    cls_weight=1.0,
    patch_weight=1.0,
    center_momentum=0.9,
  )
  assert {k: config.method[k] for k in want} == want
  if mask.startswith("attmask"):
    assert config.method.mask_ratio == (0.3,)
    assert config.method.mask_ratio_var == (0.2,)
  want = dict(optimizer="adamw", clip=3.0, clip_by="tensor", warmup_epochs=10)
  assert {k: config.optim[k] for k in want} == want
  assert config.evals.eval_epochs == 20
  assert config.evals.knn_ks == (10, 20, 100, 200)
  shares = {"5pct": 65, "10pct": 130, "20pct": 260}  # of 1300 at most
  assert config.data.subset == shares.get(arg.split("_")[1], 0)


# MAE: variant, patch, decoder, class token, normalised, epochs, warm-up.
MAE = {
  "small_100e_gap": ("small", 16, (192, 4, 3), False, True, 100, 10),
  "small_100e_cls": ("small", 16, (192, 4, 3), True, True, 100, 10),
  "small_200e_gap": ("small", 16, (192, 4, 3), False, True, 200, 20),
  "small_400e_gap": ("small", 16, (192, 4, 3), False, True, 400, 40),
  "small_800e_gap": ("small", 16, (192, 4, 3), False, True, 800, 40),
  "small_1600e_gap": ("small", 16, (192, 4, 3), False, True, 1600, 40),
  "base_400e_gap": ("base", 16, (384, 4, 6), False, True, 400, 40),
  "large_100e_gap": ("large", 16, (512, 8, 8), False, True, 100, 10),
  "large_100e_raw": ("large", 16, (512, 8, 8), False, False, 100, 10),
  "huge_100e_gap": ("huge", 14, (512, 8, 8), False, True, 100, 10),
  "giant_100e_gap": ("giant", 14, (512, 8, 8), False, True, 100, 10),
  "official_base": ("base", 16, (512, 8, 16), True, True, 1600, 40),
  "official_large": ("large", 16, (512, 8, 16), True, True, 1600, 40),
  "official_huge": ("huge", 14, (512, 8, 16), True, True, 1600, 40),
}
# Width, depth and heads; weights of the encoder without class token, and of all
# with the decoder of its recipe. Keys have no bias there.
MAE_SIZES = {
  "small": (384, 12, 6, 21_585_024, 23_586_432),
  "base": (768, 12, 12, 85_637_376, 93_325_824),
  "large": (1024, 24, 16, 303_074_304, 329_209_600),
  "huge": (1280, 32, 16, 630_393_600, 656_567_628),
  "giant": (1664, 48, 16, 1_596_825_984, 1_623_196_620),
}


def size_of(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("arg", MAE)
def test_published_settings_of_mae(arg):
  variant, patch, decoder, cls, norm, epochs, warmup = MAE[arg]
  config = recipe("mae").get_config(arg)
  assert config.data.batch_size == 8 * 512 and IMAGENET // 4096 == 312
  method, schedules = build(config, 312)
  peak = schedules.values(warmup * 312)
  assert peak["lr"] == pytest.approx(2.4e-3, rel=1e-9)
  assert schedules.values(0)["lr"] == 0
  assert (schedules.epochs, schedules.warmup_epochs) == (epochs, warmup)
  assert schedules.min_lr == 0 and peak["wd"] == pytest.approx(0.05)
  adam = optim.Optimizer.from_config(config)
  assert (adam.name, adam.betas, adam.eps) == ("adamw", (0.9, 0.95), 1e-8)
  assert adam.clip == 0

  encoder = method.backbone
  assert encoder.class_token == ("input" if cls else "none")
  assert (encoder.patch_size, encoder.drop_path) == (patch, 0)
  d = method.decoder
  assert (d.width, d.depth, d.num_heads) == decoder
  assert (method.norm_target, method.mask) == (norm, "random")
  official = arg.startswith("official")
  assert method.n_hidden == {16: 147, 14: 192}[patch]
  assert (method.target_layout, method.target_variance) == (
    ("hwc", "unbiased") if official else ("chw", "biased")
  )
  assert d.class_token == official
  assert encoder.positions == d.positions == ("xy" if official else "yx")
  data = config.data
  assert (data.transform, tuple(data.scale), data.resample) == (
    ("crop_flip", (0.2, 1.0), "bicubic")
    if official
    else ("crop_flip", (0.08, 1.0), "bilinear")
  )

  width, depth, num_heads, own, whole = MAE_SIZES[variant]
  assert (encoder.width, encoder.depth, encoder.num_heads) == (
    width,
    depth,
    num_heads,
  )
  params, _, _ = jax.eval_shape(method.init, jax.random.key(0))
  key_biases = width * depth
  got = size_of(params["backbone"]) - key_biases - cls * width
  assert got == own
  if not official:
    got = size_of(params) - key_biases - d.width * d.depth - cls * width
    assert got == whole


# ExtreMA: epochs, warm-up (of 22k: ours), masks, K, colour.
EXTREMA = {
  "80x5": (300, 40, 5, 39, False),
  "80x5_colour": (300, 40, 5, 39, True),
  "90x8_colour": (300, 40, 8, 19, True),
  "80x5_colour_22k": (30, 4, 5, 39, True),
}


@pytest.mark.parametrize("arg", EXTREMA)
def test_published_settings_of_extrema(arg):
  epochs, warmup, masks, kept, colour = EXTREMA[arg]
  config = recipe("extrema").get_config(arg)
  data = config.data
  assert data.batch_size == 2048 and IMAGENET // 2048 == 625
  method, schedules = build(config, 625)
  start, peak = (schedules.values(i) for i in (0, warmup * 625))
  assert (start["lr"], start["momentum"]) == (0, pytest.approx(0.996))
  assert peak["lr"] == pytest.approx(1.2e-3, rel=1e-9)
  assert peak["wd"] == pytest.approx(0.1)
  assert schedules.values(epochs * 625 - 1)["momentum"] == pytest.approx(1)
  assert (schedules.epochs, schedules.schedule) == (epochs, "smooth_cosine")
  adam = optim.Optimizer.from_config(config)
  assert (adam.name, adam.betas) == ("adamw", (0.9, 0.95))
  assert (method.num_masks, method.kept, method.mask) == (masks, kept, "random")
  assert method.disjoint and method.contrast == "byol"
  assert (method.backbone.drop_path, method.backbone.layer_scale) == (0.1, 0.1)
  assert data.transform == ("two_colours" if colour else "crop_flip")
  assert (tuple(data.scale), data.jitter, data.grey) == ((0.2, 1.0), 0.8, 0.2)
  params, teacher, _ = jax.eval_shape(method.init, jax.random.key(0))
  # The release counts its fixed positions: 196 x 768 values.
  assert size_of(params["backbone"]) + 196 * 768 == 99_976_704
  assert size_of(params["head"]) == 20_996_352
  assert size_of(params["predictor"]) == 2_109_696
  assert size_of(params) == 122_932_224  # trainable
  assert size_of(teacher) == size_of(params) - 2_109_696


# batch, steps per epoch, epochs, warm-up, peak lr, pool, optimiser
PROBES = {
  "linear_mae_sgd_gap": (4096, 312, 90, 10, 1.6, "mean", "sgd"),
  "linear_mae_sgd_cls": (4096, 312, 90, 10, 1.6, "cls", "sgd"),
  "linear_mae_lars_gap": (16384, 78, 90, 10, 6.4, "mean", "lars"),
  "linear_mae_lars_cls": (16384, 78, 90, 10, 6.4, "cls", "lars"),
  "linear_extrema": (4096, 312, 90, 10, 1.6, "cls", "sgd"),
}


def supervised_schedule(name, batch, steps, epochs, warmup, lr):
  """The config, once its schedule is as published."""
  config = recipe("evals").get_config(name)
  assert config.data.batch_size == batch and IMAGENET // batch == steps
  schedules = Schedules.from_config(config, steps_per_epoch=steps)
  assert (schedules.epochs, schedules.warmup_epochs) == (epochs, warmup)
  peak = schedules.values(warmup * steps)["lr"]
  assert peak == pytest.approx(lr, rel=1e-9)
  assert schedules.values(0)["lr"] == 0
  return config


@pytest.mark.parametrize("name", PROBES)
def test_published_linear_probes(name):
  *schedule, pool, optimizer = PROBES[name]
  config = supervised_schedule(name, *schedule)
  method, o = config.method, config.optim
  want = dict(
    frozen=True, final_norm=False, head_norm="batch", pool=pool, last_blocks=1,
    init_std=0.01, smoothing=0.0, mixup=0.0, cutmix=0.0,
  )  # fmt: skip
  assert {k: method[k] for k in want} == want
  assert (o.optimizer, o.sgd_momentum) == (optimizer, 0.9)
  assert tuple(o.weight_decay) == (0, 0)
  mae = "mae" in name
  assert o.nesterov == (mae and optimizer == "sgd")
  assert o.min_lr == (1e-6 if mae else 0)
  assert config.data.resample == ("bicubic" if mae else "bilinear")
  assert config.data.eval_resample == ("bicubic" if mae else "bilinear")


# epochs, warm-up, peak lr, pool, erasing, layer decay, drop path
FINE_TUNED = {
  "finetune_mae_50e_gap": (50, 10, 4e-3, "mean", 0.0, 0.75, 0.1),
  "finetune_mae_50e_gap_erasing": (50, 10, 4e-3, "mean", 0.25, 0.75, 0.1),
  "finetune_mae_50e_cls": (50, 10, 4e-3, "cls", 0.0, 0.75, 0.1),
  "finetune_mae_100e_gap": (100, 10, 4e-3, "mean", 0.0, 0.75, 0.1),
  "finetune_mae_150e_gap": (150, 10, 4e-3, "mean", 0.0, 0.75, 0.1),
  "finetune_extrema": (100, 5, 2e-3, "mean", 0.25, 0.65, 0.2),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_published_fine_tuning(name):
  *schedule, pool, erase, layer_decay, drop_path = FINE_TUNED[name]
  config = supervised_schedule(name, 8 * 128, 1251, *schedule)
  o, data = config.optim, config.data
  want = dict(
    frozen=False, final_norm=False, head_norm="layer", pool=pool,
    layer_decay=layer_decay, drop_path=drop_path, smoothing=0.1, mixup=0.8,
    cutmix=1.0, mix_prob=1.0, switch_prob=0.5, ema=False, decay_tokens=False,
    init_std=2e-5,
  )  # fmt: skip
  assert {k: config.method[k] for k in want} == want
  assert (o.optimizer, tuple(o.betas)) == ("adamw", (0.9, 0.999))
  assert (o.min_lr, tuple(o.weight_decay)) == (1e-6, (0.05, 0.05))
  assert o.teacher_momentum == o.teacher_momentum_end == 0.9999  # if averaged
  assert (data.erase_prob, data.repeats, data.resample) == (erase, 1, "bicubic")
  assert data.rand_augment == "rand-m9-mstd0.5-inc1"
  learned = ("none", "learned") if name == "finetune_extrema" else ("", "")
  assert (config.method.class_token, config.method.positions) == learned


@pytest.mark.parametrize(
  "name, pool", [("knn_mae", "mean"), ("knn_mae_cls", "cls")]
)
def test_published_k_nearest_neighbours_of_mae(name, pool):
  config = recipe("evals").get_config(name)
  evals = config.evals
  assert (evals.pool, evals.final_norm, evals.knn_temp) == (pool, False, 0.07)
  assert tuple(evals.knn_ks) == (10, 20, 100, 200)
  assert config.data.eval_resample == "bilinear"


def test_hint_counts_of_the_published_jitter():
  method, _ = build(recipe("attmask_vits16").get_config("hint_100"), steps=500)
  drawn = [method.at(step) for step in range(500)]
  hidden = [int(scalars["n_mask"]) for scalars in drawn]
  shown = [int(scalars["n_show"]) for scalars in drawn]
  # 196 patches at 0.1 to 0.5: 500 draws reach these ends in 499 of 500 cases.
  assert (min(hidden), max(hidden)) in {(19, 97), (20, 97)}
  assert (min(shown), max(shown)) == (1, 9)


@pytest.mark.parametrize(
  "name, arg, least, most",
  [
    ("attmask_vits16", "random_20pct", 19, 98),
    ("attmask_vits16", "random75_20pct", 147, 147),
    ("attmask_vits16", "block_20pct", 1, 98),
    ("ibot_vits16", "100ep", 1, 98),
    ("small_images", "ibot", 1, 32),
  ],
)
def test_half_of_the_views_stay_whole(name, arg, least, most):
  method, _ = build(recipe(name).get_config(arg))
  masks = [method.item_extras(0, i)["masks"] for i in range(100)]
  hidden = np.concatenate(masks).sum(axis=-1)
  # 200 fair draws: 4 standard deviations are 0.14.
  assert abs(np.mean(hidden == 0) - 0.5) < 0.14
  masked = hidden[hidden > 0]
  assert least <= masked.min() and masked.max() <= most


@pytest.mark.parametrize("name", ["dino_vits16", "small_images", "cifar10"])
def test_dino_has_neither_masks_nor_patch_loss(name):
  arg = "100ep" if name == "dino_vits16" else "dino"
  config = recipe(name).get_config(arg)
  assert (config.method.mask, config.method.patch_weight) == ("none", 0.0)
  method, _ = build(config)
  assert method.item_extras(0, 0) == {}
  params, _, aux = jax.eval_shape(method.init, jax.random.key(0))
  assert "mask_token" not in params["backbone"]
  assert set(aux) == {"center"}


def test_ibot_differs_from_attmask_by_its_masks_alone():
  for ours, theirs in (("100ep", "high_100"), ("20pct", "high_20pct")):
    ibot = recipe("ibot_vits16").get_config(ours).to_dict()
    attmask = recipe("attmask_vits16").get_config(theirs).to_dict()
    for key in ("mask", "mask_ratio", "mask_ratio_var"):
      assert ibot["method"].pop(key) != attmask["method"].pop(key)
    assert ibot == attmask


@pytest.mark.parametrize("name, warm", [("cifar10", 10), ("small_images", 10)])
def test_runs_shorter_than_the_temperature_warmup_are_refused(name, warm):
  config = recipe(name).get_config().lock()
  config.optim.epochs = warm
  build(config)
  config.optim.epochs = warm - 1
  with pytest.raises(InputError, match="temp_warmup_epochs"):
    build(config)
  config.method.temp_warmup_epochs = warm - 1  # the documented way
  build(config)


@pytest.mark.parametrize(
  "name, arg", [("attmask_vits16", "hint_20pct"), ("cifar10", "ibot")]
)
def test_trains_two_steps_and_is_then_done(name, arg, tmp_path):
  """Attention masks, subset and bfloat16; block masks. 20 s each."""
  config = recipe(name).get_config(arg)
  shrunk = small.SIZES | {
    "method.patch_size": 4,
    "data.source": "shapes",
    "data.subset": min(config.data.subset, 2),  # 8 classes of 2 images
    "data.shapes_train": 64 if config.data.subset else 16,
    "data.batch_size": 8,
    "optim.epochs": 1,
    "evals.knn_ks": (3,),
    "run.log_steps": 1,
  }
  config.update_from_flattened_dict(shrunk)
  config.lock()

  train.train(config, str(tmp_path))
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
  assert list(losses) == [1, 2] and np.isfinite(list(losses.values())).all()
  assert [r["step"] for r in records if "knn/top1" in r] == [0, 2]
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["method.mask"] == config.method.mask
  folder = tmp_path / "checkpoints"
  checkpoints = {p: p.stat().st_mtime_ns for p in folder.glob("*/_*METADATA")}
  assert {path.parent.name for path in checkpoints} == {"2"}

  train.train(config, str(tmp_path))
  assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines
  again = {p: p.stat().st_mtime_ns for p in folder.glob("*/_*METADATA")}
  assert again == checkpoints
