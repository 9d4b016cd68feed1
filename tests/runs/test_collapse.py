"""A collapse is said with its value, its limit and what to do."""

import json
import math

import pytest
import small

from attmask_jax import train
from attmask_jax.runs import collapse, judgement, metrics, report

K = 128
CONFIG = {"method.out_dim": K}
NONE = {}


@pytest.mark.parametrize(
  "name, value, text",
  [
    ("label_free/rankme", 1.02, "is 1.02, and 1 means that all images have the "
     "same features: lower optim.lr_per_256"),
    ("label_free/uniformity", -0.004, "is -0.004, and 0 means that all images "
     "have the same features: lower optim.lr_per_256"),
    ("label_free/prototypes_used", 1, "is 1, and 1 means that all images have "
     "the same prototype: lower optim.lr_per_256, raise"),
    # 7 log 2 = 4.852, of which a hundredth is 0.0485.
    ("epoch/teacher_entropy", 4.81, "is 4.81, and 4.852 means that the teacher "
     "gives all prototypes the same share for every image: lower "
     "method.teacher_temp."),
    ("train/teacher_entropy", 0.04, "is 0.04, and 0 means that the teacher is "
     "certain of one prototype for every image: raise method.teacher_temp"),
  ],
)  # fmt: skip
def test_sentence(name, value, text):
  now = {name: value, "knn/top1": 1.0}
  if "prototypes" in name:
    now["epoch/teacher_entropy"] = 0.4
  sentence = collapse.sentence(now, NONE, CONFIG)
  assert sentence.startswith(f"Collapse: {name} {text}")
  assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize(
  "name, values",
  [
    ("label_free/rankme", (1.51, 5.0, 128.0)),
    ("label_free/uniformity", (-0.0101, -0.7, -4.0)),
    ("label_free/prototypes_used", (2, 128)),
    # A very narrow effective number and a low retrieval are no limits.
    ("label_free/prototypes_effective", (1.0,)),
    ("label_free/retrieval", (0.0,)),
    ("epoch/teacher_entropy", (0.0486, 2.0, 4.8034)),
    ("epoch/teacher_entropy", (math.nan,)),
  ],
)  # fmt: skip
def test_no_sentence_away_from_the_limits(name, values):
  for value in values:
    assert collapse.sentence({name: value}, NONE, CONFIG) == ""


def test_what_training_has_not_changed_is_no_collapse():
  sentence = lambda now, start: collapse.sentence(
    {"label_free/rankme": now}, {"label_free/rankme": start}, NONE
  )
  assert not sentence(1.3, 1.3) and not sentence(1.3, 1.2)
  assert sentence(1.3, 1.31) and sentence(1.3, 9.0)


def test_one_prototype_is_a_sign_if_the_teacher_is_certain_of_it():
  """Else centring gives the images different targets."""
  said = lambda entropy: collapse.sentence(
    {"label_free/prototypes_used": 1, "epoch/teacher_entropy": entropy},
    NONE,
    CONFIG,
  )
  # A tenth of 7 log 2.
  assert "the same prototype" in said(0.485)
  assert not said(0.486) and not said(math.nan)
  alone = {"label_free/prototypes_used": 1}
  assert not collapse.sentence(alone, NONE, CONFIG)


def test_without_prototypes_nothing_is_said_of_the_teacher():
  assert collapse.sentence({"train/teacher_entropy": 0.0}, NONE, NONE) == ""


def test_all_features_alike_come_before_the_teacher():
  now = {"epoch/teacher_entropy": 0.0, "label_free/rankme": 1.0}
  assert "Collapse: label_free/rankme" in collapse.sentence(now, NONE, CONFIG)


def lines(*ranks):
  """A log with this effective rank at steps 0, 4, 8, ..."""
  return [
    {"step": 4 * i, "label_free/rankme": rank} for i, rank in enumerate(ranks)
  ]


def test_the_last_evaluation_of_a_run_counts():
  said = lambda *ranks: judgement.judge(CONFIG, lines(*ranks)).collapse
  assert said(9.0, 1.1) and said(9.0, 5.0, 1.1)
  assert not said(9.0, 1.1, 5.0)
  assert not said(1.1)  # not trained yet
  assert not said(1.1, 1.1)  # as few similar images have it
  # The entropy of the first epoch is that of training, not of a start.
  flat = [{"step": 4, "epoch/teacher_entropy": 4.85}]
  assert "lower method.teacher_temp" in judgement.judge(CONFIG, flat).collapse


def test_the_report_says_it(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  for ranks, shown in (((9.0, 1.1), True), ((9.0, 8.0), False)):
    text = "\n".join(map(json.dumps, lines(*ranks)))
    (tmp_path / "metrics.jsonl").write_text(text)
    page = report.write(tmp_path).read_text()
    assert ("Collapse: label_free/rankme is 1.1" in page) == shown


def prefixes(folder):
  """The log of a run as it stood at each of its lines."""
  records = metrics.read_metrics(folder / "metrics.jsonl")
  return [records[: i + 1] for i in range(len(records))]


def test_an_ordinary_run_raises_no_alarm(whole):
  config = json.loads((whole / "config.json").read_text())
  assert len(prefixes(whole)) > 6
  for records in prefixes(whole):
    assert judgement.judge(config, records).collapse == ""


# Without centring and with the student as its own teacher the quickest way to
# agree is one certain answer for all images.
COLLAPSE = {
  "method.center_momentum": 1.0,
  "optim.teacher_momentum": 0.0,
  "optim.lr_per_256": 2.0,
  "optim.warmup_epochs": 0,
  "evals.knn": False,
  "evals.overlap_images": 0,
}


@pytest.mark.slow
def test_a_run_that_collapses_is_warned(tmp_path, one_device, caplog):
  with caplog.at_level("WARNING"):
    train.train(small.config(COLLAPSE), str(tmp_path))
  said = judgement.read(tmp_path).collapse
  assert said.startswith("Collapse: label_free/prototypes_used is 1, and 1")
  assert said in caplog.messages
  assert said in (tmp_path / "report.html").read_text()
