"""Images of any kind as a batch of uint8 arrays, for `Weights.features`."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from attmask_jax.augment import transforms
from attmask_jax.augment.rgb import to_rgb
from attmask_jax.data.decoding import PLAIN, BrokenImage, Reading, decode
from attmask_jax.errors import InputError

KINDS = "uint8 arrays [B, H, W, 3], a Pillow image, a path, or a list of images"


def as_batch(
  images: Any,
  *,
  size: int,
  patch_size: int,
  resample: str = "bicubic",
  normalised: bool = False,
  reading: Reading = PLAIN,
) -> np.ndarray:
  """Images as one array [B, H, W, 3].

  Args:
    images: a uint8 array [B, H, W, 3] or [H, W, 3], which is used as it is; a
      Pillow image or a path, which gets the evaluation crop of `size` pixels;
      or a list of these.
    size: side of the crop in pixels.
    patch_size: P; height and width must be multiples of it.
    resample: of the crop, one of `transforms.RESAMPLE`.
    normalised: the images are floats, already normalised as by
      `vit.normalize_images`.
    reading: how files are decoded.

  Returns:
    uint8, or float32 for normalised images.

  Raises:
    InputError: anything else, such as floats without `normalised`, another
      number of channels, or images of several sizes.
  """
  single = isinstance(images, Image.Image | str | os.PathLike)
  if single or isinstance(images, Sequence):
    several = [images] if single else images
    rows = [_row(image, size, resample, reading) for image in several]
    shapes = {row.shape for row in rows}
    if len(shapes) != 1:
      raise InputError(
        f"images of several shapes ({', '.join(map(str, sorted(shapes)))}) are "
        "not a batch: give one shape at a time, or paths and Pillow images, "
        "which are cropped to one size"
        if rows
        else "the list of images is empty: give at least one"
      )
    batch = np.stack(rows)
  else:
    batch = np.asarray(images)
    batch = batch[None] if batch.ndim == 3 else batch
  _check(batch, patch_size, normalised)
  return batch.astype(np.float32) if normalised else batch


def _row(image: Any, size: int, resample: str, reading: Reading) -> np.ndarray:
  """One image [H, W, 3]; files and Pillow images get the evaluation crop."""
  if isinstance(image, str | os.PathLike):
    try:
      image = decode(os.path.expanduser(image), reading)
    except BrokenImage as error:
      raise InputError(
        f"the image {os.fspath(image)} cannot be read: {error}"
      ) from error
  elif isinstance(image, Image.Image):
    image = to_rgb(image, white=reading.white)
  if isinstance(image, Image.Image):
    return np.asarray(transforms.eval_crop(image, size, resample=resample))
  return np.asarray(image)


def _check(batch: np.ndarray, patch_size: int, normalised: bool) -> None:
  """Rejects anything but a batch of images."""
  if batch.ndim != 4:
    raise InputError(
      f"an array of shape {batch.shape} is not a batch of images: give {KINDS}"
    )
  if batch.shape[-1] != 3:
    raise InputError(
      f"images of shape {batch.shape} have {batch.shape[-1]} channels, and the "
      "network takes 3 (RGB), the last axis"
    )
  floats = np.issubdtype(batch.dtype, np.floating)
  if floats and not normalised:
    raise InputError(
      f"images of type {batch.dtype} would be taken as normalised ones: give "
      "uint8 from 0 to 255, or normalise them (attmask_jax.models.vit."
      "normalize_images) and set normalised=True"
    )
  if normalised and not floats:
    raise InputError(
      f"normalised=True is for floats, and the images are {batch.dtype}: "
      "leave it out"
    )
  if not normalised and batch.dtype != np.uint8:
    raise InputError(
      f"images of type {batch.dtype} are ambiguous: give uint8 from 0 to 255"
    )
  height, width = batch.shape[1:3]
  if min(height, width) < 1 or height % patch_size or width % patch_size:
    raise InputError(
      f"images of {height} x {width} pixels are not a whole number of patches "
      f"of {patch_size} pixels: crop or resize them"
    )
