"""Reads pickles of tensors in containers without running them.

A pickle is a program that may call anything. Python's own Unpickler can be kept
from importing functions, but a file could still set attributes of their
placeholders, exhaust memory, or crash it with deep keys. So this is an
interpreter of the few instructions that torch.save writes. It makes plain
values, looks up calls in a fixed list, and calls nothing from the file.

Source: pickletools, which documents and decodes the instructions.
"""

import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from attmask_jax.weights.torch_io.lazy import ARRAYS, Tensor

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
MAX_DEPTH = 64  # of containers in containers
MAX_VALUES = 2**22  # in the object, counting each use of shared ones
MAX_KEY_DEPTH, MAX_KEY_PARTS = 8, 1000  # of tuples that are keys
MAX_MADE = 2**26  # characters and items that calls may create

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
  "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES "
  "SHORT_BINBYTES BINUNICODE8 BINBYTES8 BYTEARRAY8".split()
)
_PARAMETERS = (
  "torch._utils._rebuild_parameter",
  "torch._utils._rebuild_parameter_with_state",
)
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_BUILTINS = ("__builtin__", "builtins")  # of protocol 2 and of later ones
_SETS = tuple(f"{b}.{name}" for b in _BUILTINS for name in ("set", "frozenset"))
_BYTES = tuple(f"{b}.bytes" for b in _BUILTINS)
_DICTS = ("collections.OrderedDict", "collections.defaultdict")
# Factories of a defaultdict; also ranges and the like, which stay opaque.
_TYPES = tuple(
  f"{b}.{name}"
  for b in _BUILTINS
  for name in "bool bytearray complex dict float int list range slice str tuple"
  " xrange".split()
)
_PATHS = tuple(
  f"{module}.{kind}{name}"
  for module in ("pathlib", "pathlib._local")  # the second one in Python 3.13
  for kind in ("", "Pure")
  for name in ("PosixPath", "WindowsPath", "Path")
)
# Any torch dtype, as in model configs; tensors are not typed by them.
_DTYPE = re.compile(
  r"torch\.(bool|bfloat16|(float|complex|q?u?int)\d+(x\d)?|float\d\w*|bits\w+)"
)
_INERT = (
  "argparse.Namespace", "collections.Counter", "numpy.dtype", "numpy.ndarray",
  "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
  "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer",
  "torch.device", "torch.strided", "torch.serialization._get_layout",
  *_PATHS, *_TYPES,
)  # fmt: skip
_TENSOR = "torch._utils._rebuild_tensor_v2"
_KNOWN = frozenset(
  (*(f"torch.{name}" for name in STORAGES), *_PARAMETERS, *_SCALARS, *_SETS)
  + (*_INERT, *_BYTES, *_DICTS, _TENSOR, "_codecs.encode", "torch.Size")
)


_TOO_MUCH = (
  "expands to more than any checkpoint needs: save only tensors, numbers and "
  "text in it"
)


class Refused(ValueError):
  """Error message without its beginning, the name of the file."""


class Opaque:
  """A part of a file that is not interpreted, such as its arguments.

  Attributes:
    name: of its class in the file.
    state: plain values that it would have been made from.
  """

  __slots__ = ("name", "state")

  def __init__(self, name: str, state: Any = None) -> None:
    self.name, self.state = name, state


class Storage(NamedTuple):
  """A block of numbers that a pickle refers to."""

  dtype: np.dtype
  key: str
  numel: int


def quoted(text: Any) -> str:
  """Text of a file for a message: short, and without control characters."""
  text = str(text)
  return ascii(text[:80])[1:-1] + ("..." if len(text) > 80 else "")


def load(program: bytes, tensor: Callable[..., np.ndarray | Tensor]) -> Any:
  """The object of a pickle: plain values, arrays and `Opaque`.

  Args:
    program: bytes of the pickle.
    tensor: makes an array of a `Storage`, offset, size and stride (of which
      only the first is checked).

  Raises:
    Refused: anything but tensors in containers, by name.
    Exception: damage, of many types.
  """
  machine = _Machine(tensor)
  for opcode, argument, _ in pickletools.genops(program):
    if opcode.name == "STOP":
      break
    machine.step(opcode.name, argument)
  result = machine.pop()
  _check(result)
  return result


class _Machine:
  """A stack, marks on it, and a memo."""

  def __init__(self, tensor: Callable[..., np.ndarray | Tensor]) -> None:
    self._tensor = tensor
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []
    self._memo: dict[int, Any] = {}
    self._made = 0

  def pop(self) -> Any:
    """The value on top."""
    return self._stack.pop()

  def step(self, name: str, argument: Any) -> None:
    """Executes one instruction."""
    if name in _LITERALS:
      self._stack.append(argument)
    elif name in _CONSTANTS:
      self._stack.append(_CONSTANTS[name])
    elif name in ("PROTO", "FRAME"):
      pass
    elif name == "MARK":
      self._below.append(self._stack)
      self._stack = []
    elif name == "POP":
      self._stack.pop()
    elif name in ("BINPUT", "LONG_BINPUT"):
      self._memo[argument] = self._stack[-1]
    elif name == "MEMOIZE":
      self._memo[len(self._memo)] = self._stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      self._stack.append(self._memo[argument])
    elif not self._container(name) and not self._object(name, argument):
      raise Refused(
        f"uses the pickle instruction {name}, which no checkpoint needs: save "
        "only tensors, numbers and text in it"
      )

  def _since_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._below.pop()
    return items

  def _last(self, count: int) -> list[Any]:
    if len(self._stack) < count:
      raise IndexError("the stack is empty")
    items = self._stack[-count:]
    del self._stack[-count:]
    return items

  def _container(self, name: str) -> bool:
    """Executes an instruction on containers; False for others."""
    made: dict[str, Callable[[], Any]] = {
      "EMPTY_TUPLE": tuple,
      "EMPTY_LIST": list,
      "EMPTY_DICT": dict,
      "EMPTY_SET": set,
      "FROZENSET": lambda: frozenset(map(_key, self._since_mark())),
      "TUPLE": lambda: tuple(self._since_mark()),
      "TUPLE1": lambda: tuple(self._last(1)),
      "TUPLE2": lambda: tuple(self._last(2)),
      "TUPLE3": lambda: tuple(self._last(3)),
    }
    if name in made:
      value = made[name]()  # first, since it may replace the stack
      self._stack.append(value)
    elif name in ("APPEND", "APPENDS"):
      items = self._last(1) if name == "APPEND" else self._since_mark()
      _of(list, self._stack[-1]).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
      items = self._last(2) if name == "SETITEM" else self._since_mark()
      pairs = zip(map(_key, items[::2]), items[1::2], strict=True)
      _of(dict, self._stack[-1]).update(pairs)
    elif name == "ADDITEMS":
      items = self._since_mark()
      _of(set, self._stack[-1]).update(map(_key, items))
    else:
      return False
    return True

  def _object(self, name: str, argument: Any) -> bool:
    """Executes an instruction on globals and objects; False for others."""
    if name == "GLOBAL":
      self._stack.append(_global(*argument.split(" ", 1)))
    elif name == "STACK_GLOBAL":
      self._stack.append(_global(*self._last(2)))
    elif name in ("REDUCE", "NEWOBJ"):
      what, arguments = self._last(2)
      self._stack.append(self._call(_of(Opaque, what), _of(tuple, arguments)))
    elif name == "BUILD":
      state = self._stack.pop()
      if isinstance(self._stack[-1], Opaque):
        what = self._stack[-1]
        self._stack[-1].state = (
          (what.state, state) if what.name == "numpy.dtype" else state
        )
      elif not isinstance(self._stack[-1], dict):  # an OrderedDict's _metadata
        raise TypeError("state for a plain value")
    elif name == "BINPERSID":
      self._stack.append(_storage(self._stack.pop()))
    else:
      return False
    return True

  def _call(self, what: Opaque, arguments: tuple[Any, ...]) -> Any:
    """Result of a known call, as torch would have made it."""
    if what.name == _TENSOR:
      storage, offset, size, stride, *_ = arguments
      return self._tensor(_of(Storage, storage), offset, size, stride)
    if what.name in _PARAMETERS:
      return _of(ARRAYS, arguments[0])
    if what.name in _SCALARS:
      return _scalar(*arguments)
    if what.name in _DICTS and _is_empty(what.name, arguments):
      return {}
    if what.name in _BYTES and not arguments:  # b"" in protocol 2
      return b""
    if what.name in _SETS or what.name == "torch.Size":
      items = _of(list | tuple, arguments[0]) if arguments else ()
      self._spend(len(items))
      make = frozenset if what.name.endswith("frozenset") else set
      return make(map(_key, items)) if what.name in _SETS else tuple(items)
    if what.name == "_codecs.encode":  # how protocol 2 holds bytes
      text, encoding = arguments
      if encoding != "latin1":
        raise ValueError("unknown encoding")
      self._spend(len(text))
      return _of(str, text).encode("latin1")
    if what.name not in _INERT and not _DTYPE.fullmatch(what.name):
      raise TypeError(f"an unknown call of {what.name}")
    return Opaque(what.name, arguments)

  def _spend(self, amount: int) -> None:
    self._made += amount
    if self._made > MAX_MADE:
      raise Refused(_TOO_MUCH)


def _of(kind: Any, value: Any) -> Any:
  """The value, if it is of this type."""
  if not isinstance(value, kind):
    raise TypeError(f"a {type(value).__name__} in the wrong place")
  return value


def _is_empty(name: str, arguments: tuple[Any, ...]) -> bool:
  """Whether a call makes an empty dict; a defaultdict may have a factory."""
  factory = arguments if name == "collections.defaultdict" else ()
  return len(arguments) == len(factory) <= 1


def _key(value: Any) -> Any:
  """The value, if it may be a key: hashing a deep one would recurse."""
  parts, count = [value], 0
  for _ in range(MAX_KEY_DEPTH):
    inner: list[Any] = []
    for part in parts:
      if not isinstance(part, tuple):
        _check_key_part(part)
        continue
      count += len(part)
      if count > MAX_KEY_PARTS:
        raise TypeError("a tuple of too many parts as a key")
      inner.extend(part)
    parts = inner
  if parts:
    raise TypeError("a deep tuple as a key")
  return value


def _check_key_part(part: Any) -> None:
  if not isinstance(part, str | bytes | int | float | Opaque | None):
    raise TypeError(f"a {type(part).__name__} as a key")
  # Larger ones can be chosen to have equal hashes.
  if isinstance(part, int) and abs(part) >= 2**63:
    raise ValueError("a key beyond 64 bits")


def _global(module: Any, name: Any) -> Opaque:
  """Placeholder of a global name in the file."""
  full = f"{_of(str, module)}.{_of(str, name)}"
  if full not in _KNOWN and not _DTYPE.fullmatch(full):
    raise Refused(
      f"refers to {quoted(full)}, which is not run: save only tensors, numbers "
      "and text in it"
    )
  return Opaque(full)


def _storage(pid: Any) -> Storage:
  """A block of numbers, not read yet."""
  kind, what, key, _, numel = _of(tuple, pid)
  dtype = STORAGES.get(_of(Opaque, what).name.removeprefix("torch."))
  plain = type(numel) is int and numel >= 0
  if kind != "storage" or dtype is None or not plain:
    raise ValueError("an unknown reference")
  return Storage(dtype, _of(str, key), numel)


def _scalar(dtype: Any, raw: Any = b"") -> Any:
  """A NumPy number as a plain one; other types stay opaque."""
  state = dtype.state if isinstance(dtype, Opaque) else None
  try:
    (code, *_), (_, order, *_) = state
    if code in ("f8", "f4", "f2", "i8", "i4", "b1") and order in ("<", "|"):
      return np.frombuffer(raw, code)[0].item()
  except (TypeError, ValueError, IndexError):
    pass
  return Opaque("numpy.scalar", (dtype, raw))


def _check(result: Any) -> None:
  """Rejects objects that are circular, or too deep or large to traverse."""
  level, count = [result], 0
  for _ in range(MAX_DEPTH):
    inner: list[Any] = []
    for value in level:
      if isinstance(value, dict):
        inner.extend(value.values())
      elif isinstance(value, list | tuple) and not isinstance(value, Storage):
        inner.extend(value)
      elif isinstance(value, Opaque):
        inner.append(value.state)
      elif isinstance(value, Storage):
        raise Refused("holds a storage that is not a tensor: save tensors only")
      if len(inner) > MAX_VALUES - count:
        raise Refused(_TOO_MUCH)
    count += len(inner)
    level = inner
    if not level:
      return
  raise Refused(
    f"nests containers deeper than {MAX_DEPTH}, or in a circle: save only a "
    "state dict"
  )
