"""Augmentation of supervised training: linear probes and fine-tuning.

Recipes as in `transforms`: called on `(image, rng)`, they return a dict of
arrays; images are uint8 with one view.

Source: torchvision's transforms of linear probes; timm's create_transform
(v0.4.12) as called by DeiT.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from PIL import Image

from attmask_jax import schema
from attmask_jax.augment import colours, draws, randaugment, transforms
from attmask_jax.augment.transforms import RESAMPLE

SMALL = 32  # images of up to this side are shifted, not resized


def random_shift(
  image: Image.Image, rng: np.random.Generator, *, padding: int = 4
) -> Image.Image:
  """Random crop of the image's own size after padding with black pixels."""
  left, top = rng.integers(-padding, padding + 1, size=2).tolist()
  # `crop` fills pixels outside the image with zeros.
  return image.crop((left, top, left + image.width, top + image.height))


def erase_box(
  height: int,
  width: int,
  rng: np.random.Generator,
  *,
  prob: float,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> np.ndarray:
  """Draws the box of random erasing; `mixup.erase` fills it.

  Args:
    height, width: of the image, in pixels.
    rng: of this image.
    prob: probability of a box, 0-1.
    area: smallest and largest share of the image.
    aspect: smallest and largest height / width, drawn log-uniformly.

  Returns:
    [4] int32: top, left, bottom, right, both sides shorter than the image's;
    zeros for no box, also if none of ten attempts fits.

  Source: timm.data.random_erasing, mode "pixel", one box.
  """
  none = np.zeros(4, np.int32)
  if rng.random() >= prob:
    return none
  low, high = math.log(aspect[0]), math.log(aspect[1])
  for _ in range(10):
    pixels = height * width * rng.uniform(*area)
    ratio = math.exp(rng.uniform(low, high))
    h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
    if h < height and w < width:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return np.array([top, left, top + h, left + w], np.int32)
  return none


@dataclasses.dataclass(frozen=True)
class CropFlip(transforms.Drawn):
  """A random resized crop, mirrored half of the time, for linear probes.

  Arrays: "images" [1, image_size, image_size, 3].
  """

  recolours: ClassVar[bool] = False

  scale: tuple[float, float] = schema.key(
    (0.08, 1.0), "area of the crop as a share of the image"
  )
  resample: str = schema.key(
    "bilinear", "filter of crops in training", choices=tuple(RESAMPLE)
  )

  def __post_init__(self) -> None:
    """Rejects invalid settings before the first image is read."""
    super().__post_init__()
    transforms.check_scale("data.scale", self.scale)

  @property
  def sides(self) -> dict[str, int]:
    """One kind of view."""
    return {"images": self.image_size}

  def draw(
    self, size: tuple[int, int], rng: np.random.Generator
  ) -> dict[str, list[draws.View]]:
    """The only view."""
    return {"images": [transforms.draw_geometry(size, rng, self.scale)]}


@dataclasses.dataclass(frozen=True)
class Supervised(transforms.Recipe):
  """The augmentation of fine-tuning.

  A random resized crop, or, for images of up to 32 pixels, a random shift by up
  to 4; then a flip, RandAugment or else colour jitter, and the box of random
  erasing.

  differs: an image to be shifted that is not of `image_size` is resized first;
  the reference crops a larger one and fails on a smaller one.
  """

  scale: tuple[float, float] = schema.inherit(CropFlip, "scale", (0.08, 1.0))
  resample: str = schema.inherit(CropFlip, "resample", "bicubic")
  rand_augment: str = schema.key(
    "rand-m9-mstd0.5-inc1", 'in timm\'s notation; "" = none'
  )
  jitter_strength: float = schema.key(
    0.4,
    "of brightness, contrast and saturation, if rand_augment is empty",
    low=0,
  )
  erase_prob: float = schema.key(
    0.25, "probability of random erasing", low=0, high=1
  )

  def __post_init__(self) -> None:
    """Rejects invalid settings before the first image is read."""
    super().__post_init__()
    transforms.check_scale("data.scale", self.scale)
    randaugment.parse(self.rand_augment)

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Augments one RGB image.

    Returns:
      "images" [1, H, W, 3] uint8 and, unless `erase_prob` is 0, "erase" [4]
      int32, see `erase_box`.
    """
    size = self.image_size
    if size <= SMALL:
      image = random_shift(transforms.eval_whole(image, size), rng)
    else:
      image = transforms.random_resized_crop(
        image,
        rng,
        size=size,
        scale=self.scale,
        resample=RESAMPLE[self.resample],
      )
    image = self._colour(transforms.random_flip(image, rng), rng)
    arrays = {"images": np.asarray(image)[None]}
    if self.erase_prob:
      arrays["erase"] = erase_box(size, size, rng, prob=self.erase_prob)
    return arrays

  def _colour(
    self, image: Image.Image, rng: np.random.Generator
  ) -> Image.Image:
    settings = randaugment.parse(self.rand_augment)
    if settings is not None:
      return randaugment.rand_augment(
        image, rng, **settings._asdict(), resample=RESAMPLE[self.resample]
      )
    x = self.jitter_strength
    return colours.color_jitter(
      image, rng, brightness=x, contrast=x, saturation=x, hue=0.0
    )
