"""RandAugment on Pillow images, as timm's string rand-m9-mstd0.5-inc1.

A few operations are drawn from a table of 15; each is skipped half of the time,
or applied at a strength of 0 to 10 that varies slightly from image to image.

Source: timm.data.auto_augment (v0.4.12), the increasing set of operations.
differs: draws come from a NumPy generator; posterising to 0 bits gives a black
image, as in Pillow at that time (it is an error today).
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from attmask_jax.errors import InputError

FILL = (124, 116, 104)  # ImageNet's mean colour, for pixels outside the image
MAX_MAGNITUDE = 10.0

Fill = tuple[int, int, int]
Warp = Callable[[Image.Image, float, Fill, Image.Resampling], Image.Image]


class Op(NamedTuple):
  """One operation of the table.

  Attributes:
    argument: (level 0-1, sign -1 or 1) -> argument of `run`.
    run: (image, argument, fill, resample) -> image of the same size.
  """

  argument: Callable[[float, int], float]
  run: Warp


def _affine(image: Image.Image, matrix: tuple, *paint: object) -> Image.Image:
  """Reads output pixel (x, y) from the input at `matrix` times (x, y, 1)."""
  fill, resample = paint
  return image.transform(
    image.size,
    Image.Transform.AFFINE,
    matrix,
    resample=resample,
    fillcolor=fill,
  )


def _posterize(image: Image.Image, bits: float) -> Image.Image:
  if bits < 1:
    return Image.new("RGB", image.size)
  return ImageOps.posterize(image, int(bits))


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
  table = [min(i + int(amount), 255) if i < 128 else i for i in range(256)]
  return image.point(table * 3)


def _plain(run: Callable[[Image.Image], Image.Image]) -> Op:
  """Operation without a strength."""
  return Op(lambda level, sign: 0.0, lambda x, _, *paint: run(x))


def _enhance(kind: Callable[[Image.Image], Any]) -> Op:
  """Enhancer: factor 1 is the identity; 0 is black, grey or blurred."""
  return Op(
    lambda level, sign: 1 + sign * 0.9 * level,
    lambda x, factor, *paint: kind(x).enhance(factor),
  )


def _shear(matrix: Callable[[float], tuple]) -> Op:
  """Shear about the top left corner, as in timm."""
  return Op(
    lambda level, sign: sign * 0.3 * level,
    lambda x, share, *paint: _affine(x, matrix(share), *paint),
  )


def _translate(matrix: Callable[[float, int, int], tuple]) -> Op:
  """Shift by a share of the side, left or up if positive."""
  return Op(
    lambda level, sign: sign * 0.45 * level,
    lambda x, share, *paint: _affine(x, matrix(share, *x.size), *paint),
  )


OPS = {
  "AutoContrast": _plain(ImageOps.autocontrast),
  "Equalize": _plain(ImageOps.equalize),
  "Invert": _plain(ImageOps.invert),
  "Rotate": Op(
    lambda level, sign: sign * 30 * level,  # degrees, anticlockwise
    lambda x, angle, fill, resample: x.rotate(
      angle, resample=resample, fillcolor=fill
    ),
  ),
  "Posterize": Op(
    lambda level, sign: 4 - int(level * 4),  # bits kept
    lambda x, bits, *paint: _posterize(x, bits),
  ),
  "Solarize": Op(
    lambda level, sign: 256 - int(level * 256),  # inverted from this value on
    lambda x, threshold, *paint: ImageOps.solarize(x, int(threshold)),
  ),
  "SolarizeAdd": Op(
    lambda level, sign: int(level * 110),  # added to values below 128
    lambda x, amount, *paint: _solarize_add(x, amount),
  ),
  "Color": _enhance(ImageEnhance.Color),
  "Contrast": _enhance(ImageEnhance.Contrast),
  "Brightness": _enhance(ImageEnhance.Brightness),
  "Sharpness": _enhance(ImageEnhance.Sharpness),
  "ShearX": _shear(lambda s: (1, s, 0, 0, 1, 0)),
  "ShearY": _shear(lambda s: (1, 0, 0, s, 1, 0)),
  "TranslateX": _translate(lambda s, width, height: (1, 0, s * width, 0, 1, 0)),
  "TranslateY": _translate(
    lambda s, width, height: (1, 0, 0, 0, 1, s * height)
  ),
}


def argument(name: str, magnitude: float, sign: int = 1) -> float:
  """Argument of an operation at magnitude 0-10: degrees, factor, share..."""
  return OPS[name].argument(magnitude / MAX_MAGNITUDE, sign)


def rand_augment(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  ops: int = 2,
  magnitude: float = 9.0,
  magnitude_std: float = 0.5,
  prob: float = 0.5,
  fill: Fill = FILL,
  resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
  """Applies random operations, drawn with replacement.

  Args:
    image: RGB.
    rng: always advanced by the same number of draws.
    ops: number of operations.
    magnitude: mean strength, 0-10.
    magnitude_std: standard deviation of the normal draw of the strength, which
      is then clipped to 0-10.
    prob: probability of applying an operation.
    fill: colour of pixels from outside the image, 0-255.
    resample: filter of rotation, shear and translation.

  Returns:
    An RGB image of the same size.
  """
  chosen = rng.integers(len(OPS), size=ops)
  applied = rng.random(ops) < prob
  strength = magnitude + magnitude_std * rng.standard_normal(ops)
  strength = np.clip(strength, 0.0, MAX_MAGNITUDE)
  signs = rng.choice((-1, 1), size=ops)
  names = tuple(OPS)
  for i in np.flatnonzero(applied):
    name = names[chosen[i]]
    value = argument(name, float(strength[i]), int(signs[i]))
    image = OPS[name].run(image, value, fill, resample)
  return image


class Settings(NamedTuple):
  """Arguments of `rand_augment`, under the same names."""

  ops: int = 2
  magnitude: float = 10.0
  magnitude_std: float = 0.0
  prob: float = 0.5


# Option of the string -> setting, type, smallest and largest value.
_OPTIONS: dict[str, tuple[str, type, float, float]] = {
  "m": ("magnitude", float, 0, 10),
  "n": ("ops", int, 1, 15),
  "mstd": ("magnitude_std", float, 0, 10),
  "p": ("prob", float, 0, 1),
}


@functools.cache
def parse(text: str) -> Settings | None:
  """Reads timm's string, such as rand-m9-mstd0.5-inc1; "" gives None.

  Options, joined by dashes in any order: m magnitude (10 unless given), n
  operations (2), mstd its standard deviation (0), p probability (0.5), and
  inc1, which is required: only the increasing set is supported.

  Raises:
    InputError: an unknown, repeated or missing option, or a value out of range.
  """
  if not text:
    return None
  kind, *options = text.split("-")
  if kind != "rand" or "inc1" not in options:
    raise InputError(
      f'data.rand_augment "{text}" is not RandAugment with increasing '
      "severities: write it like rand-m9-mstd0.5-inc1, or leave it empty"
    )
  options.remove("inc1")
  values: dict[str, float] = {}
  for option in options:
    match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", option)
    if not match or match[1] not in _OPTIONS:
      raise InputError(
        f'data.rand_augment "{text}" has an unknown option "{option}": use m, '
        "n, mstd or p with a number, and inc1"
      )
    name, cast, low, high = _OPTIONS[match[1]]
    number = float(match[2])
    if name in values or number != cast(number) or not low <= number <= high:
      raise InputError(
        f'data.rand_augment "{text}" cannot have "{option}": give '
        f"{match[1]} once, as a{' whole' * (cast is int)} number from {low} to "
        f"{high}"
      )
    values[name] = cast(number)
  return Settings(**values)
