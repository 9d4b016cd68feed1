"""Length of a run by epochs or steps, and warm-ups of shortened recipes.

Expected values are counted by hand from the numbers in the recipes: tiny has 12
epochs, a warm-up of 2 and one of the temperature of 1; high_100 100, 10, 30.
"""

import copy
import json
import pickle
import sys
import types

import numpy as np
import pytest
import small
import stopping
from absl import logging
from absl.testing import flagsaver

import attmask_jax
from attmask_jax import cli, evaluate, train
from attmask_jax.errors import InputError
from attmask_jax.training import lengths, supervised
from attmask_jax.training.schedules import Schedules

KEYS = ("optim.epochs", "optim.warmup_epochs", "method.temp_warmup_epochs")
NO_KNN = {"evals.knn": False, "evals.mask_images": 0, "evals.overlap_images": 0}


def configs(name, changes, monkeypatch):
  """The config that Python gets, and the one that the command line gets."""
  ours = attmask_jax.get_config(name)
  for key, value in changes.items():
    section, key = key.split(".")
    ours[section][key] = value
  seen = []
  monkeypatch.setattr(train, "train", lambda config, _: seen.append(config))
  monkeypatch.setattr(evaluate, "evaluate", train.train)
  monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
  mode = "eval" if name.startswith("evals") else "train"
  flags = [f"--config.{key}={value}" for key, value in changes.items()]
  fixed = [f"--config={name}", "--workdir=W", f"--mode={mode}"]
  argv = ["main.py", *fixed, *flags]
  monkeypatch.setattr(sys, "argv", argv)
  with flagsaver.flagsaver():
    assert cli.main(cli.parse(argv)) == 0
  return ours, seen[0]


def lengths_of(config, steps_per_epoch):
  resolved = lengths.resolve(config, steps_per_epoch)
  flat = {f"{s}.{k}": v for s in resolved for k, v in _items(resolved[s])}
  return tuple(flat.get(key) for key in KEYS)


def _items(values):
  return values.items() if hasattr(values, "items") else ()


# (recipe, changes, S): epochs, warm-up, temperature warm-up.
RESOLVED = {
  "unchanged": ("attmask_vits16", {}, 7, (100, 10, 30)),
  "shorter": ("attmask_vits16", {"optim.epochs": 5}, 7, (5, 0.5, 2)),
  "one epoch": ("attmask_vits16", {"optim.epochs": 1}, 7, (1, 0.1, 1)),
  "longer": ("attmask_vits16", {"optim.epochs": 300}, 7, (300, 10, 30)),
  "one is set": (
    "attmask_vits16", {"optim.epochs": 50, "optim.warmup_epochs": 3}, 7,
    (50, 3, 15),
  ),
  "set to the recipe's": (
    "attmask_vits16", {"optim.warmup_epochs": 10, "optim.epochs": 20}, 7,
    (20, 10, 6),
  ),
  "steps": ("attmask_vits16", {"optim.steps": 35}, 70, (1, 0.05, 1)),
  "steps of 4 epochs": ("attmask_vits16", {"optim.steps": 28}, 8, (4, 0.35, 1)),
  "both, agreeing": ("tiny", {"optim.steps": 20, "optim.epochs": 3}, 8,
    (3, 2 * 2.5 / 12, 1),
  ),
  "shares": (
    "attmask_vits16",
    {"optim.warmup_share": 0.25, "method.temp_warmup_share": 0.5}, 7,
    (100, 25, 50),
  ),
  "a share of steps": (
    "attmask_vits16", {"optim.warmup_share": 0.25, "optim.steps": 40}, 10,
    (4, 1, 1),
  ),
  "MAE": ("mae:small_800e_gap", {"optim.epochs": 20}, 7, (20, 1, None)),
  "fine-tuning": ("evals:finetune", {"optim.epochs": 30}, 7, (30, 0.5, None)),
}  # fmt: skip


@pytest.mark.parametrize("case", RESOLVED)
def test_lengths(case, monkeypatch):
  name, changes, steps_per_epoch, want = RESOLVED[case]
  for config in configs(name, changes, monkeypatch):
    got = lengths_of(config, steps_per_epoch)
    assert got == pytest.approx(want), config.optim
    # What a run used is what it continues with.
    resolved = lengths.resolve(config, steps_per_epoch)
    again = lengths.resolve(resolved, steps_per_epoch)
    assert again.to_dict() == resolved.to_dict()


# (changes, words of the sentence)
REFUSED = {
  "warm-up": ({"optim.epochs": 4, "optim.warmup_epochs": 5}, ["5", "epochs 4"]),
  "the recipe's warm-up, set": (
    {"optim.epochs": 1, "optim.warmup_epochs": 2}, ["2", "epochs 1"],
  ),
  "steps": (
    {"optim.steps": 10, "optim.warmup_epochs": 2}, ["2", "steps 10 (8 per"],
  ),
  "temperature": (
    {"optim.epochs": 2, "method.temp_warmup_epochs": 3}, ["3", "epochs 2"],
  ),
  "steps and epochs": (
    {"optim.steps": 20, "optim.epochs": 5}, ["20", "epoch 3", "is 5", "set one"]
  ),
  "share and epochs": (
    {"optim.warmup_share": 0.1, "optim.warmup_epochs": 3}, ["3", "0.1", "to 0"],
  ),
}  # fmt: skip
SIZES = {
  key: value
  for key, value in small.SIZES.items()
  if key not in KEYS and key != "run.scan"
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_somebody_set_is_refused(case, tmp_path):
  changes, words = REFUSED[case]
  config = attmask_jax.get_config("tiny")
  config.update_from_flattened_dict(SIZES | changes)
  with pytest.raises(InputError) as caught:
    train.train(config, str(tmp_path / "run"))
  assert all(word in str(caught.value) for word in words), caught.value
  assert not (tmp_path / "run").exists()


def test_an_evaluation_that_trains_is_shortened_too():
  run = small.config()
  method, _, _ = small.example()
  source = types.SimpleNamespace(
    config=run, method=method, where="run", digest="0"
  )
  config = attmask_jax.get_config("evals:finetune")
  config.optim.epochs = 30  # of 300 with 5 of warm-up
  config = evaluate.complete(config, source)
  config = supervised.complete(config, source)
  assert (config.data.source, config.digest) == ("shapes", "0")
  assert lengths_of(config, 8) == (30, 0.5, None)


def test_copies_know_what_the_recipe_planned():
  config = attmask_jax.get_config("tiny")
  config.optim.epochs = 3
  for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
    assert lengths_of(again, 8) == (3, 0.5, 1)
    again.optim.warmup_epochs = 2.0
    assert lengths_of(again, 8) == (3, 2, 1)
  assert lengths_of(config, 8) == (3, 0.5, 1)  # not the copies' values


def test_what_was_shortened_is_logged_once(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "info", lambda text, *a: lines.append(text % a))
  config = attmask_jax.get_config("attmask_vits16:high_100")
  lengths.resolve(config, 7)
  assert lines == []
  config.optim.epochs = 5
  lengths.resolve(config, 7)
  (line,) = lines
  for part in ("optim.warmup_epochs 10 -> 0.5", "temp_warmup_epochs 30 -> 2"):
    assert part in line


def test_a_fraction_of_an_epoch_warms_up_over_its_steps():
  config = attmask_jax.get_config("attmask_vits16:high_100")
  config.optim.steps = 200  # of 100 per epoch: 10 % warm-up = 20 steps
  config.data.batch_size = 256
  resolved = lengths.resolve(config, 100)
  rates = Schedules.from_config(resolved, steps_per_epoch=100)
  assert rates.total_steps == 200
  got = [rates.values(i)["lr"] for i in (0, 10, 19, 20)]
  # linspace(0, 5e-4, 20), which reaches its end at index 19.
  np.testing.assert_allclose(got, [0, 5e-4 * 10 / 19, 5e-4, 5e-4], rtol=1e-12)
  assert rates.values(199)["lr"] < 5e-6


def tiny(changes):
  config = attmask_jax.get_config("tiny")
  config.update_from_flattened_dict(SIZES | changes)
  return config


@pytest.mark.slow
def test_a_run_of_steps_ends_within_an_epoch_and_is_evaluated(tmp_path):
  config = tiny({"optim.steps": 11, "run.log_steps": 1})
  train.train(config, str(tmp_path))
  assert stopping.steps_of(tmp_path)[-1] == 11
  records = stopping.records_of(tmp_path)
  assert [r["step"] for r in records if "train/loss" in r] == [*range(1, 12)]
  evaluated = [r["step"] for r in records if "knn/top1" in r]
  assert evaluated == [0, 8, 11]
  # The last 3 steps are an epoch of their own.
  losses = [r["train/loss"] for r in records if "train/loss" in r]
  (last,) = [r["epoch/loss"] for r in records if r.get("epoch/loss")][1:]
  assert last == pytest.approx(np.mean(losses[8:]), rel=1e-6)
  flat = json.loads((tmp_path / "config.json").read_text())
  assert (flat["optim.steps"], flat["optim.epochs"]) == (11, 2)
  assert flat["optim.warmup_epochs"] == pytest.approx(2 * 11 / 8 / 12)
  assert "11 of 11" in (tmp_path / "report.html").read_text()
  train.train(config, str(tmp_path))  # there is nothing left to do


@pytest.mark.slow
def test_a_run_of_an_earlier_version_continues_with_its_warmup(tmp_path):
  old = tiny({"optim.epochs": 3} | NO_KNN)
  old.optim.warmup_epochs = 2  # as no version before this one shortened it
  old.method.temp_warmup_epochs = 1
  stopping.stop(old, tmp_path, 10)
  path = tmp_path / "config.json"
  flat = json.loads(path.read_text())
  for key in ("optim.steps", "optim.warmup_share", "method.temp_warmup_share"):
    del flat[key]
  path.write_text(json.dumps(flat))
  run = train.train(tiny({"optim.epochs": 3} | NO_KNN), str(tmp_path))
  assert run.config.optim.warmup_epochs == 2
  assert json.loads(path.read_text())["optim.warmup_epochs"] == 2
  assert stopping.steps_of(tmp_path)[-1] == 24
  with pytest.raises(InputError, match="optim.epochs"):
    train.train(tiny({"optim.epochs": 4} | NO_KNN), str(tmp_path))
