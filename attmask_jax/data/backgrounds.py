"""Sets in the layout of the ImageNet-9 backgrounds challenge.

PATH/VARIANT/val/CLASS/*: the same objects on their own background, on one of
the same class, of another class, or on none.
"""

import os

import numpy as np
from absl import logging

from attmask_jax.data import files
from attmask_jax.data.decoding import PLAIN, Reading
from attmask_jax.errors import InputError
from attmask_jax.text import printable

VARIANTS = (
  "original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg",
  "only_bg_b", "only_bg_t",
)  # fmt: skip


class Variant(files.ImageFiles):
  """One variant; classes are numbered by sorted folder name.

  Attributes:
    variant: one of VARIANTS.
  """

  def __init__(self, path: str, name: str, reading: Reading = PLAIN) -> None:
    root = os.path.join(path, name, "val")
    folders = files.class_folders(root)
    endings, left_out = reading.endings, files.Endings()
    by_class = [
      files.scan(os.path.join(root, folder), endings, left_out)
      for folder in folders
    ]
    paths = [
      os.path.join(folder, file)
      for folder, inside in zip(folders, by_class, strict=True)
      for file in inside
    ]
    labels = np.repeat(np.arange(len(folders)), [len(x) for x in by_class])
    if not paths:
      raise InputError(files.no_images(root, endings, left_out))
    files.log_left_out(root, len(paths), left_out)
    super().__init__(root, paths, labels.astype(np.int32), reading)
    self.name, self.variant = printable(root), name
    self.class_names = [printable(folder) for folder in folders]


def variants(path: str, reading: Reading = PLAIN) -> list[Variant]:
  """The known variants in a folder, in the order of VARIANTS.

  Raises:
    InputError: none is there, or their layout is another.
  """
  path = os.path.expanduser(path)
  if not path or not os.path.isdir(path):
    raise InputError(
      f"evals.backgrounds={path} is no folder: set it to the one that holds "
      "original/, mixed_same/, mixed_rand/, ..."
    )
  names = [n for n in VARIANTS if os.path.isdir(os.path.join(path, n))]
  if not names:
    raise InputError(
      f"{path} holds none of the variants {', '.join(VARIANTS)}: give the "
      "folder bg_challenge of the ImageNet-9 archive"
    )
  for name in names:
    if not os.path.isdir(os.path.join(path, name, "val")):
      raise InputError(
        f"{path}/{name} has no folder val/: the layout is "
        "VARIANT/val/CLASS/IMAGE"
      )
  if len(names) < len(VARIANTS):
    absent = [name for name in VARIANTS if name not in names]
    logging.warning("%s lacks the variants %s", path, ", ".join(absent))
  sources = [Variant(path, name, reading) for name in names]
  for other in sources[1:]:
    if other.class_names != sources[0].class_names:
      raise InputError(
        f"{other.name} has other class folders than {sources[0].name}: all "
        "variants need the same"
      )
  return sources
