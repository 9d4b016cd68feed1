"""Augmentation of pairs that share their geometry, as ExtreMA pretrains.

The student is told apart from its teacher by colour and by the patches it
sees, never by another crop: their patches stay the same places of the image.
Recipes as in `augment`: called on `(image, rng)`, uint8 views come back.

Source: the --aug-spatialconsistent-color and --aug-centercrop options of
ExtreMA; its --aug-spatial is `supervised.CropFlip`.
"""

import dataclasses

import numpy as np
from PIL import Image

from attmask_jax.augment import supervised, transforms
from attmask_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TwoColours:
  """One random resized crop with a flip, coloured twice.

  Attributes:
    image_size: side of the crop in pixels.
    scale: smallest and largest share of the image's area, above 0 up to 1.
    resample: "bilinear" or "bicubic".
    jitter, grey: probabilities of colour jitter and of a grey view, 0-1.
  """

  image_size: int = 224
  scale: tuple[float, float] = (0.2, 1.0)
  resample: str = "bilinear"
  jitter: float = 0.8
  grey: float = 0.2

  def __post_init__(self) -> None:
    """Refuses what cannot work, before the first image is read."""
    supervised.resampling(self.resample)
    supervised.check_scale(self.scale)
    for name in ("jitter", "grey"):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise InputError(f"data.{name} {value} must lie between 0 and 1")

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """{"images": [2, H, W, 3] uint8}: for the student, for the teacher."""
    image = transforms.random_resized_crop(
      image,
      rng,
      size=self.image_size,
      scale=self.scale,
      resample=supervised.resampling(self.resample),
    )
    image = transforms.random_flip(image, rng)
    colour = transforms.Photometric(
      blur=0.0, jitter=self.jitter, grey=self.grey
    )
    views = [np.asarray(colour(image, rng)) for _ in range(2)]
    return {"images": np.stack(views)}


@dataclasses.dataclass(frozen=True)
class CentreCrop:
  """The central square, the same in every epoch: see `transforms.eval_crop`.

  Attributes:
    image_size: side in pixels.
    resample: "bilinear" or "bicubic".
  """

  image_size: int = 224
  resample: str = "bilinear"

  def __post_init__(self) -> None:
    """Refuses an unknown filter."""
    supervised.resampling(self.resample)

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """{"images": [1, H, W, 3] uint8} of one RGB image."""
    del rng  # nothing is drawn
    crop = transforms.eval_crop(image, self.image_size, resample=self.resample)
    return {"images": np.asarray(crop)[None]}
