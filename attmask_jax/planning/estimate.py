"""Expected time of a step and of a run: an estimate, not a measurement."""

import dataclasses
import math
from collections.abc import Iterable

from attmask_jax.planning.collectives import Collective
from attmask_jax.planning.topologies import Chip

# Assumptions, which a plan prints. --mode=bench on the chips measures them.
PEAK_SHARE = 0.4  # of the published peak, if the compiler counts no cycles
LINK_SHARE = 0.5  # of the published rate of the links, while it sends
COUNTS = (8, 16, 32, 64, 128, 256, 512)  # of chips
DAY = 86400.0  # seconds


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Expected times on a number of chips, at the global batch of the config.

  Attributes:
    chips: number of them.
    slices: how many slices of the largest size they fill.
    images_per_chip: of a step.
    fits: whether that many images fit; None = no program that was compiled
      tells.
    compute_seconds, message_seconds: parts of a step, one after the other.
    step_seconds: both.
    efficiency: share of the step that is computation.
    images_per_s: of all chips.
    days, chip_hours: of the whole run.
  """

  chips: int
  slices: int
  images_per_chip: int
  fits: bool | None
  compute_seconds: float
  message_seconds: float
  step_seconds: float
  efficiency: float
  images_per_s: float
  days: float
  chip_hours: float


@dataclasses.dataclass(frozen=True)
class Workload:
  """What a run computes and sends.

  Attributes:
    chip: that runs it.
    batch_size: images of a step.
    steps: of the run.
    flops: of a step, all chips together.
    messages: of a step of the compiled program.
    chips: that it was compiled for.
    fsdp: chips that share parameters.
    fitting: most images of a chip that were compiled and fit, 0 = none.
    failing: fewest that were compiled and did not fit, 0 = none.
    cycles_per_image: of a chip, by the compiler; 0 = unknown.
  """

  chip: Chip
  batch_size: int
  steps: int
  flops: float
  messages: tuple[Collective, ...]
  chips: int
  fsdp: int
  fitting: int
  failing: int
  cycles_per_image: float = 0.0

  @property
  def peak_share(self) -> float:
    """Share of the published peak at which a chip computes."""
    if not self.cycles_per_image:
      return PEAK_SHARE
    seconds = self.cycles_per_image / self.chip.clock
    return self.flops / self.batch_size / seconds / self.chip.peak_flops


def estimates(load: Workload, counts: Iterable[int] = COUNTS) -> list[Estimate]:
  """Estimates for numbers of chips over which the batch divides."""
  usable = sorted({*counts, load.chips})
  return [
    estimate(load, chips)
    for chips in usable
    if load.batch_size % chips == 0 and chips % load.fsdp == 0
  ]


def estimate(load: Workload, chips: int) -> Estimate:
  """Expected times on `chips` chips."""
  compute = load.flops / (chips * load.chip.peak_flops * load.peak_share)
  slices = math.ceil(chips / load.chip.largest)
  sending = sum(_seconds(load, x, chips, slices) for x in load.messages)
  step = compute + sending
  per_chip = load.batch_size // chips
  fits = None
  if per_chip <= load.fitting:
    fits = True
  elif load.failing and per_chip >= load.failing:
    fits = False
  days = load.steps * step / DAY
  return Estimate(
    chips,
    slices,
    per_chip,
    fits,
    compute,
    sending,
    step,
    compute / step,
    load.batch_size / step,
    days,
    days * 24 * chips,
  )


def _seconds(
  load: Workload, message: Collective, chips: int, slices: int
) -> float:
  """Time of the messages of one kind on another number of chips.

  Groups over all chips, or over all copies of the parameters, grow with the
  number of chips; groups that share parameters do not.
  """
  group = message.group
  if group in (load.chips, load.chips // load.fsdp) and group != load.fsdp:
    group = group * chips // load.chips
  elif group == load.chips:
    group = chips
  within = dataclasses.replace(message, group=max(group // slices, 1))
  seconds = within.sent / (load.chip.link_rate * LINK_SHARE)
  if slices > 1 and group > load.fsdp:
    # Each chip exchanges its part of the slice's sum with the other slices.
    part = message.bytes / within.group
    across = dataclasses.replace(message, group=slices, bytes=round(part))
    seconds += across.sent / (load.chip.network_rate * LINK_SHARE)
  return seconds


def assumptions(load: Workload) -> list[str]:
  """What the estimates assume, one sentence each."""
  chip = load.chip
  reason = (
    f"by the cycles that the compiler counts for this program, at "
    f"{chip.clock / 1e9:.2f} GHz"
    if load.cycles_per_image
    else "a guess"
  )
  return [
    f"a chip computes at {load.peak_share:.0%} of its published peak of "
    f"{chip.peak_flops / 1e12:.0f} TFLOP/s in bfloat16 ({chip.source}), "
    f"{reason}",
    f"messages travel in rings at {LINK_SHARE:.0%} of the published "
    f"{chip.link_rate / 1e9:.0f} GB/s that a chip can send, without start-up "
    "time, and computation waits for them",
    f"beyond {chip.largest} chips, slices are joined by a network of "
    f"{chip.network_rate / 1e9:.2f} GB/s per chip, used at {LINK_SHARE:.0%}",
    f"the global batch stays at {load.batch_size} images",
    "the input keeps up; evaluations, saves and compilation are not counted",
  ]
