"""Colour steps as torchvision carries them out, by Pillow alone."""

import numpy as np
from PIL import Image


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
  """Adds int(255 * shift) to the 8-bit hue, which wraps around at 256."""
  hsv = np.array(image.convert("HSV"))
  hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # uint8 wraps around
  return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")
