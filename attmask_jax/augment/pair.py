"""Augmentation of pairs that share their geometry, for ExtreMA.

Student and teacher get different colours and patches but the same crop, so that
a patch is the same part of the image for both. Recipes as in `transforms`:
called on `(image, rng)`, they return uint8 views.

Source: the --aug-spatialconsistent-color and --aug-centercrop options of
ExtreMA; its --aug-spatial is `supervised.CropFlip`.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from PIL import Image

from attmask_jax import schema
from attmask_jax.augment import draws, supervised, transforms


@dataclasses.dataclass(frozen=True)
class TwoColours(supervised.CropFlip):
  """One random resized crop with a flip, in two colour augmentations.

  Arrays: "images" [2, image_size, image_size, 3], student and teacher.
  """

  recolours: ClassVar[bool] = True

  scale: tuple[float, float] = schema.inherit(
    supervised.CropFlip, "scale", (0.2, 1.0)
  )
  jitter: float = schema.inherit(transforms.MultiCrop, "jitter", 0.8)
  grey: float = schema.inherit(transforms.MultiCrop, "grey", 0.2)

  def draw(
    self, size: tuple[int, int], rng: np.random.Generator
  ) -> dict[str, list[draws.View]]:
    """For the student and for the teacher."""
    geometry = transforms.draw_geometry(size, rng, self.scale)
    kind = draws.Photometric(blur=0.0, jitter=self.jitter, grey=self.grey)
    return {"images": [kind.draw(geometry, rng) for _ in range(2)]}


@dataclasses.dataclass(frozen=True)
class CentreCrop(transforms.Recipe):
  """The central square, the same in every epoch: see `transforms.eval_crop`."""

  resample: str = schema.inherit(supervised.CropFlip, "resample", "bilinear")

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """{"images": [1, H, W, 3] uint8} of one RGB image."""
    del rng  # not random
    crop = transforms.eval_crop(image, self.image_size, resample=self.resample)
    return {"images": np.asarray(crop)[None]}
