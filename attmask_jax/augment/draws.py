"""What is random in the views of an image.

Drawn before anything is computed, so that a view can be made with Pillow
(`transforms.render`) or on the device (`device.view`).
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image

from attmask_jax.augment import colours

MIN_BLUR = 0.1  # smallest radius that is drawn, pixels


class View(NamedTuple):
  """Everything that is random in one view.

  Attributes:
    box: (left, upper, right, lower) of the crop, in pixels of the image.
    flip: mirrored horizontally.
    jitter: of the colours, or None.
    grey: becomes grey.
    blur: standard deviation in pixels, 0 = none.
    solarise: bright values are inverted.
  """

  box: tuple[int, int, int, int]
  flip: bool
  jitter: colours.Jitter | None = None
  grey: bool = False
  blur: float = 0.0
  solarise: bool = False


@dataclasses.dataclass(frozen=True)
class Photometric:
  """The colour steps of one kind of crop.

  Attributes:
    blur, solarise, jitter, grey: probabilities, 0-1.
    blur_radius: largest radius of the blur in pixels, at least 0.1.
  """

  blur: float
  solarise: float = 0.0
  jitter: float = 0.8
  grey: float = 0.2
  blur_radius: float = 2.0

  def draw(self, view: View, rng: np.random.Generator) -> View:
    """The view with the draws of its colours: each step on its own."""
    jitter, blur = None, 0.0
    if rng.random() < self.jitter:
      jitter = colours.draw_jitter(rng)
    grey = rng.random() < self.grey
    if rng.random() < self.blur:
      blur = colours.uniform(rng, MIN_BLUR, self.blur_radius)
    solarise = rng.random() < self.solarise
    return View(view.box, view.flip, jitter, grey, blur, solarise)


FIRST_GLOBAL = Photometric(blur=1.0)
OTHER_GLOBAL = Photometric(blur=0.1, solarise=0.2)
LOCAL = Photometric(blur=0.5)


def recolour(image: Image.Image, view: View) -> np.ndarray:
  """Jitter, grey, blur, solarise, as drawn: RGB -> [H, W, 3] uint8."""
  if view.jitter or view.grey:
    planes = colours.split(image)
    if view.jitter:
      planes = colours.jitter_planes(planes, view.jitter)
    if view.grey:
      return _recolour_grey(colours.luma(planes), view)
    pixels = colours.join(planes)
    image = Image.fromarray(pixels) if view.blur else image
  if view.blur:
    pixels = np.asarray(colours.gaussian_blur(image, view.blur))
  elif not view.jitter:
    pixels = np.asarray(image)
  return colours.solarise(pixels) if view.solarise else pixels


def _recolour_grey(grey: np.ndarray, view: View) -> np.ndarray:
  """What follows on one channel for all three: [H, W] -> [H, W, 3] uint8."""
  if view.blur:
    image = Image.fromarray(grey)
    grey = np.asarray(colours.gaussian_blur(image, view.blur))
  grey = colours.solarise(grey) if view.solarise else grey
  return np.repeat(grey[..., None], 3, axis=-1)
