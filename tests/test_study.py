"""The command: one sentence for bad input, nothing written, no repeats."""

import functools
import json
import pathlib
import signal

import jax
import pytest
import small
import small_study
import stopping
from absl.testing import flagsaver

from attmask_jax import cli, study, train
from attmask_jax.runs import metrics
from attmask_jax.studies import runner

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'study.py'}"


@pytest.fixture
def call(start):
  """call(*flags) -> exit code, stdout and stderr."""
  return functools.partial(start, study)


@pytest.mark.parametrize(
  "flags, words",
  [
    ([], ["--config is missing", "--config=study", "--minutes=120"]),
    ([CONFIG], ["--workdir is missing", "--minutes=120"]),
    ([CONFIG, "--workdir={tmp}"], ["--minutes is missing"]),
    ([CONFIG, "--workdir={tmp}", "--minutes=x"], ["minutes", "x"]),
    ([CONFIG, "--workdir={tmp}", "--minutes=-1"], ["--minutes -1"]),
    ([CONFIG, "--workdir={tmp}", "--minutes=1", "now"], ['"now"']),
    ([CONFIG + ":atmask"], ['"atmask"', "attmask"]),
    (
      [CONFIG, "--workdir={tmp}", "--minutes=1", "--config.optim.epochs=3"],
      ["config.optim.epochs", "config.study.steps"],
    ),
    (
      [CONFIG, "--workdir={tmp}", "--minutes=1", "--config.study.seed=3"],
      ["config.study.seed", '"seeds"'],
    ),
    (
      [CONFIG + ":attmask", "--workdir={tmp}", "--minutes=1"],
      ["--config.data.path=FOLDER"],
    ),
    (["--config=tiny", "--workdir={tmp}", "--minutes=1"], ["--config=study"]),
    ([CONFIG, "--workdir={tmp}", "--summary"], ["holds no study"]),
  ],
)
def test_bad_flags(call, tmp_path, flags, words):
  new = tmp_path / "new"
  flags = [flag.replace("{tmp}", str(new)) for flag in flags]
  code, out, errors = call(*flags)
  assert (code, out) == (2, "")
  assert errors.startswith("error: ") and errors.count("\n") == 1, errors
  for word in words:
    assert word in errors, errors
  assert not new.exists()


def test_help(call):
  code, out, _ = call("--help")
  assert code == 0
  for word in ("--minutes", "--summary", "--config=study", "study.json"):
    assert word in out


def test_main_refuses_a_study(monkeypatch, capsys):
  monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
  argv = ["main.py", CONFIG, "--workdir=new"]
  with flagsaver.flagsaver():
    assert cli.main(cli.parse(argv)) == 2
  assert "python -m attmask_jax.study" in capsys.readouterr().err


def flags_of(folder, minutes):
  changes = {k: v for k, v in small.SIZES.items() if k != "method.variant"}
  changes |= small_study.CHANGES
  for key in ("optim.epochs", "evals.eval_epochs"):
    del changes[key]  # the study's
  text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else v
  own = [f"--config.{key}={text(value)}" for key, value in changes.items()]
  return [CONFIG, f"--workdir={folder}", f"--minutes={minutes}", *own]


@pytest.mark.slow
def test_measured_trained_stopped_and_continued(call, tmp_path, monkeypatch):
  """A whole study of 4 real runs; a signal comes in the second one."""
  small.use_devices(monkeypatch, 1)
  folder = tmp_path / "study"
  flags = flags_of(folder, 60)
  trained = []

  def count(config, workdir, **rest):
    trained.append(pathlib.Path(workdir).name)
    if trained.count("random_0") != 1 or trained[-1] != "random_0":
      return real(config, workdir, **rest)
    with stopping.at_step(11, stopping.send(signal.SIGTERM)):
      return real(config, workdir, **rest)

  real = train.train
  monkeypatch.setattr(train, "train", count)
  code, _, errors = call(*flags)
  assert code == 128 + signal.SIGTERM and "to continue" in errors
  assert trained == ["run", "linear", "high_0", "linear", "random_0"]
  plan = json.loads((folder / "study.json").read_text())["plan"]
  # 60 minutes are enough for the most that the limits allow.
  assert (plan["seeds"], plan["epochs"]) == (2, 2)
  kept = stopping.contents(folder / "high_0")
  trained.clear()
  code, out, _ = call(*flags)
  assert code == 0
  assert trained == ["random_0", "linear", "high_1", "linear", "random_1",
                     "linear"]  # fmt: skip
  assert stopping.contents(folder / "high_0") == kept

  content = json.loads((folder / "study.json").read_text())
  assert out.endswith(content["sentence"] + "\n")
  for one in content["runs"]:
    place = folder / f"{one['policy']}_{one['seed']}"
    lines = metrics.read_metrics(place / "metrics.jsonl")
    knn = [line["knn/top1"] for line in lines if "knn/top1" in line]
    assert [value for _, value in one["curve"]] == knn
    assert [epoch for epoch, _ in one["curve"]] == [0, 1, 2]
    record = json.loads((place / "linear" / "results.json").read_text())
    assert one["linear"] == record["values"]["last/top1"]
  assert len(content["runs"]) == 4
  assert not list(folder.glob(".measure*"))
  jax.clear_caches()


def test_summary_flag(call, tmp_path, monkeypatch):
  costs = {"16x2x2": runner.Costs(1.0, 0.1, 0.1)}
  monkeypatch.setattr(runner, "measure", lambda *_, **__: costs)
  write = lambda c, p, folder: small_study.write_run(folder, (1, 2, 3), 4)
  runner.run(small_study.config(), str(tmp_path), 9.0, work=write)
  (tmp_path / "study.md").unlink()
  code, out, _ = call(CONFIG, f"--workdir={tmp_path}", "--summary")
  assert code == 0 and (tmp_path / "study.md").read_text() == out
  assert "4 of 4 runs are finished" in out
