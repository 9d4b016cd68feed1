"""A call from Python computes what the command line does."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
import small
from absl import logging
from test_cli import ROOT, flags_of

from attmask_jax import mesh, runtime
from attmask_jax.errors import InputError
from attmask_jax.runs import metrics
from configs import tiny

# bfloat16 products: on a CPU "highest" and the default are the same.
PRECISION = {"run.matmul_precision": "BF16_BF16_F32"}
CHANGES = small.SIZES | PRECISION | {"optim.epochs": 1}
TIMES = ("train/img_per_s", "train/data_wait")

TRAIN = """
import json, sys
import jax
from attmask_jax import train
from configs import tiny

config = tiny.get_config()
tuples = lambda x: tuple(x) if isinstance(x, list) else x
changes = {k: tuples(v) for k, v in json.loads(sys.argv[2]).items()}
config.update_from_flattened_dict(changes)
train.train(config, sys.argv[1])
assert jax.config.jax_default_matmul_precision == "BF16_BF16_F32"
"""
EVALUATE = """
import sys
import jax
from attmask_jax import evaluate
from configs import evals

config = evals.get_config("knn")
config.weights, config.evals.knn_ks = sys.argv[2], (3, 5)
config.run.matmul_precision = sys.argv[3]
result = evaluate.evaluate(config, sys.argv[1])
assert result.values["k3/top1"] > 0
assert jax.config.jax_default_matmul_precision == sys.argv[3]
"""


@pytest.fixture
def start(programs):
  """start(...) runs a new Python process to its end."""

  def start(*arguments):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
      command,
      cwd=ROOT,
      env=small.environment(programs),
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]

  return start


def numbers(folder):
  """Lines of metrics.jsonl, without what a clock measured."""
  lines = metrics.read_metrics(folder / "metrics.jsonl")
  return [{k: v for k, v in x.items() if k not in TIMES} for x in lines]


def values(folder):
  return json.loads((folder / "results.json").read_text())["values"]


@pytest.mark.slow
def test_calls_from_python_give_the_numbers_of_the_commands(start, tmp_path):
  a, b = tmp_path / "command", tmp_path / "call"
  flags = flags_of(CHANGES)
  start("main.py", "--config=configs/tiny.py", f"--workdir={a}", *flags)
  start("-c", TRAIN, b, json.dumps(CHANGES))
  assert len(numbers(a)) > 3
  assert numbers(a) == numbers(b)
  start(
    *("main.py", "--mode=eval", "--config=configs/evals.py:knn"),
    *(f"--config.weights={a}", f"--workdir={a}/knn"),
    *("--config.evals.knn_ks=3,5", "--config.run.matmul_precision=high"),
  )
  start("-c", EVALUATE, b / "knn", b, "high")
  assert values(a / "knn") == values(b / "knn")


def test_settings_of_the_last_call_count(tmp_path):
  run = tiny.get_config().run
  with small.keep_programs(tmp_path / "first", seconds=0):  # which it restores
    for i, precision in enumerate(("high", "default", "default")):
      folder = tmp_path / str(i)
      run.update(matmul_precision=precision, compilation_cache=str(folder))
      runtime.setup(run)
      assert jax.config.jax_default_matmul_precision == precision
      jax.jit(lambda x, i=i: x + i)(1.0)
      assert any(folder.iterdir())  # programs are kept in the new folder


@pytest.fixture
def keep(monkeypatch):
  """keep(folder) -> JAX's folder after the setup of a run."""

  def keep(folder=None, *, processes=1, before=None):
    run = tiny.get_config().run
    if folder is not None:
      run.compilation_cache = str(folder)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with small.keep_programs(before):  # which restores it
      runtime.setup(run)
      return jax.config.jax_compilation_cache_dir

  return keep


def test_where_programs_are_kept_by_default(keep, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  own = tmp_path / ".cache" / "attmask_jax" / "xla"
  assert keep(processes=2) is None
  assert keep("") is None
  assert keep(before=tmp_path / "a") == str(tmp_path / "a")
  assert not own.exists()
  assert keep() == str(own) and own.is_dir()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  there = tmp_path / "caches" / "attmask_jax" / "xla"
  assert keep() == str(there) and there.is_dir()
  monkeypatch.chdir(tmp_path)
  assert keep("gs://bucket/a") == "gs://bucket/a"
  assert not (tmp_path / "gs:").exists()


def test_a_run_goes_on_without_kept_programs(keep, monkeypatch, tmp_path):
  said = []
  monkeypatch.setattr(logging, "warning", lambda *args: said.append(args))
  (tmp_path / "file").touch()
  # Nobody can write to /proc, root neither; elsewhere nobody can make it.
  for folder in (tmp_path / "file" / "below", "/proc"):
    assert keep(folder) is None
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert keep() is None
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setattr(
    pathlib.Path, "home", lambda: pathlib.Path("~a/b").expanduser()
  )
  assert keep() is None
  places = (tmp_path / "file", "/proc", tmp_path / "file", "home directory")
  for (words, error), place in zip(said, places, strict=True):
    assert "are not kept" in words and str(place) in str(error)


def test_unknown_precision():
  run = tiny.get_config().run
  run.matmul_precision = "sharp"
  with pytest.raises(InputError, match='"sharp" is unknown: use highest'):
    runtime.setup(run)


def test_processes_are_joined_once(monkeypatch):
  joined = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *_, **__: joined.append(1)
  )
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(joined))
  mesh.init_distributed(True)
  mesh.init_distributed(True)
  assert joined == [1]
