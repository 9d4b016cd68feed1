"""What a run has learned, from metrics written and counted by hand."""

import json
import math
import pathlib

import numpy as np
import pytest

from attmask_jax.runs import judgement, metric_names, metrics

DATA = pathlib.Path(__file__).parents[1] / "data" / "runs_0_1"
DOCS = pathlib.Path(__file__).parents[2] / "docs"
CONFIG = {
  "data.images": 40,
  "data.batch_size": 10,
  "optim.epochs": 5,
  "method.mask": "attmask_high",
}


def lines(start, now, *, chance=None, queries=100, step=20):
  """Metrics of a run with k-NN before the first step and at a later one."""
  first = {"step": 0, "knn/top1": start}
  if chance is not None:
    first["knn/chance"] = chance
  if queries is not None:
    first["knn/queries"] = queries
  return [first, {"step": step, "knn/top1": now}]


# The rule ---------------------------------------------------------------------


def test_noise_by_hand():
  # Mean 1/2: 2 sqrt(2 / 4 / 100) = 0.2 / sqrt(2). Chance 1/5: 2 sqrt(.16 / 64).
  assert judgement.noise(40, 60, 100) == pytest.approx(20 / math.sqrt(2))
  assert judgement.chance_noise(20, 64) == pytest.approx(10)
  assert judgement.noise(0, 0, 10) == judgement.noise(100, 100, 10) == 0


def test_noise_is_what_equal_networks_rarely_exceed():
  """Two standard errors: a normal variable exceeds them 4.6 times in 100."""
  draws = np.random.default_rng(0).binomial(800, 0.3, (20_000, 2)) / 8
  exceeded = [abs(a - b) > judgement.noise(a, b, 800) for a, b in draws]
  assert 0.035 < np.mean(exceeded) < 0.055


@pytest.mark.parametrize(
  "start, now, chance, text",
  [
    # Mean 0.4705: 2 sqrt(2 * 0.4705 * 0.5295 / 100) = 0.14118.
    (40.0, 54.1, None, "within noise of the untrained network: this run has "
     "not learned the classes (54.10 % against 40.00 %, noise ± 14.1 points)"),
    (40.0, 54.2, None, "above the untrained network by more than noise: this "
     "run has learned something about the classes (54.20 % against 40.00 %"),
    # Mean 0.33: 2 sqrt(2 * 0.33 * 0.67 / 100) = 0.13300.
    (39.5, 26.5, None, "within noise of the untrained"),
    (39.7, 26.3, None, "below the untrained network by more than noise: this "
     "run has made the features worse"),
    # Above the start, but chance 0.2 has a noise of 0.08.
    (5.0, 27.9, 20.0, "not above chance by more than noise: this run has not "
     "learned the classes (27.90 % against 20.00 %, noise ± 8.0 points)"),
    (5.0, 28.1, 20.0, "above the untrained network"),
  ],
)  # fmt: skip
def test_sentence(start, now, chance, text):
  found = judgement.judge(CONFIG, lines(start, now, chance=chance))
  assert found.sentence.startswith(f"k-NN is {text}")
  assert found.rule == judgement.RULE and "(1 − p)/n" in found.rule


def test_more_queries_less_noise():
  few, many = (
    judgement.judge(CONFIG, lines(12.5, 16.0, queries=n)).sentence
    for n in (100, 10_000)
  )
  assert "within noise" in few and "above the untrained" in many


def test_sentence_of_a_run_under_way():
  found = judgement.judge(CONFIG, lines(12.0, 12.5, step=12))
  assert "has not learned the classes so far (" in found.sentence
  assert (found.step, found.total) == (12, 20)


def test_sentence_of_a_run_from_weights():
  config = CONFIG | {"init_from": "runs/a"}
  sentence = lambda now: judgement.judge(config, lines(50.0, now)).sentence
  assert (
    "noise of the weights it began with: this run has not improved k-NN"
    in (sentence(51.0))
  )
  assert "above the weights it began with" in sentence(90.0)


@pytest.mark.parametrize(
  "records, text",
  [
    ([{"step": 9, "train/loss": 1.0}], "is not measured: the images have no"),
    ([{"step": 0, "knn/top1": 9.0}], "but the start: k-NN 9.00 %"),
    (lines(9.0, 80.0, queries=None), "80.00 %; the number of queries is not"),
    (
      [
        {"step": 4, "knn/top1": 8.0, "knn/queries": 100},
        {"step": 8, "knn/top1": 80.0},
      ],
      "80.00 %; k-NN before the first step is not known",
    ),
    ([{"step": 4, "val/top1": 61.5}], "Accuracy is 61.50 %"),
  ],
)
def test_no_judgement_without_its_numbers(records, text):
  found = judgement.judge({}, records)
  assert text in found.sentence and not found.rule
  assert "learned" not in found.sentence or "not measured" in found.sentence


def test_queries_of_runs_that_did_not_log_them():
  shapes = {"data.source": "shapes", "data.shapes_val": 48}
  count = judgement.number_of_queries
  assert count(shapes, []) == 48
  assert count(shapes | {"evals.knn_queries": 20}, []) == 20
  assert count({"data.source": "folder", "data.shapes_val": 48}, []) is None
  assert count(shapes, [{"step": 0, "knn/queries": 7}]) == 7


# The numbers ------------------------------------------------------------------


def rows(config, records):
  return {row.metric: row for row in judgement.judge(config, records).rows}


def test_best_is_never_before_the_first_step():
  records = [
    {"step": 0, "knn/top1": 40.0, "knn/chance": 25.0},
    {"step": 4, "knn/top1": 30.0},
    {"step": 8, "knn/top1": 35.0},
    {"step": 12, "knn/top1": 35.0},
    {"step": 16, "knn/top1": 20.0},
  ]
  (row,) = rows(CONFIG, records).values()
  assert row == ("knn/top1", 20.0, 40.0, 25.0, (35.0, 8))
  assert judgement.best([(0, 9.0)]) is None
  # Without an evaluation before the first step there is no start.
  (row,) = rows(CONFIG, records[1:]).values()
  assert row == ("knn/top1", 20.0, None, None, (35.0, 8))


def test_rows_of_masks_clusters_and_the_teacher():
  records = [
    {"step": 0, "overlap/attmask_high": 0.3, "overlap/random": 0.25,
     "overlap/attmask_low": 0.4},
    {"step": 4, "epoch/nmi": 0.1, "epoch/ari": 0.01, "epoch/fscore": 0.2,
     "epoch/teacher_entropy": 1.5, "epoch/agreement": 0.5},
    {"step": 8, "epoch/nmi": 0.3, "epoch/ari": 0.02, "epoch/fscore": 0.1,
     "epoch/teacher_entropy": 2.5, "epoch/agreement": float("nan")},
    {"step": 8, "overlap/attmask_high": 0.35, "overlap/random": 0.26,
     "overlap/attmask_low": 0.1},
  ]  # fmt: skip
  high = ("overlap/attmask_high", 0.35, 0.3, 0.26, None)
  found = rows(CONFIG | {"method.out_dim": 512}, records)
  assert found == {
    "epoch/nmi": ("epoch/nmi", 0.3, 0.1, None, None),
    "epoch/ari": ("epoch/ari", 0.02, 0.01, 0.0, None),
    "epoch/fscore": ("epoch/fscore", 0.1, 0.2, None, None),
    "overlap/attmask_high": high,
    "epoch/agreement": ("epoch/agreement", 0.5, 0.5, None, None),
    "epoch/teacher_entropy": (
      "epoch/teacher_entropy", 2.5, 1.5, pytest.approx(9 * math.log(2)), None,
    ),
  }  # fmt: skip
  # A run without attention masks is asked what its attention would hide.
  assert high in rows({"method.mask": "random"}, records).values()
  assert "overlap/attmask_low" in rows({"method.mask": "attmask_low"}, records)


def test_time_and_images_per_second_by_hand():
  config = CONFIG | {"run.log_steps": 4}
  records = [
    {"step": 4, "train/img_per_s": 20.0},
    {"step": 8, "train/img_per_s": 40.0},
    {"step": 12, "train/img_per_s": 50.0},
    {"step": 14, "epoch/loss": 1.0},
  ]
  found = judgement.judge(config, records)
  # Batches of 10: 40 / 20 + 40 / 40 + 40 / 50, and 2 steps at 50 images/s.
  assert found.seconds == pytest.approx(2 + 1 + 0.8 + 0.4)
  assert found.images_per_s == 40.0
  # A run that went on from step 100 of another.
  late = [{"step": 104, "train/img_per_s": 20.0}]
  assert judgement.judge(config, late).seconds == pytest.approx(2)
  assert judgement.judge(config, records[3:]).seconds is None


def test_directories_of_version_0_1():
  found = judgement.read(DATA / "attmask")
  # 6 and 8 of 48: mean 7 / 48, 2 sqrt(2 * 7 / 48 * 41 / 48 / 48) = 0.1441.
  assert found.sentence == (
    "k-NN is within noise of the untrained network: this run has not learned "
    "the classes (16.67 % against 12.50 %, noise ± 14.4 points)."
  )
  assert found.step == found.total == 16
  assert "Accuracy is 12.50 %" in judgement.read(DATA / "probe").sentence
  assert "not measured" in judgement.read(DATA / "imported").sentence


def test_damaged_files_leave_what_is_whole(tmp_path):
  (tmp_path / "config.json").write_text("{")
  text = "\n".join(map(json.dumps, lines(10.0, 90.0)))
  (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 21, "kn')
  assert "above the untrained" in judgement.read(tmp_path).sentence


# Names of metrics -------------------------------------------------------------


def test_every_logged_metric_is_documented(whole):
  names = set()
  for path in (whole, *DATA.iterdir()):
    if (path / "metrics.jsonl").exists():
      records = metrics.read_metrics(path / "metrics.jsonl")
      names |= {name for record in records for name in record}
  assert len(names) > 60
  assert [n for n in names - {"step"} if metric_names.find(n) is None] == []


def test_names_with_parts_that_vary():
  key = metric_names.key
  assert key("train/loss") == key("epoch/loss") == key("loss") == "loss"
  assert key("knn/k20/top5") == "knn/kK/top5" and key("knn/top5") == "knn/top5"
  assert key("val/3/loss") == "val/J/loss" and key("val/loss") == "val/loss"
  assert key("overlap/object") == "overlap/object"
  assert key("overlap/attmask_low") == "overlap/POLICY"
  assert metric_names.find("train/nothing") is None


def test_tooltips_give_unit_and_direction():
  tooltip = metric_names.find("knn/k20/top1").tooltip
  assert tooltip == "knn/top1 with K neighbours [%]; higher is better"
  assert metric_names.find("train/lr").tooltip == "learning rate"


def test_table_of_the_documents():
  page = (DOCS / "training.md").read_text()
  assert metric_names.markdown() in page, (
    "replace the table of docs/training.md by the output of "
    "python -m attmask_jax.runs.metric_names"
  )
