"""Writes the summary of a study: study.md and study.png."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attmask_jax import atomic
from attmask_jax.evals import drawing
from attmask_jax.studies.plan import Plan
from attmask_jax.studies.summary import MEASURES, Estimate, Row

if TYPE_CHECKING:
  from matplotlib.axes import Axes

TABLE, FIGURE = "study.md", "study.png"
DIFFERENCES = {
  "knn": "k-NN",
  "linear": "linear",
  "knn_mean": "mean k-NN over the epochs",
}
NOTE = (
  "± of a top-1 is the standard deviation over the seeds. ± of a difference is "
  "half of its 95 % interval, by Student's t over the differences of runs with "
  "the same seed, which share initial weights and images; each interval stands "
  "for itself, without a correction for their number. A difference in bold has "
  "an interval without 0."
)


def write(
  folder: pathlib.Path,
  rows: Sequence[Row],
  plan: Plan,
  *,
  baseline: str,
  sentence: str,
  notes: Sequence[str] = (),
) -> str:
  """Replaces study.md and study.png; returns the text of the first."""
  done = sum(len(row.seeds) for row in rows)
  total = plan.seeds * len(plan.policies)
  head = (
    f"ViT {plan.network}, {plan.epochs} epochs of {plan.steps_per_epoch} "
    f"steps, seeds 0 to {plan.seeds - 1}: {done} of {total} runs are finished."
  )
  parts = (head, table(rows, baseline), NOTE, *notes, sentence)
  text = "\n\n".join(parts) + "\n"
  with atomic.replaced(folder / TABLE) as temporary:
    temporary.write_text(text)
  if done:
    draw(folder / FIGURE, rows, baseline)
  return text


def table(rows: Sequence[Row], baseline: str) -> str:
  """The rows as a table in Markdown."""
  headings = [
    "policy",
    "seeds",
    "k-NN before, %",
    "k-NN at the end, %",
    "linear, %",
    *(f"{name} − {baseline}" for name in DIFFERENCES.values()),
    f"epoch of {baseline}'s last k-NN",
  ]
  lines = [headings, ["---"] + ["---:"] * (len(headings) - 1)]
  for row in rows:
    spread = lambda e: _cell(e.mean, e.spread)
    lines.append(
      [
        row.policy,
        str(len(row.seeds)),
        spread(row.before),
        spread(row.measures["knn"]),
        spread(row.measures["linear"]),
        *(_difference(row.differences.get(name)) for name in DIFFERENCES),
        "-" if row.reached is None else f"{row.reached:g}",
      ]
    )
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(mean: float | None, deviation: float | None, sign: str = "") -> str:
  """A mean with its deviation, as 41.6 ± 0.8, or alone if it has none."""
  if mean is None:
    return "-"
  text = f"{mean:{sign}.1f}"
  return text if deviation is None else f"{text} ± {deviation:.1f}"


def _difference(difference: Estimate | None) -> str:
  """A signed cell; bold if its interval leaves 0 out."""
  if difference is None:
    return "-"
  text = _cell(difference.mean, difference.half_width, "+")
  return f"**{text}**" if difference.sign else text


def draw(path: pathlib.Path, rows: Sequence[Row], baseline: str) -> None:
  """Two panels: k-NN over epochs with its spread; the linear probe in bars."""
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  figure = Figure(figsize=(10.0, 4.2), dpi=drawing.DPI, layout="constrained")
  curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
  rows = [row for row in rows if row.seeds]
  for i, row in enumerate(rows):
    _curve(curves, row, colour=f"C{i}", wide=row.policy == baseline)
  curves.set_title("k-NN top-1, %: mean and spread over the seeds", fontsize=10)
  curves.set_xlabel("Epoch")
  curves.xaxis.set_major_locator(MaxNLocator(integer=True))
  probe = [row.measures["linear"] for row in rows]
  bars.bar(
    range(len(rows)),
    [estimate.mean for estimate in probe],
    yerr=[estimate.spread or 0.0 for estimate in probe],
    color=[f"C{i}" for i in range(len(rows))],
    capsize=3,
  )
  bars.set_xticks(
    range(len(rows)), [row.policy for row in rows], rotation=35, ha="right"
  )
  bars.set_title(f"{MEASURES['linear'].capitalize()} top-1, %", fontsize=10)
  for i, value in enumerate(estimate.mean for estimate in probe):
    bars.annotate(f"{value:.1f}", (i, 0), (0, 4), textcoords="offset points",
                  ha="center", color="white", fontsize=9)  # fmt: skip
  for axis in (curves, bars):
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
  # Outside the axes, off the curves.
  figure.legend(
    *curves.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=len(rows),
    frameon=False,
    fontsize=8,
  )
  drawing.save(figure, path)


def _curve(axis: "Axes", row: Row, *, colour: str, wide: bool) -> None:
  """A policy's k-NN over epochs; the band is one standard deviation."""
  epochs = [epoch for epoch, _ in row.curve]
  means = [point.mean for _, point in row.curve]
  spread = [point.spread or 0.0 for _, point in row.curve]
  axis.plot(
    epochs,
    means,
    color=colour,
    marker="o",
    markersize=3,
    linewidth=2.6 if wide else 1.4,
    label=f"{row.policy} ({len(row.seeds)})",
  )
  low = [m - s for m, s in zip(means, spread, strict=True)]
  high = [m + s for m, s in zip(means, spread, strict=True)]
  axis.fill_between(epochs, low, high, color=colour, alpha=0.12, linewidth=0)
