"""Names of other code bases for our parameters, one table for both directions.

A table is a tuple of rows. `Row` pairs a leaf of our tree with a tensor of
theirs and says how its layout differs; `Constant` is a tensor that they store
and we do not. `to_ours` and `to_theirs` use the same rows.

Our trees are those of the methods: "backbone/...", "head/...", "decoder/...",
"predictor/..."; a classifier's also holds its batch norm ("batch_norm/...").

Source: the state dicts of AttMask, iBOT, DINO, timm, MAE-priv, the official
MAE, ExtreMA and transformers 4.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from attmask_jax import Params, trees
from attmask_jax.errors import InputError
from attmask_jax.models import positions
from attmask_jax.weights.torch_io import fixed
from attmask_jax.weights.torch_io.lazy import Tensor

Tensors = Mapping[str, np.ndarray | Tensor]
Change = Callable[[np.ndarray], np.ndarray]

# Conversions of a tensor of theirs to our tree, and back.
KINDS: dict[str, tuple[Change, Change]] = {
  "same": (lambda x: x, lambda x: x),
  # (out, in) <-> (in, out)
  "linear": (lambda x: x.T, lambda x: x.T),
  # (D, 3, P, P) <-> (P, P, 3, D)
  "conv": (
    lambda x: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
  ),
  # (K, 1) <-> (K,)
  "gain": (lambda x: x[:, 0], lambda x: x[:, None]),
  # (1, K) <-> (K,), (1, 1, K) <-> (K,)
  "center": (lambda x: x[0], lambda x: x[None]),
  "center2": (lambda x: x[0, 0], lambda x: x[None, None]),
  # s <-> (1, *s): a mask token, the bias of the first of several probes
  "row": (lambda x: x[None], lambda x: x[0]),
  # A variance that 1e-6 is added to, and one that 1e-5 is added to.
  "small_eps": (
    lambda x: x - x.dtype.type(9e-6),
    lambda x: x + x.dtype.type(9e-6),
  ),
  # (C, F) <-> (1, F, C), the weights of the first of several probes
  "probe": (lambda x: x.T[None], lambda x: x[0].T),
}
# Leaves of ours that they lack because their networks do not use them.
UNUSED = {"unused_ones": np.ones, "unused_zeros": np.zeros}


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf of ours and one tensor of theirs.

  Two rows with the same leaf and part are two names of one tensor: both are
  written, and must agree if both are read.

  Attributes:
    ours: path of the leaf; a final "[i]" means that it stacks the blocks {i} of
      theirs; {j} is a number in both names.
    theirs: name of the tensor; "" for the kinds in UNUSED.
    kind: one of KINDS or UNUSED.
    part: index of the tensor in our fused [q | k | v], along the last axis; a
      third without a row is 0 in our leaf, and not written.
  """

  ours: str
  theirs: str
  kind: str = "same"
  part: int | None = None


@dataclasses.dataclass(frozen=True)
class Constant:
  """A tensor of theirs that is no parameter of ours.

  Attributes:
    theirs: its name; {j} stands for any number.
    kind: "yx" or "xy", a fixed position table, compared when it is read;
      "zero_token", an unused (1, 1, D), and "counter", an integer, written as
      0; "dropped", accepted, unused and never written.
    like: leaf of ours that must exist for it to be written, and has its width.
    class_token: leaf of the class token; if it exists, the table starts with
      zeros.
  """

  theirs: str
  kind: str
  like: str = ""
  class_token: str = ""


Table = tuple[Row | Constant, ...]


class Converted(NamedTuple):
  """Result of `to_ours`.

  Attributes:
    tree: nested dict of the leaves that are complete.
    matched: tensors that were used or compared, sorted.
    missing: tensors that the tree needs and the file lacks, sorted; leaves
      without a name of theirs appear by their path in our tree.
    unexpected: tensors of the file that were not used, sorted, including the
      blocks of a leaf that lacks another block.
  """

  tree: Params
  matched: list[str]
  missing: list[str]
  unexpected: list[str]


def to_ours(
  tensors: Tensors, table: Table, shapes: Any, *, dtype: Any = None
) -> Converted:
  """Converts tensors of theirs to a tree of ours.

  Args:
    tensors: {name: array}; read one at a time.
    table: the names.
    shapes: the expected tree: leaves with `.shape`.
    dtype: of all leaves; None = one that holds the values of the file.

  Raises:
    InputError: a tensor of another shape, two names of one tensor that
      disagree, or a position table that is not the fixed one.
  """
  expected = {k: tuple(leaf.shape) for k, leaf in trees.flat(shapes).items()}
  used, missing, leaves = set(), set(expected), {}
  for path, pieces in _pieces(table, expected).items():
    missing.remove(path)
    absent = {p.name for p in pieces} - tensors.keys() - {""}
    missing |= absent
    if not absent:
      leaves[path] = _assemble(path, expected[path], pieces, tensors, dtype)
      used |= {p.name for p in pieces}
  for row in table:
    if isinstance(row, Constant):
      for name in _matching(row.theirs, tensors):
        if row.kind in ("yx", "xy") and name not in used:
          fixed.check(name, np.asarray(tensors[name]), row.kind)
        used.add(name)
  used &= tensors.keys()
  unexpected = sorted(set(tensors) - used)
  return Converted(
    trees.nested(leaves), sorted(used), sorted(missing), unexpected
  )


def to_theirs(
  tree: Params, table: Table, *, grid: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
  """Converts a tree of ours to tensors of theirs, C-contiguous, in its dtypes.

  Args:
    tree: arrays, on the host or a device.
    table: the names; rows for leaves that the tree lacks are skipped.
    grid: patches per column and row, if a fixed position table is written.

  Raises:
    InputError: a leaf without a name, or several linear layers in one leaf.
  """
  leaves = trees.flat(jax.device_get(tree))
  leaves = {name: np.asarray(x) for name, x in leaves.items()}
  pieces = _pieces(table, {k: x.shape for k, x in leaves.items()})
  for path in sorted(leaves.keys() - pieces.keys()):
    raise InputError(
      f"{path} has no name in this format: choose a format that can hold it, "
      "or leave it out"
    )
  tensors = {}
  for path, group in pieces.items():
    for piece in group:
      if piece.name:
        value = _part(leaves[path], piece)
        if piece.row.kind in ("row", "probe") and len(value) != 1:
          raise InputError(
            f"{path} holds {len(value)} linear layers, and this format one: "
            "choose one of them"
          )
        value = KINDS[piece.row.kind][1](value)
        # safetensors silently writes any other memory order wrongly.
        tensors[piece.name] = np.ascontiguousarray(value)
  for row in table:
    if isinstance(row, Constant) and row.like in leaves:
      if row.theirs not in tensors:
        like, num_prefix_tokens = (
          leaves[row.like],
          int(row.class_token in leaves),
        )
        tensors[row.theirs] = _constant(row, like, num_prefix_tokens, grid)
  return tensors


def name_of(table: Table, ours: str) -> str | None:
  """Their name (template) for a leaf of ours, the first in the table."""
  for row in table:
    if isinstance(row, Row) and row.ours == ours:
      return row.theirs
  return None


class _Piece(NamedTuple):
  """One tensor of a leaf."""

  row: Row
  layer: int | None
  name: str


def _pieces(
  table: Table, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[_Piece]]:
  """{leaf path: its tensors}, in the table's order."""
  pieces: dict[str, list[_Piece]] = {}
  for row in table:
    if isinstance(row, Row):
      for path, layer, name in _expand(row, shapes):
        pieces.setdefault(path, []).append(_Piece(row, layer, name))
  return pieces


def _expand(
  row: Row, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int | None, str]]:
  """(leaf path, block, tensor name) of a row, for leaves that exist."""
  path = row.ours.removesuffix("[i]")
  if path != row.ours:
    if shapes.get(path):
      for i in range(shapes[path][0]):
        yield path, i, row.theirs.format(i=i)
    return
  for leaf, numbers in _matching(path, shapes).items():
    yield leaf, None, row.theirs.format(j=numbers)


def _matching(template: str, names: Mapping[str, Any]) -> dict[str, str]:
  """{name: its {j}} of the names that match a template with at most one {j}."""
  if "{j}" not in template:
    return {template: ""} if template in names else {}
  pattern = re.escape(template).replace(r"\{j\}", r"(\d+)")
  hits = {name: re.fullmatch(pattern, name) for name in names}
  return {name: hit[1] for name, hit in hits.items() if hit}


def _part(leaf: np.ndarray, piece: _Piece) -> np.ndarray:
  """The part of a leaf that belongs to a tensor, as a view."""
  if piece.layer is not None:
    leaf = leaf[piece.layer]
  if piece.row.part is None:
    return leaf
  d = leaf.shape[-1] // 3
  return leaf[..., piece.row.part * d : (piece.row.part + 1) * d]


def _assemble(
  path: str,
  shape: tuple[int, ...],
  pieces: list[_Piece],
  tensors: Tensors,
  dtype: Any,
) -> np.ndarray:
  """Reads the tensors of one leaf into an array of its shape."""
  if pieces[0].row.kind in UNUSED:
    return UNUSED[pieces[0].row.kind](shape, np.float32)
  # Broadcast from one value, so that it takes no memory.
  probe = np.broadcast_to(np.zeros((), bool), shape)
  for piece in pieces:
    expected = KINDS[piece.row.kind][1](_part(probe, piece)).shape
    given = tuple(tensors[piece.name].shape)
    if given != expected:
      raise InputError(
        f"{piece.name} has shape {given}, and {path} of this network "
        f"needs {expected}: the file has a network of another size"
      )
  if dtype is None:
    dtype = _common([tensors[piece.name].dtype for piece in pieces])
  leaf, written = np.zeros(shape, dtype), {}
  for piece in pieces:
    place = _part(leaf, piece)
    value = KINDS[piece.row.kind][0](np.asarray(tensors[piece.name]))
    first = written.setdefault((piece.layer, piece.row.part), piece.name)
    if first == piece.name:
      place[...] = value
    elif not np.array_equal(place, value.astype(leaf.dtype)):
      raise InputError(
        f"{piece.name} differs from {first}, and in this network they are one "
        "tensor: load it as a network with separate ones"
      )
  return leaf


def _common(dtypes: list[np.dtype]) -> np.dtype:
  """A type that holds the values of all of them, or float32."""
  try:
    return functools.reduce(np.promote_types, dtypes)
  except TypeError:  # float16 and bfloat16 have none in common
    return np.dtype(np.float32)


def _constant(
  row: Constant,
  like: np.ndarray,
  num_prefix_tokens: int,
  grid: tuple[int, int] | None,
) -> np.ndarray:
  """The tensor that is written for a constant."""
  if row.kind == "counter":
    return np.zeros((), np.int64)
  width = like.shape[-1]
  if row.kind == "zero_token":
    return np.zeros((1, 1, width), like.dtype)
  if grid is None:
    raise ValueError(f"{row.theirs} is written, and grid is not given")
  return positions.fixed_table(
    grid, width, row.kind, num_prefix_tokens=num_prefix_tokens
  ).astype(like.dtype)
