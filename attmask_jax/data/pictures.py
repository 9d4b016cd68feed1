"""Pictures to look at: one file, a folder, or the frames of a video."""

import os

from PIL import Image, ImageSequence

from attmask_jax.augment import transforms
from attmask_jax.data import files
from attmask_jax.errors import InputError

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")


def load(
  path: str, *, every: int = 1, limit: int = 0
) -> list[tuple[str, Image.Image]]:
  """(name, upright RGB image) of every picture.

  Args:
    path: an image, a folder of images, an animated image or a video.
    every: takes every n-th file or frame.
    limit: at most that many, 0 = all.

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
    found = _folder(path, every, limit)
  elif path.lower().endswith(VIDEOS):
    found = _video(path, every, limit)
  else:
    found = _frames(path, every, limit)
  if not found:
    raise InputError(
      f"evals.images={path} holds no images ({' '.join(files.EXTENSIONS)})"
    )
  return found


def _folder(path: str, every: int, limit: int) -> list[tuple[str, Image.Image]]:
  names = files.scan(path)[::every]
  chosen = names[: limit or None]
  return [(n, _decode(os.path.join(path, n))) for n in chosen]


def _decode(path: str) -> Image.Image:
  try:
    return files.decode(path)
  except files.BrokenImage as error:
    raise InputError(f"{path} cannot be read: {error}") from error


def _frames(path: str, every: int, limit: int) -> list[tuple[str, Image.Image]]:
  """One image, or those of an animation."""
  name = os.path.basename(path)
  try:
    with Image.open(path) as image:
      if getattr(image, "n_frames", 1) > 1:
        found = []
        for i, frame in enumerate(ImageSequence.Iterator(image)):
          if i % every == 0 and (not limit or len(found) < limit):
            found.append((f"{name} {i}", transforms.to_rgb(frame.copy())))
        return found
  except Exception as error:  # Pillow's decoders have a dozen kinds
    raise InputError(f"{path} cannot be read: {error}") from error
  return [(name, _decode(path))]


def _video(path: str, every: int, limit: int) -> list[tuple[str, Image.Image]]:
  try:
    import cv2  # optional
  except ImportError:
    raise InputError(
      f"reading {path} needs OpenCV: pip install opencv-python-headless, or "
      "take the frames out with ffmpeg and give their folder"
    ) from None
  name, found = os.path.basename(path), []
  video = cv2.VideoCapture(path)
  number = 0
  while not limit or len(found) < limit:
    good, frame = video.read()
    if not good:
      break
    if number % every == 0:
      rgb = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
      found.append((f"{name} {number}", Image.fromarray(rgb)))
    number += 1
  video.release()
  return found
