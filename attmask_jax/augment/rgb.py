"""Decodes pictures of any mode to upright 8-bit RGB."""

from PIL import Image, ImageOps

from attmask_jax.augment import depth

_ORIENTATION = 0x0112  # the EXIF tag


def to_rgb(image: Image.Image, *, white: float = 0) -> Image.Image:
  """Decodes any Pillow image to upright 8-bit RGB.

  Greyscale is repeated over the channels; alpha is dropped, not blended (as
  Pillow's own conversion does); 16 bits and floats become 8 bits as in
  `depth`; an EXIF rotation is carried out, an invalid one ignored.

  Args:
    image: of any mode, decoded or not.
    white: see `depth.to_8_bits`; 0 = as the type says.

  Raises:
    InputError: 16 bits or floats of which 8 bits would keep next to nothing.
    OSError, or what else the decoder raises, for a broken or truncated file.

  differs: the reference does not rotate by EXIF and clips 16-bit grey.
  """
  # Decoding empties the list of tiles, which hold the bits of each channel.
  tiles = str(getattr(image, "tile", ""))
  image.load()
  image = _upright(image)
  if depth.is_deep(image.mode):
    image = depth.to_8_bits(image, white)
  elif image.mode == "P" and "transparency" in image.info:
    # Converting to RGB directly gives the same colours, but warns.
    image = image.convert("RGBA")
  image = image if image.mode == "RGB" else image.convert("RGB")
  if ";16" in tiles and "I;16" not in tiles and white != depth.WHITE_INTEGER:
    depth.check_colour(image)
  return image


def is_upright(image: Image.Image) -> bool:
  """Whether there is no EXIF orientation to apply, or an invalid header."""
  try:
    return image.getexif().get(_ORIENTATION, 1) == 1
  except Exception:  # an invalid header; the pixels are still good
    return True


def _upright(image: Image.Image) -> Image.Image:
  """Applies the EXIF orientation; an invalid one is ignored."""
  try:
    return image if is_upright(image) else ImageOps.exif_transpose(image)
  except Exception:  # as above
    return image
