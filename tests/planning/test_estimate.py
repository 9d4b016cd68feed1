"""Expected times, worked out by hand."""

import pytest

from attmask_jax.planning import estimate, topologies
from attmask_jax.planning.collectives import Collective
from attmask_jax.planning.topologies import CHIPS, Chip

# 1 TFLOP/s, sends 10 GB/s, 1 GB/s between slices of 16.
CHIP = Chip(1e12, 8e9, 1e12, 10e9, 1e9, 1e9, ("2x2", "4x4"), "by hand")


def load(**changes):
  """64 images of 1 GFLOP; 100 MB of gradients added up over 8 chips."""
  reduce = Collective("all-reduce", 8, 1, 1, 10**8, {"f32": 10**8})
  values = dict(
    chip=CHIP,
    batch_size=64,
    steps=1000,
    flops=64e9,
    messages=(reduce,),
    chips=8,
    fsdp=1,
    fitting=10,
    failing=16,
  )
  return estimate.Workload(**(values | changes))


def test_eight_chips():
  got = estimate.estimate(load(), 8)
  compute = 64e9 / 8 / (1e12 * 0.4)  # 20 ms
  sending = 2 * 1e8 * 7 / 8 / (10e9 * 0.5)  # 35 ms
  assert got.compute_seconds == pytest.approx(compute) == 0.02
  assert got.message_seconds == pytest.approx(sending) == 0.035
  assert got.step_seconds == pytest.approx(0.055)
  assert got.efficiency == pytest.approx(20 / 55)
  assert got.images_per_s == pytest.approx(64 / 0.055)
  assert got.days == pytest.approx(1000 * 0.055 / 86400)
  assert got.chip_hours == pytest.approx(1000 * 0.055 / 3600 * 8)
  assert (got.slices, got.images_per_chip, got.fits) == (1, 8, True)


def test_rings_grow_with_the_number_of_chips():
  got = estimate.estimate(load(), 16)
  assert got.compute_seconds == pytest.approx(0.01)
  assert got.message_seconds == pytest.approx(2 * 1e8 * 15 / 16 / 5e9)
  assert estimate.estimate(load(), 4).fits is False  # 16 images, 10 fit
  unknown = estimate.estimate(load(failing=17), 4)
  assert unknown.fits is None


def test_slices_add_up_over_the_network():
  got = estimate.estimate(load(), 32)
  within = 2 * 1e8 * 15 / 16 / 5e9
  across = 2 * (1e8 / 16) * 1 / 2 / 0.5e9  # each chip its sixteenth
  assert got.slices == 2
  assert got.message_seconds == pytest.approx(within + across)


def test_chips_that_share_parameters_stay_a_group():
  gather = Collective("all-gather", 4, 3, 3, 10**8, {"f32": 10**8})
  shared = load(messages=(gather,), fsdp=4)
  for chips in (8, 16):
    got = estimate.estimate(shared, chips)
    assert got.message_seconds == pytest.approx(1e8 * 3 / 4 / 5e9)


def test_only_numbers_over_which_the_batch_divides():
  got = [x.chips for x in estimate.estimates(load(batch_size=48, chips=24))]
  assert got == [8, 16, 24]
  assert [x.chips for x in estimate.estimates(load(fsdp=16))] == [16, 32, 64]


def test_counted_cycles_replace_the_guess():
  # 2 million cycles of 1 ns for 1 GFLOP: half of the peak.
  counted = load(cycles_per_image=2e6)
  assert counted.peak_share == pytest.approx(0.5)
  got = estimate.estimate(counted, 8)
  assert got.compute_seconds == pytest.approx(8 * 2e6 * 1e-9)
  assert "50% of its published peak" in estimate.assumptions(counted)[0]
  assert "40% of its published peak" in estimate.assumptions(load())[0]
  assert "a guess" in estimate.assumptions(load())[0]


def test_published_figures():
  # Pages of the makers: TFLOP/s, GB, GB/s of memory and of links (both ways).
  want = {
    "v5e": (197, 16, 819, 400, 256),
    "v5p": (459, 102, 2765, 1200, 6144),
    "v6e": (918, 32, 1600, 800, 256),
  }
  for name, chip in CHIPS.items():
    got = (
      chip.peak_flops / 1e12,
      round(chip.memory / 1e9),
      chip.memory_rate / 1e9,
      2 * chip.link_rate / 1e9,
      chip.largest,
    )
    assert got == want[name]
  assert topologies.chips("4x8x8") == 256
