"""Runs that are stopped on purpose, and what they leave on disk."""

import contextlib
import json
import os
import pathlib
import signal
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small

from attmask_jax import train
from attmask_jax.errors import InputError, StoppedError
from attmask_jax.runs import metrics, saved_items
from attmask_jax.training import train_step

MAIN = pathlib.Path(__file__).parents[1] / "main.py"
WALL_CLOCK = {"train/img_per_s", "train/data_wait"}


@contextlib.contextmanager
def at_step(number, act):
  """Calls `act(results)` in place of the results of step `number`."""
  make_step = train_step.make_step

  def make(*args, **kwargs):
    step = make_step(*args, **kwargs)

    def call(state, *rest):
      done = int(state.step) + 1
      results = step(state, *rest)
      return act(results) if done == number else results

    return call

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(train_step, "make_step", make)
    yield


def send(number):
  """An action: a signal to this process."""

  def act(results):
    os.kill(os.getpid(), number)
    return results

  return act


def power_cut(_):
  raise RuntimeError("power cut")


def stop(config, folder, step, act=None):
  """Runs until a signal after `step` steps."""
  with at_step(step, act or send(signal.SIGTERM)):
    with pytest.raises(StoppedError) as error:
      train.train(config, str(folder))
  assert steps_of(folder)[-1] == step
  return error.value


def steps_of(folder):
  """Complete checkpoints on disk."""
  names = [p.name for p in (folder / "checkpoints").glob("*")]
  return sorted(int(name) for name in names if name.isdigit())


def checkpoint_of(folder, step):
  """{item/leaf: array} of a checkpoint, read without our code, and progress."""
  root = folder / "checkpoints" / str(step)
  arrays = {}
  with ocp.StandardCheckpointer() as reader:
    # A method that keeps no rows of an epoch saves no item of it.
    for item in (i for i in saved_items.ARRAY_ITEMS if (root / i).exists()):
      tree = reader.restore((root / item).absolute())
      for path, leaf in jax.tree.leaves_with_path(tree):
        arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  progress = root / "progress" / "metadata"  # beside a note that it is whole
  return arrays, json.loads(progress.read_text())


def records_of(folder):
  """metrics.jsonl without wall-clock figures."""
  return [
    {k: v for k, v in record.items() if k not in WALL_CLOCK}
    for record in metrics.read_metrics(folder / "metrics.jsonl")
  ]


def assert_same_end(folder, want_folder, step=small.TOTAL_STEPS):
  """Bit for bit: state, epoch sums, and every number that was logged."""
  got, progress = checkpoint_of(folder, step)
  want, want_progress = checkpoint_of(want_folder, step)
  assert sorted(got) == sorted(want)
  for name in want:
    assert got[name].dtype == want[name].dtype, name
    assert got[name].tobytes() == want[name].tobytes(), name
  ours, theirs = records_of(folder), records_of(want_folder)
  assert [r["step"] for r in ours] == [r["step"] for r in theirs]
  assert ours == theirs
  # The window's wall-clock-free sums; rates are no part of them.
  assert progress == want_progress


def contents(folder):
  """{path: bytes} of all files below a folder."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob("*"))
    if p.is_file()
  }


def command(workdir, changes):
  """The command line of a small run."""
  flags = [f"--config.{k}={v}" for k, v in (small.SIZES | changes).items()]
  config = "--config=configs/tiny.py"
  return [sys.executable, "main.py", config, f"--workdir={workdir}", *flags]


def newest_step(folder):
  """Step of the last line of metrics.jsonl, 0 before there is one."""
  try:
    return metrics.read_metrics(folder / "metrics.jsonl")[-1]["step"]
  except (InputError, IndexError):
    return 0
