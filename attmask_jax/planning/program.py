"""Reads the text of a compiled program (HLO of XLA).

`jax.stages.Compiled.as_text` gives one instruction per line:

  %name = f32[8,16]{1,0:T(8,128)} opcode(%operand, ...), attribute=..., ...

and computations, which fusions, loops and reductions call.
"""

import math
import re
from typing import NamedTuple

BYTES = {
  "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4,
  "u32": 4, "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8,
  "c64": 8, "c128": 16,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*))?")
_CALLS = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)="
  r"%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**62  # the compiler writes a huge number then
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
  """Type of an array.

  Attributes:
    dtype: an element type of HLO, such as bf16.
    shape: its sides.
    layout: axes in memory, the fastest first; () = not written.
  """

  dtype: str
  shape: tuple[int, ...]
  layout: tuple[int, ...] = ()

  @property
  def bytes(self) -> int:
    """Without the padding of a layout."""
    return BYTES.get(self.dtype, 0) * math.prod(self.shape)


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name, opcode: as in the text.
    arrays: type of the result, several of a tuple.
    operands: names of the arguments.
    attributes: what follows the arguments.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str

  @property
  def source(self) -> str:
    """The JAX operation it comes from, such as jit(f)/Block/attn/dot_general.

    It is "" where the compiler does not say.
    """
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls."""
    names = _CALLS.findall(self.attributes)
    for branches in _BRANCHES.findall(self.attributes):
      names += re.findall(r"%?([\w.-]+)", branches)
    return tuple(names)


class Program(NamedTuple):
  """Computations by name, each a list of instructions.

  Attributes:
    computations: all of them.
    entry: name of the first one to run.
  """

  computations: dict[str, list[Instruction]]
  entry: str

  def times(self) -> dict[str, int]:
    """How often a step runs each computation, loops multiplied out.

    Every branch of a conditional counts as taken. A loop whose length the
    compiler does not know counts once.
    """
    counts = dict.fromkeys(self.computations, 0)

    def visit(name: str, times: int) -> None:
      counts[name] += times
      for instruction in self.computations[name]:
        trips = self.trips(instruction)
        for called in instruction.called:
          visit(called, times * trips)

    visit(self.entry, 1)
    return counts

  def trips(self, instruction: Instruction) -> int:
    """Iterations of a loop; 1 of any other instruction."""
    if instruction.opcode != "while":
      return 1
    known = _TRIPS.search(instruction.attributes)
    return int(known[1]) if known else self._compared_trips(instruction)

  def _compared_trips(self, loop: Instruction) -> int:
    """From a condition that compares a counter with one constant, else 1.

    The compiler for TPUs does not write the count down.
    """
    condition = re.search(r"\bcondition=%?([\w.-]+)", loop.attributes)
    body = self.computations[condition[1]] if condition else []
    compares = "direction=LT" in "".join(x.attributes for x in body)
    numbers = [
      int(x.operands[0])
      for x in body
      if x.opcode == "constant" and x.operands and x.operands[0].isdigit()
    ]
    return numbers[0] if compares and len(numbers) == 1 else 1

  def find(self, *opcodes: str) -> list[tuple[Instruction, int]]:
    """Instructions of these kinds, each with its number of runs per step."""
    return [
      (instruction, times)
      for name, times in self.times().items()
      for instruction in self.computations[name]
      if instruction.opcode in opcodes and times
    ]


def cycles(program: Program) -> int:
  """Cycles that the compiler for TPUs expects of a step, one after the other.

  0 for programs of other compilers, which write none down. Messages between
  chips have none.
  """
  total = 0
  for name, times in program.times().items():
    for instruction in program.computations[name] if times else ():
      if found := _CYCLES.search(instruction.attributes):
        count = int(found[1])
        total += times * count if count < _UNKNOWN_CYCLES else 0
  return total


def parse(text: str) -> Program:
  """Reads a program.

  Raises:
    ValueError: the text holds no entry computation.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (name := _NAME.match(line)):
      current.append(_instruction(name[1], line[name.end() :]))
  if not entry:
    raise ValueError("the text is no compiled program: it has no ENTRY")
  return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
  """Splits "TYPE opcode(operands), attributes"."""
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opening = text.index("(", end)
  closing = _closing(text, opening)
  inside = re.sub(r"/\*.*?\*/", "", text[opening + 1 : closing])
  # Some versions write the type of each operand before its name.
  words = [x.split()[-1].lstrip("%") for x in _split(inside)]
  arrays = tuple(
    Array(dtype, _numbers(shape), _numbers(layout))
    for dtype, shape, layout in _ARRAY.findall(text[:end])
  )
  return Instruction(
    name,
    text[end:opening].strip(),
    arrays,
    tuple(words),
    text[closing + 1 :],
  )


def _numbers(text: str) -> tuple[int, ...]:
  """ "2,0,1" -> (2, 0, 1)."""
  return tuple(int(number) for number in text.split(",") if number)


def _closing(text: str, opening: int) -> int:
  """Index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for found in re.finditer(r"[()]", text[opening:]):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return opening + found.start()
  raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _split(arguments: str) -> list[str]:
  """Splits at commas outside brackets; drops empty parts."""
  parts, depth, start = [], 0, 0
  for found in re.finditer(r"[()\[\]{},]", arguments):
    depth += (found[0] in "([{") - (found[0] in ")]}")
    if found[0] == "," and not depth:
      parts.append(arguments[start : found.start()].strip())
      start = found.end()
  parts.append(arguments[start:].strip())
  return [part for part in parts if part]
