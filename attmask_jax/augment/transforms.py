"""Image augmentation with Pillow: one pure function per step.

Steps take an RGB image and return a new one; the recipes at the end combine
them. A recipe is a frozen dataclass called on `(image, rng)` that returns a
dict of uint8 arrays, so a new method adds a recipe without changing the input
pipeline. Normalisation happens on the device.

Source: the steps behave like torchvision's on Pillow images.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from PIL import Image

from attmask_jax import schema
from attmask_jax.augment import colours, enlarge
from attmask_jax.augment.draws import (
  FIRST_GLOBAL,
  LOCAL,
  MIN_BLUR,
  OTHER_GLOBAL,
  Photometric,
  View,
  recolour,
)
from attmask_jax.errors import InputError

BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR
RESAMPLE = {"bilinear": BILINEAR, "bicubic": BICUBIC}
FLIP_PROB = 0.5
LONG = 8  # long side over short side of pictures that are cropped first


# --- geometry ---------------------------------------------------------------


def crop_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
  """Draws the box of a random resized crop.

  Ten attempts with a uniform share of the area and a log-uniform aspect; if
  none fits, the largest central crop whose aspect is within `ratio`.

  Args:
    width, height: of the image, in pixels.
    rng: advanced by two draws per attempt and two for the position.
    scale: smallest and largest share of the area, 0-1.
    ratio: smallest and largest width / height.

  Returns:
    (left, upper, right, lower) in pixels, inside the image.

  Source: torchvision.transforms.RandomResizedCrop.get_params.
  """
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    area = width * height * colours.uniform(rng, *scale)
    aspect = math.exp(colours.uniform(rng, low, high))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return left, top, left + w, top + h
  w, h = width, height
  if width / height < ratio[0]:
    h = min(round(width / ratio[0]), height)
  elif width / height > ratio[1]:
    w = min(round(height * ratio[1]), width)
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  size: int,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  resample: Image.Resampling = BICUBIC,
) -> Image.Image:
  """Random crop, resized to `size` x `size`.

  Crops before resizing, so that the filter does not use pixels outside the box
  (as `Image.resize(box=...)` would).
  """
  box = crop_box(*image.size, rng, scale=scale, ratio=ratio)
  return image.crop(box).resize((size, size), resample)


def random_flip(
  image: Image.Image, rng: np.random.Generator, *, prob: float = FLIP_PROB
) -> Image.Image:
  """Flips horizontally with probability `prob`."""
  return flip(image) if rng.random() < prob else image


def flip(image: Image.Image) -> Image.Image:
  """Mirrors horizontally."""
  return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def eval_crop(
  image: Image.Image, size: int, *, resample: str = "bicubic"
) -> Image.Image:
  """Resizes the shorter side to floor(256/224 * size), then crops the centre.

  Args:
    image: any size.
    size: side of the square in pixels.
    resample: one of RESAMPLE.

  Source: torchvision Resize(256) + CenterCrop(224), for any size. Of long
  pictures only the square is computed, with the same pixels.
  """
  shorter = 256 * size // 224
  width, height = image.size
  if width <= height:
    target = shorter, int(shorter * height / width)
  else:
    target = int(shorter * width / height), shorter
  left, top = (round((side - size) / 2) for side in target)
  box = left, top, left + size, top + size
  if max(target) > LONG * shorter and max(target) > max(width, height):
    return enlarge.part(image, target, box, RESAMPLE[resample])
  return image.resize(target, RESAMPLE[resample]).crop(box)


def eval_whole(image: Image.Image, size: int) -> Image.Image:
  """The whole image, resized (bicubic) unless it is `size` x `size` already.

  Source: DeiT, for images of up to 32 pixels (which it does not resize).
  """
  if image.size == (size, size):
    return image
  return image.resize((size, size), BICUBIC)


# --- recipes ----------------------------------------------------------------


def check_scale(name: str, scale: tuple[float, float]) -> None:
  """Rejects shares of an image's area that no crop can have.

  Args:
    name: of the key.
    scale: its value.

  Raises:
    InputError: not ascending, or outside of (0, 1].
  """
  low, high = scale
  if not 0 < low <= high <= 1:
    raise InputError(
      f"{name} {(low, high)} must be two shares of the image's area, the "
      "smaller first, above 0 and at most 1"
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Base class of the recipes for `data.transform`."""

  image_size: int = schema.key(
    224, "side of global crops and of evaluated images, pixels", low=1
  )

  def __post_init__(self) -> None:
    """Rejects invalid settings before the first image is read."""
    schema.check("data", vars(self), type(self))

  def pair(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Two views of one RGB image: [2, image_size, image_size, 3] uint8.

    The first two that the recipe makes together or, if it makes one, two draws.
    """
    views = self(image, rng)["images"]
    if len(views) < 2:
      views = np.concatenate([views, self(image, rng)["images"]])
    return views[:2]


def draw_geometry(
  size: tuple[int, int],
  rng: np.random.Generator,
  scale: tuple[float, float],
) -> View:
  """A random crop of an image of `size` = (width, height), and its flip."""
  box = crop_box(*size, rng, scale=scale)
  return View(box, rng.random() < FLIP_PROB)


def render(
  image: Image.Image,
  views: Iterable[View],
  *,
  size: int,
  resample: Image.Resampling = BICUBIC,
) -> np.ndarray:
  """Carries out views of one RGB image: [V, size, size, 3] uint8.

  Of each: crop, resize, flip, jitter, grey, blur, solarise, in this order.
  Views in a row with the same geometry are cropped once.
  """
  crop, geometry, rendered = image, None, []
  for view in views:
    if geometry != (view.box, view.flip):
      geometry = view.box, view.flip
      crop = image.crop(view.box).resize((size, size), resample)
      crop = flip(crop) if view.flip else crop
    rendered.append(recolour(crop, view))
  return np.stack(rendered)


@dataclasses.dataclass(frozen=True)
class Drawn(Recipe):
  """Base class of recipes that draw all of their views beforehand.

  They depend on the image by its size only, so that the views can be carried
  out here or on the device (see `canvas`).

  Attributes:
    resample: filter of the crops, one of RESAMPLE.
    recolours: views have colour steps.
  """

  resample = "bicubic"  # without a type, which would make it a field
  recolours: ClassVar[bool] = True

  @property
  @abc.abstractmethod
  def sides(self) -> dict[str, int]:
    """Side in pixels of each kind of view, by the name of its array."""

  @abc.abstractmethod
  def draw(
    self, size: tuple[int, int], rng: np.random.Generator
  ) -> dict[str, list[View]]:
    """Draws the views of an image of `size` = (width, height), by name."""

  @property
  def max_blur(self) -> float:
    """Largest standard deviation of a blur, in pixels."""
    return 0.0

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Augments one RGB image.

    Args:
      image: RGB.
      rng: the image's own generator.

    Returns:
      Each kind of view: [V, H, W, 3] uint8.
    """
    resample = RESAMPLE[self.resample]
    return {
      name: render(image, views, size=self.sides[name], resample=resample)
      for name, views in self.draw(image.size, rng).items()
    }


@dataclasses.dataclass(frozen=True)
class MultiCrop(Drawn):
  """Global and local crops, as in DINO, iBOT and AttMask.

  Arrays: "images" [G, image_size, image_size, 3] and, unless there are no local
  crops, "local_images" [local_crops, local_size, local_size, 3].

  Source: AttMask main_attmask.py, DataAugmentationiBOT.
  """

  global_crops: int = schema.key(2, "global views per image")
  global_scale: tuple[float, float] = schema.key(
    (0.25, 1.0), "area of global crops as a share of the image"
  )
  local_size: int = schema.key(96, "side of local crops, pixels", low=1)
  local_crops: int = schema.key(10, "local views per image")
  local_scale: tuple[float, float] = schema.key(
    (0.05, 0.25), "area of local crops as a share of the image"
  )
  jitter: float = schema.key(0.8, "probability of colour jitter", low=0, high=1)
  grey: float = schema.key(0.2, "probability of a grey view", low=0, high=1)
  blur_radius: float = schema.key(
    2.0, "largest, in pixels; published for 224 px", low=MIN_BLUR
  )

  def __post_init__(self) -> None:
    """Rejects invalid settings before the first image is read."""
    super().__post_init__()
    check_scale("data.global_scale", self.global_scale)
    check_scale("data.local_scale", self.local_scale)

  @property
  def sides(self) -> dict[str, int]:
    """Global and local ones."""
    local = {"local_images": self.local_size} if self.local_crops else {}
    return {"images": self.image_size, **local}

  @property
  def max_blur(self) -> float:
    """Of all views."""
    return self.blur_radius

  def draw(
    self, size: tuple[int, int], rng: np.random.Generator
  ) -> dict[str, list[View]]:
    """Each view on its own."""
    first, other, local = self._kinds
    one = lambda colour, scale: colour.draw(
      draw_geometry(size, rng, scale), rng
    )
    kinds = [first] + [other] * (self.global_crops - 1)
    views = {"images": [one(kind, self.global_scale) for kind in kinds]}
    if self.local_crops:
      views["local_images"] = [
        one(local, self.local_scale) for _ in range(self.local_crops)
      ]
    return views

  @functools.cached_property
  def _kinds(self) -> tuple[Photometric, ...]:
    """Colours of the first global view, of the others, and of local ones."""
    names = ("jitter", "grey", "blur_radius")
    strength = {name: getattr(self, name) for name in names}
    kinds = (FIRST_GLOBAL, OTHER_GLOBAL, LOCAL)
    return tuple(dataclasses.replace(kind, **strength) for kind in kinds)

  def pair(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The two global views of a training step, see `Recipe.pair`."""
    both = dataclasses.replace(self, global_crops=2, local_crops=0)
    return both(image, rng)["images"]
