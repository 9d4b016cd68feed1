"""Decoded images on canvases of one size, with the draws for the device.

The host's part of `data.pipeline=device`: it draws the views as the Pillow
pipeline does, decodes at the size that they need, and leaves crops and colours
to `device.augment`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from attmask_jax.augment import draws, transforms

CANVAS = "canvas"  # name of the array of images
NOTHING = 4  # a step of the jitter that is none
WIDTH = 16  # numbers of one view, see `pack`
_NO_JITTER = (*(NOTHING,) * 4, 1, 1, 1, 0)
REDUCTIONS = (8, 4, 2)  # of the JPEG decoder
# A picture is decoded smaller while each crop keeps this many pixels per pixel
# of its view.
SPARE = 2.0


def views_name(name: str) -> str:
  """Name of the array with the draws of a kind of view."""
  return f"{name}_views"


def pack(
  views: list[draws.View],
  *,
  offset: tuple[float, float] = (0.0, 0.0),
  scale: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
  """The draws as numbers: [V, WIDTH] float32, see `device.Draws`.

  Args:
    views: their boxes are in pixels of the image.
    offset: (x, y) of the canvas in the image.
    scale: (x, y) pixels of the canvas per pixel of the image.
  """
  rows = []
  for view in views:
    row = [*view.box, view.flip, view.grey, view.solarise]
    if jitter := view.jitter:
      row += jitter.order + (NOTHING,) * (4 - len(jitter.order))
      row += (*jitter.factors, jitter.hue_steps)
    else:
      row += _NO_JITTER
    row.append(box_radius(view.blur) if view.blur else 0)
    rows.append(row)
  packed = np.array(rows, np.float64)
  packed[:, 0:4] = (packed[:, 0:4] - offset * 2) * (scale * 2)
  return packed.astype(np.float32)


def box_radius(sigma: float, passes: int = 3) -> float:
  """Radius of the box whose repeated blur has a standard deviation, in pixels.

  Source: _gaussian_blur_radius in BoxBlur.c of Pillow.
  """
  variance = sigma * sigma / passes
  whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
  part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
  return whole + part / (6 * (variance - (whole + 1) ** 2))


@dataclasses.dataclass(frozen=True)
class OnCanvas:
  """A recipe whose views the device makes.

  Attributes:
    recipe: draws the views.
    side: of the canvases, in pixels. What the views need of an image is
      reduced to it along each axis where it is larger.
  """

  recipe: transforms.Drawn
  side: int

  def start(self, rng: np.random.Generator) -> "Placing":
    """Begins an image."""
    return Placing(self, rng)

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """The arrays of one RGB image, see `Placing.arrays`."""
    return self.start(rng).arrays(image)

  def stack(self, images: Sequence[np.ndarray]) -> np.ndarray:
    """Images [h, w, 3] at the upper left of canvases: [n, side, side, 3]."""
    canvases = np.zeros((len(images), self.side, self.side, 3), np.uint8)
    for canvas, image in zip(canvases, images, strict=True):
      canvas[: image.shape[0], : image.shape[1]] = image
    return canvases


class Placing:
  """One image on its way to a canvas."""

  def __init__(self, target: OnCanvas, rng: np.random.Generator) -> None:
    self._target, self._rng = target, rng
    self._size: tuple[int, int] | None = None

  def reduction(self, size: tuple[int, int]) -> int:
    """Draws the views, and says how much smaller the image may be decoded.

    Args:
      size: (width, height) of the image.

    Returns:
      1, 2, 4 or 8: both sides may be divided by it.
    """
    recipe, self._size = self._target.recipe, size
    self._views = recipe.draw(size, self._rng)
    spare, edges = math.inf, []
    for name, side in recipe.sides.items():
      for view in self._views[name]:
        left, top, right, bottom = view.box
        spare = min(spare, (right - left) / side, (bottom - top) / side)
        edges.append(view.box)
    lefts, tops, rights, bottoms = zip(*edges, strict=True)
    self._part = min(lefts), min(tops), max(rights), max(bottoms)
    left, top, right, bottom = self._part
    excess = max(right - left, bottom - top) / self._target.side
    most = max(spare / SPARE, excess)
    return next((n for n in REDUCTIONS if n <= most), 1)

  def arrays(self, image: Image.Image) -> dict[str, np.ndarray]:
    """The image on its canvas, and the draws.

    Args:
      image: RGB, upright; of the size given to `reduction`, if that was called,
        or as much smaller as it said.

    Returns:
      CANVAS [h, w, 3] uint8, see `OnCanvas.stack`, and for each kind of view
      its draws [V, WIDTH] float32.
    """
    if self._size is None:
      self.reduction(image.size)
    # Decoders round up, so that the divisor is not the ratio of the sizes.
    reduced = lambda n: tuple(-(-length // n) for length in self._size)
    factor = next(n for n in (1, 2, 4, 8) if reduced(n) == image.size)
    offset = (0, 0)
    if max(image.size) > self._target.side:
      left, top = (edge // factor for edge in self._part[:2])
      right, bottom = (-(-edge // factor) for edge in self._part[2:])
      image = image.crop((left, top, right, bottom))
      offset = left * factor, top * factor
    full = image.size
    if max(full) > self._target.side:
      # Each axis by itself: often one of them fits.
      small = tuple(min(length, self._target.side) for length in full)
      image = image.resize(small, transforms.BICUBIC)
    scale = image.width / full[0] / factor, image.height / full[1] / factor
    return {CANVAS: np.asarray(image)} | {
      views_name(name): pack(views, offset=offset, scale=scale)
      for name, views in self._views.items()
    }
