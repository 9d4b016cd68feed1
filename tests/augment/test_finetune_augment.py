"""RandAugment, the supervised recipes, repeated augmentation."""

import collections
import itertools
import math
import re

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from attmask_jax.augment import colours, randaugment, supervised, transforms
from attmask_jax.data import pipeline, shapes
from attmask_jax.errors import InputError

RECIPE = transforms.MultiCrop(image_size=8, local_crops=0, global_crops=1)
NEAREST = Image.Resampling.NEAREST


def _rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


def _noise(width: int = 20, height: int = 16, seed: int = 0) -> Image.Image:
  pixels = _rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


# --- RandAugment: what an operation does ------------------------------------


@pytest.mark.parametrize(
  ("name", "at_0", "at_9", "at_10"),
  [
    ("Rotate", 0, 27, 30),
    ("Posterize", 4, 1, 0),  # 4 - int(3.6)
    ("Solarize", 256, 26, 0),  # 256 - int(230.4)
    ("SolarizeAdd", 0, 99, 110),
    ("Color", 1, 1.81, 1.9),
    ("Contrast", 1, 1.81, 1.9),
    ("Brightness", 1, 1.81, 1.9),
    ("Sharpness", 1, 1.81, 1.9),
    ("ShearX", 0, 0.27, 0.3),
    ("ShearY", 0, 0.27, 0.3),
    ("TranslateX", 0, 0.405, 0.45),
    ("TranslateY", 0, 0.405, 0.45),
  ],
)
def test_severity_increases_with_the_magnitude(
  name: str, at_0: float, at_9: float, at_10: float
) -> None:
  got = [randaugment.argument(name, m) for m in (0, 9, 10)]
  assert got == pytest.approx([at_0, at_9, at_10])
  other = [randaugment.argument(name, m, -1) for m in (0, 9, 10)]
  if name in ("Posterize", "Solarize", "SolarizeAdd"):
    assert other == got
  else:  # two-sided, about the value that changes nothing
    assert other == pytest.approx([2 * at_0 - x for x in got])


def test_the_table_is_complete() -> None:
  assert len(randaugment.OPS) == 15
  assert set(randaugment.OPS) >= {"AutoContrast", "Equalize", "Invert"}


def _run(
  name: str,
  image: Image.Image,
  magnitude: float,
  sign: int = 1,
  resample: Image.Resampling = NEAREST,
) -> np.ndarray:
  value = randaugment.argument(name, magnitude, sign)
  op = randaugment.OPS[name]
  return np.asarray(op.run(image, value, randaugment.FILL, resample))


def test_value_operations_by_hand() -> None:
  image = _noise()
  x = np.asarray(image).astype(int)
  for magnitude, keep in ((0, 0xF0), (9, 0x80), (10, 0)):
    got = _run("Posterize", image, magnitude)
    np.testing.assert_array_equal(got, x & keep)
  for magnitude, threshold in ((0, 256), (9, 26), (10, 0)):
    got = _run("Solarize", image, magnitude)
    np.testing.assert_array_equal(got, np.where(x < threshold, x, 255 - x))
  for magnitude, amount in ((0, 0), (9, 99), (10, 110)):
    want = np.where(x < 128, np.minimum(x + amount, 255), x)
    np.testing.assert_array_equal(_run("SolarizeAdd", image, magnitude), want)
  np.testing.assert_array_equal(_run("Invert", image, 9), 255 - x)
  dull = Image.fromarray((x // 4 + 50).astype(np.uint8))  # 50 to 113
  stretched = (np.asarray(dull) - 50.0) * 255 / 63
  np.testing.assert_allclose(_run("AutoContrast", dull, 9), stretched, atol=1)
  # Dark values are the frequent ones: afterwards all are.
  skewed = (_rng().random((64, 64, 3)) ** 3 * 256).astype(np.uint8)
  flat = _run("Equalize", Image.fromarray(skewed), 9)
  np.testing.assert_array_equal(
    flat, ImageOps.equalize(Image.fromarray(skewed))
  )
  levels = np.histogram(flat, bins=4, range=(0, 256))[0]
  assert levels.max() < 1.3 * levels.min()


@pytest.mark.parametrize(("sign", "factor"), [(1, 1.81), (-1, 0.19)])
def test_enhancements_blend_with_their_neutral_image(
  sign: int, factor: float
) -> None:
  image = _noise()
  x = np.asarray(image).astype(float)
  luma = np.asarray(image.convert("L")).astype(float)[..., None]
  neutral = {
    "Brightness": 0 * x,
    "Color": luma + 0 * x,
    "Contrast": 0 * x + round(luma.mean()),
  }
  for name, other in neutral.items():
    want = np.clip(other + factor * (x - other), 0, 255)
    got = _run(name, image, 9, sign)
    np.testing.assert_allclose(got, want, atol=1.01, err_msg=name)
  want = ImageEnhance.Sharpness(image).enhance(factor)
  np.testing.assert_array_equal(_run("Sharpness", image, 9, sign), want)


@pytest.mark.parametrize("sign", [1, -1])
def test_shear_and_translation_pixel_by_pixel(sign: int) -> None:
  image = _noise(20, 14)
  x = np.asarray(image)
  shift_x, shift_y = sign * 0.405 * 20, sign * 0.405 * 14  # 8.1, 5.67 px
  sources = {
    "ShearX": lambda i, j: (i, j + sign * 0.27 * i),
    "ShearY": lambda i, j: (i + sign * 0.27 * j, j),
    "TranslateX": lambda i, j: (i, j + shift_x),
    "TranslateY": lambda i, j: (i + shift_y, j),
  }
  for name, source in sources.items():
    want = np.tile(np.array(randaugment.FILL, np.uint8), (14, 20, 1))
    for i, j in itertools.product(range(14), range(20)):
      # A pixel's colour is found at its centre.
      row, column = (math.floor(v) for v in source(i + 0.5, j + 0.5))
      if 0 <= row < 14 and 0 <= column < 20:
        want[i, j] = x[row, column]
    got = _run(name, image, 9, sign)
    np.testing.assert_array_equal(got, want, err_msg=name)


def test_rotation_is_about_the_centre_and_fills() -> None:
  pixels = np.zeros((41, 41, 3), np.uint8)
  pixels[19:22, 34:37] = 255  # to the right: 15 px from the centre
  got = _run("Rotate", Image.fromarray(pixels), 10, 1, transforms.BICUBIC)
  y, x = np.nonzero(got.min(axis=2) > 200)
  # Anticlockwise by 30 degrees.
  assert abs(x.mean() - 20 - 15 * math.cos(math.pi / 6)) < 0.5
  assert abs(20 - y.mean() - 15 * math.sin(math.pi / 6)) < 0.5
  assert tuple(got[0, 0]) == randaugment.FILL


# --- RandAugment: what is drawn ---------------------------------------------


def test_how_often_and_how_strongly_each_operation_is_done(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  done = []
  for name, op in randaugment.OPS.items():

    def run(
      image: Image.Image, value: float, *paint: object, name: str = name
    ) -> Image.Image:
      assert paint == ((124, 116, 104), transforms.BICUBIC)
      done.append((name, value))
      return image

    monkeypatch.setitem(randaugment.OPS, name, op._replace(run=run))
  image, rng, n = _noise(), _rng(), 6000
  per_image, twice = collections.Counter(), 0
  for _ in range(n):
    before = len(done)
    randaugment.rand_augment(image, rng)
    names = [name for name, _ in done[before:]]
    per_image[len(names)] += 1
    twice += len(names) == 2 and names[0] == names[1]
  # Five standard deviations throughout.
  for count, prob in ((0, 0.25), (1, 0.5), (2, 0.25), (3, 0)):
    margin = 5 * math.sqrt(prob * (1 - prob) / n)
    assert abs(per_image[count] / n - prob) <= margin
  assert abs(twice - n / 60) < 5 * math.sqrt(n / 60)  # with replacement
  counts = collections.Counter(name for name, _ in done)
  assert len(counts) == 15
  for name, count in counts.items():
    assert abs(count - n / 15) < 5 * math.sqrt(n / 15), name
  # N(9, 0.5) cut off at 10: the mean loses 0.5 (phi(2) - 2 (1 - Phi(2))).
  angles = np.array([value for name, value in done if name == "Rotate"])
  magnitude = np.abs(angles) / 3
  assert magnitude.max() == 10 and np.mean(magnitude == 10) < 0.06
  margin = 5 * 0.49 / math.sqrt(len(angles))
  assert abs(magnitude.mean() - 8.996) < margin
  assert abs(magnitude.std() - 0.49) < margin
  margin = 5 * 0.5 / math.sqrt(len(angles))
  assert abs(np.mean(angles > 0) - 0.5) < margin


def test_every_image_keeps_its_size_and_its_stream() -> None:
  image = _noise()
  results = set()
  for seed in range(60):
    got = randaugment.rand_augment(image, _rng(seed), ops=3, prob=1.0)
    again = randaugment.rand_augment(image, _rng(seed), ops=3, prob=1.0)
    assert got.mode == "RGB" and got.size == image.size
    assert got.tobytes() == again.tobytes()
    results.add(got.tobytes())
  assert len(results) > 50


def test_magnitude_zero_changes_nothing_that_has_a_strength() -> None:
  image = _noise()
  changed = {
    name
    for name in randaugment.OPS
    if not np.array_equal(_run(name, image, 0, 1, transforms.BICUBIC), image)
  }
  # Posterising keeps four bits at most.
  assert changed == {"AutoContrast", "Equalize", "Invert", "Posterize"}


@pytest.mark.parametrize(
  ("text", "want"),
  [
    ("rand-m9-mstd0.5-inc1", (2, 9.0, 0.5, 0.5)),
    ("rand-inc1", (2, 10.0, 0.0, 0.5)),
    ("rand-inc1-p1-n3-m7.5", (3, 7.5, 0.0, 1.0)),
  ],
)
def test_the_string(text: str, want: tuple) -> None:
  assert randaugment.parse(text) == want
  assert randaugment.parse("") is None


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("augmix-m3-inc1", "is not RandAugment .*rand-m9-mstd0.5-inc1"),
    ("rand-m9", "is not RandAugment with increasing"),
    ("rand-m9-inc0", "is not RandAugment with increasing"),
    ("rand-m9-w0-inc1", 'unknown option "w0": use m, n, mstd or p'),
    ("rand-m-inc1", 'unknown option "m"'),
    ("rand-m9-inc1-", 'unknown option ""'),
    ("rand-m11-inc1", 'cannot have "m11": give m once, .* from 0 to 10'),
    ("rand-n1.5-inc1", 'cannot have "n1.5": give n once, as a whole number'),
    ("rand-m9-m8-inc1", 'cannot have "m8": give m once'),
  ],
)
def test_a_string_that_is_not_understood(text: str, message: str) -> None:
  with pytest.raises(InputError, match=message):
    randaugment.parse(text)


# --- random erasing ---------------------------------------------------------


def test_erased_boxes_have_the_asked_share_and_aspect() -> None:
  rng = _rng()
  boxes = [supervised.erase_box(200, 300, rng, prob=0.25) for _ in range(8000)]
  boxes = np.array(boxes)
  assert boxes.shape == (8000, 4) and boxes.dtype == np.int32
  some = boxes.any(axis=1)
  # Five standard deviations of 8,000 draws.
  assert abs(some.mean() - 0.25) < 5 * math.sqrt(0.1875 / 8000)
  top, left, bottom, right = boxes[some].T
  assert top.min() >= 0 and left.min() >= 0
  assert bottom.max() <= 200 and right.max() <= 300
  height, width = bottom - top, right - left
  assert height.max() < 200 and width.max() < 300
  # Rounding the shorter side, at least 19 px, moves either by up to 3 %.
  share, aspect = height * width / 60_000, height / width
  assert 0.019 < share.min() < 0.023 and 0.32 < share.max() < 0.345
  assert 0.29 < aspect.min() < 0.32 and 2.8 < aspect.max() < 3.45
  # Small boxes fit whatever their aspect: there it is log-uniform. Uniform on
  # +-1.204, sd 0.695.
  small = np.log(aspect[share < 0.15])
  assert abs(small.mean()) < 5 * 0.695 / math.sqrt(len(small))
  assert abs(small.std() - 0.695) < 0.05
  # Anywhere: on average in the middle.
  assert abs((top + bottom).mean() / 2 - 100) < 8
  assert abs((left + right).mean() / 2 - 150) < 10


def test_nothing_is_erased_where_nothing_fits() -> None:
  box = supervised.erase_box(
    50, 50, _rng(), prob=1.0, area=(1.0, 1.0), aspect=(1.0, 1.0)
  )
  assert not box.any()
  assert not supervised.erase_box(50, 50, _rng(), prob=0.0).any()
  assert supervised.erase_box(50, 50, _rng(), prob=1.0).any()


# --- recipes ----------------------------------------------------------------


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_probe_recipe_crops_then_flips(resample: str) -> None:
  image, flips = _noise(50, 40), 0
  recipe = supervised.CropFlip(24, (0.2, 0.6), resample)
  for seed in range(20):
    got = recipe(image, _rng(seed))["images"]
    assert got.shape == (1, 24, 24, 3) and got.dtype == np.uint8
    box = transforms.crop_box(50, 40, _rng(seed), scale=(0.2, 0.6))
    want = np.asarray(
      image.crop(box).resize((24, 24), transforms.RESAMPLE[resample])
    )
    flipped = np.array_equal(got[0], want[:, ::-1])
    assert flipped or np.array_equal(got[0], want)
    flips += flipped
  assert 3 < flips < 17


def _plain_recipe(**changes: object) -> supervised.Supervised:
  fields = dict(
    image_size=40, rand_augment="", jitter_strength=0.0, erase_prob=0.0
  )
  return supervised.Supervised(**fields | changes)


def test_large_images_are_cropped_as_the_probe_does() -> None:
  image = _noise(60, 50)
  want = supervised.CropFlip(40, resample="bicubic")
  for seed in range(5):
    got = _plain_recipe()(image, _rng(seed))
    assert set(got) == {"images"}
    np.testing.assert_array_equal(
      got["images"], want(image, _rng(seed))["images"]
    )


def test_small_images_are_shifted_by_up_to_four_pixels() -> None:
  image = _noise(32, 32)
  padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
  recipe = _plain_recipe(image_size=32)
  windows = {}
  for top, left in itertools.product(range(9), range(9)):
    window = padded[top : top + 32, left : left + 32]
    windows[window.tobytes()] = (top, left, False)
    windows[window[:, ::-1].tobytes()] = (top, left, True)
  rng = _rng()
  seen = collections.Counter(
    windows[recipe(image, rng)["images"][0].tobytes()] for _ in range(3000)
  )
  assert len(seen) == 162  # 18.5 each: all met
  assert max(seen.values()) < 18.5 + 6 * math.sqrt(18.5)


def test_small_images_of_another_size_are_resized_first() -> None:
  got = _plain_recipe(image_size=16)(_noise(50, 30), _rng(1))["images"]
  assert got.shape == (1, 16, 16, 3)


def test_colour_jitter_only_without_rand_augment(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  calls = []

  def jitter(image: Image.Image, rng: object, **options: float) -> Image.Image:
    calls.append(options)
    return image

  monkeypatch.setattr(colours, "color_jitter", jitter)
  image = _noise(60, 50)
  _plain_recipe(jitter_strength=0.3)(image, _rng())
  strength = dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.0)
  assert calls == [strength]
  supervised.Supervised(image_size=40)(image, _rng())
  assert len(calls) == 1


def test_rand_augment_and_erasing_follow_the_crop() -> None:
  image = _noise(60, 50)
  recipe = supervised.Supervised(40, erase_prob=1.0, rand_augment="")
  got = recipe(image, _rng(2))
  assert got["erase"].shape == (4,) and got["erase"].dtype == np.int32
  assert got["erase"].any() and got["erase"].max() <= 40
  assert set(supervised.Supervised(40)(image, _rng())) == set(got)
  # Invert alone: whatever the crop, its negative.
  always = _plain_recipe(rand_augment="rand-m0-p1-n1-inc1")
  inverted = 0
  for seed in range(60):
    crop = _plain_recipe()(image, _rng(seed))["images"]
    inverted += np.array_equal(always(image, _rng(seed))["images"], 255 - crop)
  assert 0 < inverted < 15  # 4 expected


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(resample="cubic"), "data.resample .cubic. is unknown: use bilinear"),
    (dict(rand_augment="v0"), "data.rand_augment .v0. is not RandAugment"),
    (dict(erase_prob=1.5), "data.erase_prob 1.5 must be between 0 and 1"),
    (dict(jitter_strength=-1), "data.jitter_strength -1 must be at least 0"),
  ],
)
def test_wrong_settings_stop_at_once(changes: dict, message: str) -> None:
  with pytest.raises(InputError, match=message):
    supervised.Supervised(**changes)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.6, 0.2), (0.5, 1.2)])
@pytest.mark.parametrize("recipe", [supervised.CropFlip, supervised.Supervised])
def test_crops_that_cannot_be_stop_at_once(recipe, scale) -> None:
  shown = re.escape(f"data.scale {scale} must be two shares")
  with pytest.raises(InputError, match=shown):
    recipe(scale=scale)
  recipe(scale=(0.3, 0.3))


# --- evaluation -------------------------------------------------------------


def test_small_images_are_evaluated_whole() -> None:
  image = _noise(32, 32)
  np.testing.assert_array_equal(transforms.eval_whole(image, 32), image)
  want = image.resize((24, 24), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(transforms.eval_whole(image, 24), want)
  source = shapes.Shapes(4, size=32, seed=0, split="val")
  (batch,) = pipeline.eval_batches(
    source, image_size=32, batch_size=4, crop=transforms.eval_whole
  )
  for i in range(4):
    np.testing.assert_array_equal(batch["images"][i], source.load(i))


# --- repeated augmentation --------------------------------------------------


def _pipe(repeats: int, **options: object) -> pipeline.TrainPipeline:
  source = shapes.Shapes(50, size=16, seed=0, split="train")
  return pipeline.TrainPipeline(
    source, RECIPE, batch_size=8, seed=3, repeats=repeats, threads=2, **options
  )


def test_order_with_repeats() -> None:
  once, thrice = _pipe(1), _pipe(3)
  assert once.steps_per_epoch == thrice.steps_per_epoch == 6
  for epoch in range(2):
    # 48 places: 16 images three times each.
    want = [i for i in once.order(epoch)[:16] for _ in range(3)]
    assert thrice.order(epoch).tolist() == want
  assert thrice.order(0).dtype == np.int32
  counts = collections.Counter(_pipe(5).order(0).tolist())
  assert sorted(counts.values()) == [3] + [5] * 9  # the last one is cut short


def test_each_copy_is_augmented_on_its_own() -> None:
  pipe = _pipe(3)
  batches = list(pipe.batches(0, 12))
  images = np.concatenate([b["images"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  source = shapes.Shapes(50, size=16, seed=0, split="train")
  for place in range(96):
    epoch, copy = place // 48, place % 48 % 3
    # The first copy is what a run without repeats would see.
    key = [3, epoch, index[place], pipeline.AUGMENT_TAG] + [copy] * (copy > 0)
    want = RECIPE(source.load(int(index[place])), _rng(key))["images"]
    np.testing.assert_array_equal(images[place], want)
  for first in range(0, 96, 3):
    assert len(set(index[first : first + 3])) == 1
    assert len({images[first + k].tobytes() for k in range(3)}) == 3
  for got, want in zip(pipe.batches(5, 7), batches[5:7], strict=True):
    np.testing.assert_array_equal(got["images"], want["images"])


def test_no_repeats_is_refused() -> None:
  with pytest.raises(InputError, match="data.repeats=0 must be at least 1"):
    _pipe(0)
