"""Colour steps of an image: jitter, grey, blur, solarise.

What is random is drawn first, as `Jitter`, so that the same draws can be
carried out elsewhere (see `device`).

All but the blur are computed in NumPy, on planes [3, H, W] uint8 (red, green,
blue), with the values of Pillow to the last bit. Pillow uses no vector
instructions and takes twice as long for the hue of 224 px
(tests/bench/bench_colours.py).

Source: the steps behave like torchvision's on Pillow images; Blend.c and
Convert.c of Pillow (MIT-CMU).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

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


def split(image: Image.Image) -> np.ndarray:
  """The channels of an RGB image."""
  return np.stack([np.asarray(channel) for channel in image.split()])


def join(planes: np.ndarray) -> np.ndarray:
  """The pixels of channels: [3, H, W] -> [H, W, 3]."""
  return np.stack(list(planes), axis=-1)


def jitter_planes(planes: np.ndarray, jitter: Jitter) -> np.ndarray:
  """Carries out one jitter.

  Source: torchvision.transforms.ColorJitter on Pillow images.
  """
  for step in jitter.order:
    if step == HUE:
      planes = shift_planes(planes, jitter.hue_steps)
    else:
      planes = enhance(planes, step, jitter.factors[step])
  return planes


def enhance(planes: np.ndarray, step: int, factor: float) -> np.ndarray:
  """Blends with black, with the mean luma, or with the luma.

  Args:
    planes: the channels.
    step: BRIGHTNESS, CONTRAST or SATURATION.
    factor: 1 = no change.

  Source: ImageEnhance of Pillow.
  """
  other = None
  if step == CONTRAST:
    grey = luma(planes)
    other = np.float32(int(int(grey.sum(dtype=np.int64)) / grey.size + 0.5))
  elif step == SATURATION:
    other = luma(planes).astype(np.float32)
  return _blend(other, planes, factor)


def _blend(
  other: np.ndarray | np.float32 | None, planes: np.ndarray, factor: float
) -> np.ndarray:
  """other + factor * (planes - other), cut to 0-255, truncated; None = black.

  Source: ImagingBlend, in float32 and in this order.
  """
  mixed = planes.astype(np.float32)
  if other is not None:
    mixed -= other
  mixed *= np.float32(factor)
  if other is not None:
    mixed += other
  if not 0 <= factor <= 1:
    np.clip(mixed, np.float32(0), np.float32(255), out=mixed)
  return mixed.astype(np.uint8)


def luma(planes: np.ndarray) -> np.ndarray:
  """(19595 R + 38470 G + 7471 B + 32768) >> 16: [H, W] uint8 (ITU-R 601)."""
  total = np.full(planes[0].shape, 32768, np.float32)
  for plane, weight in zip(planes, (19595, 38470, 7471), strict=True):
    total += plane * np.float32(weight)  # whole numbers below 2**24: exact
  total *= np.float32(2**-16)
  return total.astype(np.uint8)


def solarise(pixels: np.ndarray) -> np.ndarray:
  """Inverts every channel value at or above THRESHOLD: uint8 of any shape."""
  return pixels ^ _mask(
    pixels >= THRESHOLD
  )  # 255 - x is x with all bits turned


def gaussian_blur(image: Image.Image, radius: float) -> Image.Image:
  """Pillow's Gaussian blur with a radius (standard deviation) in pixels."""
  return image.filter(ImageFilter.GaussianBlur(radius))


# --- hue --------------------------------------------------------------------


def shift_planes(planes: np.ndarray, steps: int) -> np.ndarray:
  """Adds `steps` to Pillow's 8-bit hue, which wraps around at 256.

  What a pixel becomes follows from its order of channels (one of six), largest
  value, and the distances of the other two from the smallest; tables give it.

  Source: rgb2hsv_row and hsv2rgb in Convert.c of Pillow.
  """
  tables = _tables()
  red, green, blue = planes
  value = np.maximum(np.maximum(red, green), blue)
  low = np.minimum(np.minimum(red, green), blue)
  middle = red ^ green ^ blue ^ value ^ low  # what is left of the three
  # 0 for red, 1 for green, 2 for blue as the largest, the first of equal ones.
  is_red = red == value
  is_green = (green == value) & ~is_red
  is_blue = ~(is_red | is_green)
  rises = (is_red & (green >= blue)) | (is_green & (blue >= red))
  rises |= is_blue & (red >= green)
  order = 2 * (is_green.view(np.uint8) + 2 * is_blue.view(np.uint8)) + rises
  chroma = (value - low).astype(np.uint16) << 8
  place = (order.astype(np.int32) << 16) | (chroma | (middle - low))
  hue = tables.hue.take(place) + np.uint8(steps)
  saturation = tables.saturation.take((chroma | value).astype(np.int32))
  saturation = saturation.astype(np.uint16) << 8
  low = tables.low.take((saturation | value).astype(np.int32))
  share = tables.middle.take((saturation | hue).astype(np.int32))
  share *= value.astype(np.float32)
  share += np.float32(0.5)
  middle = share.astype(np.uint8)
  at_least = [_mask(hue >= start) for start in _SECTORS]
  sectors = [at_least[i] ^ at_least[i + 1] for i in range(5)]
  sectors = [~at_least[0] | at_least[5], *sectors]  # 255 is 0 again

  def channel(first: int) -> np.ndarray:
    """Largest in the sectors `first` and the next, and so on round."""
    one, two, three, four, five, six = sectors[first:] + sectors[:first]
    large = value & (one | two)
    return large | (middle & (three | six)) | (low & (four | five))

  return np.stack([channel(5), channel(1), channel(3)])


_SECTORS = (43, 85, 128, 170, 213, 255)  # first hue of 6 hue // 255 = 1 to 6


def _mask(condition: np.ndarray) -> np.ndarray:
  """bool -> uint8: 255 where true, for the bits of other arrays."""
  return np.negative(condition.view(np.uint8))


class Tables(NamedTuple):
  """How Pillow converts to HSV and back; chroma = largest - smallest channel.

  Attributes:
    hue: uint8 by (order, chroma, middle - smallest channel), with order =
      2 * largest channel + whether the next channel on the circle is at least
      the one after it.
    saturation: uint8 by (chroma, largest channel).
    low: uint8 by (saturation, largest channel), the smallest channel.
    middle: float32 by (saturation, hue), the middle channel over the largest.
  """

  hue: np.ndarray
  saturation: np.ndarray
  low: np.ndarray
  middle: np.ndarray


@functools.cache
def _tables() -> Tables:
  """0.8 MB. Of the way to HSV by Pillow itself."""
  every = np.arange(256)
  chroma = every[:, None]
  low = np.broadcast_to(255 - chroma, (256, 256))
  middle = np.minimum(low + every, 255)
  largest = np.full_like(low, 255)
  hue = []
  for largest_channel in range(3):
    for rest in ((low, middle), (middle, low)):
      turned = np.roll([0, 1, 2], largest_channel)  # red is ... of the three
      hue.append(_to_hsv([(largest, *rest)[i] for i in turned])[0])
  low = np.maximum(every - chroma, 0)
  saturation = _to_hsv([np.broadcast_to(every, low.shape), low, low])[1]
  # Back, in the types of hsv2rgb.
  share = (every / 255).astype(np.float32)[:, None].astype(np.float64)
  sector = every * 6 // 255
  part = (every * 6 / 255 - sector).astype(np.float32).astype(np.float64)
  falling = (share.astype(np.float32) * part.astype(np.float32)).astype(float)
  middle = 1 - np.where(sector % 2, falling, share * (1 - part))
  low = np.floor(every * (1 - share) + 0.5).astype(np.uint8)
  flat = (np.stack(hue), saturation, low, middle.astype(np.float32))
  return Tables(*(np.ravel(table) for table in flat))


def _to_hsv(channels: Sequence[np.ndarray]) -> np.ndarray:
  """Pillow's hue, saturation, value of [H, W] each: [3, H, W] uint8."""
  rgb = np.stack(channels, axis=-1).astype(np.uint8)
  return np.moveaxis(np.asarray(Image.fromarray(rgb).convert("HSV")), -1, 0)


# --- the same on Pillow images ----------------------------------------------


def apply_jitter(image: Image.Image, jitter: Jitter) -> Image.Image:
  """Carries out one jitter on an RGB image."""
  return Image.fromarray(join(jitter_planes(split(image), jitter)))


def color_jitter(
  image: Image.Image, rng: np.random.Generator, **strengths: float
) -> Image.Image:
  """Brightness, contrast, saturation and hue at random, see `draw_jitter`."""
  return apply_jitter(image, draw_jitter(rng, **strengths))
