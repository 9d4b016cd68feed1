"""Augmentation of pairs that share their geometry, for ExtreMA.

Student and teacher get different colours and patches but the same crop, so that
a patch is the same part of the image for both. Recipes as in `transforms`:
called on `(image, rng)`, they return uint8 views.

Source: the --aug-spatialconsistent-color and --aug-centercrop options of
ExtreMA; its --aug-spatial is `supervised.CropFlip`.
"""

import dataclasses

import numpy as np
from PIL import Image

from attmask_jax import schema
from attmask_jax.augment import supervised, transforms


@dataclasses.dataclass(frozen=True)
class TwoColours(supervised.CropFlip):
  """One random resized crop with a flip, in two colour augmentations."""

  scale: tuple[float, float] = schema.inherit(
    supervised.CropFlip, "scale", (0.2, 1.0)
  )
  jitter: float = schema.inherit(transforms.MultiCrop, "jitter", 0.8)
  grey: float = schema.inherit(transforms.MultiCrop, "grey", 0.2)

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """{"images": [2, H, W, 3] uint8}: for the student and for the teacher."""
    image = transforms.random_resized_crop(
      image,
      rng,
      size=self.image_size,
      scale=self.scale,
      resample=transforms.RESAMPLE[self.resample],
    )
    image = transforms.random_flip(image, rng)
    colour = transforms.Photometric(
      blur=0.0, jitter=self.jitter, grey=self.grey
    )
    views = [np.asarray(colour(image, rng)) for _ in range(2)]
    return {"images": np.stack(views)}


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
