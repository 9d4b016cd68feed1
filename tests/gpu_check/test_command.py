"""The check goes on when a part fails, and says so."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from attmask_jax.gpu_check import command, parity, parts
from attmask_jax.gpu_check.parts import Part

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "gpu_check.sh"
# Stands in for the interpreter of a part's process.
FAKE = """#!{python}
import json, pathlib, sys, time
words = dict(w.lstrip("-").split("=", 1) for w in sys.argv if "=" in w)
name, output = words["part"], pathlib.Path(words["output"])
checks = lambda error: dict(passed=error < 1, checks=[dict(
  name="c", error=error, tolerance=1.0, passed=error < 1)])
if name == "crashes":
  print("one")
  sys.exit("no such | thing")
if name == "refuses":
  raise type("InputError", (ValueError,), {})("--minutes 1 is too short")
if name == "hangs":
  time.sleep(60)
if name in ("study", "unfinished"):
  pathlib.Path("study").mkdir()
  pathlib.Path("study/study.md").write_text("table")
  time.sleep(60 if name == "unfinished" else 0)
results = dict(good=checks(0.5), bad=checks(2.0), study=dict(sentence="S."))
output.write_text(json.dumps(results[name]))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(names, limit) -> exit code and results of parts with these names."""
  fake = tmp_path / "fake"
  fake.write_text(FAKE.replace("{python}", sys.executable))
  fake.chmod(0o755)
  monkeypatch.setattr(command.sys, "executable", str(fake))

  def run(*names, share=1.0, seconds=60.0):
    listed = [Part(name, lambda *_: {}, share) for name in names]
    monkeypatch.setattr(parts, "parts", lambda: listed)
    output = tmp_path / "output"
    code = command.check(output, small=True, seconds=seconds)
    return code, json.loads((output / "gpu_check.json").read_text()), output

  return run


def test_all_good(run):
  code, results, output = run("good", "study")
  assert code == 0
  assert list(results["parts"]) == ["good", "study"]
  table = (output / "gpu_check.md").read_text()
  assert "| good | passed |" in table
  assert "| good: c | 5.0e-01 | 1e+00 | passed |" in table
  assert table.endswith("\nS.\n")
  assert (output / "study.md").read_text() == "table"
  assert {p.name for p in output.iterdir()} == {
    "gpu_check.json", "gpu_check.md", "gpu_check.log", "study.md",
  }  # fmt: skip


def test_a_comparison_beyond_its_tolerance(run):
  code, results, output = run("bad", "good")
  assert code == 1
  assert not results["parts"]["bad"]["passed"]
  assert results["parts"]["good"]["passed"]
  assert "| 2.0e+00 | 1e+00 | FAILED |" in (output / "gpu_check.md").read_text()


def test_a_crash_is_recorded_and_the_rest_goes_on(run):
  code, results, output = run("crashes", "good")
  assert code == 1
  error = results["parts"]["crashes"]["error"]
  assert error == "exit code 1: one / no such | thing"
  assert results["parts"]["good"]["passed"]
  table = (output / "gpu_check.md").read_text()
  assert "| crashes | exit code 1: one / no such / thing |" in table
  assert "no such | thing" in (output / "gpu_check.log").read_text()


def test_bad_input_of_a_part_is_its_sentence(run):
  _, results, _ = run("refuses")
  error = results["parts"]["refuses"]["error"]
  assert error == "exit code 1: --minutes 1 is too short"


def test_what_takes_too_long_is_ended(run):
  code, results, _ = run("hangs", "good", share=0.05, seconds=40)
  assert code == 1
  assert results["parts"]["hangs"]["error"] == "ended after 2 seconds"
  assert results["parts"]["good"]["passed"]


def test_an_unfinished_study_leaves_its_table(run):
  code, results, output = run("unfinished", share=0.05, seconds=40)
  assert code == 1 and "ended" in results["parts"]["unfinished"]["error"]
  assert (output / "study.md").read_text() == "table"


def test_no_time_left(run):
  code, results, _ = run("good", seconds=5.0)
  assert code == 1
  assert results["parts"]["good"]["error"] == "skipped: no time was left"


def test_missing_packages(monkeypatch):
  assert command.missing() == []
  names = ("jax", "nothing_of_this_name", "nothing_of_this_name.inner")
  monkeypatch.setattr(command, "NEEDED", names)
  assert command.missing() == list(names[1:])


ALONE = """
import sys
for name in sys.argv[1:]:
  sys.modules[name] = None  # importing it fails
from attmask_jax.gpu_check import command, parts
result = parts.parts()[0].run(True, 60.0)
print(result["machine"]["platform"], len(result["checks"]))
"""


def test_attention_is_compared_without_other_packages():
  others = [n.split(".")[0] for n in command.NEEDED[1:] if n != "numpy"]
  argv = [sys.executable, "-c", ALONE, *others]
  paths = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run(argv, capture_output=True, text=True, env=paths)
  assert done.stdout.split() == ["cpu", "4"], done.stderr


def test_every_part_of_the_three_families():
  assert [part.name for part in parts.parts()] == [
    "attention", "attmask: parity", "attmask: speed", "mae: parity",
    "mae: speed", "extrema: parity", "extrema: speed", "study",
  ]  # fmt: skip


def test_checks_without_a_number():
  checked = parts._checked([parity.Check("c | d", float("nan"), 0.1)])
  assert checked["checks"][0]["error"] is None and not checked["passed"]
  json.loads(json.dumps(checked, allow_nan=False))
  results = {"missing_packages": [], "parts": {"p": checked | {"took": 1.0}}}
  assert "| p: c / d | - | 1e-01 | FAILED |" in command.page(results)


def test_row_of_a_step():
  """2 TFLOP in half a second are 4 TFLOP/s."""
  row = command.speed_row(
    {
      "recipe": "r", "batch": 64, "flops": 2e12, "share_of_peak": 0.5,
      "peak_flops_per_s": 8e12, "compile_seconds": 9.6,
      "seconds": {"step": 0.5}, "memory_gb": {"arguments": 1, "temporaries": 2},
      "images_per_s": {"step": 128.0, "step with data": 100.0},
    }
  )  # fmt: skip
  assert row == "| r | 64 | 0.5000 | 128 | 100 | 4 | 50% of 8 | 10 | 3.00 |"


@pytest.mark.parametrize("kind", ["full", "file"])
def test_results_are_not_overwritten(tmp_path, capsys, kind):
  output = tmp_path / "output"
  (output / "mine").mkdir(parents=True) if kind == "full" else output.touch()
  with pytest.raises(SystemExit) as stop:
    command.main([f"--output={output}"])
  assert stop.value.code == 2
  assert "give a new folder" in capsys.readouterr().err


def shell(*words, **environment):
  done = subprocess.run(
    ["bash", SCRIPT, *map(str, words)],
    env=os.environ | {"PYTHON": sys.executable} | environment,
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
  "words, environment, sentence",
  [
    ((), {}, "give a folder"),
    (("--small",), {}, "must come first"),
    (("{tmp}", "--fast"), {}, "unknown argument --fast"),
    (("{tmp}", "--minutes=x"), {}, "--minutes=x must be"),
    (("{tmp}", "--minutes=0"), {}, "--minutes=0 must be"),
    (("{tmp}",), {"PYTHON": "/nowhere/python"}, "set PYTHON"),
    (("{tmp}",), {}, "no GPU here: add --small"),
  ],
)
def test_bad_input_of_the_script(tmp_path, words, environment, sentence):
  output = tmp_path / "new"
  words = [word.replace("{tmp}", str(output)) for word in words]
  code, out, errors = shell(*words, **environment)
  assert (code, out) == (2, "")
  assert errors.startswith("error: ") and errors.count("\n") == 1, errors
  assert sentence in errors
  assert not output.exists()


@pytest.mark.slow
def test_the_whole_check_on_a_cpu(tmp_path):
  code, out, errors = shell(tmp_path / "new", "--small", "--minutes=20")
  results = json.loads((tmp_path / "new" / "gpu_check.json").read_text())
  assert code == 0, (out, errors)
  assert results["missing_packages"] == []
  for name, part in results["parts"].items():
    assert "error" not in part, name
  assert results["parts"]["attention"]["machine"]["platform"] == "cpu"
  assert results["parts"]["mae: speed"]["seconds"]["step"] > 0
  assert "random" in results["parts"]["study"]["sentence"]
  for name in command.STUDY_FILES:
    assert (tmp_path / "new" / name).exists()
