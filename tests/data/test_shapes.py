"""Generated pictures: repeatable, balanced, and told apart by outline only."""

import numpy as np
import pytest

from attmask_jax.data import shapes


def _shapes(
  count: int = 64, size: int = 32, **options: object
) -> shapes.Shapes:
  options = dict(seed=0, split="train") | options
  return shapes.Shapes(count, size=size, **options)


def test_shapes_are_a_function_of_seed_split_and_index() -> None:
  first = np.asarray(_shapes().load(5))
  np.testing.assert_array_equal(first, _shapes(count=8).load(5))
  for other in (_shapes(seed=1), _shapes(split="val")):
    assert not np.array_equal(first, other.load(5))
  assert not np.array_equal(first, _shapes().load(13))  # the same class


@pytest.mark.parametrize("size", [32, 50, 224])
def test_shapes_at_any_resolution(size: int) -> None:
  source = _shapes(size=size)
  assert source.load(3).size == (size, size)
  mask = source.object_mask(3)
  assert mask.shape == (size, size) and mask.dtype == bool
  # The same object whatever the resolution, up to the pixels of its edge.
  assert abs(mask.mean() - _shapes(size=128).object_mask(3).mean()) < 0.02


def test_shapes_are_balanced_and_of_the_stated_area() -> None:
  source = _shapes(count=800)
  assert np.bincount(source.labels).tolist() == [100] * 8
  areas = np.array([source.object_mask(i).mean() for i in range(800)])
  # A corner may leave the picture, and pixels round the edge.
  assert areas.min() > 0.07 and areas.max() < 0.36
  # Area says nothing about the class: means of 100 draws of U(0.08, 0.35).
  means = [areas[source.labels == c].mean() for c in range(8)]
  np.testing.assert_allclose(means, 0.215, atol=4 * 0.078 / 10)


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_outline_area_and_reach(name: str) -> None:
  grid = (np.arange(1200) + 0.5) / 400 - 1.5
  x, y = np.meshgrid(grid, grid)
  inside = shapes.outline(name, x, y) < 0
  area, reach = shapes._EXTENT[name]
  np.testing.assert_allclose(inside.mean() * 9, area, rtol=0.01)
  np.testing.assert_allclose(np.hypot(x, y)[inside].max(), reach, rtol=0.01)


def test_colours_do_not_tell_the_shape() -> None:
  neighbors = pytest.importorskip("sklearn.neighbors")
  source = _shapes(count=1200)
  images = np.stack([np.asarray(source.load(i)) for i in range(1200)]) / 255
  features = {
    "colour": np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1),
    "corners": images[:, :4, :4].reshape(1200, -1),
  }
  for name, values in features.items():
    knn = neighbors.KNeighborsClassifier(20).fit(
      values[:800], source.labels[:800]
    )
    score = knn.score(values[800:], source.labels[800:])
    # Chance is 1/8; four standard errors of 400 draws.
    assert score < 0.125 + 4 * 0.0165, name


def test_the_object_stands_out_where_its_mask_says() -> None:
  source = _shapes(count=200, size=64)
  gaps = []
  for i in range(200):
    pixels = np.asarray(source.load(i)).astype(float)
    mask = source.object_mask(i)
    # Shuffling the mask's place would make the two means alike.
    gaps.append(np.abs(pixels[mask].mean(0) - pixels[~mask].mean(0)).max())
  assert np.median(gaps) > 30
