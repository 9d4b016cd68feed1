"""Images with object masks: `path`/images and `path`/masks."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from attmask_jax.data import files
from attmask_jax.data.decoding import PLAIN, Reading
from attmask_jax.errors import InputError
from attmask_jax.text import printable


class Segmented(files.Flat):
  """Every image of `path`/images whose mask `path`/masks/STEM.* has.

  A mask is an 8-bit image of the same size; above 127 is the object. There are
  no labels, and both splits are the same.
  """

  class_names: Sequence[str] = ()

  def __init__(self, path: str, reading: Reading = PLAIN) -> None:
    folders = {name: os.path.join(path, name) for name in ("images", "masks")}
    for folder in folders.values():
      if not os.path.isdir(folder):
        raise InputError(
          f"{folder} is missing: data.source=segmented expects images/NAME.jpg "
          "and masks/NAME.png below data.path"
        )
    super().__init__(folders["images"], reading)
    stem = lambda name: os.path.splitext(name)[0]
    names = files.scan(folders["masks"], reading.endings)
    masks = {stem(name): name for name in names}
    without = [name for name in self._files if stem(name) not in masks]
    if without:
      raise InputError(
        f"{len(without)} images of {folders['images']} have no mask, such as "
        f"{printable(', '.join(without[:3]))}: add masks/NAME.png or remove "
        "the images"
      )
    self.name = printable(path)
    self._masks = [
      os.path.join(folders["masks"], masks[stem(name)]) for name in self._files
    ]

  def object_mask(self, index: int) -> np.ndarray:
    """[H, W] bool, True on the object.

    Raises:
      InputError: the mask cannot be read, or is of another size.
    """
    path = self._masks[index]
    name = printable(path)
    try:
      with Image.open(path) as image:
        mask = np.asarray(image.convert("L")) > 127
    except Exception as error:  # Pillow's decoders have a dozen kinds
      raise InputError(f"mask {name} cannot be read: {error}") from error
    width, height = self.load(index).size
    if mask.shape != (height, width):
      raise InputError(
        f"mask {name} has {mask.shape[1]} x {mask.shape[0]} pixels and its "
        f"image {width} x {height}: both must be alike"
      )
    return mask

  def fingerprint(self) -> str:
    """Changes with any image or mask."""
    return files.fingerprint(
      "segmented" + self.reading.tag,
      [self.path(i) for i in range(len(self))] + self._masks,
      self.labels,
    )
