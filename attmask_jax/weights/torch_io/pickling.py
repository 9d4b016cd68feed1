"""Writes pickles of tensors in containers: the inverse of `unpickling`.

Source: pickletools, and files written by torch.save.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from attmask_jax.weights.torch_io.unpickling import STORAGES, Refused

NAMES = {dtype: name for name, dtype in STORAGES.items()}


def dump(tree: Any) -> tuple[bytes, list[Any]]:
  """The pickle of a tree, and its arrays: number i has the key "i".

  An array that occurs twice is one block, as in torch.

  Raises:
    Refused: anything but plain values and arrays.
  """
  writer = _Writer()
  try:
    return b"\x80\x02" + writer.emit(tree) + b".", writer.arrays
  except RecursionError as error:
    raise Refused("nests too deeply, or in a circle") from error


class _Writer:
  """Emits instructions; collects arrays."""

  def __init__(self) -> None:
    self.arrays: list[Any] = []
    self._keys: dict[int, str] = {}

  def emit(self, node: Any) -> bytes:
    """Instructions that leave a node on the stack."""
    if node is None:
      return b"N"
    if isinstance(node, bool | np.bool_):
      return b"\x88" if node else b"\x89"
    if isinstance(node, int | np.integer):
      return _integer(int(node))
    if isinstance(node, float) and not isinstance(node, np.generic):
      return b"G" + struct.pack(">d", node)
    if isinstance(node, str):
      raw = node.encode("utf-8", "surrogatepass")
      return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(node, Mapping):
      items = (self.emit(k) + self.emit(v) for k, v in node.items())
      return b"}(" + b"".join(items) + b"u"
    if isinstance(node, list):
      return b"](" + b"".join(map(self.emit, node)) + b"e"
    if isinstance(node, tuple):
      return b"(" + b"".join(map(self.emit, node)) + b"t"
    dtype = getattr(node, "dtype", None)
    if dtype not in NAMES:
      raise Refused(
        f"a {type(node).__name__} of type {dtype} cannot be written to a .pth "
        f"file: use {', '.join(str(d) for d in NAMES)}"
      )
    return self._tensor(node)

  def _tensor(self, array: Any) -> bytes:
    """A call of _rebuild_tensor_v2 on a block of numbers."""
    if id(array) not in self._keys:
      self._keys[id(array)] = str(len(self.arrays))
      self.arrays.append(array)  # also keeps its id from being reused
    shape = tuple(int(n) for n in array.shape)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    emit = self.emit
    storage = (
      b"(" + emit("storage") + _name("torch", NAMES[array.dtype])
      + emit(self._keys[id(array)]) + emit("cpu") + emit(math.prod(shape))
      + b"tQ"
    )  # fmt: skip
    hooks = _name("collections", "OrderedDict") + b")R"
    rest = emit(0) + emit(shape) + emit(strides) + b"\x89" + hooks
    return (
      _name("torch._utils", "_rebuild_tensor_v2")
      + b"("
      + storage
      + rest
      + b"tR"
    )


def _integer(value: int) -> bytes:
  if -(2**31) <= value < 2**31:
    return b"J" + struct.pack("<i", value)
  if abs(value) >= 2**63:
    raise Refused(f"an integer of {value.bit_length()} bits is too large")
  raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
  return b"\x8a" + bytes([len(raw)]) + raw


def _name(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()
