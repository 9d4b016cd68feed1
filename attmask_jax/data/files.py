"""Image files: decoding one, and the folders that hold many."""

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from attmask_jax.augment import transforms
from attmask_jax.errors import InputError

_log = logging.getLogger(__name__)

EXTENSIONS = (
  ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip


class BrokenImage(Exception):
  """One image cannot be read; the message says why."""


def decode(file: Any) -> Image.Image:
  """Opens and decodes a path or a binary stream to upright RGB.

  Raises:
    BrokenImage: Pillow cannot read it to its end. Its decoders raise errors of
      a dozen kinds, all of which mean the same here.

  differs: the reference fills the missing part of a truncated file with grey.
  """
  try:
    with Image.open(file) as image:
      return transforms.to_rgb(image)
  except UnidentifiedImageError as err:
    raise BrokenImage("not an image in a format that Pillow knows") from err
  except Exception as err:
    # `strerror` leaves out the path, which the caller names anyway.
    message = getattr(err, "strerror", None) or err
    raise BrokenImage(f"{type(err).__name__}: {message}") from err


def scan(folder: str) -> list[str]:
  """Image files anywhere below `folder`, sorted; paths relative to it.

  `scandir` gives the kind of each entry without a call per file, which is what
  keeps a million files to seconds. Hidden files are no images (macOS leaves
  `._x.jpg` behind when it copies).
  """
  found, pending = [], [""]
  while pending:
    below = pending.pop()
    with os.scandir(os.path.join(folder, below)) as entries:
      for entry in entries:
        if entry.name.startswith("."):
          continue
        path = os.path.join(below, entry.name)
        if entry.name.lower().endswith(EXTENSIONS):
          found.append(path)
        elif entry.is_dir():
          pending.append(path)
  found.sort()
  return found


def class_folders(root: str) -> list[str]:
  """Folders directly in `root`, sorted; hidden ones left out."""
  with os.scandir(root) as entries:
    return sorted(
      e.name for e in entries if e.is_dir() and not e.name.startswith(".")
    )


def fingerprint(kind: str, paths: Sequence[str], labels: np.ndarray) -> str:
  """Changes with any file's name, size or time, any label, or their order.

  One `stat` per file: seconds for a million on a local disk.
  """
  total = hashlib.sha256(kind.encode())
  for path in paths:
    found = os.stat(path)
    total.update(f"{path} {found.st_size} {found.st_mtime_ns}\n".encode())
  total.update(np.ascontiguousarray(labels, np.int64).tobytes())
  return total.hexdigest()


class ImageFiles:
  """Image files below one folder."""

  def __init__(self, root: str, files: list[str], labels: np.ndarray) -> None:
    self.root = root
    self.labels = labels
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def label(self, index: int) -> int:
    """Label of one file, -1 for none."""
    return int(self.labels[index])

  def describe(self, index: int) -> str:
    """Path of one file."""
    return os.path.join(self.root, self._files[index])

  def load(self, index: int) -> Image.Image:
    """Decodes one file to RGB; raises BrokenImage."""
    return decode(self.describe(index))

  def fingerprint(self) -> str:
    """Changes with any file, any label, or their order."""
    paths = [self.describe(i) for i in range(len(self))]
    return fingerprint("files", paths, self.labels)


class Folder(ImageFiles):
  """`path`/train and `path`/val with one folder per class.

  Classes are numbered by sorted folder name, files sorted by path below it.
  Validation classes take their numbers from the training folder when there is
  one.
  """

  def __init__(self, path: str, split: str) -> None:
    root = os.path.join(path, split)
    test = os.path.join(path, "test")
    if split == "val" and not os.path.isdir(root) and os.path.isdir(test):
      _log.info("%s has no val/: evaluating on test/", path)
      root = test
    if not os.path.isdir(root):
      raise InputError(
        f"{path} has no folder {split}/; data.source=folder expects "
        "train/CLASS/*.jpg and val/CLASS/*.jpg (data.source=flat takes a "
        "folder without classes)."
      )
    found = class_folders(root)
    if not found:
      raise InputError(
        f"{root} holds no class folders; expected {root}/CLASS/*.jpg "
        "(data.source=flat takes a folder without classes)."
      )
    training = os.path.join(path, "train")
    known = class_folders(training) if os.path.isdir(training) else found
    numbers = {name: number for number, name in enumerate(known)}
    files, labels = [], []
    for name in found:
      if name not in numbers:
        raise InputError(
          f"class folder {os.path.join(root, name)} has no counterpart in "
          f"{training}; both splits need the same classes."
        )
      inside = scan(os.path.join(root, name))
      if not inside:
        raise InputError(
          f"class folder {os.path.join(root, name)} holds no images "
          f"({' '.join(EXTENSIONS)}); fill or remove it."
        )
      files += [os.path.join(name, file) for file in inside]
      labels.append(np.full(len(inside), numbers[name], np.int32))
    super().__init__(root, files, np.concatenate(labels))
    self.name = root
    self.class_names = known


class Flat(ImageFiles):
  """Every image anywhere below a folder, without labels."""

  class_names: Sequence[str] = ()

  def __init__(self, path: str) -> None:
    files = scan(path)
    if not files:
      raise InputError(
        f"data.path={path} holds no images ({' '.join(EXTENSIONS)})."
      )
    super().__init__(path, files, np.full(len(files), -1, np.int32))
    self.name = path
