"""Batches of augmented images, each a pure function of the step.

Epoch e uses the first S * B entries of its own permutation of the data set, and
every draw is keyed by (seed, epoch, index, copy): a run that stops continues
with the same batches, on any number of threads or processes.
Grain's threads prepare the next batches while the current step runs.
"""

import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from attmask_jax.augment import canvas, transforms
from attmask_jax.data import keys
from attmask_jax.data.decoding import BrokenImage
from attmask_jax.data.sources import Source
from attmask_jax.errors import InputError

HostBatch = dict[str, np.ndarray]
Transform = Callable[[Image.Image, np.random.Generator], HostBatch]
Extras = Callable[[int, int], HostBatch]

# Last word of a generator's key, one per use. Never 0: NumPy pads a short key
# with zeros, so that [a, b] and [a, b, 0, 0] are the same stream.
ORDER_TAG = 1
AUGMENT_TAG = 2

_LISTED = 20  # broken files named in the error that stops a run

_log = logging.getLogger(__name__)


class BrokenFiles:
  """Unreadable images so far; stops the run when there are too many.

  The share is of the whole data set: one broken file in fifty is 2 %. A
  process counts the files that it has read itself and, with every checkpoint,
  those of the others.

  Attributes:
    reasons: why an image cannot be read, by index.
  """

  def __init__(self, source: Source, max_share: float) -> None:
    self.reasons: dict[int, str] = {}
    self._source = source
    self._max_share = max_share
    self._lock = threading.Lock()

  def add(self, index: int, reason: str) -> None:
    """Records and logs one file, once.

    Raises:
      InputError: more than `max_share` of the data set is broken.
    """
    with self._lock:
      if index not in self.reasons:
        self.reasons[index] = reason
        _log.warning(
          "unreadable image %d of the run: %s (%s)",
          len(self.reasons),
          self._source.describe(index),
          reason,
        )
      if len(self.reasons) > self._max_share * len(self._source):
        raise InputError(self._message())

  def snapshot(self) -> dict[int, str]:
    """A copy of `reasons`, taken while no thread adds to it."""
    with self._lock:
      return dict(self.reasons)

  def restore(self, reasons: dict[int, str]) -> None:
    """Adds files of before or of other processes, without logging them again.

    Raises:
      InputError: together they are too many.
    """
    with self._lock:
      self.reasons |= reasons
      if len(self.reasons) > self._max_share * len(self._source):
        raise InputError(self._message())

  def _message(self) -> str:
    first = sorted(self.reasons)[:_LISTED]
    names = "; ".join(
      f"{self._source.describe(i)} ({self.reasons[i]})" for i in first
    )
    rest = len(self.reasons) - len(first)
    return (
      f"{len(self.reasons)} of the {len(self._source)} images of "
      f"{self._source.name} cannot be read, more than data.max_broken="
      f"{self._max_share} allows; repair or remove them: {names}"
      + (f"; and {rest} more." if rest else ".")
    )


class TrainPipeline:
  """Training batches from a source and an augmentation recipe.

  Attributes:
    steps_per_epoch: S = n // B; the rest of each permutation is left out.
  """

  def __init__(
    self,
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    positions: Sequence[int] | np.ndarray | None = None,
    extras: Extras | None = None,
    threads: int = keys.LoadKeys.threads,
    prefetch: int = keys.LoadKeys.prefetch,
    max_broken: float = keys.ReadKeys.max_broken,
    repeats: int = keys.RepeatKeys.repeats,
  ) -> None:
    """Checks the sizes; reads nothing yet.

    Args:
      source: the images.
      transform: augmentation of one image, `(image, rng) -> {name: array}`,
        with the same shapes for every image; or `canvas.OnCanvas`, which has
        large files decoded at a smaller size.
      batch_size: B, the global batch.
      seed: of the order and the augmentation, >= 0.
      positions: rows of the global batch that this process loads, each within
        [0, B); all of them by default.
      extras: `(epoch, index) -> {name: array}` per image; copies share them.
      threads: that decode and augment; 0 for one per core.
      prefetch: batches prepared ahead, >= 1.
      max_broken: largest share of unreadable files, 0-1.
      repeats: copies of an image in a row, each augmented on its own. An epoch
        has S steps all the same, so it sees n / repeats of the images.

    Raises:
      InputError: the data set has fewer images than a batch.

    Source (repeats): RASampler of DeiT. differs: it first cuts an epoch to a
    multiple of 256 images and deals an image's copies out to the devices.
    """
    if not 1 <= batch_size <= len(source):
      raise InputError(
        f"data.batch_size={batch_size} does not fit {source.name} with its "
        f"{len(source)} images; choose between 1 and {len(source)}."
      )
    if seed < 0:
      raise InputError(f"data.seed={seed} must not be negative.")
    if repeats < 1:
      raise InputError(f"data.repeats={repeats} must be at least 1")
    self.steps_per_epoch = len(source) // batch_size
    self._source = source
    self._transform = transform
    self._batch_size = batch_size
    self._seed = seed
    rows = range(batch_size) if positions is None else positions
    self._positions = [int(row) for row in rows]
    self._extras = extras
    self._threads = threads
    self._prefetch = prefetch
    self._repeats = repeats
    self._broken = BrokenFiles(source, max_broken)
    self._orders: dict[int, np.ndarray] = {}
    self._lock = threading.Lock()

  @property
  def broken(self) -> dict[int, str]:
    """Reason by index, of every unreadable file so far."""
    return self._broken.snapshot()

  def restore_broken(self, reasons: dict[int, str]) -> None:
    """Takes up the `broken` of an earlier part of the run."""
    self._broken.restore(reasons)

  def order(self, epoch: int) -> np.ndarray:
    """Indices that an epoch uses, each `repeats` times: [S * B] int32."""
    with self._lock:
      if epoch not in self._orders:
        # Threads prefetch across one epoch end at a time: two are enough.
        while len(self._orders) > 1:
          self._orders.pop(min(self._orders))
        rng = np.random.default_rng([self._seed, epoch, 0, ORDER_TAG])
        order = rng.permutation(np.arange(len(self._source), dtype=np.int32))
        used = self.steps_per_epoch * self._batch_size
        self._orders[epoch] = np.repeat(order, self._repeats)[:used]
      return self._orders[epoch]

  def batches(
    self, start_step: int, stop_step: int
  ) -> Generator[HostBatch, None, None]:
    """The batches of steps start_step, ..., stop_step - 1.

    Close the generator (`contextlib.closing`) when leaving it early, by an
    exception too: that cancels what is being prepared and ends the threads,
    for which Python would otherwise wait when the program ends.

    Yields:
      The arrays of the transform and the extras with a leading axis over
      `positions`, and "label" (-1 for none), "index" and "position", each
      [len(positions)] int32. An unreadable image is replaced by the next
      readable one, whose label and index the batch then carries.

    Raises:
      InputError: too many files cannot be read.
    """
    rows = len(self._positions)
    return _stream(
      self._item,
      range(start_step * rows, stop_step * rows),
      batch_size=rows,
      threads=self._threads,
      prefetch=self._prefetch,
      stack=self._stack,
    )

  def _stack(self, items: Sequence[HostBatch]) -> HostBatch:
    if not isinstance(self._transform, canvas.OnCanvas):
      return _stack(items)
    images = self._transform.stack([item.pop(canvas.CANVAS) for item in items])
    return _stack(items) | {canvas.CANVAS: images}

  def example(self) -> HostBatch:
    """This process's first row of the first batch: name -> [...]."""
    batch = self._stack([self._item(0)])
    return {name: values[0] for name, values in batch.items()}

  def _item(self, item: int) -> HostBatch:
    """Row `item` of the endless sequence of this process's rows."""
    step, row = divmod(int(item), len(self._positions))
    epoch, step = divmod(step, self.steps_per_epoch)
    position = self._positions[row]
    place = step * self._batch_size + position
    requested = int(self.order(epoch)[place])
    # Keyed by the requested image: a replacement, which also occurs as itself
    # in this epoch, is cropped differently there.
    key = [self._seed, epoch, requested, AUGMENT_TAG]
    if copy := place % self._repeats:
      key.append(copy)
    index, arrays = self._load(requested, key)
    if self._extras is not None:
      arrays |= self._extras(epoch, requested)
    arrays["label"] = np.int32(self._source.label(index))
    arrays["index"] = np.int32(index)
    arrays["position"] = np.int32(position)
    return arrays

  def _load(self, requested: int, key: list[int]) -> tuple[int, HostBatch]:
    """The augmented image, or the next readable one, with its index."""
    count = len(self._source)
    for offset in range(count):
      index = (requested + offset) % count
      rng = np.random.default_rng(key)
      try:
        return index, self._augmented(index, rng)
      except BrokenImage as err:
        self._broken.add(index, str(err))
    raise InputError(f"none of the {count} images can be read.")

  def _augmented(self, index: int, rng: np.random.Generator) -> HostBatch:
    if not isinstance(self._transform, canvas.OnCanvas):
      return dict(self._transform(self._source.load(index), rng))
    placing = self._transform.start(rng)
    return placing.arrays(self._source.load(index, placing.reduction))


def eval_batches(
  source: Source,
  *,
  image_size: int,
  batch_size: int,
  indices: Sequence[int] | np.ndarray | None = None,
  threads: int = keys.LoadKeys.threads,
  prefetch: int = 2,
  max_broken: float = keys.ReadKeys.max_broken,
  crop: Callable[[Image.Image, int], Image.Image] = transforms.eval_crop,
  views: Callable[[Image.Image, int], np.ndarray] | None = None,
) -> Generator[HostBatch, None, None]:
  """Images in order, with the evaluation crop, in full batches only.

  Args:
    source: the images.
    image_size: side of the crop in pixels.
    batch_size: rows per batch.
    indices: which images, all by default.
    threads, prefetch, max_broken: as in `TrainPipeline`.
    crop: `(image, size) -> image` of size x size pixels.
    views: `(image, index) -> [2, size, size, 3]` uint8, instead of a crop.

  Yields:
    "images" [B, H, W, 3] uint8, of views [B, 2, H, W, 3], "label" and "index"
    [B] int32, "valid" [B] bool. Rows that fill up the last batch are zero
    images with label -1, index -1, valid False. An unreadable image is never
    replaced, since a score must not count another one twice: its row is a zero
    image with label -1, valid False and its own index.

  Raises:
    InputError: too many files cannot be read.
  """
  chosen = np.arange(len(source)) if indices is None else np.asarray(indices)
  broken = BrokenFiles(source, max_broken)

  def row(item: int) -> HostBatch:
    index = int(chosen[item]) if item < len(chosen) else -1
    shape = (image_size, image_size, 3)
    image = np.zeros(shape if views is None else (2, *shape), np.uint8)
    label, valid = -1, False
    if index >= 0:
      try:
        picture = source.load(index)
        if views is None:
          image = np.asarray(crop(picture, image_size))
        else:
          image = views(picture, index)
        label, valid = source.label(index), True
      except BrokenImage as err:
        broken.add(index, str(err))
    return {
      "images": image,
      "label": np.int32(label),
      "index": np.int32(index),
      "valid": np.bool_(valid),
    }

  padded = -(-len(chosen) // batch_size) * batch_size
  return _stream(
    row,
    range(padded),
    batch_size=batch_size,
    threads=threads,
    prefetch=prefetch,
  )


def _stack(items: Sequence[HostBatch]) -> HostBatch:
  return {name: np.stack([item[name] for item in items]) for name in items[0]}


def _stream(
  load: Callable[[int], HostBatch],
  items: range,
  *,
  batch_size: int,
  threads: int,
  prefetch: int,
  stack: Callable[[Sequence[HostBatch]], HostBatch] = _stack,
) -> Generator[HostBatch, None, None]:
  """Batches of `load(item)`, prepared ahead in threads (0 = one per core).

  `load` gives dicts of equally shaped arrays and is called from many threads;
  `items` are a whole number of batches.
  """
  threads = threads or cores()
  options = grain.ReadOptions(
    num_threads=threads,
    prefetch_buffer_size=max(prefetch * batch_size, threads),
  )
  rows = grain.MapDataset.range(items.start, items.stop)
  rows = rows.map(load).to_iter_dataset(options)
  iterator: Iterator[Any] = iter(rows.batch(batch_size, batch_fn=stack))
  try:
    yield from iterator
  finally:
    iterator.close()


def cores() -> int:
  """Cores that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not on Linux
    return os.cpu_count() or 1
