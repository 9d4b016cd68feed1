"""Two processes train as one does, to float rounding."""

import os
import pathlib
import socket
import subprocess

import pytest
import small
from stopping import command

from attmask_jax import train
from attmask_jax.runs import metrics

ROOT = pathlib.Path(__file__).parent.parent


def processes(workdir, programs, changes):
  """Starts two processes of two CPU devices each."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  environment = dict(small.environment(programs)) | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=2"),
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
  }
  return [
    subprocess.Popen(
      command(workdir, changes),
      cwd=ROOT,
      env=environment | {"JAX_PROCESS_ID": str(i)},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, monkeypatch, programs):
  changes = {"run.fsdp": 2}
  running = processes(tmp_path / "two", programs, changes)
  try:
    for process in running:
      _, errors = process.communicate(timeout=600)
      assert process.returncode == 0, errors[-2000:]
  finally:
    for process in running:  # one that died leaves the other waiting
      process.kill()
  small.use_devices(monkeypatch, 1)
  train.train(small.config(), os.fspath(tmp_path / "one"))
  one, two = (
    metrics.read_metrics(tmp_path / name / "metrics.jsonl")
    for name in ("one", "two")
  )
  assert [line.keys() for line in one] == [line.keys() for line in two]
  for a, b in zip(one, two, strict=True):
    for key in a.keys() - {"train/img_per_s", "train/data_wait"}:
      # Sums in another order; narrow heads amplify rounding step by step.
      assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3), key
