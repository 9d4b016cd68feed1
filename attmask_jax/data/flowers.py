"""Oxford Flowers-102 as its authors distribute it."""

import os

import numpy as np

from attmask_jax.data import files
from attmask_jax.data.decoding import PLAIN, Reading
from attmask_jax.errors import InputError
from attmask_jax.text import printable

CLASSES = 102


class Flowers(files.ImageFiles):
  """`path`/jpg, `path`/imagelabels.mat and `path`/setid.mat.

  "train" are the official training and validation images (2040), "val" the
  official test images (6149), as the reference fine-tunes. Labels count from 0.
  """

  def __init__(self, path: str, split: str, reading: Reading = PLAIN) -> None:
    from scipy import io  # slow import, only needed here

    tables = {}
    for name in ("imagelabels.mat", "setid.mat"):
      file = os.path.join(path, name)
      if not os.path.isfile(file):
        raise InputError(
          f"{file} is missing: data.source=flowers expects jpg/, "
          "imagelabels.mat and setid.mat of Oxford Flowers-102 in data.path"
        )
      try:
        tables |= io.loadmat(file)
      except Exception as error:  # scipy raises many kinds
        raise InputError(f"{file} cannot be read: {error}") from error
    keys = ("trnid", "valid") if split == "train" else ("tstid",)
    numbers = np.concatenate([tables[key].ravel() for key in keys])
    names = [f"image_{number:05d}.jpg" for number in numbers]
    root = os.path.join(path, "jpg")
    missing = [n for n in names if not os.path.isfile(os.path.join(root, n))]
    if missing:
      raise InputError(
        f"{len(missing)} images are missing in {root}, such as {missing[0]}: "
        "unpack 102flowers.tgz there"
      )
    labels = tables["labels"].ravel()[numbers - 1].astype(np.int32) - 1
    super().__init__(root, names, labels, reading)
    self.name = printable(f"flowers {split} in {path}")
    self.class_names = [str(i) for i in range(CLASSES)]
