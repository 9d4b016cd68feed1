"""Sets in the layout of the ImageNet-9 backgrounds challenge.

PATH/VARIANT/val/CLASS/*: the same objects on their own background, on one of
the same class, of another class, or on none.
"""

import os
import pathlib

import numpy as np
from absl import logging
from PIL import Image

from attmask_jax.data import files, shapes
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


def write_shapes(
  path: str | os.PathLike[str], *, per_class: int, size: int, seed: int
) -> None:
  """Writes a small set of generated shapes in this layout.

  Args:
    path: folder that gets the variants.
    per_class: images of each class and variant.
    size: side in pixels.
    seed: of `shapes.Shapes`.
  """
  count = per_class * len(shapes.CLASSES)
  source = shapes.Shapes(count, size=size, seed=seed, split="val")
  layers = [source.layers(i) for i in range(count)]
  rng = np.random.default_rng([seed, count, 6])
  kinds = len(shapes.CLASSES)  # picture i is of class i mod kinds
  for i, (back, front, cover) in enumerate(layers):
    same = (i + kinds) % count
    other = int(rng.integers(count))
    follows = (i + 1) % count
    on = lambda j, f=front, c=cover: layers[j][0] * (1 - c) + f * c
    box = _box(cover[..., 0])
    tiled = back.copy()
    top, bottom, left, right = box
    tiled[top:bottom, left:right] = np.roll(back, size // 2, axis=1)[
      top:bottom, left:right
    ]
    black = back.copy()
    black[top:bottom, left:right] = 0
    pictures = {
      "original": on(i),
      "mixed_same": on(same),
      "mixed_rand": on(other),
      "mixed_next": on(follows),
      "only_fg": front * cover,
      "no_fg": on(i) * (cover == 0),
      "only_bg_b": black,
      "only_bg_t": tiled,
    }
    name = shapes.CLASSES[i % kinds]
    for variant, picture in pictures.items():
      folder = pathlib.Path(path) / variant / "val" / name
      folder.mkdir(parents=True, exist_ok=True)
      pixels = np.clip(picture, 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(folder / f"{i:05d}.png")


def _box(cover: np.ndarray) -> tuple[int, int, int, int]:
  """Bounding box of what is covered at all: top, bottom, left, right."""
  rows, columns = np.nonzero(cover > 0)
  return (
    int(rows.min()),
    int(rows.max()) + 1,
    int(columns.min()),
    int(columns.max()) + 1,
  )
