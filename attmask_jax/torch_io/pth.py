"""PyTorch's .pth files without PyTorch: NumPy arrays in plain containers.

A .pth file is a zip archive: a pickle that describes the object, and one member
per block of numbers. A pickle is a program; here only the few opcodes and names
that tensors in containers need are carried out, none of which runs code of the
file's choice. Anything else is refused by name.

Source: the layout that torch.save has written since 1.6, read off its files.
"""

import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from attmask_jax import atomic
from attmask_jax.errors import InputError

STORAGES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in STORAGES.items()}
MAX_PICKLE_BYTES = 2**26  # that of a ViT-G training state is a hundredth
MAX_DIMENSIONS = 16
OPCODES = frozenset(
  "PROTO FRAME STOP MARK POP GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID "
  "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
  "SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
  "TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET "
  "ADDITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split()
)
ALIGNMENT = 64  # bytes, as torch aligns the numbers, for memory maps
_OLD_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


class Opaque:
  """A part of a file that is none of our business, such as its arguments.

  Attributes:
    name: what the file calls its class.
    state: what it would have been made of; plain values.
  """

  name = ""

  def __init__(self, *state: Any) -> None:
    self.state: Any = state

  def __setstate__(self, state: Any) -> None:
    self.state = state


class _Ordered(dict):
  """Stands for OrderedDict; attributes hung on it (`_metadata`) are dropped."""

  def __setstate__(self, state: Any) -> None:
    pass


class _Storage(NamedTuple):
  """A block of numbers that the pickle names."""

  dtype: np.dtype
  key: str
  numel: int


def read(path: str | os.PathLike[str]) -> Any:
  """The object in a .pth file: containers, numbers, text and NumPy arrays.

  Arrays are C-contiguous and may be read-only; bfloat16 is ml_dtypes'. Every
  block of numbers is read once, when the first tensor needs it, and tensors
  that fill it share its memory: the whole takes little more than the file.

  Args:
    path: file written by torch.save of version 1.6 or later, or by `write`.

  Raises:
    InputError: the file is missing, damaged, of another format, or asks for
      something else than tensors in containers.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path} is no file: give a .pth checkpoint")
  try:
    with zipfile.ZipFile(path) as archive:
      return _Archive(archive, path).load()
  except InputError:
    raise
  except zipfile.BadZipFile as error:
    raise InputError(_not_a_zip(path, error)) from error
  except MemoryError as error:
    raise InputError(f"{path} asks for more memory than there is") from error
  except Exception as error:  # damage shows in a dozen kinds
    raise InputError(
      f"{path} is damaged ({type(error).__name__}: {error}): copy or download "
      "it again"
    ) from error


def _not_a_zip(path: pathlib.Path, error: Exception) -> str:
  """A sentence for a file that is no zip archive."""
  with path.open("rb") as file:
    head = file.read(64)
  old = _OLD_MAGIC in head or head[:2] in (b"\x80\x02", b"\x80\x03")
  if old and not head.startswith(b"PK"):
    return (
      f"{path} was saved by torch before 1.6, or in its old format: load it in "
      "torch and save it again with torch.save"
    )
  return f"{path} is no .pth file, or is damaged ({error})"


class _Archive:
  """An open .pth file."""

  def __init__(self, archive: zipfile.ZipFile, path: pathlib.Path) -> None:
    self._archive, self._path = archive, path
    self._size = path.stat().st_size
    self._members = self._check_members(archive.infolist())
    self._blocks: dict[str, np.ndarray] = {}
    self._copied = 0

  def _check_members(
    self, members: list[zipfile.ZipInfo]
  ) -> dict[str, zipfile.ZipInfo]:
    """Members by name; refuses what torch never writes."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
      name = member.filename
      parts = name.replace("\\", "/").split("/")
      if name.startswith("/") or ".." in parts or ":" in parts[0]:
        raise InputError(f'{self._path} holds a member outside it: "{name}"')
      if name in found:
        raise InputError(f'{self._path} holds the member "{name}" twice')
      stored = member.compress_type == zipfile.ZIP_STORED
      if not stored or member.file_size > self._size:
        raise InputError(
          f'{self._path} holds a compressed member, "{name}", which torch '
          "never writes: save it again with torch.save"
        )
      found[name] = member
    return found

  def load(self) -> Any:
    """Runs the pickle, within limits."""
    pickles = [n for n in self._members if n.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise InputError(f"{self._path} is a zip archive, but no .pth file")
    self._root = pickles[0].removesuffix("data.pkl")
    if self._root + "constants.pkl" in self._members:
      raise InputError(
        f"{self._path} is a TorchScript program: save the state dict of the "
        "model with torch.save instead"
      )
    order = self._root + "byteorder"
    if order in self._members and self._archive.read(order) != b"little":
      raise InputError(
        f"{self._path} was written on a big-endian machine, which is not "
        "supported"
      )
    if self._members[pickles[0]].file_size > MAX_PICKLE_BYTES:
      raise InputError(
        f"{self._path} has a description of "
        f"{self._members[pickles[0]].file_size} bytes: no checkpoint needs that"
      )
    program = self._archive.read(pickles[0])
    self._check_opcodes(program)
    return _Unpickler(io.BytesIO(program), self).load()

  def _check_opcodes(self, program: bytes) -> None:
    """Refuses opcodes that tensors in containers do not need."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
      if opcode.name not in OPCODES:
        raise InputError(
          f"{self._path} uses the pickle opcode {opcode.name}, which no "
          "checkpoint needs: save only tensors, numbers and text in it"
        )
      # A large index would make the unpickler reserve memory up to it.
      if opcode.name == "LONG_BINPUT" and argument > count:
        raise InputError(f"{self._path} is damaged: its memo has holes")

  def block(self, storage: _Storage) -> np.ndarray:
    """The numbers of a storage: [numel], read once."""
    if storage.key in self._blocks:
      raw = self._blocks[storage.key]
    else:
      member = self._members.get(f"{self._root}data/{storage.key}")
      if member is None:
        raise InputError(
          f'{self._path} lacks its member "data/{storage.key}": copy or '
          "download it again"
        )
      raw = np.frombuffer(self._archive.read(member), np.uint8)
      self._blocks[storage.key] = raw
    wanted = storage.numel * storage.dtype.itemsize
    if storage.numel < 0 or wanted > len(raw):
      raise InputError(
        f'{self._path} claims {wanted} bytes in its member "data/'
        f'{storage.key}", which has {len(raw)}'
      )
    return raw[:wanted].view(storage.dtype)

  def tensor(
    self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any
  ) -> np.ndarray:
    """A tensor over a storage; a copy where it is not one contiguous piece."""
    if not isinstance(storage, _Storage):
      raise InputError(f"{self._path} is damaged: a tensor without numbers")
    numbers = (offset, *size, *stride)
    plain = all(type(n) is int and n >= 0 for n in numbers)
    if not plain or len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
      raise InputError(
        f"{self._path} is damaged: a tensor of size {size} and stride {stride}"
      )
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if count > storage.numel or (count and last >= storage.numel):
      raise InputError(
        f"{self._path} claims a tensor of size {tuple(size)} in "
        f"{storage.numel} numbers"
      )
    if not count:
      return np.zeros(size, storage.dtype)
    block = self.block(storage)
    if _is_contiguous(size, stride):
      return block[offset : offset + count].reshape(size)
    self._copied += count * storage.dtype.itemsize
    if self._copied > 2 * self._size:
      raise InputError(
        f"{self._path} unfolds to more than twice its size: save contiguous "
        "tensors"
      )
    steps = [s * storage.dtype.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided(block[offset:], size, steps)
    return np.ascontiguousarray(view)


def _is_contiguous(size: Any, stride: Any) -> bool:
  wanted = 1
  for n, s in zip(reversed(size), reversed(stride), strict=True):
    if n != 1 and s != wanted:
      return False
    wanted *= n
  return True


class _Unpickler(pickle.Unpickler):
  """Knows the names of `_known` and no other."""

  def __init__(self, file: io.BytesIO, archive: _Archive) -> None:
    super().__init__(file)
    self._archive = archive

  def find_class(self, module: str, name: str) -> Any:
    """What stands for a global of the file."""
    found = _known(module, name, self._archive)
    if found is None:
      raise InputError(
        f"{self._archive._path} asks for {module}.{name}, which is not run: "
        "save only tensors, numbers and text in it"
      )
    return found

  def persistent_load(self, pid: Any) -> _Storage:
    """A block of numbers, not read yet."""
    kind, dtype, key, _, numel = pid
    plain = isinstance(key, str) and type(numel) is int
    if kind != "storage" or not isinstance(dtype, np.dtype) or not plain:
      raise pickle.UnpicklingError(f"unknown reference {kind!r}")
    return _Storage(dtype, key, numel)


def _known(
  module: str, name: str, archive: _Archive
) -> Callable[..., Any] | np.dtype | None:
  """What stands for a global, None for those that are refused."""
  full = f"{module}.{name}"
  if module == "torch" and name in STORAGES:
    return STORAGES[name]
  if full in ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath",
              "collections.Counter", "collections.defaultdict", "torch.device",
              "torch.float32", "torch.float16", "torch.bfloat16",
              "__builtin__.set", "builtins.set"):  # fmt: skip
    return type("Opaque", (Opaque,), {"name": full})
  return {
    "collections.OrderedDict": _Ordered,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": archive.tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
  }.get(full)


def _encode(text: str, encoding: str) -> bytes:
  """How pickles of protocol 2 hold bytes."""
  if not isinstance(text, str) or encoding != "latin1":
    raise pickle.UnpicklingError("unknown text encoding")
  return text.encode("latin1")


class _Dtype(Opaque):
  """numpy.dtype; knows how it was called."""

  name = "numpy.dtype"

  def __init__(self, *state: Any) -> None:
    super().__init__(*state)
    self.code = state[0] if state else ""


def _scalar(dtype: Any, raw: Any = b"") -> Any:
  """A NumPy number as a plain one; another kind stays opaque."""
  code = getattr(dtype, "code", "")
  if code in ("f8", "f4", "i8", "i4", "b1") and isinstance(raw, bytes):
    return np.frombuffer(raw, code)[0].item()
  return Opaque(code, raw)


# --- writing ----------------------------------------------------------------


def write(path: str | os.PathLike[str], tree: Any) -> None:
  """Writes a .pth file that torch.load reads with weights_only=True.

  The file appears in one move; arrays go to the disk one after another.

  Args:
    path: the file; its folder is made if missing.
    tree: mappings, lists, tuples, text, numbers, None and arrays of the types
      of STORAGES.

  Raises:
    InputError: something else in the tree, or the file cannot be written.
  """
  arrays: list[Any] = []
  program = b"\x80\x02" + _emit(tree, arrays) + b"."
  try:
    with (
      atomic.replaced(path) as temporary,
      zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
      _member(archive, "archive/data.pkl", program)
      _member(archive, "archive/byteorder", b"little")
      for key, array in enumerate(arrays):
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _member(archive, f"archive/data/{key}", raw)
      _member(archive, "archive/version", b"3\n")
  except OSError as error:
    raise InputError(
      f"{path} cannot be written ({error.strerror}): give another file"
    ) from error


def _member(archive: zipfile.ZipFile, name: str, content: Any) -> None:
  """Adds an uncompressed member whose content starts at a multiple of 64."""
  info = zipfile.ZipInfo(name)  # of 1980: the same tree gives the same file
  start = archive.fp.tell() + 30 + len(name) + 4
  padding = -start % ALIGNMENT
  info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
  info.file_size = len(content)
  with archive.open(info, "w") as file:
    file.write(memoryview(content))


def _emit(node: Any, arrays: list[Any]) -> bytes:
  """The pickle program that makes a node; its arrays are appended."""
  inner = lambda x: _emit(x, arrays)
  if node is None:
    return b"N"
  if isinstance(node, bool | np.bool_):
    return b"\x88" if node else b"\x89"
  if isinstance(node, int | np.integer):
    return _integer(int(node))
  if isinstance(node, float | np.floating) and not hasattr(node, "ndim"):
    return b"G" + struct.pack(">d", float(node))
  if isinstance(node, str):
    raw = node.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw
  if isinstance(node, Mapping):
    items = b"".join(inner(k) + inner(v) for k, v in node.items())
    return b"}(" + items + b"u"
  if isinstance(node, list):
    return b"](" + b"".join(map(inner, node)) + b"e"
  if isinstance(node, tuple):
    return b"(" + b"".join(map(inner, node)) + b"t"
  dtype = getattr(node, "dtype", None)
  if dtype not in NAMES:
    raise InputError(
      f"a {type(node).__name__} of type {dtype} cannot be written to a .pth "
      f"file: use {', '.join(str(d) for d in NAMES)}"
    )
  return _tensor(node, arrays)


def _integer(value: int) -> bytes:
  if -(2**31) <= value < 2**31:
    return b"J" + struct.pack("<i", value)
  raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
  return b"\x8a" + bytes([len(raw)]) + raw


def _tensor(array: Any, arrays: list[Any]) -> bytes:
  """A call of _rebuild_tensor_v2 on the next block of numbers."""
  key, shape = str(len(arrays)), tuple(int(n) for n in array.shape)
  arrays.append(array)
  strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
  emit = lambda node: _emit(node, arrays)
  storage = (
    b"(" + emit("storage") + _global("torch", NAMES[array.dtype]) + emit(key)
    + emit("cpu") + emit(math.prod(shape)) + b"tQ"
  )  # fmt: skip
  hooks = _global("collections", "OrderedDict") + b")R"
  arguments = storage + emit(0) + emit(shape) + emit(strides) + b"\x89" + hooks
  return (
    _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"
  )


def _global(module: str, name: str) -> bytes:
  return f"c{module}\n{name}\n".encode()
