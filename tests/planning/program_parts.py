"""What a test reads of a compiled program beside what a plan needs."""

from typing import NamedTuple

from attmask_jax.planning.program import Array, Instruction, Program

PRODUCTS = ("dot", "convolution")  # TPUs compile products to convolutions


class Product(NamedTuple):
  """A matrix product of a program.

  Attributes:
    source: the JAX operation, see `Instruction.source`.
    operands: types of both factors.
    result: its type.
    times: runs per step.
  """

  source: str
  operands: tuple[Array, Array]
  result: Array
  times: int


def products(program: Program) -> list[Product]:
  """All matrix products and convolutions of a program."""
  found = []
  for name, times in program.times().items():
    types = _types(program, name) if times else {}
    for x in program.computations[name] if times else ():
      if x.opcode in PRODUCTS:
        a, b = (types[operand][0] for operand in x.operands[:2])
        found.append(Product(x.source, (a, b), x.arrays[0], times))
  return found


def rearranged(
  program: Program, source: str, *, smallest: int
) -> list[Instruction]:
  """Arrays that are transposed in memory on their own, outside of fusions.

  Copies that keep the order of the axes only move an array to another memory.

  Args:
    program: compiled for a TPU, where arrays have layouts.
    source: part of the name of the JAX operation, such as "Block/".
    smallest: bytes; smaller arrays do not matter.
  """
  found = []
  for name, times in program.times().items():
    types = _types(program, name) if times else {}
    for x in program.computations[name] if times else ():
      if x.opcode not in ("copy", "transpose") or source not in x.source:
        continue
      (before, *_), (after, *_) = types[x.operands[0]], x.arrays
      kept = x.opcode == "copy" and _order(before) == _order(after)
      if after.bytes >= smallest and not kept:
        found.append(x)
  return found


def _types(program: Program, computation: str) -> dict[str, tuple[Array, ...]]:
  """Type of the result of each instruction of a computation, by name."""
  return {x.name: x.arrays for x in program.computations[computation]}


def _order(array: Array) -> tuple[int, ...]:
  """Axes in memory but for those of length 1, which have no place."""
  return tuple(axis for axis in array.layout if array.shape[axis] > 1)
