"""Recipes build, hold the published settings, and train.

Expected settings are those of the commands in the AttMask release, expected
steps those of its loader for 1281167 and 260000 images.
"""

import importlib
import json
import re

import jax
import numpy as np
import pytest
import small

from attmask_jax import optim, rates, train
from attmask_jax.errors import InputError
from attmask_jax.methods import METHODS

SMALL = ("attmask", "hint", "ibot", "dino")
ARGUMENTS = {  # the first is the default
  "attmask_vits16": (
    *("high_100", "hint_100", "high_300", "hint_20pct", "high_20pct"),
    *("low_20pct", "random_20pct", "random75_20pct", "block_20pct"),
    *("high_10pct", "block_10pct", "high_5pct", "block_5pct"),
  ),
  "ibot_vits16": ("100ep", "20pct"),
  "dino_vits16": ("100ep", "20pct"),
  "small_images": SMALL,
  "cifar10": SMALL,
  "tiny": ("attmask", "hint", "low", "random", "ibot", "dino"),
}
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
  schedules = rates.Schedules.from_config(config, steps_per_epoch=steps)
  method = METHODS[config.method.name].from_config(
    config, steps_per_epoch=steps
  )
  return method, schedules


def rows(config, method):
  """Shapes of a batch of two images."""
  data = config.data
  views = lambda n, side: jax.ShapeDtypeStruct((2, n, side, side, 3), np.uint8)
  batch = {
    "images": views(data.global_crops, data.image_size),
    "local_images": views(data.local_crops, data.local_size),
    "position": jax.ShapeDtypeStruct((2,), np.int32),
  }
  extras = method.item_extras(0, 0)
  return batch | {k: np.stack([v, v]) for k, v in extras.items()}


@pytest.mark.parametrize("name, arg", RECIPES)
def test_builds(name, arg):
  config = recipe(name).get_config(arg).lock()
  method, schedules = build(config)
  optim.Optimizer.from_config(config).build(
    frozen_at_start=method.frozen_at_start, untrained=method.untrained
  )
  for step in (0, schedules.total_steps - 1):
    scalars = schedules.at(step) | method.at(step)
    assert all(np.isfinite(value) for value in scalars.values())
  for size in (config.data.image_size, config.data.local_size):
    assert size % config.method.patch_size == 0
  assert config.data.batch_size % 8 == 0  # a node of 8 devices


@pytest.mark.parametrize("name", ARGUMENTS)
def test_loss_of_the_full_size_has_shapes(name):
  """Traced, not run; 21.7 million weights in ViT-S/16, 5.4 in ViT-Ti."""
  config = recipe(name).get_config()
  method, schedules = build(config)
  key = jax.random.key(0)
  params, teacher, aux = jax.eval_shape(method.init, key)
  count = sum(x.size for x in jax.tree.leaves(teacher["backbone"]))
  if name != "tiny":
    want = 21.7e6 if name.endswith("_vits16") else 5.4e6
    assert count == pytest.approx(want, rel=0.02)

  scalars = schedules.at(0) | method.at(0)
  loss, (stats, _, per_image) = jax.eval_shape(
    method.loss, params, teacher, aux, rows(config, method), key, scalars
  )
  assert (loss.shape, loss.dtype) == ((), np.float32)
  assert per_image["assignment"].shape == (2,)
  assert jax.eval_shape(method.update_aux, aux, stats) == aux


@pytest.mark.parametrize("name", ARGUMENTS)
def test_first_argument_is_the_default(name):
  get_config = recipe(name).get_config
  first = ARGUMENTS[name][0]
  assert get_config().to_dict() == get_config(first).to_dict()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_unknown_argument_is_one_sentence_with_the_known_ones(name):
  with pytest.raises(ValueError) as caught:
    recipe(name).get_config("hihg_100")
  message = str(caught.value)
  assert '"hihg_100"' in message and "\n" not in message
  for arg in ARGUMENTS[name]:
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
