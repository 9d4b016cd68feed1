"""Colour steps on Pillow images: jitter, grey, blur, solarise.

What is random is drawn first, as `Jitter`, so that the same draws can be
carried out elsewhere (see `device`).

Source: the steps behave like torchvision's on Pillow images.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in `Jitter.order`
THRESHOLD = 128  # of solarisation


class Jitter(NamedTuple):
  """Draws of one colour jitter.

  Attributes:
    order: of the steps, each BRIGHTNESS, CONTRAST, SATURATION or HUE, once at
      most.
    factors: of brightness, contrast and saturation, >= 0; 1 = no change.
    hue: share of the circle, -0.5 to 0.5.
  """

  order: tuple[int, ...]
  factors: tuple[float, float, float]
  hue: float

  @property
  def hue_steps(self) -> int:
    """The shift in Pillow's 8-bit hue, which wraps around at 256: 0-255."""
    return int(self.hue * 255) % 256


def draw_jitter(
  rng: np.random.Generator,
  *,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.2,
  hue: float = 0.1,
) -> Jitter:
  """Draws brightness, contrast, saturation and hue in random order.

  The factors of the first three are from U(1 - x, 1 + x), bounded below by 0;
  hue is rotated by U(-hue, hue) of a circle. A strength of 0 skips the step.

  Source: torchvision.transforms.ColorJitter.
  """
  order = rng.permutation(4).tolist()
  strengths = (brightness, contrast, saturation, hue)
  factors = [uniform(rng, max(0.0, 1 - x), 1 + x) for x in strengths[:3]]
  shift = uniform(rng, -hue, hue)
  return Jitter(tuple(i for i in order if strengths[i]), tuple(factors), shift)


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
  """`rng.uniform(low, high)`, to the last bit, in a third of its time."""
  return low + (high - low) * rng.random()


def apply_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
  """Carries out one jitter.

  Source: torchvision.transforms.ColorJitter on Pillow images.
  """
  for step in jitter.order:
    if step == HUE:
      image = shift_hue(image, jitter.hue)
    else:
      image = ENHANCERS[step](image).enhance(jitter.factors[step])
  return image


ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
  """Rotates the hue by `shift` of a full circle, in [-0.5, 0.5].

  The shift in Pillow's 8-bit hue is `shift * 255` truncated towards zero; hue
  wraps around at 256.
  """
  hsv = np.array(image.convert("HSV"))
  hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # uint8 wraps around
  return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")


def color_jitter(
  image: Image.Image, rng: np.random.Generator, **strengths: float
) -> Image.Image:
  """Brightness, contrast, saturation and hue at random, see `draw_jitter`."""
  return apply_jitter(image, draw_jitter(rng, **strengths))


def to_grey(image: Image.Image) -> Image.Image:
  """Luma (ITU-R 601) in all three channels."""
  return image.convert("L").convert("RGB")


def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
  """Pillow's Gaussian blur with a radius (standard deviation) in pixels."""
  return image.filter(ImageFilter.GaussianBlur(radius))


def solarise(image: Image.Image) -> Image.Image:
  """Inverts every channel value at or above THRESHOLD."""
  return ImageOps.solarize(image, THRESHOLD)
