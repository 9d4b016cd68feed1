"""Kills at random moments, and files with other bytes.

ATTMASK_TORTURE scales the counts: 1 is 100 kills and 10,000 files.
"""

import collections
import os
import random
import subprocess
import sys
import time

import pytest
import small
from stopping import MAIN, assert_same_end, command, newest_step, steps_of

pytestmark = pytest.mark.slow

SCALE = float(os.environ.get("ATTMASK_TORTURE", "0.05"))
SEED = int(os.environ.get("ATTMASK_SEED", random.randrange(10**6)))
HANGS = 1800  # seconds without what a run is waited for


class KilledRun:
  """A run in another process, on two devices."""

  def __init__(self, folder, programs, steps, save_steps=3):
    # Little but starts, steps and saves, which is where a kill can hurt; k-NN
    # is there for the best checkpoint, which is kept.
    changes = {
      "method.variant": "16x1x2",
      "data.local_crops": 0,
      "optim.epochs": steps // small.STEPS_PER_EPOCH,
      "evals.eval_epochs": 5,
      "evals.label_free": False,
      "evals.overlap_images": 0,
      "run.log_steps": 1,
      "run.save_steps": save_steps,
    }
    devices = " --xla_force_host_platform_device_count=2"  # the last one counts
    environment = small.environment(programs)
    environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + devices
    self.folder, self.began = folder, time.monotonic()
    self.process = subprocess.Popen(
      command(folder, changes),
      cwd=MAIN.parent,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  def seconds(self):
    """Since the start."""
    return time.monotonic() - self.began

  def wait_until(self, true):
    """Ends early if the run does."""
    while not true() and self.process.poll() is None:
      assert self.seconds() < HANGS, self.kill()
      time.sleep(0.005)

  def reach(self, step):
    self.wait_until(lambda: newest_step(self.folder) >= step)

  def unfinished_save(self):
    return any(self.folder.glob("checkpoints/*.orbax-checkpoint-tmp"))

  def kill(self):
    self.process.kill()
    return self.end(-9)

  def end(self, code=0):
    _, words = self.process.communicate()
    assert self.process.returncode == code, words
    return words


def test_a_run_that_is_killed_again_and_again(tmp_path, programs):
  print("ATTMASK_SEED =", SEED)
  rng, kills = random.Random(SEED), max(3, round(100 * SCALE))
  steps = small.STEPS_PER_EPOCH * kills  # more than it can reach
  KilledRun(tmp_path / "whole", programs, steps, save_steps=0).end()
  folder, to_first_step = tmp_path / "killed", 10.0
  hit = collections.Counter()
  for i in range(kills):
    before, run = newest_step(folder), KilledRun(folder, programs, steps)
    moment = ("starting", "training", "saving")[i % 3]
    if not i:  # so that every later start continues from a save
      run.wait_until(lambda: steps_of(folder))
    elif moment == "starting":
      seconds = rng.uniform(0, to_first_step)
      run.wait_until(
        lambda before=before, run=run, seconds=seconds: (
          run.seconds() >= seconds or newest_step(folder) > before
        )
      )
    else:
      run.reach(before + 1)
      to_first_step = run.seconds()
    if moment == "training":
      run.reach(before + rng.randint(1, 6))
      time.sleep(rng.uniform(0, 0.1))
    if moment == "saving":
      run.wait_until(run.unfinished_save)
      time.sleep(rng.uniform(0, 0.03))
    run.kill()
    hit[moment] += 1
    hit["with a save begun"] += run.unfinished_save()
  reached = newest_step(folder)
  KilledRun(folder, programs, steps, save_steps=0).end()
  print(f"{kills} kills in {reached} of {steps} steps: {dict(hit)}")
  assert_same_end(folder, tmp_path / "whole", steps)


@pytest.mark.parametrize(
  "kind, share", [("images", 0.6), ("weights", 0.3), ("checkpoints", 0.1)]
)
def test_files_with_other_bytes_are_read_or_refused(tmp_path, kind, share):
  print("ATTMASK_SEED =", SEED)
  count = max(20, round(10_000 * share * SCALE))
  script = [sys.executable, "tests/mutate.py", kind, str(SEED), str(count)]
  run = subprocess.run(
    [*script, str(tmp_path)],
    cwd=MAIN.parent,
    env=os.environ | {"PYTHONPATH": str(MAIN.parent)},
    capture_output=True,
    text=True,
  )
  print(run.stdout)
  at = (tmp_path / "progress").read_text()
  assert run.returncode == 0, (
    f"file {at}, kept as {tmp_path}/last: {run.stderr}"
  )
