"""First panel of the report: has the run learned?"""

from collections.abc import Mapping
from typing import Any

from attmask_jax.runs import judgement, metric_names, metrics, records
from attmask_jax.runs.markup import table, term, text

# Rows of the panel, by metric.
LABELS = {
  "knn/top1": "k-NN top-1",
  "val/top1": "accuracy",
  "nmi": "prototypes and labels, NMI",
  "ari": "prototypes and labels, ARI",
  "fscore": "prototypes and labels, F",
  "label_free/rankme": "effective rank (RankMe)",
  "label_free/uniformity": "uniformity",
  "label_free/alignment": "alignment of two views",
  "label_free/retrieval": "other view found first",
  "label_free/prototypes_used": "prototypes in use",
  "label_free/prototypes_effective": "prototypes in effect",
  "agreement": "student agrees with teacher",
  "teacher_entropy": "entropy of the teacher",
  "target_std": "spread of the targets",
}
# What the column "without learning" shows, where it is not chance.
CHANCE = {"overlap/POLICY": "random mask", "teacher_entropy": "uniform"}


def section(config: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
  """HTML of the panel; "" for a directory without metrics.

  Args:
    config: flat, as in config.json; may be empty.
    lines: of metrics.jsonl.
  """
  if not lines:
    return ""
  found = judgement.judge(config, lines)
  total = f" of {found.total:,}" if found.total else ""
  facts = [("steps", f"{found.step:,}{total}")]
  if found.seconds is not None:
    facts.append(("time in training steps", _duration(found.seconds)))
  if found.images_per_s is not None:
    facts.append(("images/s, median", f"{found.images_per_s:,.0f}"))
  losses = [line["epoch/loss"] for line in lines if "epoch/loss" in line]
  losses = losses or [x["train/loss"] for x in lines if "train/loss" in x]
  if losses:
    facts.append(("loss", f"{losses[-1]:.4f}"))
  cards = "".join(
    f"<div>{text(name)}<b>{text(value)}</b></div>" for name, value in facts
  )
  start = "at the start" if config.get("init_from") else "untrained"
  headings = ["measure", "now", start, "without learning", "best"]
  per_epoch = records.steps_per_epoch(config)
  numbers = [_measure(row, per_epoch) for row in found.rows]
  return (
    f'<section class="panel"><p class="verdict">{text(found.sentence)}</p>'
    + (
      f'<p class="verdict">{text(found.collapse)}</p>' if found.collapse else ""
    )
    + f'<div class="facts">{cards}</div>'
    + (table(headings, numbers) if numbers else "")
    + (f'<p class="note">{text(found.rule)}</p>' if found.rule else "")
    + "</section>"
  )


def _measure(row: judgement.Row, per_epoch: int) -> list[str]:
  """Cells of a row of the panel."""
  key = metric_names.key(row.metric)
  label = LABELS.get(key, key)
  if key == "overlap/POLICY":
    label = f"mask on the object, {row.metric.removeprefix('overlap/')}"
  start, chance, best = "–", "–", "–"
  if row.start is not None:
    start = _number(row.metric, row.start)
    if row.metric.startswith(metric_names.PHASES):
      start += " (first epoch)" if "epoch/" in row.metric else " (first steps)"
  if row.chance is not None:
    chance = f"{_number(row.metric, row.chance)} ({CHANCE.get(key, 'chance')})"
  if row.best is not None:
    value, step = row.best
    place = f"epoch {step / per_epoch:g}" if per_epoch else f"step {step}"
    best = f"{_number(row.metric, value)} ({place})"
  now = _number(row.metric, row.now)
  return [term(row.metric, label), now, start, chance, best]


def _number(name: str, value: float) -> str:
  """A value with the unit of its metric."""
  if name.startswith("overlap/"):
    return f"{100 * value:.1f} %"
  unit = metric_names.METRICS[metric_names.key(name)].unit
  if unit == "%":
    return f"{metrics.percent(value)} %"
  if unit == "nats":
    return f"{value:.2f} nats"
  if unit == "prototypes":
    return f"{value:.4g}"
  return f"{value:z.3f}"  # no "-0.000"


def _duration(seconds: float) -> str:
  """45 s, 12.5 min or 3.2 h."""
  for size, unit in ((3600, "h"), (60, "min")):
    if seconds >= 1.5 * size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.0f} s"
