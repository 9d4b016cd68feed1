"""A run that is stopped and continued is the run that was not."""

import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import small
from stopping import (
  MAIN,
  assert_same_end,
  at_step,
  checkpoint_of,
  command,
  contents,
  newest_step,
  power_cut,
  records_of,
  send,
  steps_of,
  stop,
)

from attmask_jax import train
from attmask_jax.errors import StoppedError

pytestmark = pytest.mark.usefixtures("one_device")

# One device or eight: sums in another order, see test_mesh.py; the numbers
# that are logged are sums of such sums.
PARAMETERS, LOGGED = 1e-5, 1e-4


def test_the_run_measures_something(whole):
  """Else equal scores would say nothing."""
  for prefix in ("knn/", "epoch/nmi", "epoch/ari", "epoch/fscore"):
    scores = [
      tuple(v for k, v in record.items() if k.startswith(prefix))
      for record in records_of(whole)
    ]
    assert len(set(scores) - {()}) > 1, prefix


@pytest.mark.parametrize("step", [1, 5, 8])
def test_stopped_by_a_signal_and_continued_is_the_same_run(
  tmp_path, whole, step
):
  error = stop(small.config(), tmp_path, step)
  assert error.signal == signal.SIGTERM
  assert f"after step {step};" in str(error) and str(tmp_path) in str(error)
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
  "family, changes",
  [
    ("mae", {"method.mask": "attmask_hint", "method.show_max": 0.3}),
    ("extrema", {"method.drop_path": 0.1}),
  ],
)
def test_the_other_families_continue_as_if_never_stopped(
  tmp_path, family, changes
):
  quick = {"optim.epochs": 1, "evals.mask_images": 0, "evals.overlap_images": 0}
  config = lambda: small.config(changes | quick, arg=family)
  train.train(config(), str(tmp_path / "whole"))
  stop(config(), tmp_path / "stopped", 5)
  train.train(config(), str(tmp_path / "stopped"))
  end = small.STEPS_PER_EPOCH
  assert_same_end(tmp_path / "stopped", tmp_path / "whole", end)


@pytest.mark.slow
def test_stopped_again_and_again_is_the_same_run(tmp_path, whole):
  for step in (2, 11, 16):
    stop(small.config(), tmp_path, step)
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


def test_control_c_stops_like_a_signal(tmp_path):
  before = signal.getsignal(signal.SIGINT)
  error = stop(small.config(), tmp_path, 2, send(signal.SIGINT))
  assert error.signal == signal.SIGINT
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize(
  "step, kept", [(2, "there is no checkpoint yet"), (7, "checkpoint is step 5")]
)
def test_a_second_control_c_says_what_is_kept(tmp_path, step, kept):
  def twice(results):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return results

  config = small.config({"run.save_steps": 5})
  with at_step(step, twice), pytest.raises(StoppedError) as error:
    train.train(config, str(tmp_path))
  assert error.value.signal == signal.SIGINT
  assert (
    f"interrupted without saving; {'the last good ' * (step == 7)}{kept}"
    in (str(error.value))
  )
  assert steps_of(tmp_path) == [5] * (step == 7)


@pytest.mark.slow
def test_crashed_between_checkpoints_is_the_same_run(tmp_path, whole):
  config = small.config({"run.save_steps": 5})
  with at_step(13, power_cut), pytest.raises(RuntimeError, match="power cut"):
    train.train(config, str(tmp_path))
  assert steps_of(tmp_path)[-1] == 10
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_crashed_before_the_first_checkpoint_starts_again(tmp_path, whole):
  with at_step(5, power_cut), pytest.raises(RuntimeError):
    train.train(small.config(), str(tmp_path))
  assert steps_of(tmp_path) == []
  assert records_of(tmp_path)[-1]["step"] == 3
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_killed_and_continued_is_the_same_run(monkeypatch, tmp_path, programs):
  small.use_devices(monkeypatch, 8)  # like the processes
  epochs, folder = 4, tmp_path / "killed"
  total = epochs * small.STEPS_PER_EPOCH
  changes = {"optim.epochs": epochs, "run.log_steps": 1, "run.save_steps": 3}
  options = dict(
    cwd=MAIN.parent,
    env=small.environment(programs),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  run = subprocess.Popen(command(folder, changes), **options)
  try:
    while newest_step(folder) < 10 and run.poll() is None:
      time.sleep(0.005)
  finally:
    run.kill()
    _, words = run.communicate()
  assert run.returncode == -signal.SIGKILL, words.decode()
  assert 8 <= steps_of(folder)[-1] < total
  subprocess.run(command(folder, changes), check=True, **options)
  changes["run.save_steps"] = 0
  train.train(small.config(changes), str(tmp_path / "whole"))
  assert_same_end(folder, tmp_path / "whole", total)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1, 8), (8, 1)])
def test_continued_on_another_number_of_devices(
  monkeypatch, tmp_path, whole, counts
):
  small.use_devices(monkeypatch, counts[0])
  stop(small.config(), tmp_path, 5)
  small.use_devices(monkeypatch, counts[1])
  train.train(small.config(), str(tmp_path))
  states = []
  for folder in (tmp_path, whole):
    arrays, _ = checkpoint_of(folder, small.TOTAL_STEPS)
    states.append(arrays)
  got, want = states
  for name in want:
    if name.endswith("['qkv']['bias']") or "qkv.bias" in name:
      continue  # of keys: see small.assert_close
    np.testing.assert_allclose(
      got[name], want[name], rtol=1e-4, atol=PARAMETERS, err_msg=name
    )
  for ours, theirs in zip(records_of(tmp_path), records_of(whole), strict=True):
    assert ours == pytest.approx(theirs, rel=LOGGED, abs=LOGGED)


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  before = contents(folder)
  with at_step(small.TOTAL_STEPS + 1, power_cut):
    train.train(small.config(), str(folder))
  assert contents(folder) == before


def test_what_may_differ_when_a_run_continues(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  free = {
    "run.log_steps": 7,
    "run.save_steps": 3,
    "evals.knn_ks": (3,),
    "data.path": "/elsewhere",
    "data.max_broken": 0.5,
  }
  train.train(small.config(free), str(folder))
  assert records_of(folder) == records_of(whole)
