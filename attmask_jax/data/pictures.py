"""Pictures that are drawn: one file, a folder, or the frames of a video."""

import os

from absl import logging
from PIL import Image, ImageSequence

from attmask_jax.augment.rgb import to_rgb
from attmask_jax.data import files
from attmask_jax.data.decoding import PLAIN, BrokenImage, Reading, decode
from attmask_jax.errors import InputError
from attmask_jax.text import printable

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
Named = list[tuple[str, Image.Image]]


def load(
  path: str, *, every: int = 1, limit: int = 0, reading: Reading = PLAIN
) -> Named:
  """(name, upright RGB image) of every picture that can be read.

  Pictures of a folder, and frames, that cannot be read are named in the log.

  Args:
    path: an image, a folder of images, an animated image or a video.
    every: takes every n-th file or frame.
    limit: at most that many, 0 = all.
    reading: which files of a folder are images, and how they are decoded.

  Raises:
    InputError: nothing there, nothing readable, or a video without OpenCV.
  """
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise InputError(f"evals.images={path} does not exist")
  if every < 1 or limit < 0:
    raise InputError(
      f"evals.every {every} must be at least 1 and evals.count {limit} not "
      "negative"
    )
  if os.path.isdir(path):
    return _folder(path, every, limit, reading)
  if path.lower().endswith(VIDEOS):
    return _video(path, every, limit)
  return _frames(path, every, limit, reading)


def _folder(path: str, every: int, limit: int, reading: Reading) -> Named:
  endings, left_out = reading.endings, files.Endings()
  names = files.scan(path, endings, left_out)
  if not names:
    what = files.no_images(f"evals.images={path}", endings, left_out)
    raise InputError(what)
  files.log_left_out(path, len(names), left_out)
  images, reasons = [], []
  for name in names[::every]:
    if limit and len(images) == limit:
      break
    file = os.path.join(path, name)
    try:
      images.append((printable(name), decode(file, reading)))
    except BrokenImage as error:
      reasons.append(f"{printable(file)} cannot be read: {error}")
  if not images:
    raise InputError(reasons[0])
  for reason in reasons:
    logging.warning("left out: %s", reason)
  return images


def _frames(path: str, every: int, limit: int, reading: Reading) -> Named:
  """One image, or those of an animation up to the first damaged one."""
  name, images = printable(os.path.basename(path)), []
  try:
    first = decode(path, reading)  # checks the size, too
    with Image.open(path) as image:
      for i, frame in enumerate(ImageSequence.Iterator(image)):
        if limit and len(images) == limit:
          break
        if i % every == 0:
          rgb = to_rgb(frame.copy(), white=reading.white)
          images.append((f"{name} {i}", rgb))
  except Exception as error:  # Pillow's decoders have a dozen kinds
    if not images:
      raise InputError(f"{printable(path)} cannot be read: {error}") from error
    logging.warning(
      "%s cannot be read beyond frame %d: %s", printable(path), i, error
    )
  return [(name, first)] if i == 0 else images


def _video(path: str, every: int, limit: int) -> Named:
  try:
    import cv2  # optional
  except ImportError:
    raise InputError(
      f"reading {path} needs OpenCV: pip install opencv-python-headless, or "
      "take the frames out with ffmpeg and give their folder"
    ) from None
  name, images = printable(os.path.basename(path)), []
  video = cv2.VideoCapture(path)
  number = 0
  while not limit or len(images) < limit:
    good, frame = video.read()
    if not good:
      break
    if number % every == 0:
      rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
      images.append((f"{name} {number}", Image.fromarray(rgb)))
    number += 1
  video.release()
  if not images:
    raise InputError(f"{path} holds no frames that OpenCV can read")
  return images
