"""Bytes per device of a train step, and the largest batch that fits."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from attmask_jax.planning.step import Planned

# A batch is the largest if it fills this share of the memory, or if one that is
# this much larger does not fit.
FULL, CLOSE = 0.95, 0.05
# What the compiler for TPUs says of a program that does not fit.
_NEEDS = (
  re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.I),
  re.compile(
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)"
  ),
)
_PREFIXES = {p: 1024**i for i, p in enumerate(["", "K", "M", "G", "T"])}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device; whole arrays where several devices have copies.

  Attributes:
    batch_size: images over all devices.
    parameters, teacher, optimizer, other: of the state; other are centres and
      the step.
    batch: images and what comes with them.
    temporaries: activations, gradients and working space.
    program: the code, and what the layouts of the arguments add.
    total: what the program needs, 0 if the compiler does not say.
    fits: the compiler placed it all.
  """

  batch_size: int
  parameters: int
  teacher: int
  optimizer: int
  other: int
  batch: int
  temporaries: int
  program: int
  total: int
  fits: bool


def measure(
  planned: Planned,
  size: int,
  compiled: jax.stages.Compiled,
  capacity: float,
) -> Memory:
  """Memory of a compiled step.

  Args:
    planned: where it comes from.
    size: of the batch.
    compiled: the step for that batch.
    capacity: bytes of a device.
  """
  parts = _parts(planned, size)
  plan = compiled.memory_analysis()
  # Outputs that take the place of the old state are aliases.
  outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
  total = (
    plan.argument_size_in_bytes
    + outputs
    + plan.temp_size_in_bytes
    + plan.generated_code_size_in_bytes
  )
  temporaries = plan.temp_size_in_bytes + outputs
  program = max(total - temporaries - sum(parts.values()), 0)
  return Memory(
    size,
    **parts,
    temporaries=temporaries,
    program=program,
    total=total,
    fits=total <= capacity,
  )


def too_large(planned: Planned, size: int, error: Exception) -> Memory:
  """Memory of a step that the compiler refused.

  Raises:
    Exception: the error itself, if it is another one.
  """
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
  parts = _parts(planned, size)
  total = needed(str(error))
  state = sum(parts.values())
  # The compiler counts all or only what is temporary, by its message.
  if total and "temporaries" in str(error):
    total += state
  temporaries = max(total - state, 0)
  return Memory(
    size,
    **parts,
    temporaries=temporaries,
    program=0,
    total=total,
    fits=False,
  )


def needed(message: str) -> int:
  """Bytes that the compiler says a program needs, 0 if it does not."""
  for pattern in _NEEDS:
    if found := pattern.search(message):
      return int(float(found[1]) * _PREFIXES[found[2].upper()])
  return 0


def _parts(planned: Planned, size: int) -> dict[str, int]:
  state = planned.state
  return {
    "parameters": bytes_per_device(state.params),
    "teacher": bytes_per_device(state.teacher),
    "optimizer": bytes_per_device(state.opt),
    "other": bytes_per_device((state.aux, state.step)),
    "batch": bytes_per_device(planned.batch(size)),
  }


def bytes_per_device(tree: Any) -> int:
  """Bytes of the largest shard of each array or shape with a sharding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def largest_batch(
  first: Memory,
  capacity: float,
  unit: int,
  at: Callable[[int], Memory],
  *,
  most: int,
  compilations: int = 3,
) -> list[Memory]:
  """Looks for the largest batch that fits.

  Memory grows about linearly with the batch, so each try is where the line
  through two others meets the capacity. Near it the compiler computes some
  arrays again, so that more fits than the line says.

  Args:
    first: memory of the batch of the config.
    capacity: bytes of a device.
    unit: a batch is a multiple of this.
    at: compiles a batch.
    most: a batch that no run exceeds.
    compilations: how often it may.

  Returns:
    All that was compiled, `first` first. The largest that fits is one of them;
    if none fits, no batch does or it was not found.
  """
  tried = [first]
  most = most // unit * unit
  fixed = first.total - first.temporaries - first.batch
  for _ in range(compilations):
    low = largest(tried)
    high = min((x.batch_size for x in tried if not x.fits), default=most + unit)
    fills = any(x.fits and x.total >= FULL * capacity for x in tried)
    if fills or high - low <= max(unit, CLOSE * low):
      break
    points = [(x.batch_size, x.total) for x in tried if x.total]
    if len(points) == 1:
      points.append((0, fixed))
    guess = _meets(points, capacity) if points else (low + high) / 2
    # The end of the range is only an answer where no run has a larger batch.
    end = most if high > most else high - unit
    size = int(min(guess, end) // unit) * unit
    if not low < size < high:
      size = (low + high) // 2 // unit * unit
    tried.append(at(max(size, low + unit)))
  return tried


def _meets(points: list[tuple[int, int]], capacity: float) -> float:
  """Where the line through the two points nearest the capacity meets it."""
  nearest = sorted(points, key=lambda p: abs(p[1] - capacity))[:2]
  (x0, y0), (x1, y1) = sorted(nearest)
  if y1 <= y0:
    return float("inf")
  return x0 + (capacity - y0) * (x1 - x0) / (y1 - y0)


def largest(tried: Iterable[Memory]) -> int:
  """The largest batch of those that were compiled and fit, 0 if none does."""
  return max((x.batch_size for x in tried if x.fits), default=0)
