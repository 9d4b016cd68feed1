"""The example of CONTRIBUTING.md, word for word, through the public API."""

import json
import os
import pathlib
import re
import signal
import sys
import types

import jax
import numpy as np
import pytest
import small

from attmask_jax import evaluate, train
from attmask_jax.errors import StoppedError
from attmask_jax.methods import METHODS
from attmask_jax.runs import metrics
from attmask_jax.training import train_step
from configs import evals

ROOT = pathlib.Path(__file__).parents[2]
SIZES = {
  "method.variant": "16x2x2",
  "data.image_size": 16,
  "data.batch_size": 8,
  "data.shapes_train": 32,
  "data.shapes_val": 48,
  "optim.epochs": 2,
  "optim.warmup_epochs": 1,
  "evals.eval_epochs": 2,
  "evals.knn_ks": (3,),
  "evals.batch_size": 32,
  "evals.mask_images": 2,
  "evals.overlap_images": 8,
  "run.tensorboard": False,
}


def blocks():
  """{path in the first comment: code} of the document's Python blocks."""
  text = (ROOT / "CONTRIBUTING.md").read_text()
  found = re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL)
  return dict(found)


@pytest.fixture
def denoise(monkeypatch):
  """Its config, with the method in METHODS."""
  modules = {}
  for path, code in blocks().items():
    name = path.removesuffix(".py").replace("/", ".")
    modules[name] = types.ModuleType(name)
    # dataclasses look up annotations in the module that a class names.
    monkeypatch.setitem(sys.modules, name, modules[name])
    exec(compile(code, path, "exec"), modules[name].__dict__)
  monkeypatch.setitem(METHODS, "denoise", modules["methods.denoise"].Denoise)

  def config(**changes):
    config = modules["configs.denoise"].get_config()
    config.lock().update_from_flattened_dict(SIZES | changes)
    return config

  return config


def test_its_loss_is_the_mean_square_of_the_mean_colours(denoise):
  config = denoise()
  method = METHODS["denoise"].from_config(config, steps_per_epoch=4)
  params, teacher, aux = method.init(jax.random.key(0))
  params["head"] = jax.tree.map(np.zeros_like, params["head"])
  images = np.random.default_rng(0).integers(
    0, 256, (2, 1, 16, 16, 3), np.uint8
  )
  batch = {"images": images, "position": np.arange(2, dtype=np.int32)}
  got = method.loss(params, teacher, aux, batch, jax.random.key(1), {}).loss
  want = []
  for image in small.normalised(images[:, 0]):
    for y in range(0, 16, 4):
      for x in range(0, 16, 4):
        want += [image[y : y + 4, x : x + 4].mean((0, 1)) ** 2]
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)


def stop_after(monkeypatch, number):
  """Sends SIGTERM when a step of the next training is done."""
  make_step = train_step.make_step

  def make(*args, **options):
    step = make_step(*args, **options)

    def call(state, *rest):
      if int(state.step) + 1 == number:
        os.kill(os.getpid(), signal.SIGTERM)
      return step(state, *rest)

    return call

  monkeypatch.setattr(train_step, "make_step", make)


def logged(folder):
  """Lines of metrics.jsonl without what is measured in seconds."""
  times = ("img_per_s", "data_wait")
  lines = metrics.read_metrics(folder / "metrics.jsonl")
  return [
    {k: v for k, v in line.items() if not k.endswith(times)} for line in lines
  ]


@pytest.mark.slow
def test_it_trains_evaluates_and_resumes(denoise, monkeypatch, tmp_path):
  small.use_devices(monkeypatch, 1)
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  train.train(denoise(), str(whole))
  with monkeypatch.context() as patch, pytest.raises(StoppedError):
    stop_after(patch, 3)
    train.train(denoise(), str(parts))
  train.train(denoise(), str(parts))
  assert logged(parts) == logged(whole)
  assert any("knn/top1" in line for line in logged(whole))
  assert (whole / "figures" / "masks.png").stat().st_size > 1000
  # It assigns nothing, so that its checkpoints hold no rows of an epoch.
  assert not (whole / "checkpoints" / "8" / "epoch").exists()

  config = evals.get_config("knn_mae")
  config.lock().update_from_flattened_dict(
    {"weights": str(whole), "evals.knn_ks": (3,), "evals.batch_size": 32}
  )
  evaluate.evaluate(config, str(tmp_path / "knn"))
  record = json.loads((tmp_path / "knn" / "results.json").read_text())
  last = [x["knn/top1"] for x in logged(whole) if "knn/top1" in x][-1]
  assert record["values"]["k3/top1"] == pytest.approx(last, abs=1e-6)
