"""A small set in the layout of the backgrounds challenge."""

import pathlib

import numpy as np
from PIL import Image

from attmask_jax.data import shapes


def write_shapes(path, *, per_class, size, seed):
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


def _box(cover):
  """Bounding box of what is covered at all: top, bottom, left, right."""
  rows, columns = np.nonzero(cover > 0)
  return (
    int(rows.min()),
    int(rows.max()) + 1,
    int(columns.min()),
    int(columns.max()) + 1,
  )
