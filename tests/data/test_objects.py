"""Generated objects: outline, material and hue go with the class, no more."""

import numpy as np
import pytest

from attmask_jax.data import objects, shapes, sources


def make(count: int = 64, size: int = 32, **options: object) -> objects.Objects:
  return objects.Objects(
    count, size=size, **(dict(seed=0, split="train") | options)
  )


def test_objects_are_a_function_of_seed_split_and_index() -> None:
  first = np.asarray(make().load(5))
  np.testing.assert_array_equal(first, make(count=8).load(5))
  for other in (make(seed=1), make(split="val")):
    assert not np.array_equal(first, other.load(5))
  assert not np.array_equal(first, make().load(13))  # the same class


def test_a_picture_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
  source = make()
  first = np.asarray(source.load(3))
  monkeypatch.setattr(source, "_draw", None)
  np.testing.assert_array_equal(first, source.load(3))
  # A set that does not fit is not kept.
  monkeypatch.setattr(shapes, "KEPT", 64 * 32 * 32 * 3 - 1)
  source = make()
  source.load(3)
  monkeypatch.setattr(source, "_draw", lambda index: np.zeros((1, 1, 3), "u1"))
  assert source.load(3).size == (1, 1)


def test_two_classes_of_distant_hues_share_each_material() -> None:
  for first in range(4):
    assert objects.material(first) == objects.material(first + 4) == first


def typical(monkeypatch: pytest.MonkeyPatch, name: str) -> np.ndarray:
  """Share of 4,000 pictures whose material or hue is that of their class."""
  seen = []
  surface = lambda self, rng, kind, turn: seen.append((kind, turn)) or 0.0
  monkeypatch.setattr(objects.Objects, "_surface", surface)
  monkeypatch.setattr(objects, "HUE_SPREAD", 0.0)
  source = make(count=4000, size=8)
  for i in range(4000):
    source.layers(i)
  kinds, turns = np.array(seen).T
  if name == "material":
    return np.mean(kinds == np.arange(4000) % 4)
  return np.mean(np.round(8 * turns) == np.arange(4000) % 8)


@pytest.mark.parametrize(
  ("name", "probability", "count"),
  [("material", objects.MATERIAL, 4), ("hue", objects.HUE, 8)],
)
def test_materials_and_hues_are_typical_in_most_pictures(
  name: str, probability: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  # The usual one, or one of all at random that happens to be it.
  want = probability + (1 - probability) / count
  got = typical(monkeypatch, name)
  assert abs(got - want) < 4 * np.sqrt(want * (1 - want) / 4000)


def test_patterns_lie_in_the_range_and_differ() -> None:
  """Upright stripes vary along rows, level ones along columns, checks both."""
  source = make(size=64)
  along = []
  for kind in range(objects.MATERIALS):
    patterns = [
      source._pattern(np.random.default_rng(i), kind) for i in range(50)
    ]
    assert all(p.min() >= 0 and p.max() <= 1 + 1e-6 for p in patterns)
    rows = np.mean([p.mean(0).std() for p in patterns])  # varies with x
    columns = np.mean([p.mean(1).std() for p in patterns])  # varies with y
    along.append((rows > 0.1, columns > 0.1))
  # The gradient runs along rows, from one side to the other.
  assert along == [(True, False), (True, False), (False, True), (False, False)]


def test_an_outline_is_typical_in_most_pictures() -> None:
  source = make(count=4000)
  names = [source.outline_name(i, source._rng(i)) for i in range(4000)]
  own = np.mean([n == shapes.CLASSES[i % 8] for i, n in enumerate(names)])
  # Its own, or one of eight at random that happens to be it: 4 std errors.
  want = objects.OUTLINE + (1 - objects.OUTLINE) / 8
  assert abs(own - want) < 4 * np.sqrt(want * (1 - want) / 4000)


def test_the_mask_is_where_the_object_is() -> None:
  source = make(count=40, size=64)
  for i in range(40):
    back, front, cover = source.layers(i)
    mask = source.object_mask(i)
    assert np.all(cover[..., 0][mask] >= 0.5)
    assert np.all(cover[..., 0][~mask] <= 0.5)
    assert back.shape == front.shape == (64, 64, 3)


def test_the_background_does_not_tell_the_class() -> None:
  """k-NN on the colours of a background, drawn without the object."""
  neighbors = pytest.importorskip("sklearn.neighbors")
  source = make(count=1600)
  backs, fronts = (
    np.stack([source.layers(i)[which] for i in range(1600)]) / 255
    for which in (0, 1)
  )

  def accuracy(images: np.ndarray) -> float:
    values = np.concatenate([images.mean((1, 2)), images.std((1, 2))], axis=1)
    knn = neighbors.KNeighborsClassifier(20).fit(
      values[:800], source.labels[:800]
    )
    return knn.score(values[800:], source.labels[800:])

  # Chance is 1/8; four standard errors of 800 draws.
  assert accuracy(backs) < 0.125 + 4 * 0.0117
  assert accuracy(fronts) > 0.25  # surfaces of objects do


def test_brightness_does_not_tell_the_class() -> None:
  source = make(count=1600)
  levels = np.array([source.layers(i)[1].mean() for i in range(1600)])
  means = [levels[source.labels == c].mean() for c in range(8)]
  # The spread within a class is the unit: 200 pictures each.
  error = 4 * levels.std() / np.sqrt(200)
  np.testing.assert_allclose(means, levels.mean(), atol=error)


def test_whatever_changes_a_picture_changes_the_fingerprint() -> None:
  others = [
    make(),
    make(count=65),
    make(size=33),
    make(seed=1),
    make(split="val"),
    shapes.Shapes(64, size=32, seed=0, split="train"),
  ]
  assert len({source.fingerprint() for source in others}) == len(others)


def test_a_config_names_them() -> None:
  class Data:
    source, seed, image_size = "objects", 0, 32
    shapes_train, shapes_val, subset = 16, 8, 0
    extensions, white, max_pixels = "", 0.0, 0

  train, val = (sources.build(Data, split) for split in ("train", "val"))
  assert (len(train), len(val)) == (16, 8)
  assert train.describe(3) == "objects[3]"
  assert train.name == "16 generated objects (train)"
