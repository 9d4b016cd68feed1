"""Kills at random moments, and files with other bytes.

ATTMASK_TORTURE scales the counts: 1 is 100 kills and 10,000 files.
"""

import os
import random
import subprocess
import sys
import time

import pytest
import small
from stopping import MAIN, assert_same_end, command, newest_step

pytestmark = pytest.mark.slow

SCALE = float(os.environ.get("ATTMASK_TORTURE", "0.05"))
SEED = int(os.environ.get("ATTMASK_SEED", random.randrange(10**6)))


def run_of(folder, programs, steps):
  """Starts a run of so many steps that saves every third of them."""
  changes = {
    "optim.epochs": steps // small.STEPS_PER_EPOCH,
    "evals.knn": False,
    "evals.mask_images": 0,
    "run.log_steps": 1,
    "run.save_steps": 3,
  }
  return subprocess.Popen(
    command(folder, changes),
    cwd=MAIN.parent,
    env=small.environment(programs),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_run_that_is_killed_again_and_again(tmp_path, programs):
  print("ATTMASK_SEED =", SEED)
  rng, kills = random.Random(SEED), max(1, round(100 * SCALE))
  steps = small.STEPS_PER_EPOCH * max(2, kills)
  whole = run_of(tmp_path / "whole", programs, steps)
  _, words = whole.communicate()
  assert whole.returncode == 0, words
  killed = tmp_path / "killed"
  for i in range(kills):
    before, run = newest_step(killed), run_of(killed, programs, steps)
    if i % 3:  # after its first step; else at any time, as while it starts
      while newest_step(killed) <= before and run.poll() is None:
        time.sleep(0.01)
      time.sleep(rng.uniform(0, 1))
    else:
      time.sleep(rng.uniform(0, 20))
    run.kill()
    _, words = run.communicate()
    assert run.returncode in (-9, 0), words
  last = run_of(killed, programs, steps)
  _, words = last.communicate()
  assert last.returncode == 0, words
  print(f"killed {kills} times")
  assert_same_end(killed, tmp_path / "whole", steps)


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
