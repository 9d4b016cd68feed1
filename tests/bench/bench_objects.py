"""What simple features know of the classes of the generated images.

python tests/bench/bench_objects.py [--source objects] [--size 32] [--seed 0]

20-nearest-neighbours of validation images among training images, on the mean
colour, the colour histogram (8 x 8 x 8 bins, square roots) and raw pixels. A
trained network has to be better than these.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np
from sklearn import neighbors

from attmask_jax.data import sources

K = 20


def histogram(images: np.ndarray) -> np.ndarray:
  """[n, H, W, 3] uint8 -> [n, 512]."""
  bins = (images // 32).astype(int) @ np.array([64, 8, 1])
  counts = [np.bincount(x.ravel(), minlength=512) for x in bins]
  return np.sqrt(counts)


FEATURES = {
  "mean colour": lambda images: images.mean((1, 2)),
  "histogram": histogram,
  "raw pixels": lambda images: images.reshape(len(images), -1).astype(float),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--source", default="objects", choices=sources.GENERATED)
  parser.add_argument("--size", type=int, default=32)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--train", type=int, default=4000)
  parser.add_argument("--val", type=int, default=800)
  options = parser.parse_args()
  images, labels = {}, {}
  for split in ("train", "val"):
    source = sources.GENERATED[options.source](
      getattr(options, split),
      size=options.size,
      seed=options.seed,
      split=split,
    )
    loaded = [np.asarray(source.load(i)) for i in range(len(source))]
    images[split], labels[split] = np.stack(loaded), source.labels
  for name, of in FEATURES.items():
    model = neighbors.KNeighborsClassifier(K)
    model.fit(of(images["train"]), labels["train"])
    score = model.score(of(images["val"]), labels["val"])
    print(f"{name}: {100 * score:.1f} %")


if __name__ == "__main__":
  main()
