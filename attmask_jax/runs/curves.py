"""Curves of a run over its epochs, for the report."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attmask_jax.runs import judgement, records

MAX_POINTS = 500  # per curve; longer ones are averaged in bins
# Title: metrics of the plot; those that a run does not have are left out.
CURVES = {
  "Loss": ("epoch/loss", "epoch/cls", "epoch/patch", "val/loss", "train/loss"),
  "k-NN and accuracy, %": ("knn/top1", "val/top1", "ema/top1"),
  "Class among the five best, %": ("knn/top5", "val/top5", "ema/top5"),
  "Share of the mask on the object": (
    "overlap/attmask_high", "overlap/attmask_hint", "overlap/attmask_low",
    "overlap/random",
  ),
  "Effective rank (RankMe)": ("label_free/rankme",),
  "Alignment and uniformity": ("label_free/alignment", "label_free/uniformity"),
  "Other view found first, %": ("label_free/retrieval",),
  "Prototypes in use": (
    "label_free/prototypes_used", "label_free/prototypes_effective",
  ),
  "Clusters against labels": ("epoch/nmi", "epoch/ari", "epoch/fscore"),
  "Teacher's entropy, nats": ("train/teacher_entropy",),
  "Teacher's temperature": ("train/teacher_temp", "train/teacher_patch_temp"),
  "Learning rate": ("train/lr",),
  "Weight decay": ("train/wd",),
  "Teacher momentum": ("train/momentum",),
  "Gradient norm": ("train/grad_norm",),
  "Images per second": ("train/img_per_s",),
}  # fmt: skip
LOSS = "Loss"
SHADED = (LOSS, "Teacher's entropy, nats", "Teacher's temperature")
ENTROPY_REMARK = (
  "The loss is a cross-entropy with the teacher's targets, so it rises and "
  "falls with the teacher's entropy: a lower loss need not be a better network."
)
Curve = list[tuple[float, float]]


class Plot(NamedTuple):
  """One plot of the page.

  Attributes:
    title: of the plot.
    names: metrics that it shows.
    svg: the picture.
    remark: a sentence or two below it, "" = none.
  """

  title: str
  names: tuple[str, ...]
  svg: bytes
  remark: str


def plots(
  config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]
) -> list[Plot]:
  """One plot per entry of CURVES that the run has numbers for.

  Args:
    config: flat, as in config.json; may be empty.
    lines: of metrics.jsonl.
  """
  per_epoch = records.steps_per_epoch(config)
  unit = "epoch" if per_epoch else "step"
  warmup = temperature_warmup(config) if per_epoch else None
  chance = judgement.first(lines, "knn/chance")
  made = []
  for title, names in CURVES.items():
    curves = _curves(lines, names, per_epoch or 1)
    if not curves:
      continue
    span = warmup if title in SHADED else None
    level = chance if "knn/top1" in curves else None
    remark = _remark(span, lines) if title == LOSS else ""
    svg = _draw(title, curves, unit, span=span, chance=level)
    made.append(Plot(title, tuple(curves), svg, remark))
  return made


def temperature_warmup(config: Mapping[str, Any]) -> tuple[int, int] | None:
  """First and last epoch of a rising teacher temperature; None if it is flat.

  The temperature of patches begins with the masks.
  """
  length = records.count(config, "method.temp_warmup_epochs")
  delay = records.count(config, "method.mask_start_epoch")
  spans = []
  for name, begin in (("teacher_temp", 0), ("teacher_patch_temp", delay)):
    ends = config.get(f"method.{name}")
    if length and isinstance(ends, (list, tuple)) and ends[-1] > ends[0]:
      spans.append((begin, begin + length))
  if not spans:
    return None
  return min(begin for begin, _ in spans), max(end for _, end in spans)


def binned(points: Curve, limit: int) -> Curve:
  """At most `limit` points: means over equal bins of neighbours."""
  if len(points) <= limit:
    return points
  size = math.ceil(len(points) / limit)
  bins = [points[i : i + size] for i in range(0, len(points), size)]
  mean = lambda values: sum(values) / len(values)
  return [(mean([x for x, _ in b]), mean([y for _, y in b])) for b in bins]


def _curves(
  lines: Sequence[Mapping[str, Any]], names: Sequence[str], per_epoch: int
) -> dict[str, Curve]:
  """The metrics of a plot that have two finite values or more."""
  curves = {}
  for name in names:
    logged = judgement.points(lines, name)
    if len(logged) > 1:
      curve = [(step / per_epoch, value) for step, value in logged]
      curves[name] = binned(curve, MAX_POINTS)
  if len(curves) > 1:  # means per epoch suffice
    curves.pop("train/loss", None)
  return curves


def _remark(
  span: tuple[int, int] | None, lines: Sequence[Mapping[str, Any]]
) -> str:
  """What to know of the loss."""
  remarks = []
  if span:
    remarks.append(
      f"Shaded: warm-up of the teacher's temperature, epochs {span[0]} to "
      f"{span[1]}. A loss that rises during it is expected, as the targets "
      "become softer."
    )
  if any("train/teacher_entropy" in line for line in lines):
    remarks.append(ENTROPY_REMARK)
  return " ".join(remarks)


def _draw(
  title: str,
  curves: Mapping[str, Curve],
  unit: str,
  *,
  span: tuple[int, int] | None,
  chance: float | None,
) -> bytes:
  """A plot as SVG.

  Args:
    title: above it.
    curves: by name; the legend is below the axes, off the lines.
    unit: of the x axis.
    span: of the x axis, to shade.
    chance: height of a dashed line.
  """
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4.6, 3.1), layout="constrained")
  FigureCanvasSVG(figure)
  axis = figure.subplots()
  for name, points in curves.items():
    axis.plot(
      *zip(*points, strict=True),
      marker="o" if len(points) < 40 else None,
      markersize=3,
      label=name,
    )
  if chance is not None:
    axis.axhline(chance, color="0.4", ls="--", lw=1, label="top-1 by chance")
  if span:
    low, high = axis.get_xlim()
    axis.axvspan(
      *span, color="#eeaa33", alpha=0.18, lw=0, label="temperature warm-up"
    )
    axis.set_xlim(low, high)  # a warm-up longer than the run is cut off
  axis.set_title(title, fontsize=10)
  axis.set_xlabel(unit, fontsize=8)
  axis.tick_params(labelsize=8)
  axis.grid(alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
  handles = axis.get_legend_handles_labels()
  if len(handles[0]) > 1:  # else the caption names it
    figure.legend(
      *handles,
      loc="outside lower center",
      ncols=_columns(handles[1]),
      frameon=False,
      fontsize=7.5,
    )
  file = io.BytesIO()
  figure.savefig(file, format="svg", metadata={"Date": None})
  return file.getvalue()


def _columns(labels: Sequence[str]) -> int:
  """Columns of a legend that is as wide as the plot."""
  return min(len(labels), 3 if max(map(len, labels)) < 20 else 2)
