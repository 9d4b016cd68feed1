"""A study continues where it was stopped, and refuses to become another."""

import json
import signal

import pytest
import small_study
import stopping

from attmask_jax.errors import InputError, NotFiniteError, StoppedError
from attmask_jax.studies import runner
from attmask_jax.studies.plan import Costs

COSTS = {"16x2x2": Costs(1.0, 0.1, 0.1)}
SEEDS = ["high_0", "random_0", "high_1", "random_1"]


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
  """Costs are given; counts how often they were asked for."""
  calls = []
  monkeypatch.setattr(
    runner, "measure", lambda *args, **kwargs: calls.append(1) or COSTS
  )
  return calls


class Work:
  """Writes finished runs in place of training them; fails as told."""

  def __init__(self, fail=None):
    self.done, self.fail = [], fail or {}

  def __call__(self, config, probe, folder):
    self.done.append(folder.name)
    if folder.name in self.fail:
      raise self.fail[folder.name]
    policy, seed = folder.name.split("_")
    assert config.method.seed == config.data.seed == int(seed)
    assert config.method.mask == {"high": "attmask_high"}.get(policy, policy)
    assert probe.evals.name == "linear"
    above = 2 * (policy == "high") + config.method.seed / 10
    small_study.write_run(folder, (30, 40 + above, 50 + above), 60 + above)


def study(folder, work, *, changes=None, minutes=10.0):
  config = small_study.config(changes)
  return runner.run(config, str(folder), minutes, work=work)


def stop(folder):
  """A study that a signal stops in its third run."""
  error = StoppedError("stopped", signal=signal.SIGTERM)
  work = Work({"high_1": error})
  with pytest.raises(StoppedError):
    study(folder, work)
  return work


def test_every_run_once_and_all_numbers(tmp_path):
  work = Work()
  sentence = study(tmp_path, work)
  assert work.done == SEEDS
  content = json.loads((tmp_path / "study.json").read_text())
  assert content["sentence"] == sentence
  # Both seeds differ by 2 exactly: an interval of width 0.
  assert "over 2 seeds: k-NN" in sentence
  assert "epochs: high is above by 2.0 ± 0.0" in sentence
  assert content["runs"][2] == {
    "policy": "high",
    "seed": 1,
    "curve": [[0.0, 30], [1.0, 42.1], [2.0, 52.1]],
    "linear": 62.1,
  }
  assert content["plan"]["epochs"] == 2 and content["minutes"] == 10
  assert content["costs"]["16x2x2"]["step"] == 0.1
  assert {p.name for p in tmp_path.iterdir()} == {
    "study.json", "study.md", "study.png", *SEEDS,
  }  # fmt: skip


def test_a_stopped_study_continues(tmp_path, no_measuring):
  work = stop(tmp_path)
  assert work.done == SEEDS[:3]
  assert "2 of 4 runs are finished" in (tmp_path / "study.md").read_text()
  assert "Fewer than two seeds" in (tmp_path / "study.md").read_text()
  again = Work()
  sentence = study(tmp_path, again)
  assert again.done == SEEDS[2:]  # the half-finished one, and the rest
  assert no_measuring == [1]  # the plan is kept
  whole = tmp_path / "whole"
  assert sentence == study(whole, Work())
  for name in ("study.md", "study.json"):
    assert (tmp_path / name).read_text() == (whole / name).read_text()


def test_a_finished_study_is_left_as_it_is(tmp_path):
  study(tmp_path, Work())
  before = stopping.contents(tmp_path)
  work = Work()
  study(tmp_path, work)
  assert work.done == []
  assert stopping.contents(tmp_path) == before


@pytest.mark.parametrize(
  "changes, minutes, words",
  [
    ({"data.batch_size": 16}, 10.0, "data.batch_size (8 there, 16 here)"),
    ({"study.seeds": (2, 3)}, 10.0, "study.seeds ([2, 2] there, [2, 3] here)"),
    ({"evals.knn_ks": (3,)}, 10.0, "evals.knn_ks"),
    (None, 20.0, "minutes (10.0 there, 20.0 here)"),
  ],
)
def test_another_config_or_budget_is_refused(tmp_path, changes, minutes, words):
  stop(tmp_path)
  before = stopping.contents(tmp_path)
  with pytest.raises(InputError) as caught:
    study(tmp_path, Work(), changes=changes, minutes=minutes)
  assert words in str(caught.value) and "another --workdir" in str(caught.value)
  assert stopping.contents(tmp_path) == before


def test_what_changes_no_result_may_change(tmp_path):
  stop(tmp_path)
  study(tmp_path, work := Work(), changes={"run.threads": 1})
  assert work.done == SEEDS[2:]


def test_a_run_that_is_not_finite_is_noted_and_not_repeated(tmp_path):
  error = NotFiniteError("step 3 is not finite")
  work = Work({"random_0": error})
  study(tmp_path, work)
  assert work.done == SEEDS  # the others go on
  text = (tmp_path / "study.md").read_text()
  assert "random_0 has no result: step 3 is not finite." in text
  study(tmp_path, again := Work())
  assert again.done == []
  content = json.loads((tmp_path / "study.json").read_text())
  assert [row["seeds"] for row in content["policies"]] == [[0, 1], [1]]


def test_summary_without_training(tmp_path):
  stop(tmp_path)
  small_study.write_run(tmp_path / "high_1", (30, 40, 50), 60)
  small_study.write_run(tmp_path / "random_1", (30, 40, 50), 60)
  assert "no difference that 2 seeds" in runner.redraw(str(tmp_path))
  assert "4 of 4 runs" in (tmp_path / "study.md").read_text()
  with pytest.raises(InputError, match="holds no study"):
    runner.redraw(str(tmp_path / "high_1"))


def test_too_little_time(tmp_path):
  with pytest.raises(InputError, match="can be planned: raise --minutes"):
    study(tmp_path / "new", work := Work(), minutes=0.05)
  assert not work.done and not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
  "changes, minutes, words",
  [
    ({}, 0.0, "--minutes 0 must be above 0"),
    ({"data.source": "folder"}, 10.0, "--config.data.path=FOLDER"),
    ({"data.batch_size": 128}, 10.0, "128"),
    ({"evals.knn": False}, 10.0, "evals.knn=True"),
    ({"policies.random.mask": "rondom"}, 10.0, "rondom"),
    ({"study.networks": "16x2x2,15x2x2"}, 10.0, "15"),
    ({"linear.method.lrs": (-1.0,)}, 10.0, "lrs"),
  ],
)
def test_bad_input(tmp_path, changes, minutes, words):
  with pytest.raises(InputError) as caught:
    study(tmp_path / "new", Work(), changes=changes, minutes=minutes)
  assert words in str(caught.value), caught.value
  assert not (tmp_path / "new").exists()


def test_a_config_of_a_single_run():
  import small

  with pytest.raises(InputError, match="--config=study"):
    runner.run(small.config(), "new", 10.0)


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_directory_of_something_else(tmp_path, name):
  (tmp_path / name).write_text("{}")
  with pytest.raises(InputError, match="another --workdir"):
    study(tmp_path, Work())
  assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"plan": 3}'])
def test_damaged_study(tmp_path, text):
  (tmp_path / "study.json").write_text(text)
  with pytest.raises(InputError, match=r"study.json is damaged"):
    study(tmp_path, Work())
  assert (tmp_path / "study.json").read_text() == text
