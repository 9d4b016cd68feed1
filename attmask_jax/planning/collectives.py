"""Messages between devices in a compiled train step."""

import dataclasses
import math
import re
from collections.abc import Iterable

from attmask_jax.planning.program import Instruction, Program

KINDS = (
  "all-reduce", "reduce-scatter", "all-gather", "all-to-all",
  "ragged-all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """Messages of one kind within groups of one size.

  Attributes:
    kind: one of KINDS.
    group: devices that take part together.
    count: messages per step.
    arrays: arrays that they carry; the compiler combines several in one.
    bytes: of these arrays, whole: what an all-gather makes, what an all-reduce
      or a reduce-scatter takes in.
    dtypes: bytes by element type.
  """

  kind: str
  group: int
  count: int
  arrays: int
  bytes: int
  dtypes: dict[str, int]

  @property
  def sent(self) -> float:
    """Bytes that each device sends in a step, if groups are rings."""
    if self.group == 1:
      return 0.0
    share = (self.group - 1) / self.group
    factors = {"all-reduce": 2 * share, "collective-permute": 1.0}
    return factors.get(self.kind, share) * self.bytes


def collectives(program: Program, *, devices: int) -> list[Collective]:
  """All messages of a step, summed by kind and size of the group.

  Args:
    program: the compiled step.
    devices: that run it, for messages that name no groups.
  """
  starts = tuple(kind + "-start" for kind in KINDS)
  found: dict[tuple[str, int], list[tuple[Instruction, int]]] = {}
  for instruction, times in program.find(*KINDS, *starts):
    kind = instruction.opcode.removesuffix("-start")
    key = kind, group_size(instruction, devices)
    found.setdefault(key, []).append((instruction, times))
  return [_sum(*key, messages) for key, messages in sorted(found.items())]


def _sum(
  kind: str, group: int, messages: Iterable[tuple[Instruction, int]]
) -> Collective:
  count, arrays, dtypes = 0, 0, {}
  for instruction, times in messages:
    count += times
    whole = group if kind == "reduce-scatter" else 1
    for array in _results(instruction):
      arrays += times
      size = times * whole * array.bytes
      dtypes[array.dtype] = dtypes.get(array.dtype, 0) + size
  return Collective(kind, group, count, arrays, sum(dtypes.values()), dtypes)


def _results(instruction: Instruction) -> tuple:
  """Arrays that arrive; the start of an asynchronous one also lists others.

  all-gather-start and collective-permute-start give (operands, results,
  contexts), all-reduce-start the results alone.
  """
  arrays, count = instruction.arrays, len(instruction.operands)
  if instruction.opcode in ("all-gather-start", "collective-permute-start"):
    return arrays[count : 2 * count]
  return arrays


def group_size(instruction: Instruction, devices: int) -> int:
  """Devices in each group of a message; 2 for pairs.

  Groups are written as {{0,1},{2,3}}, as [2,2]<=[4], or by axes of a mesh, as
  mesh['a'=2,'b'=2] {'b'}; none are all devices.
  """
  text = instruction.attributes
  if instruction.opcode.startswith("collective-permute"):
    return 2
  if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
    names = re.findall(r"'(\w+)'", axes[2])
    return math.prod(int(sizes[name]) for name in names)
  if counts := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
    return int(counts[1])
  if first := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
    return len(first[1].split(","))
  return devices


def unexpected(
  found: Iterable[Collective], *, fsdp: int, batch_coupled: bool
) -> list[str]:
  """Kinds of messages that the sharding does not need.

  Data parallelism adds up gradients, centres and metrics, and nothing else. A
  loss that compares the images of a batch gathers once what it compares. With
  fsdp parameters are gathered as well, and gradients scattered.

  Args:
    found: messages of a step.
    fsdp: devices that share parameters.
    batch_coupled: of the method.
  """
  allowed = {"all-reduce"}
  if fsdp > 1:
    allowed |= {"all-gather", "reduce-scatter"}
  gathers = sum(x.count for x in found if x.kind == "all-gather")
  if batch_coupled and gathers == 1:
    allowed.add("all-gather")
  return sorted({x.kind for x in found} - allowed)
