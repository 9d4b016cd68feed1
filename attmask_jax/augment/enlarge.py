"""A part of an enlarged image without the rest of it.

A panorama of 3000 x 1 pixels whose shorter side becomes 256 has 768,000 x 256
pixels, of which the evaluation crop keeps 224 x 224. `part` computes
those alone, bit-equal to a crop of Pillow's resized image.
"""

import numpy as np
from PIL import Image

# Radius of each filter in pixels of the input.
_RADIUS = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2}
_PRECISION = 22  # bits of Pillow's fixed-point weights for 8-bit pixels


def part(
  image: Image.Image,
  size: tuple[int, int],
  box: tuple[int, int, int, int],
  resample: Image.Resampling,
) -> Image.Image:
  """`image.resize(size, resample).crop(box)` in the memory of the box.

  `Image.resize(box=...)` would round the box to float32.

  Args:
    image: mode RGB or L.
    size: (width, height) of the whole resized image, no smaller than `image`.
    box: (left, upper, right, lower) inside it.
    resample: BILINEAR or BICUBIC.

  Source: Resample.c of Pillow: rows first, 8-bit values in between.
  """
  pixels = np.asarray(image)
  height, width = pixels.shape[:2]
  taps, weights = _taps(height, size[1], box[1], box[3], resample)
  first, last = taps.min(), taps.max()
  across = _taps(width, size[0], box[0], box[2], resample)
  pixels = _filter(pixels[first : last + 1].swapaxes(0, 1), *across)
  return Image.fromarray(_filter(pixels.swapaxes(0, 1), taps - first, weights))


def _taps(
  n_in: int, n_out: int, start: int, stop: int, resample: Image.Resampling
) -> tuple[np.ndarray, np.ndarray]:
  """Input pixels and weights of the outputs [start, stop) along one axis.

  Returns:
    Indices [n, taps] and int32 weights [n, taps], scaled by 2**_PRECISION;
    those beyond the edge are 0.
  """
  radius = _RADIUS[resample]
  centers = ((np.arange(start, stop) + 0.5) * (n_in / n_out))[:, None]
  first = np.maximum((centers - radius + 0.5).astype(int), 0)
  last = np.minimum((centers + radius + 0.5).astype(int), n_in)
  taps = first + np.arange(2 * radius + 1)
  x = np.abs(taps - centers + 0.5)
  if resample == Image.Resampling.BILINEAR:
    weights = 1 - x
  else:
    near = (1.5 * x - 2.5) * x * x + 1
    weights = np.where(x < 1, near, (((x - 5) * x + 8) * x - 4) * -0.5)
  weights = np.where((x < radius) & (taps < last), weights, 0)
  weights *= 2**_PRECISION / weights.sum(axis=1, keepdims=True)
  rounded = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)
  return np.minimum(taps, n_in - 1), rounded


def _filter(
  pixels: np.ndarray, taps: np.ndarray, weights: np.ndarray
) -> np.ndarray:
  """Weighted sums along the first axis: [n, ...] uint8 -> [m, ...] uint8."""
  total = np.full(
    (len(taps), *pixels.shape[1:]), 2 ** (_PRECISION - 1), np.int32
  )
  weights = weights.reshape(*weights.shape, *[1] * (pixels.ndim - 1))
  for k in range(taps.shape[1]):
    total += pixels[taps[:, k]].astype(np.int32) * weights[:, k]
  return np.clip(total >> _PRECISION, 0, 255).astype(np.uint8)
