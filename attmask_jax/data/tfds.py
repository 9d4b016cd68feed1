"""Data sets of tensorflow-datasets, read without TensorFlow.

The set must have been prepared as ArrayRecord files; images stay encoded until
Pillow decodes them. The package is optional and imported only here, on use.
"""

import hashlib
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from attmask_jax.data.decoding import (
  PLAIN,
  BrokenImage,
  Reading,
  Reduction,
  decode,
)
from attmask_jax.errors import InputError
from attmask_jax.text import printable

_PACKAGES = "pip install tensorflow-datasets array_record importlib_resources"
_FORMAT = "array_record"
_BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # packages that read them
_UNREAD = -2  # a label not looked up yet
_CHUNK = 1024  # records read at a time for their labels


class Tfds:
  """One split of a prepared data set with features "image" and "label".

  Records hold labels beside the images, which are kept as images are loaded.
  Only `labels` (needed by `data.subset`) reads the whole split, still without
  decoding an image.
  """

  def __init__(
    self, spec: str, data_dir: str, split: str, reading: Reading = PLAIN
  ) -> None:
    """Opens the split.

    Args:
      spec: NAME[/CONFIG][:VERSION], as `tfds.builder` takes it.
      data_dir: where it was prepared; "" for the package's own default.
      reading: how images are decoded.
      split: "train", or "val" for the split called validation or else test.

    Raises:
      InputError: the package or the data set is missing, or it was not
        prepared as ArrayRecord, or it has other features.
    """
    package = _import()
    builder = _builder(package, spec, data_dir)
    name = _split_name(builder, spec, split)
    features = dict(builder.info.features or {})
    names = getattr(features.get("label"), "names", None)
    if "image" not in features or names is None:
      raise InputError(
        f"tfds:{spec} has features {sorted(features)}; 'image' and a class "
        "'label' are needed."
      )
    decoders = {"image": package.decode.SkipDecoding()}
    try:
      self._records: Any = builder.as_data_source(name, decoders=decoders)
    except Exception as err:  # of any kind, by the format of the files
      format = str(getattr(builder.info.file_format, "value", "another format"))
      if format == _FORMAT:
        raise InputError(_unreadable(spec, data_dir, err)) from err
      raise InputError(_how_to_prepare(spec, data_dir, format)) from err
    self.name = f"tfds:{spec} {name}"
    self._reading = reading
    self._identity = (builder.info.full_name, str(builder.data_path), name)
    self._folder = str(builder.data_path)
    self.class_names = list(names)
    self._labels = np.full(len(self._records), _UNREAD, np.int32)

  def __len__(self) -> int:
    return len(self._labels)

  @property
  def labels(self) -> np.ndarray:
    """[n] int32; the first use reads every record whose label is unknown."""
    unread = np.flatnonzero(self._labels == _UNREAD)
    for start in range(0, len(unread), _CHUNK):
      rows = unread[start : start + _CHUNK]
      records = self._records.__getitems__(rows.tolist())
      self._labels[rows] = [record["label"] for record in records]
    return self._labels

  def label(self, index: int) -> int:
    """Class of one record; free for an image that has been loaded."""
    if self._labels[index] == _UNREAD:
      self._labels[index] = self._records[index]["label"]
    return int(self._labels[index])

  def describe(self, index: int) -> str:
    """Data set and place of one record."""
    return f"{self.name}[{index}]"

  def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
    """Decodes one record to RGB; raises BrokenImage."""
    try:
      record = self._records[index]
    except Exception as err:  # whatever the record reader makes of damage
      raise BrokenImage(f"{type(err).__name__}: {err}") from err
    self._labels[index] = record["label"]
    file = io.BytesIO(bytes(record["image"]))
    return decode(file, self._reading, reduction)

  def fingerprint(self) -> str:
    """Changes with name, version, folder, split, and any of the files there.

    Of a bucket, whose files cannot be listed like a folder's, without the last.
    """
    stats = []
    if "://" not in self._folder:
      with os.scandir(self._folder) as entries:
        stats = sorted((e.name, e.stat()) for e in entries)
    shards = (f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)
    text = "\n".join((*self._identity, str(len(self)), *shards))
    return hashlib.sha256((text + self._reading.tag).encode()).hexdigest()


def _import() -> Any:
  try:
    import tensorflow_datasets
  except ImportError as err:
    raise InputError(
      f"data.source=tfds:... needs packages that are not installed ({err}); "
      f"run `{_PACKAGES}`."
    ) from err
  return tensorflow_datasets


def _builder(package: Any, spec: str, data_dir: str) -> Any:
  """The builder of a data set that is prepared."""
  try:
    builder = package.builder(spec, data_dir=data_dir or None)
  except (ValueError, AssertionError) as err:
    reason = str(err).splitlines()[0]
    raise InputError(
      f"tensorflow-datasets knows no data set {spec!r} ({reason}); check the "
      "name, configuration and version, and data.path."
    ) from err
  except Exception as err:  # of a bucket: no package for it, no right, no net
    raise InputError(_unreadable(spec, data_dir, err)) from err
  if not builder.is_prepared():
    raise InputError(_how_to_prepare(spec, data_dir))
  return builder


def _split_name(builder: Any, spec: str, split: str) -> str:
  choices = ["train"] if split == "train" else ["validation", "test"]
  present = list(builder.info.splits)
  for name in choices:
    if name in present:
      return name
  raise InputError(
    f"tfds:{spec} has the splits {present} and none called "
    f"{' or '.join(choices)}."
  )


def _unreadable(spec: str, data_dir: str, err: Exception) -> str:
  """A sentence on a data set that the package fails to open."""
  reason = printable(str(err).strip().splitlines()[-1] if str(err) else "")
  if package := _BUCKETS.get(data_dir.partition("://")[0]):
    advice = (
      f"run `pip install {package}`, or copy the prepared set to a local "
      "folder and give that as data.path"
    )
  elif isinstance(err, ImportError):
    advice = f"run `{_PACKAGES}`"
  else:
    advice = "check data.path, or prepare the set again (docs/data.md)"
  return (
    f"tfds:{spec} cannot be opened in {data_dir or 'its default folder'} "
    f"({type(err).__name__}: {reason}); {advice}."
  )


def _how_to_prepare(spec: str, data_dir: str, format: str = "") -> str:
  """A sentence on a data set that is not there, or of another file format."""
  folder = data_dir or "the default folder (data.path is empty)"
  if format:
    state = f"is stored as {format} in {folder}, without random access; prepare"
    state += " it in another folder:"
    data_dir = "ANOTHER_FOLDER"
  else:
    state = f"is not prepared as ArrayRecord in {folder};"
  where = f", data_dir={data_dir!r}" if data_dir else ""
  return (
    f"tfds:{spec} {state} run `{_PACKAGES}` and then "
    '`python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({spec!r}{where}).download_and_prepare("
    f"file_format='{_FORMAT}')\"` (details in docs/data.md)."
  )
