"""Several runs in one plot: accuracy and loss over epochs.

Source: the figure "AttMask learns faster" of the authors' ECCV slides.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.evals import drawing
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.runs import config as run_config
from attmask_jax.runs import judgement, metrics
from attmask_jax.text import printable

ACCURACIES = {"knn/top1": "k-NN top-1", "val/top1": "accuracy"}
MAX_NAMED_KEYS = 6  # differing config keys named in a note
Curve = list[tuple[float, float]]  # (epoch, value)


@dataclasses.dataclass(frozen=True)
class Keys:
  """Curves of several runs."""

  runs: str = schema.key("", "run directories: runs/a,runs/b")
  labels: str = schema.key(
    "", 'A,B: names of the runs in the plot; "" = those of the directories'
  )


class History(NamedTuple):
  """Curves and config of a run.

  Attributes:
    label: its name in the plot.
    kind: of accuracy, a value of ACCURACIES.
    accuracy: percent over epochs; empty if none was measured.
    loss: mean over each epoch, at its end.
    config: flat config.
  """

  label: str
  kind: str
  accuracy: Curve
  loss: Curve
  config: dict[str, object]


def run(job: Job) -> Result:
  """Reads `evals.runs` and draws figures/compare.png.

  Raises:
    InputError: there are no runs, a folder holds none, or the labels are not
      one different name for each.
  """
  histories = [
    read(pathlib.Path(folder).expanduser(), label)
    for folder, label in _named(job.config.evals)
  ]
  path = job.figure("compare.png")
  if jax.process_index() == 0:
    _draw(path, histories)
  highest = judgement.best(histories[0].accuracy)
  goal = None if highest is None else highest[1]
  values, rows = {}, []
  for history in histories:
    numbers, row = _summary(history, goal)
    values |= {f"{history.label}/{k}": v for k, v in numbers.items()}
    rows.append(row)
  headings = ("run", "epochs", "first %", "last %", "best %")
  if goal is not None:
    headings += (f"epoch of {goal:.1f} %",)
  headings += ("last loss",)
  if goal is None:
    rows = [row[:5] + row[6:] for row in rows]
  return Result(
    values,
    {"runs": len(histories)},
    Table(headings, tuple(rows)),
    (path,),
    _differences(histories),
  )


def read(folder: pathlib.Path, label: str) -> History:
  """The curves of one run directory.

  Raises:
    InputError: the folder holds no run.
  """
  path = folder / "metrics.jsonl"
  if not path.is_file():
    raise InputError(
      f"{folder} holds no run (no metrics.jsonl): give run directories in "
      "--config.evals.runs=A,B"
    )
  config = run_config.flat_config(run_config.read_config(folder))
  images, batch = config.get("data.images"), config.get("data.batch_size")
  per_epoch = max(int(images) // int(batch), 1) if images and batch else 1
  lines = metrics.read_metrics(path)
  curve = lambda key: [
    (line["step"] / per_epoch, line[key]) for line in lines if key in line
  ]
  key = next((k for k in ACCURACIES if curve(k)), "knn/top1")
  return History(
    label, ACCURACIES[key], curve(key), curve("epoch/loss"), config
  )


def _named(evals: object) -> list[tuple[str, str]]:
  """(folder, label) of every run."""
  runs, labels = schema.words(evals.runs), schema.words(evals.labels)
  if not runs:
    raise InputError(
      "evals.runs is empty: give run directories, --config.evals.runs=A,B"
    )
  if not labels:
    labels = tuple(pathlib.Path(run).name or run for run in runs)
    if len(set(labels)) < len(labels):
      labels = runs
  if len(labels) != len(runs) or len(set(labels)) < len(labels):
    raise InputError(
      f"evals.labels {labels} must name each of the {len(runs)} runs, "
      "with different names"
    )
  return list(zip(runs, map(printable, labels), strict=True))


def _summary(
  history: History, goal: float | None
) -> tuple[dict[str, float], tuple[str, ...]]:
  """Values and table row of one run."""
  accuracy, loss = history.accuracy, history.loss
  values = {}
  if accuracy:
    values = {"first": accuracy[0][1], "last": accuracy[-1][1]}
  highest = judgement.best(accuracy)
  if highest is not None:
    values["best"] = highest[1]
  # Before the first step nothing is reached: it is no result of training.
  reached = next(
    (e for e, v in accuracy if goal is not None and e > 0 and v >= goal), None
  )
  if reached is not None:
    values["reached_epoch"] = reached
  if loss:
    values["loss"] = loss[-1][1]
  cell = lambda key, form: format(values[key], form) if key in values else "-"
  epochs = max((e for e, _ in accuracy + loss), default=0)
  row = (
    history.label,
    f"{epochs:g}",
    *(cell(key, ".2f") for key in ("first", "last", "best")),
    cell("reached_epoch", "g"),
    cell("loss", ".4f"),
  )
  return values, row


def _differences(histories: list[History]) -> tuple[str, ...]:
  """A sentence per run whose config differs from the first one's."""
  first, notes = histories[0], []
  kinds = {h.kind for h in histories if h.accuracy}
  if len(kinds) > 1:
    notes.append(
      f"Top-1 is {' or '.join(sorted(kinds))}, which cannot be compared."
    )
  for other in histories[1:]:
    keys = sorted(
      key
      for key in first.config.keys() | other.config.keys()
      if first.config.get(key) != other.config.get(key)
      and not key.startswith(run_config.FREE_KEYS)
    )
    if keys:
      named = ", ".join(
        f"{key} ({first.config.get(key, 'absent')} and "
        f"{other.config.get(key, 'absent')})"
        for key in keys[:MAX_NAMED_KEYS]
      )
      more = len(keys) - MAX_NAMED_KEYS
      rest = f" and {more} more keys" if more > 0 else ""
      notes.append(f"{first.label} and {other.label} differ in {named}{rest}.")
  return tuple(notes)


def _draw(path: pathlib.Path, histories: list[History]) -> None:
  """Two panels side by side: accuracy and loss over epochs."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(9.5, 4.0), dpi=drawing.DPI, layout="constrained")
  panels = figure.subplots(1, 2)
  for axis, name, title in (
    (panels[0], "accuracy", "Top-1 accuracy, %"),
    (panels[1], "loss", "Loss, mean of the epoch"),
  ):
    for history in histories:
      curve = getattr(history, name)
      if curve:
        axis.plot(
          *zip(*curve, strict=True), marker="o", markersize=3, linewidth=1.5,
          label=f"{history.label} ({history.kind})" * (name == "accuracy")
          or history.label,
        )  # fmt: skip
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("Epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if any(getattr(history, name) for history in histories):
      # Below the axes, off the curves.
      axis.legend(
        frameon=False,
        fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
      )
    else:
      axis.text(0.5, 0.5, "not measured", ha="center", va="center",
                transform=axis.transAxes)  # fmt: skip
  drawing.save(figure, path)


EVAL = Eval(run, needs="none", keys=(Keys,))
