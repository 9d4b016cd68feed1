"""CIFAR-10 and CIFAR-100 from their official binary files."""

import hashlib
import os

import numpy as np
from PIL import Image

from attmask_jax.data.decoding import Reduction
from attmask_jax.errors import InputError

_CIFAR = {
  # folder, training files, validation file, bytes of labels, file of names
  "cifar10": (
    "cifar-10-batches-bin",
    [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test_batch.bin",
    1,
    "batches.meta.txt",
  ),
  "cifar100": (
    "cifar-100-binary",
    ["train.bin"],
    "test.bin",
    2,
    "fine_label_names.txt",
  ),
}


class Cifar:
  """CIFAR-10 or CIFAR-100 in the official binary version, 32 x 32 pixels.

  A record is one label byte (CIFAR-100: coarse, then fine; the fine one is
  taken) and 3072 bytes of channel-first pixels. All of it is held in memory.
  """

  def __init__(self, path: str, kind: str, split: str) -> None:
    folder, train, val, self._offset, names = _CIFAR[kind]
    self._names = train if split == "train" else [val]
    inner = os.path.join(path, folder)
    root = inner if os.path.isdir(inner) else path
    records = [self._read(os.path.join(root, f), kind) for f in self._names]
    self._ends = np.cumsum([len(part) for part in records])
    self._records = np.concatenate(records)
    self.labels = self._records[:, self._offset - 1].astype(np.int32)
    classes = 10 if kind == "cifar10" else 100
    self.class_names = [str(i) for i in range(classes)]
    names_file = os.path.join(root, names)
    if os.path.isfile(names_file):
      with open(names_file, encoding="utf-8") as lines:
        self.class_names = [x.strip() for x in lines if x.strip()]
    self.name = f"{kind} {split} in {root}"
    if self.labels.max() >= classes:
      raise InputError(
        f"{root} has a label {self.labels.max()} where {kind} has {classes} "
        "classes; is it the other CIFAR?"
      )

  def _read(self, file: str, kind: str) -> np.ndarray:
    """Records of one file: [n, labels + 3072] uint8."""
    if not os.path.isfile(file):
      archive = kind.replace("cifar", "cifar-") + "-binary.tar.gz"
      raise InputError(
        f"{file} is missing; unpack the binary version ({archive} from "
        "https://www.cs.toronto.edu/~kriz/cifar.html) into data.path."
      )
    data = np.fromfile(file, np.uint8)
    size = self._offset + 3072
    if not len(data) or len(data) % size:
      raise InputError(
        f"{file} has {len(data)} bytes, which is not a whole number of "
        f"{size}-byte records; download it again."
      )
    return data.reshape(-1, size)

  def __len__(self) -> int:
    return len(self._records)

  def label(self, index: int) -> int:
    """Class of one record."""
    return int(self.labels[index])

  def describe(self, index: int) -> str:
    """File and place of one record."""
    file = int(np.searchsorted(self._ends, index, side="right"))
    start = self._ends[file - 1] if file else 0
    return f"{self._names[file]}[{index - start}]"

  def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
    """One record as an RGB image, never reduced."""
    del reduction
    pixels = self._records[index, self._offset :].reshape(3, 32, 32)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

  def fingerprint(self) -> str:
    """Hash of all records."""
    return hashlib.sha256(self._records.tobytes()).hexdigest()
