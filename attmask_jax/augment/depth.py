"""Images of more than 8 bits as 8-bit ones."""

import numpy as np
from PIL import Image

from attmask_jax.errors import InputError

WHITE_INTEGER, WHITE_FLOAT = 65535, 1.0
# Fewer grey levels than this are no photograph, but one whose white lies lower
# than its type says, such as 12 bits stored in 16.
MIN_LEVELS = 64


def is_deep(mode: str) -> bool:
  """Whether a Pillow mode holds integers of 16 or 32 bits, or floats."""
  return mode == "F" or mode.startswith("I")


def to_8_bits(image: Image.Image, white: float = 0) -> Image.Image:
  """A deep grey image as one of mode L: 0 is black, `white` 255.

  Integers are read as 16-bit ones, whose upper eight bits are kept, floats as
  running from 0 to 1. Where that would lose the contrast nothing is guessed:
  the range of one image says little about those of the others.

  Args:
    image: `is_deep`.
    white: value that becomes 255, larger ones too; 0 = as the type says.

  Raises:
    InputError: values that are not finite; or, without `white`, beyond the
      range of the type or in its lowest quarter. Images of one value pass.
  """
  values = np.asarray(image)
  floats = values.dtype.kind == "f"
  low, high = float(values.min()), float(values.max())
  if not np.isfinite(low + high):
    raise InputError("it holds values that are not finite: replace them")
  top = white or (WHITE_FLOAT if floats else WHITE_INTEGER)
  if not white and low < high:
    _check_range(low, high, top, "floats" if floats else "integers")
  if top == WHITE_INTEGER and not floats:
    values = np.clip(values.astype(np.int64), 0, WHITE_INTEGER) >> 8
  else:
    values = np.rint(np.clip(values.astype(np.float64) / top, 0, 1) * 255)
  return Image.fromarray(values.astype(np.uint8))


def _check_range(low: float, high: float, top: float, kind: str) -> None:
  """Refuses values that the type's own range would flatten."""
  if low < 0 or high > top:
    raise InputError(
      f"its {kind} run from {low:g} to {high:g}, where 0 is black and {top:g} "
      "white: set data.white to the value that is white, or save it with 8 bits"
    )
  if (levels := int(high / top * 255) + 1) <= MIN_LEVELS:
    raise InputError(
      f"its {kind} reach {high:g} where {top:g} is white, which leaves "
      f"{levels} of 256 grey levels: set data.white to the value that is "
      f"white, {top:g} if it is really so dark, or save it with 8 bits"
    )


def check_colour(image: Image.Image) -> None:
  """Refuses a picture of which 8 of 16 bits per channel keep next to nothing.

  Pillow gives the upper 8 bits of 16-bit colour and no way to the others.

  Args:
    image: RGB, decoded from 16 bits per channel.

  Raises:
    InputError: all values lie in the lowest quarter.
  """
  extrema = image.getextrema()
  high = max(top for _, top in extrema)
  if high < MIN_LEVELS and any(low < top for low, top in extrema):
    raise InputError(
      "of its 16 bits per channel Pillow keeps the upper 8, which leaves "
      f"{high + 1} of 256 levels: save it with 8 bits, or set "
      f"data.white={WHITE_INTEGER} if it is really so dark"
    )
