"""Pairs of ExtreMA: recorded primitives, shared geometry, own colours."""

import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image, ImageEnhance

from attmask_jax.augment import colours, pair, transforms
from attmask_jax.errors import InputError
from attmask_jax.models import vit
from configs import tiny


def test_golden_primitives(golden, monkeypatch):
  file = golden("extrema/augment.npz")
  image, size = Image.fromarray(file["in/image"]), int(file["cfg/size"])
  top, left, height, width = file["in/crop_ijhw"].tolist()
  recorded_box = lambda *_, **__: (left, top, left + width, top + height)
  monkeypatch.setattr(transforms, "crop_box", recorded_box)
  crop = transforms.random_resized_crop(
    image, None, size=size, scale=(0.2, 1.0), resample=transforms.BILINEAR
  )
  same = lambda got, key: np.testing.assert_array_equal(
    np.asarray(got), file[f"out/{key}"]
  )
  same(crop, "resized_crop")

  class Always:
    """A generator that always flips."""

    def random(self):
      return 0.0

  same(transforms.random_flip(crop, Always()), "hflip")
  bright, contrast, saturation, hue = file["in/factors"].tolist()
  same(ImageEnhance.Brightness(crop).enhance(bright), "brightness")
  same(ImageEnhance.Contrast(crop).enhance(contrast), "contrast")
  same(ImageEnhance.Color(crop).enhance(saturation), "saturation")
  turn = colours.Jitter((colours.HUE,), (1.0, 1.0, 1.0), hue)
  same(colours.apply_jitter(crop, turn), "hue")
  # Recorded after the jitter.
  jittered = Image.fromarray(file["out/jitter"])
  luma = colours.luma(colours.split(jittered))
  same(np.repeat(luma[..., None], 3, -1), "grayscale")

  class Recorded:
    """Draws the recorded order."""

    def permutation(self, n):
      return file["in/order"]

  factors = iter(file["in/factors"].tolist())

  def uniform(_, low, high):
    value = next(factors)
    assert low <= value <= high
    return value

  monkeypatch.setattr(colours, "uniform", uniform)

  same(colours.color_jitter(crop, Recorded()), "jitter")
  got = np.asarray(vit.normalize_images(jnp.asarray(file["out/jitter"])))
  np.testing.assert_allclose(
    got.transpose(2, 0, 1), file["out/normalized"], rtol=1e-4, atol=2e-5
  )


def gradient():
  """Red falls from left to right, green from top to bottom: 60 x 40."""
  x = np.linspace(250, 5, 60)[None, :].repeat(40, 0)
  y = np.linspace(250, 5, 40)[:, None].repeat(60, 1)
  return Image.fromarray(np.stack([x, y, 0 * x + 90], -1).astype(np.uint8))


def test_views_share_their_geometry():
  views_of = pair.TwoColours(image_size=16, jitter=0.0, grey=0.0)
  crops = []
  for seed in range(8):
    views = views_of(gradient(), np.random.default_rng(seed))["images"]
    assert views.shape == (2, 16, 16, 3) and views.dtype == np.uint8
    np.testing.assert_array_equal(views[0], views[1])
    crops.append(views[0].tobytes())
  assert len(set(crops)) == 8
  # Mirrored about half of the time: then red rises.
  rising = [
    np.diff(views_of(gradient(), np.random.default_rng(s))["images"][0, 5, :, 0]
            .astype(int)).sum() > 0
    for s in range(300)
  ]  # fmt: skip
  assert 0.4 < np.mean(rising) < 0.6


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.3, 0.4)])
def test_area_of_the_crop(scale):
  size, wide, high = 32, 60, 40
  changes = {} if scale == (0.2, 1.0) else {"scale": scale}  # the default
  views_of = pair.TwoColours(image_size=size, jitter=0.0, grey=0.0, **changes)
  areas = []
  for seed in range(300):
    view = views_of(gradient(), np.random.default_rng(seed))["images"][0] * 1.0
    # Colours are places, 245 levels from the first pixel to the last, and the
    # outermost centres of a crop lie 31 / 32 of its side apart.
    across = np.ptp(view[..., 0]) * (wide - 1) / 245 * size / (size - 1)
    down = np.ptp(view[..., 1]) * (high - 1) / 245 * size / (size - 1)
    areas.append(across * down / (wide * high))
  low, top = scale[0], min(scale[1], 8 / 9)  # of 3:2, as 4:3 at the widest
  assert 0.93 * low - 0.01 < min(areas) < 1.1 * low + 0.01
  assert 0.9 * top < max(areas) < 1.07 * top


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_filter_of_the_crop(resample):
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3))
  image = Image.fromarray(pixels.astype(np.uint8))
  views_of = pair.TwoColours(
    image_size=16, resample=resample, jitter=0.0, grey=0.0
  )
  for seed in range(4):
    got = views_of(image, np.random.default_rng(seed))["images"][1]
    rng = np.random.default_rng(seed)
    crop = image.crop(transforms.crop_box(60, 40, rng, scale=(0.2, 1.0)))
    pillow = Image.Resampling[resample.upper()]
    want = np.asarray(crop.resize((16, 16), pillow))
    assert np.array_equal(got, want) or np.array_equal(got, want[:, ::-1])


def test_ranges_of_the_jitter():
  recipe, rng = (
    pair.TwoColours(image_size=8, jitter=1.0),
    np.random.default_rng(0),
  )
  views = [v for _ in range(500) for v in recipe.draw((60, 40), rng)["images"]]
  drawn = np.array([(*v.jitter.factors, v.jitter.hue) for v in views])
  low, high = np.array([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]).T
  # The 1,000 draws leave a gap of 1 % of the range with probability e^-10.
  gap = 0.01 * (high - low)
  assert (drawn.min(0) >= low).all() and (drawn.min(0) < low + gap).all()
  assert (drawn.max(0) <= high).all() and (drawn.max(0) > high - gap).all()


def test_uniform_draws_are_those_of_numpy():
  one, other = np.random.default_rng(3), np.random.default_rng(3)
  for low, high in [(0.2, 1.0), (-0.1, 0.1), (0.6, 1.4), (0.1, 2.0)] * 50:
    assert colours.uniform(one, low, high) == other.uniform(low, high)


def test_grey_comes_after_the_jitter(monkeypatch):
  red = Image.new("RGB", (8, 8), (255, 0, 0))
  planes = colours.split(red)
  monkeypatch.setattr(colours, "jitter_planes", lambda *_: planes)
  views_of = pair.TwoColours(image_size=8, jitter=1.0, grey=1.0)
  views = views_of(gradient(), np.random.default_rng(0))["images"]
  assert (views == 76).all()  # 0.299 * 255


def test_views_are_coloured_alone():
  views_of = pair.TwoColours(image_size=16)
  first = views_of(gradient(), np.random.default_rng(1))["images"]
  again = views_of(gradient(), np.random.default_rng(1))["images"]
  np.testing.assert_array_equal(first, again)
  grey, same = [], 0
  for seed in range(400):
    views = views_of(gradient(), np.random.default_rng(seed))["images"]
    grey += [bool((v == v[..., :1]).all()) for v in views]
    same += bool((views[0] == views[1]).all())
  assert 0.15 < np.mean(grey) < 0.25  # p = 0.2
  # Both plain, or both grey without jitter: (0.2 * 0.8)^2 + (0.2 * 0.2)^2.
  assert 0.005 < same / 400 < 0.06
  only_grey = pair.TwoColours(image_size=8, jitter=0.0, grey=1.0)
  views = only_grey(gradient(), np.random.default_rng(0))["images"]
  assert (views == views[..., :1]).all() and (views[0] == views[1]).all()


def test_centre_crop_by_hand():
  image = gradient()
  crop = pair.CentreCrop(image_size=28)
  got = crop(image, None)["images"]
  # Shorter side 28 * 256 / 224 = 32; the other 48; the middle 28 x 28.
  whole = image.resize((48, 32), Image.Resampling.BILINEAR)
  want = np.asarray(whole)[2:30, 10:38]
  np.testing.assert_array_equal(got, want[None])


@pytest.mark.parametrize(
  "recipe, changes, match",
  [
    (pair.TwoColours, {"jitter": 1.5}, "data.jitter 1.5"),
    (pair.TwoColours, {"grey": -0.1}, "data.grey -0.1"),
    (pair.TwoColours, {"resample": "x"}, '"x" is unknown'),
    (pair.TwoColours, {"scale": (0.2, 1.5)}, "data.scale"),
    (pair.TwoColours, {"scale": (0.0, 1.0)}, "data.scale"),
    (pair.TwoColours, {"scale": (0.5, 0.2)}, "data.scale"),
    (pair.CentreCrop, {"resample": "x"}, '"x" is unknown'),
  ],
)
def test_what_cannot_be_drawn(recipe, changes, match):
  with pytest.raises(InputError, match=match):
    recipe(**changes)


@pytest.mark.slow
@pytest.mark.parametrize(
  "transform, views", [("two_colours", 2), ("crop_flip", 1), ("centre_crop", 1)]
)
def test_a_step_on_every_augmentation(tmp_path, transform, views):
  config = tiny.get_config("extrema")
  config.update_from_flattened_dict(
    {
      "method.variant": "16x1x2",
      "method.num_masks": 2,
      "method.head_hidden": 16,
      "method.out_dim": 8,
      "data.image_size": 16,
      "data.batch_size": 8,
      "data.shapes_train": 16,
      "data.shapes_val": 8,
      "data.transform": transform,
      "evals.knn_ks": (3,),
    }
  )
  built, state, step = small.parts(config.lock())
  ((batch, scalars),) = small.arguments(built, 1)
  assert batch["images"].shape == (8, views, 16, 16, 3)
  _, values, _ = step(state, batch, scalars)
  assert np.isfinite(float(values["loss"]))
