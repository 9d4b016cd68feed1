"""What a training batch is drawn from."""

import contextlib

import numpy as np

from attmask_jax.augment import transforms
from attmask_jax.data import pipeline, shapes

RECIPE = transforms.MultiCrop(image_size=16, local_size=8, local_crops=1)


def by_index(seed: int) -> dict[int, np.ndarray]:
  """Global crops of every image in the first epoch."""
  source = shapes.Shapes(16, size=32, seed=0, split="train")
  pipe = pipeline.TrainPipeline(source, RECIPE, batch_size=4, seed=seed)
  crops = {}
  with contextlib.closing(pipe.batches(0, 4)) as batches:
    for batch in batches:
      crops |= dict(zip(batch["index"].tolist(), batch["images"], strict=True))
  return crops


def test_augmentation_follows_the_seed() -> None:
  first, again, other = by_index(1), by_index(1), by_index(2)
  assert first.keys() == other.keys() == set(range(16))
  for i, crops in first.items():
    np.testing.assert_array_equal(crops, again[i])
    assert not np.array_equal(crops, other[i])
