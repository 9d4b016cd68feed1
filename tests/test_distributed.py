"""Two processes train as one does, to float rounding, and fail together."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
import small
from stopping import command, records_of, steps_of

from attmask_jax import train
from attmask_jax.runs import metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
CHANGES = {"run.fsdp": 2}
# The command line in a process for which the newest checkpoint is damaged.
DAMAGED = """
import sys
from attmask_jax import cli
from attmask_jax.runs import saved_items

read = saved_items.read_item

def damaged(folder, like):
  if folder.parent.name == "16":
    raise Exception("chunk is gone")
  return read(folder, like)

saved_items.read_item = damaged
cli.entry()
"""


def run(commands, programs, seconds=600):
  """Runs one process of two CPU devices per command; what they say."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = dict(small.environment(programs)) | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  running = [
    subprocess.Popen(
      words,
      cwd=ROOT,
      env=environment | {"JAX_PROCESS_ID": str(i)},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i, words in enumerate(commands)
  ]
  try:
    said = []
    for process in running:
      _, errors = process.communicate(timeout=seconds)
      assert process.returncode == 0, errors[-2000:]
      said.append(errors)
  finally:
    for process in running:  # one that died leaves the other waiting
      process.kill()
  return said


@pytest.fixture(scope="module")
def two(tmp_path_factory, programs):
  """Folder of a run of two processes; nobody writes to it."""
  folder = tmp_path_factory.mktemp("two")
  run([command(folder, CHANGES)] * 2, programs)
  return folder


def same_records(one, two):
  assert [line.keys() for line in one] == [line.keys() for line in two]
  for a, b in zip(one, two, strict=True):
    for key in a.keys() - {"train/img_per_s", "train/data_wait"}:
      # Sums in another order; narrow heads amplify rounding step by step.
      assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3), key


def test_two_processes_are_one_run(tmp_path, monkeypatch, two):
  small.use_devices(monkeypatch, 1)
  train.train(small.config(), os.fspath(tmp_path))
  same_records(
    metrics.read_metrics(tmp_path / "metrics.jsonl"),
    metrics.read_metrics(two / "metrics.jsonl"),
  )


def for_the_second(words):
  """The same command with a damaged newest checkpoint."""
  return [sys.executable, "-c", DAMAGED, *words[2:]]


def test_a_checkpoint_damaged_for_one_process_is_so_for_both(
  tmp_path, programs, two
):
  """The first has read it and must not wait for the second."""
  folder = tmp_path / "run"
  shutil.copytree(two, folder)
  words = command(folder, CHANGES)
  said = run([words, for_the_second(words)], programs)
  assert "process 1: checkpoint" in said[0]
  for each in said:
    (line,) = (x for x in each.splitlines() if "is damaged" in x)
    assert "(chunk is gone)" in line and "continues from step 8" in line
  assert (folder / "checkpoints" / "16.damaged").is_dir()
  assert steps_of(folder) == steps_of(two)
  same_records(records_of(two), records_of(folder))


def test_an_evaluation_reads_one_step_on_both_processes(
  tmp_path, programs, two
):
  words = [
    *(
      sys.executable,
      "main.py",
      "--mode=eval",
      "--config=configs/evals.py:knn",
    ),
    *(f"--config.weights={two}", f"--workdir={tmp_path}"),
    "--config.evals.knn_ks=(3,)",
  ]
  said = run([words, for_the_second(words)], programs)
  for each in said:
    assert "reading step 8 instead" in each
  result = json.loads((tmp_path / "results.json").read_text())
  assert result["weights"]["step"] == 8
