"""configs/own_images.py: what it chooses for which pictures; that it trains.

Expected settings are counted by hand from the rules in its reasons.
"""

import contextlib
import sys

import numpy as np
import pytest
import stopping
from absl.testing import flagsaver
from PIL import Image

import attmask_jax
from attmask_jax import cli, train
from attmask_jax.errors import InputError
from attmask_jax.training import lengths, setup
from configs import own_images


def pictures(folder, count, *, size=(90, 70), start=0):
  folder.mkdir(parents=True, exist_ok=True)
  noise = np.random.default_rng(start)
  for i in range(start, start + count):
    pixels = noise.integers(0, 256, (size[1] + i % 3, size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.jpg")
  return folder


def labelled(root, splits=("train", "val"), per_class=20):
  for split in splits:
    for number, name in enumerate(("ant", "bee")):
      pictures(root / split / name, per_class, start=100 * number)
  return root


def chosen(count, side, accelerated, labels=False):
  """{key: value} of all choices."""
  kind = "folder" if labels else "flat"
  images = own_images.Pictures(kind, "/p", labels, count, side)
  values = {}
  for choice in own_images.choose(images, accelerated=accelerated):
    assert choice.why
    values |= choice.values
  return values


# (images, side, accelerator): crop, patch, network, batch, epochs, momentum,
# prototypes.
CHOICES = {
  # 30 / 8 = 3 steps per epoch; 333 epochs would make 1,000 steps.
  (30, 300, False): (64, 8, "128x4x4", 8, 300, round(1 - 10 / 900, 4), 128),
  # 182 // 4 = 45: a batch of 32, 5 steps per epoch.
  (182, 334, False): (64, 8, "128x4x4", 32, 200, 0.99, 128),
  (30, 40, True): (32, 4, "tiny", 8, 300, round(1 - 10 / 900, 4), 128),
  # 1,000 // 4 = 250; 7 steps per epoch; 20,000 steps would be 2,857 epochs.
  (1000, 150, True): (128, 16, "tiny", 128, 300, round(1 - 10 / 2100, 4), 512),
  # 234 steps per epoch of 128; 20,000 / 234 = 85.5.
  (30_000, 500, True): (224, 16, "small", 128, 85, 0.996, 4096),
  # 468 steps per epoch of 64; 1,000 / 468 = 2.1, and 3 is the least.
  (30_000, 500, False): (
    64, 8, "128x4x4", 64, 3, round(1 - 10 / 1404, 4), 1024,
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_choices(case):
  values = chosen(*case)
  keys = (
    *("data.image_size", "method.patch_size", "method.variant"),
    *("data.batch_size", "optim.epochs", "optim.teacher_momentum"),
    "method.out_dim",
  )
  assert tuple(values[key] for key in keys) == CHOICES[case]
  assert values["run.scan"] == case[2]
  assert values.get("method.dtype") == ("bfloat16" if case[2] else None)


@pytest.mark.parametrize("count", [16, 30, 63, 300, 4_000, 30_000])
@pytest.mark.parametrize("side", [20, 64, 200, 3000])
@pytest.mark.parametrize("accelerated", [False, True])
def test_every_choice_fits_together(count, side, accelerated):
  values = chosen(count, side, accelerated, labels=True)
  size, local = values["data.image_size"], values["data.local_size"]
  assert size % values["method.patch_size"] == 0 and size > local
  assert local % values["method.patch_size"] == 0
  batch = values["data.batch_size"]
  assert batch % 8 == 0 and batch * 2 <= count
  assert max(values["evals.knn_ks"]) <= count
  assert 0.96 <= values["optim.teacher_momentum"] <= 0.996
  assert 3 <= values["optim.epochs"] <= 300


def test_layouts(tmp_path):
  measure = lambda name: own_images.measure(str(tmp_path / name))
  at = lambda *parts: str(tmp_path.joinpath(*parts))
  pictures(tmp_path / "flat", 37)
  assert measure("flat") == ("flat", at("flat"), False, 37, 71)
  labelled(tmp_path / "both")
  assert measure("both")[:4] == ("folder", at("both"), True, 40)
  labelled(tmp_path / "test", ("train", "test"))
  assert measure("test").labelled
  labelled(tmp_path / "train_only", ("train",))
  want = ("folder", at("train_only"), False, 40)
  assert measure("train_only")[:4] == want
  pictures(tmp_path / "no_classes" / "train", 20)
  pictures(tmp_path / "no_classes" / "val", 9)
  want = ("flat", at("no_classes", "train"), False, 20)
  assert measure("no_classes")[:4] == want
  for name in ("ant", "bee"):  # classes, but no training folder
    pictures(tmp_path / "classes" / name, 10)
  assert measure("classes")[:4] == ("flat", at("classes"), False, 20)


def test_broken_files_and_few_pictures(tmp_path):
  folder = pictures(tmp_path / "mine", 20, size=(300, 200))
  for i in range(5):
    (folder / f"0{i}.jpg").write_bytes(b"no image")
  found = own_images.measure(str(folder))
  assert (found.count, found.side) == (25, 201)
  for path in sorted(folder.iterdir())[15:]:
    path.unlink()
  with pytest.raises(InputError, match="15 images: at least 16"):
    own_images.measure(str(folder))
  with pytest.raises(InputError, match="not an existing folder"):
    own_images.measure(str(tmp_path / "nowhere"))


SMALL = {  # as small as a run can be
  "method.variant": "16x2x2",
  "method.head_hidden": 16,
  "method.out_dim": 16,
  "optim.steps": 3,
  "evals.mask_images": 0,
  "evals.batch_size": 32,
  "run.tensorboard": False,
}


def command(monkeypatch, *flags):
  monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
  argv = ["main.py", *flags]
  monkeypatch.setattr(sys, "argv", argv)
  with flagsaver.flagsaver(), contextlib.suppress(SystemExit):
    return cli.main(cli.parse(argv))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [False, True])
def test_one_command_trains(tmp_path, monkeypatch, capsys, labels):
  folder = tmp_path / "mine"
  if labels:
    labelled(folder)
  else:
    pictures(folder, 37)
  run = tmp_path / "run"
  flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
  config = f"--config=own_images:{folder}"
  assert command(monkeypatch, config, f"--workdir={run}", *flags) == 0
  assert stopping.steps_of(run)[-1] == 3
  out = capsys.readouterr().out
  assert f"{40 if labels else 37} pictures" in out
  assert "--config.data.batch_size=8" in out
  records = stopping.records_of(run)
  assert any("knn/top1" in record for record in records) == labels


def test_flags_replace_choices(tmp_path, monkeypatch, capsys):
  folder, seen = pictures(tmp_path / "mine", 37), []
  monkeypatch.setattr(train, "train", lambda config, _: seen.append(config))
  config = f"--config=own_images:{folder}"
  changes = ["--config.data.batch_size=16", "--config.optim.epochs=10"]
  assert command(monkeypatch, config, "--workdir=W", *changes) == 0
  assert capsys.readouterr().out.count("chosen for") == 1
  assert seen[0].data.batch_size == 16
  # Shares of 0.1 and 0.3.
  resolved = lengths.resolve(seen[0], 2)
  assert resolved.optim.warmup_epochs == pytest.approx(1)
  assert resolved.method.temp_warmup_epochs == 3
  changes += ["--config.optim.warmup_epochs=2"]
  assert command(monkeypatch, config, "--workdir=W", *changes) == 0
  resolved = lengths.resolve(seen[1], 2)
  assert resolved.optim.warmup_epochs == 2
  assert resolved.optim.warmup_share == 0


def test_the_folder_is_needed(monkeypatch, capsys, tmp_path):
  command(monkeypatch, "--config=own_images", "--workdir=W")
  command(monkeypatch, f"--config=own_images:{tmp_path}/x", "--workdir=W")
  first, second = capsys.readouterr().err.splitlines()
  assert first.startswith("error: own_images needs a folder")
  assert second.startswith(f"error: {tmp_path}/x is not an existing folder")


def test_the_real_thing_builds(tmp_path):
  config = attmask_jax.get_config(f"own_images:{pictures(tmp_path, 37)}")
  run = setup.build(config)
  assert run.schedules.steps_per_epoch == 4
  assert run.schedules.warmup_steps == 0.1 * run.schedules.total_steps
