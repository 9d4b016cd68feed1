"""Crops and colours on the device against Pillow, step by step."""

import functools
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pillow_steps
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from attmask_jax.augment import (
  TRANSFORMS,
  canvas,
  colours,
  device,
  draws,
  supervised,
  transforms,
)
from attmask_jax.data import files

SIDE = 96


def _noise(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
  return Image.fromarray(pixels.astype(np.uint8))


def _colours():
  """Every hue and saturation, and greys: 96 x 96."""
  x, y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
  hsv = np.stack([x * 255 // 95, y * 255 // 95, (x * 7 + y * 5) % 256], -1)
  image = Image.frombytes("HSV", (SIDE, SIDE), hsv.astype(np.uint8).tobytes())
  return image.convert("RGB")


@pytest.fixture(scope="module")
def photographs(request, tmp_path_factory):
  """The source of 45 photographs, skipped without them."""
  root = request.getfixturevalue("images_root")
  folder = tmp_path_factory.mktemp("photographs")
  with tarfile.open(root / "core" / "imagenet_sample_a.tar") as archive:
    archive.extractall(folder, filter="data")
  return files.Flat(str(folder))


@pytest.fixture(scope="module", params=["generated", "photographs"])
def pictures(request):
  """RGB images of 96 x 96: generated ones and, if there are any, real ones."""
  if request.param == "generated":
    return [_noise(SIDE, SIDE), _colours()]
  source = request.getfixturevalue("photographs")
  whole = [source.load(i) for i in range(len(source))]
  return [image.resize((SIDE, SIDE), transforms.BICUBIC) for image in whole]


def _levels(got, want):
  """Differences in grey levels, without sign."""
  return np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))


def _on_device(step, pictures):
  batch = np.stack([np.asarray(x) for x in pictures]).astype(np.float32)
  return jax.jit(jax.vmap(step))(batch)


STEPS = {
  "brightness": (
    lambda x, f: ImageEnhance.Brightness(x).enhance(f),
    lambda x, f: device.enhance(x, jnp.float32(colours.BRIGHTNESS), f),
    (0.6, 1.0, 1.17, 1.4),
  ),
  "contrast": (
    lambda x, f: ImageEnhance.Contrast(x).enhance(f),
    lambda x, f: device.enhance(x, jnp.float32(colours.CONTRAST), f),
    (0.6, 1.0, 1.17, 1.4),
  ),
  "saturation": (
    lambda x, f: ImageEnhance.Color(x).enhance(f),
    lambda x, f: device.enhance(x, jnp.float32(colours.SATURATION), f),
    (0.8, 1.0, 1.17, 1.2),
  ),
  "grey": (
    lambda x, _: x.convert("L").convert("RGB"),
    lambda x, _: jnp.broadcast_to(device.luma(x), x.shape),
    (0,),
  ),
  "solarise": (
    lambda x, _: ImageOps.solarize(x),
    lambda x, _: device.solarise(x),
    (0,),
  ),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_is_that_of_pillow(name, pictures):
  pillow, ours, values = STEPS[name]
  for value in values:
    want = np.stack([np.asarray(pillow(x, value)) for x in pictures])
    got = _on_device(lambda x, v=value: ours(x, jnp.float32(v)), pictures)
    off = _levels(got, want)
    # Fused multiply-add may round a product that is whole but for rounding,
    # as every fifth is with a factor of 0.6, down by one level.
    assert off.max() <= 1 and off.mean() < 0.02


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_hue_is_that_of_pillow(shift, pictures):
  want = np.stack(
    [np.asarray(pillow_steps.shift_hue(x, shift)) for x in pictures]
  )
  steps = jnp.float32(int(shift * 255) % 256)
  off = _levels(
    _on_device(lambda x: device.shift_hue(x, steps), pictures), want
  )
  # Pillow's C computes in double in places: where its hue truncates to the
  # next step, of 6 levels at most, ours may not.
  assert off.max() <= 6 and off.mean() < 0.01
  assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 1.3, 2.0, 4.5])
def test_blur_is_that_of_pillow(sigma, pictures):
  kernel = ImageFilter.GaussianBlur(sigma)
  want = np.stack([np.asarray(x.filter(kernel)) for x in pictures])
  radius = canvas.box_radius(sigma)
  for most in (int(radius), int(radius) + 2):  # as wide as the largest blur
    blur = functools.partial(device.blur, radius=jnp.float32(radius), most=most)
    off = _levels(_on_device(blur, pictures), want)
    # Rounded after each of six passes: ties may fall the other way.
    assert off.max() <= 2 and off.mean() < 0.1


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_crop_is_that_of_pillow(resample):
  image, side = _noise(90, 70), 24
  crop = jax.jit(functools.partial(device.crop, side=side, resample=resample))
  field = np.full((100, 100, 3), 255, np.uint8)  # must not be seen
  field[:70, :90] = np.asarray(image)
  boxes = [(0, 0, 90, 70), (3, 5, 88, 60), (40, 20, 50, 33), (7, 7, 31, 31)]
  for box in boxes:
    for flip in (False, True):
      view = draws.View(box, flip)
      want = transforms.render(
        image, [view], size=side, resample=transforms.RESAMPLE[resample]
      )
      off = _levels(crop(field, jnp.float32(box), jnp.float32(flip)), want[0])
      # The weights are float32 instead of 22 bits: ties, after each pass.
      assert off.max() <= 2 and off.mean() < 0.05


def test_all_steps_of_a_view_in_their_order():
  recipe, rng = transforms.MultiCrop(image_size=24), np.random.default_rng(0)
  image = _noise(6, 5).resize((40, 33), transforms.BICUBIC)
  one = jax.jit(functools.partial(device.view, recipe=recipe, side=24))
  kinds = (draws.FIRST_GLOBAL, draws.OTHER_GLOBAL)
  orders = set()
  for i in range(60):
    geometry = transforms.draw_geometry(image.size, rng, (0.3, 1.0))
    view = kinds[i % 2].draw(geometry, rng)
    orders.add(view.jitter and view.jitter.order)
    (want,) = transforms.render(image, [view], size=24)
    (row,) = canvas.pack([view])
    off = _levels(one(np.asarray(image), device.unpack(row)), want)
    # One level of the crop can become a step of the hue; after a wrong order
    # of two enhancements the mean is above 1.
    assert off.mean() < 0.3, view
  assert len(orders) > 15 and None in orders


def test_a_jitter_may_lack_steps():
  image = _noise(24, 24)
  recipe = transforms.MultiCrop(image_size=24)
  jitter = colours.Jitter(
    (colours.SATURATION, colours.BRIGHTNESS), (1.3, 9, 0.7), 0.4
  )
  view = draws.View((0, 0, 24, 24), False, jitter)
  (row,) = canvas.pack([view])
  one = jax.jit(functools.partial(device.view, recipe=recipe, side=24))
  got = one(np.asarray(image), device.unpack(row))
  (want,) = transforms.render(image, [view], size=24)
  assert _levels(got, want).max() <= 1


@pytest.mark.parametrize("name", ["multi_crop", "crop_flip", "two_colours"])
def test_batch_of_the_recipe(name):
  local = dict(local_size=16, local_crops=3) if name == "multi_crop" else {}
  recipe = TRANSFORMS[name](image_size=32, **local)
  images = [_noise(50, 40, 1), _colours(), _noise(20, 64, 2)]
  place = canvas.OnCanvas(recipe, 100)
  rngs = lambda: [np.random.default_rng([7, i]) for i in range(len(images))]
  items = [place(x, rng) for x, rng in zip(images, rngs(), strict=True)]
  pixels = place.stack([item.pop(canvas.CANVAS) for item in items])
  batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
  batch |= {canvas.CANVAS: pixels, "label": np.arange(3)}
  got = jax.jit(functools.partial(device.augment, recipe=recipe))(batch)
  wanted = [recipe(x, rng) for x, rng in zip(images, rngs(), strict=True)]
  assert set(got) == set(wanted[0]) | {"label"}
  for key in wanted[0]:
    want = np.stack([item[key] for item in wanted])
    assert got[key].dtype == np.uint8 and got[key].shape == want.shape
    assert _levels(got[key], want).mean() < 0.3


@pytest.mark.slow
def test_two_thousand_crops_of_photographs(photographs):
  """Mean, variance and histogram of all crops; every crop by itself."""
  recipe = transforms.MultiCrop(image_size=112, local_size=48)
  place = canvas.OnCanvas(recipe, 512)
  augment = jax.jit(functools.partial(device.augment, recipe=recipe))
  values = {"host": [], "device": []}
  per_crop = []
  for epoch in range(4):
    for i in range(len(photographs)):
      rng = lambda key=(0, epoch, i): np.random.default_rng(key)
      want = recipe(photographs.load(i), rng())
      start = place.start(rng())
      arrays = start.arrays(photographs.load(i, start.reduction))
      arrays[canvas.CANVAS] = place.stack([arrays[canvas.CANVAS]])[0]
      got = augment({key: x[None] for key, x in arrays.items()})
      for key, views in want.items():
        off = _levels(got[key][0], views)
        per_crop += off.mean((1, 2, 3)).tolist()
        values["host"].append(views.reshape(-1, 3))
        values["device"].append(np.asarray(got[key][0]).reshape(-1, 3))
  assert len(per_crop) == 4 * 45 * 12
  # Some photographs are decoded at half the size, or reduced to the canvas.
  assert np.mean(per_crop) < 0.3 and np.quantile(per_crop, 0.9) < 0.6
  assert max(per_crop) < 3
  host, ours = (np.concatenate(x).astype(float) for x in values.values())
  assert np.abs(host.mean(0) - ours.mean(0)).max() < 0.05
  assert np.abs(host.var(0) / ours.var(0) - 1).max() < 2e-3
  bins = np.arange(0, 257, 8)
  for c in range(3):
    one, other = (np.histogram(x[:, c], bins)[0] / len(x) for x in (host, ours))
    assert np.abs(one - other).sum() / 2 < 2e-3  # share in another bin


def test_supervised_recipes_are_not_drawn_beforehand():
  drawn = {k for k, v in TRANSFORMS.items() if issubclass(v, transforms.Drawn)}
  assert drawn == {"multi_crop", "crop_flip", "two_colours"}
  assert not issubclass(supervised.Supervised, transforms.Drawn)
