"""Statistics against scipy's own tests and against hand counts."""

import pytest
from scipy import stats

from attmask_jax.studies import page, plan, summary
from attmask_jax.studies.summary import Outcome

# k-NN before, after one epoch and after two; linear probe.
HIGH = [(30, 40, 50, 60), (31, 43, 51, 62), (29, 39, 52, 64)]
RANDOM = [(30, 36, 48, 61), (31, 37, 47, 61), (29, 38, 49, 61)]


def outcomes(policy, runs):
  return [
    Outcome(policy, seed, tuple(enumerate(run[:3])), run[3])
    for seed, run in enumerate(runs)
  ]


def compare(**runs):
  found = [o for name, values in runs.items() for o in outcomes(name, values)]
  return summary.compare(found, policies=tuple(runs), baseline="random")


def test_means_and_intervals_are_those_of_scipy():
  high, random = compare(high=HIGH, random=RANDOM)
  assert high.seeds == (0, 1, 2)
  ours, theirs = ([run[2] for run in runs] for runs in (HIGH, RANDOM))
  paired = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
  difference = high.differences["knn"]
  assert difference.n == 3
  low = difference.mean - difference.half_width
  assert low == pytest.approx(paired.low, rel=1e-12)
  assert difference.mean + difference.half_width == pytest.approx(paired.high)
  assert high.measures["knn"].mean == 51
  assert high.measures["knn"].spread == 1.0  # of 50, 51, 52
  assert high.measures["linear"].spread == 2.0  # of 60, 62, 64
  # Differences of the means of 40, 50 and 36, 48 and so on: 3, 5, 2.
  assert high.differences["knn_mean"].mean == pytest.approx(10 / 3)
  assert high.gain.mean == 21  # of 20, 20, 23
  assert [(e, p.mean) for e, p in high.curve] == [
    (0, 30), (1, pytest.approx(122 / 3)), (2, 51),
  ]  # fmt: skip
  assert random.differences == {}


def test_interval_by_hand():
  """Differences 1, 2, 3: t(0.975, 2) = 4.302653, over the root of 3."""
  got = summary.estimate([1.0, 2.0, 3.0])
  assert got[:3] == (3, 2.0, 1.0)
  assert got.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
  assert got.sign == 0
  assert summary.estimate([-1.1, -1.0, -1.2]).sign == -1


def test_one_seed_has_no_interval():
  assert summary.estimate([5.0]) == (1, 5.0, None, None)
  assert summary.estimate([5.0]).sign == 0
  assert summary.estimate([]) == (0, None, None, None)
  rows = compare(high=HIGH[:1], random=RANDOM)
  assert rows[0].differences["knn"] == (1, 2, None, None)
  assert "Fewer than two seeds" in summary.sentence(rows, baseline="random")


def test_only_seeds_of_both_are_compared():
  rows = compare(high=HIGH, random=RANDOM[:2])
  assert rows[0].measures["knn"].n == 3
  assert rows[0].differences["knn"].n == 2
  assert rows[0].differences["knn"].mean == 3  # of 2 and 4


def test_epoch_that_reaches_the_baseline():
  """The mean of the baseline ends at 48."""
  low = [(30, 31, 32, 50)] * 3
  fast = [(30, 48, 40, 50)] * 3
  rows = compare(high=HIGH, low=low, fast=fast, random=RANDOM)
  assert [row.reached for row in rows] == [2, None, 1, 2]


def test_sentence():
  low = [(30, 31, 32 + i, 50) for i in range(3)]
  rows = compare(high=HIGH, low=low, random=RANDOM)
  # high: k-NN 2, 4, 3, so 3 ± 4.302653 / 3^0.5 = 2.48; linear -1, 1, 3 and
  # mean k-NN 3, 5, 2 have 0 within theirs. low: -16, -14, -15; -11; -10.5,
  # -10, -11.
  assert summary.sentence(rows, baseline="random") == (
    "Against random, seed by seed, in points with 95 % intervals over 3 seeds: "
    "k-NN at the end: high is above by 3.0 ± 2.5, low is below by 15.0 ± 2.5; "
    "linear probe: low is below by 11.0 ± 0.0, no difference that 3 seeds can "
    "show for high; mean k-NN over the epochs: low is below by 10.5 ± 1.2, no "
    "difference that 3 seeds can show for high."
  )


def test_sentence_says_if_nothing_was_learned():
  flat = [(40, 39, 40 + i, 60) for i in (-1, 0, 1)]
  words = summary.sentence(compare(high=flat, random=flat), baseline="random")
  assert words.startswith(
    "Against random, seed by seed, in points with 95 % intervals over 3 seeds: "
    "k-NN at the end, linear probe, mean k-NN over the epochs: no difference "
    "that 3 seeds can show for high; and no "
  )
  assert "no policy's k-NN has risen above that of the untrained" in words


def test_sentence_with_different_numbers_of_seeds():
  rows = compare(high=HIGH, low=HIGH[:2], random=RANDOM)
  words = summary.sentence(rows, baseline="random")
  assert "no difference that 2 seeds can show for low" in words
  assert "over 2 to 3 seeds: " in words


PLAN = plan.Plan(("high", "low", "random"), "16x2x2", 2, 8, 4, 1, 60.0)


def test_table_and_figure(tmp_path):
  rows = compare(high=HIGH, low=[], random=RANDOM)
  text = page.write(
    tmp_path, rows, PLAN, baseline="random", sentence="S.", notes=["N."]
  )
  assert (tmp_path / "study.md").read_text() == text
  lines = text.splitlines()
  assert lines[-3:] == ["N.", "", "S."]
  assert "ViT 16x2x2, 2 epochs of 8 steps, seeds 0 to 3: 6 of 12 runs" in text
  assert (
    "| high | 3 | 30.0 ± 1.0 | 51.0 ± 1.0 | 62.0 ± 2.0 | **+3.0 ± 2.5** | "
    "+1.0 ± 5.0 | +3.3 ± 3.8 | 2 |"
  ) in lines
  assert "| low | 0 | - | - | - | - | - | - | - |" in lines
  assert (
    "| random | 3 | 30.0 ± 1.0 | 48.0 ± 1.0 | 61.0 ± 0.0 | - | - | - | 2 |"
  ) in lines
  assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_figure_shows_what_was_measured(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(page.drawing, "save", lambda f, path: drawn.append(f))
  page.draw(tmp_path, compare(high=HIGH, low=[], random=RANDOM), "random")
  curves, bars = drawn[0].axes
  assert [line.get_label() for line in curves.lines] == [
    "high (3)", "random (3)",
  ]  # fmt: skip
  assert list(curves.lines[1].get_ydata()) == [30, 37, 48]
  assert [bar.get_height() for bar in bars.patches] == [62, 61]
  assert bars.get_ylim()[0] == 0


def test_nothing_finished_yet(tmp_path):
  rows = compare(high=[], random=[])
  page.write(tmp_path, rows, PLAN, baseline="random", sentence="S.")
  assert not (tmp_path / "study.png").exists()
