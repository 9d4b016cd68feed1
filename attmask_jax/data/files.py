"""Folders of image files."""

import collections
import errno
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from attmask_jax.data.decoding import PLAIN, Reading, Reduction, decode
from attmask_jax.errors import InputError
from attmask_jax.text import printable

_log = logging.getLogger(__name__)

# Folders that programs leave behind; those with a dot in front are, too.
_LEFTOVERS = frozenset(
  (
    "__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN",
    "System Volume Information",
  )
)  # fmt: skip

Endings = collections.Counter[str]  # of files that are left out


def scan(
  folder: str,
  endings: frozenset[str] = PLAIN.endings,
  left_out: Endings | None = None,
) -> list[str]:
  """Image files anywhere below `folder`, sorted; paths relative to it.

  A link to nothing is a file that cannot be read, and a link to a folder above
  itself is not followed. `scandir` gives the kind of each entry without a call
  per file, which is what keeps a million files to seconds. Hidden files are no
  images (macOS leaves `._x.jpg` behind when it copies).

  Args:
    folder: that exists.
    endings: of image files, in lower case.
    left_out: counts the endings of other files.
  """
  root = os.path.realpath(folder)
  files, pending = [], [("", (root,))]
  while pending:
    below, chain = pending.pop()
    for entry in _entries(os.path.join(folder, below)):
      path = os.path.join(below, entry.name)
      if _is_folder(entry):
        inside = os.path.join(chain[-1], entry.name)
        if entry.is_symlink():
          inside = os.path.realpath(inside)
          if _leads_back(inside, chain):
            _log.warning(
              "%s links to a folder above itself: it is not followed",
              printable(os.path.join(folder, path)),
            )
            continue
        pending.append((path, (*chain, inside)))
      elif (ending := os.path.splitext(entry.name)[1].lower()) in endings:
        files.append(path)
      elif left_out is not None:
        left_out[ending] += 1
  files.sort()
  return files


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
  """What lies directly in a folder, without hidden entries and leftovers."""
  with os.scandir(folder) as entries:
    for entry in entries:
      if not entry.name.startswith(".") and entry.name not in _LEFTOVERS:
        yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
  """Whether this is a folder or a link to one."""
  try:
    return entry.is_dir()
  except OSError as error:
    if error.errno != errno.ELOOP:  # a link to itself: a file without content
      raise
    return False


def _leads_back(folder: str, chain: tuple[str, ...]) -> bool:
  """Whether a link's target holds one of the folders that led to the link."""
  return any(
    os.path.join(above, "").startswith(os.path.join(folder, ""))
    for above in chain
  )


def class_folders(root: str) -> list[str]:
  """Folders directly in `root`, sorted; hidden ones and leftovers left out.

  Raises:
    InputError: one is a link to nothing.
  """
  names = []
  for entry in _entries(root):
    if _is_folder(entry):
      names.append(entry.name)
    elif (
      entry.is_symlink()
      and not os.path.splitext(entry.name)[1]
      and not os.path.exists(entry.path)
    ):
      raise InputError(
        f"class folder {printable(entry.path)} is a link to "
        f"{printable(os.readlink(entry.path))}, which does not exist: restore "
        "or remove it"
      )
  return sorted(names)


def log_left_out(folder: str, images: int, left_out: Endings) -> None:
  """Says how many files of which endings are no images."""
  if not left_out:
    return
  readable = Image.registered_extensions()
  known = [e for e in left_out if readable.get(e) in Image.OPEN]
  advice = ",".join(sorted(known) + ["none"] * ("" in left_out))
  _log.warning(
    "%d of %d files below %s are left out by their endings: %s%s",
    left_out.total(),
    left_out.total() + images,
    printable(folder),
    _counts(left_out),
    f" (--config.data.extensions={advice} adds them)" if advice else "",
  )


def _counts(left_out: Endings) -> str:
  """Endings and how often each occurs, the ten most frequent ones."""
  named = [
    f"{count} {printable(ending) or 'without an ending'}"
    for ending, count in left_out.most_common(10)
  ]
  return ", ".join(named) + ", ..." * (len(left_out) > 10)


def no_images(what: str, endings: frozenset[str], left_out: Endings) -> str:
  """The beginning of a message about a folder without images."""
  others = f", but {_counts(left_out)}" if left_out else ""
  listed = " ".join(sorted(endings - {""}))
  return f"{printable(what)} holds no images ({listed}){others}"


def fingerprint(kind: str, paths: Sequence[str], labels: np.ndarray) -> str:
  """Changes with any file's name, size or time, any label, or their order.

  One `stat` per file: seconds for a million on a local disk. A file that is
  not there, as behind a dangling link, counts with its name.
  """
  total = hashlib.sha256(kind.encode())
  for path in paths:
    try:
      status = os.stat(path)
      line = f"{path} {status.st_size} {status.st_mtime_ns}\n"
    except OSError:
      line = f"{path} missing\n"
    total.update(line.encode("utf-8", "surrogateescape"))
  total.update(np.ascontiguousarray(labels, np.int64).tobytes())
  return total.hexdigest()


class ImageFiles:
  """Image files below one folder."""

  def __init__(
    self,
    root: str,
    files: list[str],
    labels: np.ndarray,
    reading: Reading = PLAIN,
  ) -> None:
    self.root = root
    self.labels = labels
    self.reading = reading
    self._files = files

  def __len__(self) -> int:
    return len(self._files)

  def label(self, index: int) -> int:
    """Label of one file, -1 for none."""
    return int(self.labels[index])

  def path(self, index: int) -> str:
    """Path of one file, any bytes."""
    return os.path.join(self.root, self._files[index])

  def describe(self, index: int) -> str:
    """Path of one file, as it may be printed."""
    return printable(self.path(index))

  def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
    """Decodes one file to RGB; raises BrokenImage."""
    return decode(self.path(index), self.reading, reduction)

  def fingerprint(self) -> str:
    """Changes with any file, any label, their order, or how they are read."""
    paths = [self.path(i) for i in range(len(self))]
    return fingerprint("files" + self.reading.tag, paths, self.labels)


class Folder(ImageFiles):
  """`path`/train and `path`/val with one folder per class.

  Classes are numbered by sorted folder name, files sorted by path below it.
  Validation classes take their numbers from the training folder when there is
  one.
  """

  def __init__(self, path: str, split: str, reading: Reading = PLAIN) -> None:
    root = os.path.join(path, split)
    test = os.path.join(path, "test")
    if split == "val" and not os.path.isdir(root) and os.path.isdir(test):
      _log.info("%s has no val/: evaluating on test/", printable(path))
      root = test
    if not os.path.isdir(root):
      raise InputError(
        f"{path} has no folder {split}/; data.source=folder expects "
        "train/CLASS/*.jpg and val/CLASS/*.jpg (data.source=flat takes a "
        "folder without classes)."
      )
    classes = class_folders(root)
    if not classes:
      raise InputError(
        f"{root} holds no class folders; expected {root}/CLASS/*.jpg "
        "(data.source=flat takes a folder without classes)."
      )
    training = os.path.join(path, "train")
    known = class_folders(training) if os.path.isdir(training) else classes
    files, labels = _labelled(root, classes, known, training, reading)
    super().__init__(root, files, labels, reading)
    self.name = printable(root)
    self.class_names = [printable(name) for name in known]


def _labelled(
  root: str,
  classes: Sequence[str],
  known: Sequence[str],
  training: str,
  reading: Reading,
) -> tuple[list[str], np.ndarray]:
  """Files of all class folders, and the number of each one's class [n] int32.

  Raises:
    InputError: a class that is not among the known ones, or without images.
  """
  numbers = {name: number for number, name in enumerate(known)}
  endings, left_out = reading.endings, Endings()
  files, labels = [], []
  for name in classes:
    folder = os.path.join(root, name)
    if name not in numbers:
      raise InputError(
        f"class folder {printable(folder)} has no counterpart in "
        f"{training}; both splits need the same classes."
      )
    others = Endings()
    inside = scan(folder, endings, others)
    if not inside:
      what = no_images(f"class folder {folder}", endings, others)
      raise InputError(f"{what}; fill or remove it.")
    files += [os.path.join(name, file) for file in inside]
    labels.append(np.full(len(inside), numbers[name], np.int32))
    left_out += others
  log_left_out(root, len(files), left_out)
  loose = [
    entry.name
    for entry in _entries(root)
    if not _is_folder(entry)
    and os.path.splitext(entry.name)[1].lower() in endings
  ]
  if loose:
    _log.warning(
      "%d images lie directly in %s, beside the class folders, and are not "
      "used, such as %s",
      len(loose),
      printable(root),
      printable(min(loose)),
    )
  return files, np.concatenate(labels)


class Flat(ImageFiles):
  """Every image anywhere below a folder, without labels."""

  class_names: Sequence[str] = ()

  def __init__(self, path: str, reading: Reading = PLAIN) -> None:
    left_out = Endings()
    files = scan(path, reading.endings, left_out)
    if not files:
      what = no_images(f"data.path={path}", reading.endings, left_out)
      raise InputError(f"{what}.")
    log_left_out(path, len(files), left_out)
    super().__init__(path, files, np.full(len(files), -1, np.int32), reading)
    self.name = printable(path)
