"""Where images come from: one small class per kind of data set.

A source knows how many images there are, their labels, and how to read one of
them; it decodes nothing until asked and never changes, so any thread may read
any image at any time. `build` makes the one that a config names.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from attmask_jax.data import (
  cifar,
  files,
  flowers,
  objects,
  segmented,
  shapes,
  tfds,
)
from attmask_jax.data.decoding import Reading, Reduction
from attmask_jax.errors import InputError

KINDS = (
  "objects, shapes, folder, flat, segmented, flowers, cifar10, cifar100 or "
  "tfds:NAME"
)
GENERATED = {"objects": objects.Objects, "shapes": shapes.Shapes}

_log = logging.getLogger(__name__)


class Source(Protocol):
  """What the input pipeline asks of a data set.

  Attributes:
    name: what it is and where, for messages.
    class_names: one name per class; empty for a set without labels.
    labels: [n] int32, -1 for no label. May have to read every record
      (tfds): use `label` for the image at hand.
  """

  name: str
  class_names: Sequence[str]

  @property
  def labels(self) -> np.ndarray: ...

  def __len__(self) -> int: ...

  def label(self, index: int) -> int:
    """Label of one image, -1 for none."""
    ...

  def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
    """Upright 8-bit RGB image; raises decoding.BrokenImage if unreadable.

    Sources of files may decode it smaller, see `decoding.decode`.
    """
    ...

  def describe(self, index: int) -> str:
    """Name of one image for logs: its path, or its place in a record file."""
    ...

  def fingerprint(self) -> str:
    """Changes whenever an image, a label or the order may have changed."""
    ...


def build(data: Any, split: str) -> Source | None:
  """The source that the `data` section of a config names.

  Args:
    data: config with source, path, subset, seed, image_size, shapes_train,
      shapes_val and, if they are not the defaults, the keys of `Reading`.
    split: "train" (cut down to `data.subset` images per class) or "val"
      (always whole).

  Returns:
    A source with at least one image, or None for the validation split of a
    flat folder: it has no labels, so nothing can be evaluated online.

  Raises:
    InputError: the source is unknown, missing, empty or too small.
  """
  if split not in ("train", "val"):
    raise ValueError(f"split {split!r} is neither 'train' nor 'val'")
  kind = data.source
  if kind == "flat" and split == "val":
    _log.warning(
      "data.source=flat has no labels: online k-NN and every other evaluation "
      "on labels is off."
    )
    return None
  source = _build_whole(data, kind, split)
  if split == "train" and data.subset:
    return Subset(source, data.subset)
  return source


def _build_whole(data: Any, kind: str, split: str) -> Source:
  reading = Reading.of(data)
  if kind in GENERATED:
    count = data.shapes_train if split == "train" else data.shapes_val
    if count < 1:
      raise InputError(f"data.shapes_{split}={count} must be at least 1.")
    return GENERATED[kind](
      count, size=data.image_size, seed=data.seed, split=split
    )
  if kind.startswith("tfds:") and kind != "tfds:":
    return tfds.Tfds(kind.removeprefix("tfds:"), data.path, split, reading)
  if kind == "folder":
    return files.Folder(_existing(data.path, kind), split, reading)
  if kind == "flat":
    return files.Flat(_existing(data.path, kind), reading)
  if kind == "segmented":
    return segmented.Segmented(_existing(data.path, kind), reading)
  if kind == "flowers":
    return flowers.Flowers(_existing(data.path, kind), split, reading)
  if kind in ("cifar10", "cifar100"):
    return cifar.Cifar(_existing(data.path, kind), kind, split)
  raise InputError(f"data.source={kind!r} is unknown; it can be {KINDS}.")


def _existing(path: str, kind: str) -> str:
  if not path:
    raise InputError(
      f"data.source={kind} needs a folder: set --config.data.path=FOLDER."
    )
  path = os.path.expanduser(path)
  if not os.path.isdir(path):
    raise InputError(
      f"data.path={path} is not an existing folder; set --config.data.path to "
      "the folder that holds the data set."
    )
  return path


class Subset:
  """The first `per_class` images of every class of a source.

  Order: class by class, within a class as in the source.

  Attributes:
    indices: [n] where each image stands in the source.

  Source: `--subset` of the reference, for any number of classes.
  """

  def __init__(self, source: Source, per_class: int) -> None:
    labels = source.labels
    if per_class < 0 or not len(source.class_names) or labels.min() < 0:
      raise InputError(
        f"data.subset={per_class} needs a labelled data set and a positive "
        f"count; {source.name} has {len(source.class_names)} classes."
      )
    counts = np.bincount(labels, minlength=len(source.class_names))
    scarce = int(np.argmin(counts))
    if counts[scarce] < per_class:
      raise InputError(
        f"data.subset={per_class} is larger than class "
        f"{source.class_names[scarce]} of {source.name}, which has "
        f"{counts[scarce]} images; use at most that."
      )
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    picks = starts[:, None] + np.arange(per_class)
    self.indices = order[picks.reshape(-1)]
    self.labels = labels[self.indices]
    self.class_names = source.class_names
    self.name = f"{source.name} ({per_class} per class)"
    self._source = source

  def __len__(self) -> int:
    return len(self.indices)

  def label(self, index: int) -> int:
    """Label of one image."""
    return int(self.labels[index])

  def describe(self, index: int) -> str:
    """Name of one image in the whole source."""
    return self._source.describe(int(self.indices[index]))

  def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
    """One image of the whole source."""
    return self._source.load(int(self.indices[index]), reduction)

  def fingerprint(self) -> str:
    """That of the whole source, and which images of it."""
    chosen = np.ascontiguousarray(self.indices, np.int64).tobytes()
    inner = self._source.fingerprint().encode()
    return hashlib.sha256(inner + chosen).hexdigest()
