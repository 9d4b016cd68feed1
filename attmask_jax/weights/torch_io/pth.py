"""PyTorch's .pth files without PyTorch: NumPy arrays in plain containers.

A .pth file is a zip archive: a pickle that describes the object (it is not run,
see `unpickling`), and one member per block of numbers.

Source: files written by torch.save since version 1.6.
"""

import contextlib
import math
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from attmask_jax import atomic
from attmask_jax.errors import InputError
from attmask_jax.weights.torch_io import lazy as laziness
from attmask_jax.weights.torch_io import pickling, unpickling
from attmask_jax.weights.torch_io.unpickling import Refused, quoted

Opaque = unpickling.Opaque
MAX_PICKLE_BYTES = 2**24  # a ViT-G training state takes a twentieth of it
MAX_COPIED_BYTES = 2**26  # that a small file may expand to
MAX_DIMENSIONS = 16
ALIGNMENT = 64  # bytes, as torch aligns the numbers, for memory maps
_OLD_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


def read(path: str | os.PathLike[str], *, lazy: bool = False) -> Any:
  """Reads the object in a .pth file: containers, numbers, text, NumPy arrays.

  Arrays are C-contiguous and may be read-only; bfloat16 is ml_dtypes'. Every
  block of numbers is read once, when the first tensor needs it, and contiguous
  tensors share its memory: in total little more than the file size, or twice
  that if all tensors are transposed. Anything but tensors, numbers, text and
  containers, such as a Namespace, becomes an `Opaque`.

  Args:
    path: file written by torch.save of version 1.6 or later, or by `write`.
    lazy: return `lazy.Tensor`s, each of which reads its own numbers on demand;
      everything else is checked now.

  Raises:
    InputError: the file is missing, damaged, of another format, or asks for
      anything but tensors in containers.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"{path} is not a file: give a .pth checkpoint")
  with _one_sentence(path):
    # Lazy tensors keep the file open; it is closed with the last of them.
    archive = zipfile.ZipFile(path)
    try:
      content = _Archive(archive, path, keep=not lazy).load()
    except BaseException:
      archive.close()
      raise
    if not lazy:
      archive.close()
    return content


@contextlib.contextmanager
def _one_sentence(path: pathlib.Path) -> Iterator[None]:
  """Turns errors of an unreadable file into an InputError."""
  try:
    yield
  except InputError:
    raise
  except Refused as error:
    raise InputError(f"{path} {error}") from error
  except zipfile.BadZipFile as error:
    raise InputError(_not_a_zip(path, error)) from error
  except PermissionError as error:
    raise InputError(f"{path} may not be read: change its mode") from error
  except MemoryError as error:
    raise InputError(f"{path} needs more memory than there is") from error
  except Exception as error:  # damage causes many types
    reason = f"{type(error).__name__}: {quoted(error)}"
    raise InputError(
      f"{path} is damaged ({reason}): copy or download it again"
    ) from error


def _not_a_zip(path: pathlib.Path, error: Exception) -> str:
  """Message for a file that is not a zip archive."""
  with path.open("rb") as file:
    head = file.read(64)
  if _OLD_MAGIC in head or head[:2] in (b"\x80\x02", b"\x80\x03"):
    return (
      f"{path} was saved by torch before 1.6, or in its old format: load it in "
      "torch once and save it again with torch.save"
    )
  return f"{path} is not a .pth file, or is damaged ({quoted(error)})"


class _Archive:
  """An open .pth file."""

  def __init__(
    self, archive: zipfile.ZipFile, path: pathlib.Path, *, keep: bool
  ) -> None:
    """`keep`: read all tensors now, and each block of numbers only once."""
    self._archive, self._path, self._keep = archive, path, keep
    self._size = path.stat().st_size
    self._members = self._check_members(archive.infolist())
    self._blocks: dict[str, np.ndarray] = {}
    self._copied = 0

  def _check_members(
    self, members: list[zipfile.ZipInfo]
  ) -> dict[str, zipfile.ZipInfo]:
    """Members by name; rejects any that torch never writes."""
    by_name: dict[str, zipfile.ZipInfo] = {}
    for member in members:
      name = member.filename
      parts = name.replace("\\", "/").split("/")
      drive = re.match("[A-Za-z]:", name)
      if name.startswith("/") or ".." in parts or drive:
        raise Refused(
          f'holds a member outside it, "{quoted(name)}": do not use '
          "weights from its source"
        )
      if name in by_name:
        raise Refused(
          f'holds the member "{quoted(name)}" twice: copy or download it again'
        )
      if member.compress_type != zipfile.ZIP_STORED:
        raise Refused(
          f'holds a compressed member, "{quoted(name)}", which torch '
          "never writes: save it again with torch.save"
        )
      by_name[name] = member
    # Members of a zip archive may overlap, and so be larger than the file.
    if sum(m.file_size for m in members) > self._size:
      raise Refused(
        "claims members larger than itself: copy or download it again"
      )
    return by_name

  def load(self) -> Any:
    """Reads the pickle, and with it the tensors."""
    programs = [n for n in self._members if n.endswith("/data.pkl")]
    if len(programs) != 1:
      raise Refused(
        "is a zip archive, but not a .pth file: give one written by torch.save"
      )
    self._root = programs[0].removesuffix("data.pkl")
    script = (self._root + "constants.pkl", self._root + "code/")
    if any(name.startswith(script) for name in self._members):
      raise Refused(
        "is a TorchScript program: save the state dict of the model with "
        "torch.save instead"
      )
    if self._small("byteorder", b"little", 16) != b"little":
      raise Refused(
        "was written on a big-endian machine: save it again on another one"
      )
    program = self._small("data.pkl", b"", MAX_PICKLE_BYTES)
    return unpickling.load(program, self.tensor)

  def _small(self, name: str, default: bytes, limit: int) -> bytes:
    """Content of a member other than numbers."""
    member = self._members.get(self._root + name)
    if member is None:
      return default
    if member.file_size > limit:
      raise Refused(
        f"has a {name} of {member.file_size} bytes: no checkpoint needs that, "
        "save only tensors, numbers and text in it"
      )
    return self._archive.read(member)

  def _member(self, storage: unpickling.Storage) -> zipfile.ZipInfo:
    """The member that holds the numbers of a storage."""
    key = storage.key
    member = self._members.get(f"{self._root}data/{key}")
    if member is None:
      raise Refused(
        f'lacks its member "data/{quoted(key)}": copy or download it again'
      )
    size = storage.numel * storage.dtype.itemsize
    if size > member.file_size:
      raise Refused(
        f'claims {quoted(size)} bytes in its member "data/{key}", '
        f"which has {member.file_size}: copy or download it again"
      )
    return member

  def block(self, storage: unpickling.Storage) -> np.ndarray:
    """The numbers of a storage: [numel], cached for the next tensor."""
    key = storage.key
    if key not in self._blocks:
      raw = np.frombuffer(self._archive.read(self._member(storage)), np.uint8)
      # Tensors of one storage mostly follow each other.
      self._blocks = (self._blocks if self._keep else {}) | {key: raw}
    raw = self._blocks[key]
    size = storage.numel * storage.dtype.itemsize
    if storage.dtype == bool:  # NumPy needs bytes 0 and 1
      return raw[:size] != 0
    return raw[:size].view(storage.dtype)

  def tensor(
    self, storage: unpickling.Storage, offset: Any, size: Any, stride: Any
  ) -> np.ndarray | laziness.Tensor:
    """A tensor over a storage; a copy if it is not contiguous."""
    if not _is_plain(offset, size, stride):
      raise TypeError("a tensor of an impossible shape")
    count = math.prod(size)
    if not count:
      return np.zeros(size, storage.dtype)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= storage.numel:
      raise Refused(
        f"claims a tensor of size {quoted(tuple(size))} in "
        f"{quoted(storage.numel)} numbers: copy or download it again"
      )
    self._member(storage)  # checks that it exists and is large enough
    if not _is_contiguous(size, stride):
      self._copied += count * storage.dtype.itemsize
      if self._copied > max(2 * self._size, MAX_COPIED_BYTES):
        raise Refused(
          "expands to more than twice its size: save contiguous tensors"
        )
    if self._keep:
      return self._numbers(storage, offset, size, stride)

    def later() -> np.ndarray:
      with _one_sentence(self._path):
        return self._numbers(storage, offset, size, stride)

    return laziness.Tensor(size, storage.dtype, later)

  def _numbers(
    self,
    storage: unpickling.Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
  ) -> np.ndarray:
    """Reads a checked tensor."""
    block = self.block(storage)
    if _is_contiguous(size, stride):
      return block[offset : offset + math.prod(size)].reshape(size)
    steps = [s * storage.dtype.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided(block[offset:], size, steps)
    return np.ascontiguousarray(view)


def _is_plain(offset: Any, size: Any, stride: Any) -> bool:
  """Whether these are numbers >= 0 of at most MAX_DIMENSIONS axes."""
  if not isinstance(size, tuple) or not isinstance(stride, tuple):
    return False
  if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
    return False
  return all(type(n) is int and n >= 0 for n in (offset, *size, *stride))


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
  expected = 1
  for n, s in zip(reversed(size), reversed(stride), strict=True):
    if n != 1 and s != expected:
      return False
    expected *= n
  return True


def write(path: str | os.PathLike[str], tree: Any) -> None:
  """Writes a .pth file that torch.load reads with weights_only=True.

  The write is atomic; arrays are written one at a time.

  Args:
    path: the file; its folder is made if missing.
    tree: mappings, lists, tuples, text, numbers, None and arrays of the types
      of `unpickling.STORAGES`.

  Raises:
    InputError: anything else in the tree, or the file cannot be written.
  """
  try:
    program, arrays = pickling.dump(tree)
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
  except Refused as error:
    raise InputError(f"{path} cannot be written: {error}") from error
  except OSError as error:
    raise InputError(
      f"{path} cannot be written ({error.strerror}): give another file"
    ) from error


def _member(archive: zipfile.ZipFile, name: str, content: Any) -> None:
  """Adds an uncompressed member whose content starts at a multiple of 64."""
  info = zipfile.ZipInfo(name)  # dated 1980, so equal trees give equal files
  info.file_size = len(content)
  # zipfile's condition for another 20 bytes in front of the content.
  large = info.file_size * 1.05 > zipfile.ZIP64_LIMIT
  start = archive.fp.tell() + 30 + len(name) + 4 + (20 if large else 0)
  padding = -start % ALIGNMENT
  info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
  with archive.open(info, "w") as file:
    file.write(memoryview(content))
