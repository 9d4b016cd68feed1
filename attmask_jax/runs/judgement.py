"""Whether a run has learned: its main numbers, and one sentence with its rule.

A second sentence says if it has collapsed, see collapse.py.

The k-NN accuracy now is compared with that before the first step and with
chance. Accuracies over n queries are uncertain like n coin tosses, so a
difference within two standard errors counts as noise.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attmask_jax.runs import collapse, metric_names, records
from attmask_jax.runs.metrics import percent

NOISE_ERRORS = 2  # standard errors that still count as noise
KNN, ACCURACY = "knn/top1", "val/top1"
CLUSTERS = ("nmi", "ari", "fscore")
# Measures that need no labels. One more is one more name here, with its line
# in metric_names.py.
LABEL_FREE = (
  "label_free/rankme",
  "label_free/uniformity",
  "label_free/alignment",
  "label_free/retrieval",
  "label_free/prototypes_used",
  "label_free/prototypes_effective",
)
WHILE_TRAINING = ("agreement", "teacher_entropy", "target_std")
RULE = (
  f"Rule: k-NN over n queries is uncertain like n coin tosses. Noise is "
  f"{NOISE_ERRORS} standard errors: {NOISE_ERRORS}·√(2·p·(1 − p)/n) for the "
  "difference of two accuracies with mean p, and "
  f"{NOISE_ERRORS}·√(c·(1 − c)/n) against chance c. Learned means above both "
  "the start and chance by more than noise. The spread between seeds comes "
  "on top."
)
Lines = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
  """One measure of the run; None where it was not measured.

  Attributes:
    metric: its logged name.
    now: the last value after the first step.
    start: the value before the first step, or of the first epoch for what is
      only measured while training.
    chance: the value without learning: of a blind answer, of a random mask, of
      a uniform teacher.
    best: (value, step) of the best value after the first step.
  """

  metric: str
  now: float | None
  start: float | None
  chance: float | None
  best: tuple[float, int] | None


@dataclasses.dataclass(frozen=True)
class Judgement:
  """The main numbers of a run.

  Attributes:
    sentence: what the numbers say.
    rule: how it was decided; "" where nothing was.
    collapse: see `collapse.sentence`; "" = no sign of one.
    rows: the measures.
    step: last step in the log.
    total: steps of the whole run, 0 = unknown.
    seconds: time spent in training steps, without evaluations; None = unknown.
    images_per_s: median over the run, None = unknown.
  """

  sentence: str
  rule: str
  collapse: str
  rows: tuple[Row, ...]
  step: int
  total: int
  seconds: float | None
  images_per_s: float | None


def read(folder: pathlib.Path) -> Judgement:
  """The judgement of a run directory; of damaged files, what is left."""
  config = records.read_json(folder / "config.json", []) or {}
  return judge(config, records.read_metrics(folder / "metrics.jsonl", []))


def judge(config: Mapping[str, Any], lines: Lines) -> Judgement:
  """The judgement of a run.

  Args:
    config: flat, as in config.json; may be empty.
    lines: of metrics.jsonl.
  """
  step = max((line["step"] for line in lines), default=0)
  epochs = records.count(config, "optim.epochs")
  total = records.count(config, "optim.steps")
  total = total or records.steps_per_epoch(config) * epochs
  score = _row(lines, KNN, chance=first(lines, "knn/chance"))
  sentence = _sentence(config, lines, score, done=0 < total <= step)
  rates = [rate for _, rate in points(lines, "train/img_per_s")]
  rows = [row for row in _rows(config, lines, score) if row.now is not None]
  return Judgement(
    sentence,
    RULE if "noise" in sentence else "",
    _collapse(config, rows),
    tuple(rows),
    step,
    total,
    _seconds(config, lines, step),
    statistics.median(rates) if rates else None,
  )


def noise(a: float, b: float, queries: int) -> float:
  """Two standard errors of the difference of two accuracies, in points.

  Args:
    a: percent.
    b: percent; over as many queries.
    queries: n of each.
  """
  p = min(max((a + b) / 200, 0.0), 1.0)  # a damaged log may hold any number
  return 100 * NOISE_ERRORS * math.sqrt(2 * p * (1 - p) / queries)


def chance_noise(chance: float, queries: int) -> float:
  """Two standard errors of an accuracy at chance, in points; see `noise`."""
  p = min(max(chance / 100, 0.0), 1.0)
  return 100 * NOISE_ERRORS * math.sqrt(p * (1 - p) / queries)


def best(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
  """The (place, value) of the highest value, the first of equals.

  Place 0, before the first step, does not count: it is no result of training.
  """
  trained = [point for point in points if point[0] > 0]
  return max(trained, key=lambda point: point[1], default=None)


def first(lines: Lines, name: str) -> float | None:
  """The first logged value of a metric, None if there is none."""
  logged = points(lines, name)
  return logged[0][1] if logged else None


def number_of_queries(config: Mapping[str, Any], lines: Lines) -> int | None:
  """Queries of the k-NN; of runs that did not log it, from the config."""
  logged = first(lines, "knn/queries")
  if logged is not None:
    return max(int(logged), 0) or None
  sizes = [records.count(config, "evals.knn_queries")]
  if config.get("data.source") == "shapes":
    sizes.append(records.count(config, "data.shapes_val"))
  return min(filter(None, sizes), default=None)


def points(lines: Lines, name: str) -> list[tuple[int, float]]:
  """(step, value) of a logged metric, finite values only."""
  return [
    (line["step"], line[name])
    for line in lines
    if isinstance(line.get(name), (int, float)) and math.isfinite(line[name])
  ]


def _row(
  lines: Lines, name: str, *, chance: float | None = None, rank: bool = True
) -> Row:
  """The row of a metric; `rank` adds its best value."""
  logged = points(lines, name)
  trained = [value for step, value in logged if step > 0]
  highest = best(logged) if rank else None
  # Of a mean over steps the first; else only what precedes training.
  mean = name.startswith(metric_names.PHASES)
  begun = [value for step, value in logged[:1] if mean or step == 0]
  return Row(
    name,
    trained[-1] if trained else None,
    begun[0] if begun else None,
    chance,
    (highest[1], int(highest[0])) if highest else None,
  )


def _rows(config: Mapping[str, Any], lines: Lines, score: Row) -> list[Row]:
  """All rows, measured or not."""
  rows = [score, _row(lines, ACCURACY)]
  rows += [_row(lines, f"epoch/{name}", rank=False) for name in CLUSTERS]
  rows[-2] = rows[-2]._replace(chance=0.0)  # the Rand index is adjusted
  policy = str(config.get("method.mask"))
  if not policy.startswith("attmask_"):
    policy = "attmask_high"  # what attention would hide
  random = points(lines, "overlap/random")
  rows.append(
    _row(
      lines,
      f"overlap/{policy}",
      chance=random[-1][1] if random else None,
      rank=False,
    )
  )
  images = first(lines, "label_free/images")
  for name in LABEL_FREE:
    chance = None
    if name == "label_free/retrieval" and images:
      chance = 100 / images
    rows.append(_row(lines, name, chance=chance, rank=False))
  for name in WHILE_TRAINING:
    phase = "epoch" if points(lines, f"epoch/{name}") else "train"
    chance = None
    prototypes = records.count(config, "method.out_dim")
    if name == "teacher_entropy" and prototypes:
      chance = math.log(prototypes)
    rows.append(_row(lines, f"{phase}/{name}", chance=chance, rank=False))
  return rows


def _sentence(
  config: Mapping[str, Any], lines: Lines, score: Row, *, done: bool
) -> str:
  """One sentence on the k-NN."""
  now, start, chance = score.now, score.start, score.chance
  if now is None:
    accuracy = _row(lines, ACCURACY).now
    if accuracy is not None:
      return f"Accuracy is {percent(accuracy)} % on the validation images."
    if start is not None:
      return f"Nothing is measured yet but the start: k-NN {percent(start)} %."
    return (
      "Whether this run has learned the classes is not measured: the images "
      "have no labels, or evals.knn is off."
    )
  queries = number_of_queries(config, lines)
  if start is None or not queries:
    missing = "the number of queries"
    if start is None:
      missing = "k-NN before the first step"
    return f"k-NN is {percent(now)} %; {missing} is not known, so no judgement."
  loaded = bool(config.get("init_from"))
  whose = "the weights it began with" if loaded else "the untrained network"
  margin = noise(now, start, queries)
  figures = (
    f"{percent(now)} % against {percent(start)} %, noise ± {margin:.1f} points"
  )
  at_chance = False
  if chance is not None:
    at_chance = now - chance <= chance_noise(chance, queries)
  failed = "not improved k-NN" if loaded else "not learned the classes"
  failed += "" if done else " so far"
  if now - start < -margin:
    return (
      f"k-NN is below {whose} by more than noise: this run has made the "
      f"features worse ({figures})."
    )
  if now - start <= margin:
    return (
      f"k-NN is within noise of {whose}: this run has {failed} ({figures})."
    )
  if at_chance:
    margin = chance_noise(chance, queries)
    return (
      f"k-NN is not above chance by more than noise: this run has {failed} "
      f"({percent(now)} % against {percent(chance)} %, noise ± {margin:.1f} "
      "points)."
    )
  what = "improved k-NN" if loaded else "learned something about the classes"
  return (
    f"k-NN is above {whose} by more than noise: this run has {what} "
    f"({figures})."
  )


def _collapse(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
  """The sentence on a collapse, from the rows that are measured."""
  start = {
    row.metric: row.start
    for row in rows
    # Of what is only measured while training there is no value before it.
    if row.start is not None and not row.metric.startswith(metric_names.PHASES)
  }
  return collapse.sentence({row.metric: row.now for row in rows}, start, config)


def _seconds(
  config: Mapping[str, Any], lines: Lines, step: int
) -> float | None:
  """Time in training steps, from the images per second of each window."""
  rates = [p for p in points(lines, "train/img_per_s") if p[1] > 0]
  batch = records.count(config, "data.batch_size")
  if not rates or not batch:
    return None
  window = records.count(config, "run.log_steps") or rates[0][0]
  seconds, before = 0.0, 0
  for at, rate in rates:
    # The run may have begun, or gone on, after step 0.
    seconds += min(at - before, window) * batch / rate
    before = at
  return seconds + (step - before) * batch / rates[-1][1]
