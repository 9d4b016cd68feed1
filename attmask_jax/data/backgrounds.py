"""Sets in the layout of the ImageNet-9 backgrounds challenge.

PATH/VARIANT/val/CLASS/*: the same objects on their own background, on one of
the same class, of another class, or on none.
"""

import os

import numpy as np
from absl import logging

from attmask_jax.data import files
from attmask_jax.errors import InputError

VARIANTS = (
  "original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg",
  "only_bg_b", "only_bg_t",
)  # fmt: skip


class Variant(files.ImageFiles):
  """One variant; classes are numbered by sorted folder name.

  Attributes:
    variant: one of VARIANTS.
  """

  def __init__(self, path: str, name: str) -> None:
    root = os.path.join(path, name, "val")
    folders = files.class_folders(root)
    found = [files.scan(os.path.join(root, folder)) for folder in folders]
    paths = [
      os.path.join(folder, file)
      for folder, inside in zip(folders, found, strict=True)
      for file in inside
    ]
    labels = np.repeat(np.arange(len(folders)), [len(x) for x in found])
    if not paths:
      raise InputError(f"{root} holds no images")
    super().__init__(root, paths, labels.astype(np.int32))
    self.name, self.variant = root, name
    self.class_names = folders


def variants(path: str) -> list[Variant]:
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
  there = [n for n in VARIANTS if os.path.isdir(os.path.join(path, n))]
  if not there:
    raise InputError(
      f"{path} holds none of the variants {', '.join(VARIANTS)}: give the "
      "folder bg_challenge of the ImageNet-9 archive"
    )
  for name in there:
    if not os.path.isdir(os.path.join(path, name, "val")):
      raise InputError(
        f"{path}/{name} has no folder val/: the layout is "
        "VARIANT/val/CLASS/IMAGE"
      )
  if len(there) < len(VARIANTS):
    absent = [name for name in VARIANTS if name not in there]
    logging.warning("%s lacks the variants %s", path, ", ".join(absent))
  found = [Variant(path, name) for name in there]
  for other in found[1:]:
    if other.class_names != found[0].class_names:
      raise InputError(
        f"{other.name} has other class folders than {found[0].name}: all "
        "variants need the same"
      )
  return found
