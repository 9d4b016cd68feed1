"""Decoding one image file, and the keys that say how."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Self

from absl import logging
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from attmask_jax import schema
from attmask_jax.augment.rgb import is_upright, to_rgb
from attmask_jax.errors import InputError
from attmask_jax.text import printable

EXTENSIONS = (
  ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
)  # fmt: skip
NO_EXTENSION = "none"  # stands for files without an ending
MAX_PIXELS = 178_956_970  # where Pillow refuses a picture by default

# From (width, height) to 1, 2, 4 or 8.
Reduction = Callable[[tuple[int, int]], int]

# Tags of TIFF files.
_BITS, _PHOTOMETRIC, _BANDS, _EXTRA, _FORMAT = 258, 262, 277, 338, 339


class BrokenImage(Exception):
  """One image cannot be read; the message says why."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """Which files are images, and how they are decoded."""

  extensions: str = schema.key(
    "",
    "A,B: more endings of image files, of those that Pillow reads, such as "
    f".jfif,.gif; {NO_EXTENSION} = files without an ending",
  )
  white: float = schema.key(
    0.0,
    "value that is white in images of more than 8 bits, 0 = 65535 of integers, "
    "1 of floats",
    low=0,
  )
  max_pixels: int = schema.key(
    0,
    f"a picture of more pixels counts as unreadable, 0 = {MAX_PIXELS}",
    low=0,
  )

  @classmethod
  def of(cls, data: Any) -> Self:
    """Those of the section `data`; defaults for what an old config lacks."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{n: getattr(data, n) for n in names if hasattr(data, n)})

  @property
  def endings(self) -> frozenset[str]:
    """Endings of image files in lower case, "" for none.

    Raises:
      InputError: one that Pillow does not read.
    """
    more = []
    for word in schema.words(self.extensions.lower()):
      ending = "" if word == NO_EXTENSION else f".{word.removeprefix('.')}"
      kind = Image.registered_extensions().get(ending)
      if ending and kind not in Image.OPEN:
        raise InputError(
          f"data.extensions={self.extensions}: Pillow reads no files that end "
          f"in {ending}; convert them, or leave it out"
        )
      more.append(ending)
    return frozenset((*EXTENSIONS, *more))

  @property
  def tag(self) -> str:
    """What distinguishes the pixels from those of the defaults, else ""."""
    return "".join(
      f" {name}={value}"
      for name, value in (("white", self.white), ("pixels", self.max_pixels))
      if value
    )


PLAIN = Reading()


def decode(
  file: Any, reading: Reading = PLAIN, reduction: Reduction | None = None
) -> Image.Image:
  """Opens and decodes a path or a binary stream to upright 8-bit RGB.

  Args:
    file: path or stream.
    reading: how files are decoded.
    reduction: called with the size of the image unless it is to be turned,
      says how much smaller it may be: the sides of JPEG files are divided by
      that.

  Raises:
    BrokenImage: Pillow cannot read it to its end. Its decoders raise errors of
      a dozen kinds, all of which mean the same here. Or it has more pixels than
      allowed, or no 8-bit image can be made of it without a guess.

  differs: the reference fills the missing part of a truncated file with grey.
  """
  limit = reading.max_pixels or MAX_PIXELS
  if reading.max_pixels and Image.MAX_IMAGE_PIXELS is not None:
    # Pillow has one limit for the whole process.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
  try:
    with Image.open(file) as image:
      if image.width * image.height > limit:
        raise InputError(_too_large(image.size, limit))
      _warn_of_bands(file, image)
      if reduction is not None:
        _reduce(image, reduction)
      white = reading.white or _declared_white(image)
      return to_rgb(image, white=white)
  except InputError as err:
    raise BrokenImage(str(err)) from err
  except Image.DecompressionBombError as err:
    raise BrokenImage(_too_large(_declared_size(file), limit)) from err
  except UnidentifiedImageError as err:
    raise BrokenImage(_unidentified(file)) from err
  except Exception as err:
    raise BrokenImage(_reason(file, err)) from err


def _reduce(image: Image.Image, reduction: Reduction) -> None:
  """Has the decoder of a JPEG file divide its sides; others stay as they are.

  The library computes fewer frequencies of each block, in less time. Pictures
  that EXIF turns stay as they are, too: their blocks would begin at the wrong
  end.
  """
  width, height = image.size
  if is_upright(image) and (factor := reduction(image.size)) > 1:
    # Takes the largest divisor that leaves at least this size.
    image.draft(None, (max(width // factor, 1), max(height // factor, 1)))


def _too_large(size: tuple[int, int] | None, limit: int) -> str:
  """A sentence on a picture of too many pixels."""
  shape = f"its {size[0]} x {size[1]}" if size else "its"
  pixels = size[0] * size[1] if size else limit + 1
  return (
    f"{shape} pixels are more than {limit}: raise the limit with "
    f"--config.data.max_pixels={pixels}, or save it smaller"
  )


def _reason(file: Any, err: Exception) -> str:
  """A sentence on a file that is missing or damaged."""
  if isinstance(err, FileNotFoundError) and os.path.islink(file):
    return f"a link to {printable(os.readlink(file))}, which does not exist"
  # `strerror` leaves out the path, which the caller names anyway.
  message = getattr(err, "strerror", None) or err
  return printable(f"{type(err).__name__}: {message}")


@contextlib.contextmanager
def _opened(file: Any) -> Iterator[BinaryIO]:
  """A path or a stream from its beginning."""
  if hasattr(file, "seek"):
    file.seek(0)
    yield file
  else:
    with open(file, "rb") as stream:
      yield stream


def _declared_size(file: Any) -> tuple[int, int] | None:
  """(width, height) in the header of a file that Pillow refuses to open."""
  with _opened(file) as stream:
    prefix = stream.read(16)
    for factory, accept in map(Image.OPEN.get, Image.ID):
      if accept is not None and accept(prefix) is True:
        stream.seek(0)
        with contextlib.suppress(Exception):  # one of a dozen, as above
          return factory(stream, "").size
  return None


def _unidentified(file: Any) -> str:
  """A sentence on a file of no known format, or a TIFF of unusual bands."""
  try:
    with _opened(file) as stream:
      header = stream.read(8)
      if 43 in header[2:4]:  # BigTIFF
        header += stream.read(8)
      tags = TiffImagePlugin.ImageFileDirectory_v2(header)
      stream.seek(tags.next)
      tags.load(stream)
      bands, bits = int(tags.get(_BANDS, 1)), int(tags[_BITS][0])
      kind = "float" if tags.get(_FORMAT, (1,))[0] == 3 else "integer"
  except Exception:  # no TIFF, or a damaged one
    return "not an image in a format that Pillow knows"
  return (
    f"a TIFF of {bands} {'band' if bands == 1 else 'bands'} of {bits}-bit "
    f"{kind}s, which Pillow does not read: save one band as grey, or three as "
    "RGB, of 8 bits"
  )


def _declared_white(image: Image.Image) -> int:
  """Largest value of a TIFF that declares 9 to 15 bits, 0 for all others.

  PNG files that declare so few bits (sBIT) are scaled to all 16 already.
  """
  bits = getattr(image, "tag_v2", {}).get(_BITS, (0,))
  return 2 ** bits[0] - 1 if image.mode != "RGB" and 8 < bits[0] < 16 else 0


def _warn_of_bands(file: Any, image: Image.Image) -> None:
  """Warns that bands beyond RGB, or beyond grey, are not used."""
  tags = getattr(image, "tag_v2", None)
  if tags is None or tags.get(_PHOTOMETRIC) not in (0, 1, 2):
    return
  used = 3 if tags[_PHOTOMETRIC] == 2 else 1
  # Extra samples of kinds 1 and 2 are alpha, which is always dropped.
  alpha = sum(kind in (1, 2) for kind in tags.get(_EXTRA, ()))
  bands = tags.get(_BANDS, 1)
  if bands > used + alpha:
    logging.log_first_n(
      logging.WARNING,
      "%s is a TIFF of %d bands: the first %d are used, the others are not",
      5,
      printable(str(file)),
      bands,
      used,
    )
