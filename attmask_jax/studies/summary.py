"""Compares the finished runs of a study: means, spread, paired differences.

Policies are compared with the baseline seed by seed: runs of a seed share
initial weights and images, so their difference varies less than each of them.
The interval of a mean difference is Student's, at 95 %, over the seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

CONFIDENCE = 0.95
# Measure of a run: its name in sentences.
MEASURES = {
  "knn": "k-NN at the end",
  "linear": "linear probe",
  "knn_mean": "mean k-NN over the epochs",
}
Curve = Sequence[tuple[float, float]]  # (epoch, %)


class Outcome(NamedTuple):
  """A finished run.

  Attributes:
    policy: of its masks.
    seed: of it.
    curve: (epoch, k-NN top-1 in percent) of all evaluations, the first before
      the first step.
    linear: top-1 of the linear probe, in percent.
  """

  policy: str
  seed: int
  curve: Curve
  linear: float

  def value(self, measure: str) -> float:
    """One of MEASURES, in percent.

    knn_mean, the mean of all evaluations after the first step, is high for a
    run that learns fast.
    """
    if measure == "linear":
      return self.linear
    after = [accuracy for epoch, accuracy in self.curve if epoch > 0]
    return after[-1] if measure == "knn" else statistics.mean(after)


class Estimate(NamedTuple):
  """A mean over seeds.

  Attributes:
    n: seeds.
    mean: None for no seeds.
    spread: standard deviation over the seeds; None for fewer than two.
    half_width: of the 95 % interval of the mean; None for fewer than two.
  """

  n: int
  mean: float | None
  spread: float | None
  half_width: float | None

  @property
  def sign(self) -> int:
    """1 or -1 if the whole interval is above or below 0, else 0."""
    if self.half_width is None or abs(self.mean) <= self.half_width:
      return 0
    return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
  """Mean, standard deviation (n - 1) and Student's 95 % interval."""
  n = len(values)
  if n < 2:
    return Estimate(n, values[0] if n else None, None, None)
  spread = statistics.stdev(values)
  quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
  return Estimate(
    n, statistics.mean(values), spread, quantile * spread / n**0.5
  )


class Row(NamedTuple):
  """What the runs of a policy reached.

  Attributes:
    policy: its name.
    seeds: of its finished runs.
    before: k-NN before the first step.
    gain: k-NN at the end over that before the first step, seed by seed.
    measures: of each of MEASURES.
    differences: the same minus the baseline's, over the seeds of both; of the
      baseline itself {}.
    curve: (epoch, estimate of k-NN) at each evaluation.
    reached: first evaluated epoch at which the mean k-NN is at least the
      baseline's at the end; None = never, or no run of the baseline.
  """

  policy: str
  seeds: tuple[int, ...]
  before: Estimate
  gain: Estimate
  measures: dict[str, Estimate]
  differences: dict[str, Estimate]
  curve: tuple[tuple[float, Estimate], ...]
  reached: float | None


def compare(
  outcomes: Sequence[Outcome], *, policies: Sequence[str], baseline: str
) -> list[Row]:
  """One row per policy, in the given order.

  Args:
    outcomes: all finished runs, of equal length.
    policies: their names; not all need have runs.
    baseline: one of them.
  """
  by_policy: dict[str, dict[int, Outcome]] = {name: {} for name in policies}
  for outcome in outcomes:
    by_policy[outcome.policy][outcome.seed] = outcome
  base = by_policy[baseline]
  goal = estimate([run.value("knn") for run in base.values()]).mean
  return [
    _row(name, runs, {} if name == baseline else base, goal)
    for name, runs in by_policy.items()
  ]


def _row(
  policy: str,
  runs: Mapping[int, Outcome],
  base: Mapping[int, Outcome],
  goal: float | None,
) -> Row:
  """The row of one policy.

  Args:
    policy: its name.
    runs: by seed.
    base: those of the baseline; {} = do not compare.
    goal: k-NN of the baseline at the end.
  """
  seeds = tuple(sorted(runs))
  curves = [runs[seed].curve for seed in seeds]
  points = [
    (epoch, estimate([curve[i][1] for curve in curves]))
    for i, (epoch, _) in enumerate(curves[0] if curves else ())
  ]
  pairs = [(runs[seed], base[seed]) for seed in seeds if seed in base]
  difference = lambda name: estimate(
    [run.value(name) - other.value(name) for run, other in pairs]
  )
  every = lambda name: estimate([runs[seed].value(name) for seed in seeds])
  return Row(
    policy,
    seeds,
    estimate([curve[0][1] for curve in curves]),
    estimate([runs[s].value("knn") - runs[s].curve[0][1] for s in seeds]),
    {name: every(name) for name in MEASURES},
    {name: difference(name) for name in MEASURES} if base else {},
    tuple(points),
    next((e for e, p in points if e > 0 and _reaches(p.mean, goal)), None),
  )


def _reaches(value: float, goal: float | None) -> bool:
  """Whether a mean is at the goal, but for rounding."""
  return goal is not None and value >= goal - 1e-9


def sentence(rows: Sequence[Row], *, baseline: str) -> str:
  """One sentence that says what the data support.

  Per measure, the policies whose whole interval is above or below 0, and for
  the others that these seeds show no difference.

  Args:
    rows: see `compare`.
    baseline: the policy that the others are compared with.
  """
  compared = [row for row in rows if row.differences]
  numbers = [row.differences["knn"].n for row in compared]
  if not numbers or max(numbers) < 2:
    return (
      f"Fewer than two seeds are finished of {baseline} and any other policy, "
      "so nothing can be said about differences."
    )
  found: dict[str, list[str]] = {}  # measures that say the same, together
  for measure, name in MEASURES.items():
    found.setdefault(_findings(compared, measure), []).append(name)
  parts = [f"{', '.join(names)}: {words}" for words, names in found.items()]
  fewest = min(n for n in numbers if n > 1)
  seeds = f"{fewest} to " * (fewest < max(numbers)) + str(max(numbers))
  text = (
    f"Against {baseline}, seed by seed, in points with 95 % intervals over "
    f"{seeds} seeds: {'; '.join(parts)}"
  )
  if not any(row.gain.sign > 0 for row in rows):
    text += (
      "; and no policy's k-NN has risen above that of the untrained network by "
      "more than the seeds vary, so the runs may be too short to compare"
    )
  return text + "."


def _findings(rows: Sequence[Row], measure: str) -> str:
  """What one measure says of all policies."""
  parts, open_ = [], []
  for row in rows:
    found = row.differences[measure]
    if found.sign:
      word = "above" if found.sign > 0 else "below"
      parts.append(
        f"{row.policy} is {word} by {abs(found.mean):.1f} ± "
        f"{found.half_width:.1f}"
      )
    elif found.n > 1:
      open_.append((row.policy, found.n))
  for n in sorted({n for _, n in open_}, reverse=True):
    names = [policy for policy, count in open_ if count == n]
    parts.append(
      f"no difference that {n} seeds can show for {', '.join(names)}"
    )
  return ", ".join(parts)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """All numbers of the rows, for study.json."""
  plain = lambda estimates: {k: v._asdict() for k, v in estimates.items()}
  return [
    row._asdict()
    | {
      "seeds": list(row.seeds),
      "before": row.before._asdict(),
      "gain": row.gain._asdict(),
      "measures": plain(row.measures),
      "differences": plain(row.differences),
      "curve": [{"epoch": e} | p._asdict() for e, p in row.curve],
    }
    for row in rows
  ]
