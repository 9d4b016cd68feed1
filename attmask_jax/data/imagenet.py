"""The 1000 classes of ImageNet-1k, and the nine of the backgrounds challenge.

Source: labels/imagenet_classes.csv; wnids in sorted order are the indices. The
map to ImageNet-9 is that of the challenge (MadryLab/backgrounds_challenge).
"""

import csv
import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attmask_jax.errors import InputError

IN9_CLASSES = 9
_TABLE = pathlib.Path(__file__).parent / "labels" / "imagenet_classes.csv"


class ImageNetClass(NamedTuple):
  """One row of the table; in9 is 0 to 8, or -1 for none."""

  index: int
  wnid: str
  name: str
  in9: int


@functools.cache
def classes() -> tuple[ImageNetClass, ...]:
  """All 1000 classes by index."""
  with _TABLE.open(newline="", encoding="utf-8") as file:
    return tuple(
      ImageNetClass(
        int(row["index"]), row["wnid"], row["simple_label"], int(row["in9"])
      )
      for row in csv.DictReader(file)
    )


def in9_map(
  class_names: Sequence[str], folders: Sequence[str], *, where: str
) -> np.ndarray:
  """Which folder of a backgrounds set each class of a classifier belongs to.

  Classes named as the folders map to them; ImageNet wnids, any of the 1000, to
  the nine folders of the challenge in their order; so do exactly 1000 classes
  of other names, by index.

  Args:
    class_names: [C], of the classifier.
    folders: class folders, sorted.
    where: the classifier, for the message.

  Returns:
    [C] int32, -1 = none: a prediction that is always wrong.

  Raises:
    InputError: no such map.
  """
  if set(folders) <= set(class_names):
    place = {name: i for i, name in enumerate(folders)}
    return np.array([place.get(name, -1) for name in class_names], np.int32)
  table = classes()
  by_wnid = {row.wnid: row.in9 for row in table}
  known = len(folders) == IN9_CLASSES
  if known and all(name in by_wnid for name in class_names):
    return np.array([by_wnid[name] for name in class_names], np.int32)
  if known and len(class_names) == len(table):
    return np.array([row.in9 for row in table], np.int32)
  raise InputError(
    f"the {len(class_names)} classes of {where} (such as "
    f'"{class_names[0]}") do not map to the {len(folders)} folders (such as '
    f'"{folders[0]}"): use a classifier of ImageNet-1k, of folders named by '
    "wnid, or of these very classes"
  )
