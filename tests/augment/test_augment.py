"""Augmentation steps against hand calculations and plain loops."""

import colorsys
import dataclasses
import math

import numpy as np
import pillow_steps
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from attmask_jax.augment import colours, draws, transforms
from attmask_jax.augment.rgb import to_rgb


def _rng(seed: int = 0) -> np.random.Generator:
  return np.random.default_rng(seed)


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
  pixels = _rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
  return Image.fromarray(pixels)


def _plain(colour: tuple[int, int, int], side: int = 4) -> Image.Image:
  return Image.new("RGB", (side, side), colour)


# --- modes ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("mode", "value", "want"),
  [
    ("RGB", (1, 2, 3), (1, 2, 3)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("LA", (77, 10), (77, 77, 77)),
    ("RGBA", (10, 20, 30, 0), (10, 20, 30)),  # alpha dropped, not blended
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("I;16", 0xABCD, (0xAB,) * 3),
    ("I", 0xABCD, (0xAB,) * 3),
    ("I", 70000, (255,) * 3),  # above 16 bits
  ],
)
def test_every_mode_becomes_rgb(mode: str, value: int, want: tuple) -> None:
  image = to_rgb(Image.new(mode, (3, 2), value))
  assert image.mode == "RGB"
  assert image.size == (3, 2)
  assert image.getpixel((1, 1)) == want


def test_palette_with_transparency(recwarn: pytest.WarningsRecorder) -> None:
  image = Image.new("P", (2, 1))
  image.putpalette([10, 20, 30, 200, 100, 50])
  image.putpixel((1, 0), 1)
  image.info["transparency"] = b"\x00\xff"
  image = to_rgb(image)
  assert image.getpixel((0, 0)) == (10, 20, 30)
  assert image.getpixel((1, 0)) == (200, 100, 50)
  assert not recwarn.list


@pytest.mark.parametrize(
  ("orientation", "corner"),
  # Where the top left pixel of the stored image belongs, by the EXIF standard:
  # 1 stays, 3 half a turn, 6 a quarter turn clockwise, 8 the other way.
  [(1, (0, 0)), (3, (2, 1)), (6, (1, 0)), (8, (0, 2)), (0, (0, 0))],
)
def test_exif_rotation(
  tmp_path: pytest.TempPathFactory, orientation: int, corner: tuple
) -> None:
  stored = Image.new("RGB", (3, 2))
  stored.putpixel((0, 0), (255, 0, 0))
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored.save(tmp_path / "x.png", exif=exif)
  with Image.open(tmp_path / "x.png") as image:
    upright = to_rgb(image)
  assert upright.size == ((2, 3) if orientation in (6, 8) else (3, 2))
  assert upright.getpixel(corner) == (255, 0, 0)


def test_garbage_in_the_exif_header_is_ignored(
  tmp_path: pytest.TempPathFactory,
) -> None:
  _plain((9, 9, 9)).save(tmp_path / "x.png", exif=b"Exif\x00\x00garbage!")
  with Image.open(tmp_path / "x.png") as image:
    assert to_rgb(image).getpixel((0, 0)) == (9, 9, 9)


# --- geometry ---------------------------------------------------------------


def test_crop_boxes_have_the_asked_area_and_aspect() -> None:
  rng = _rng()
  boxes = [
    transforms.crop_box(500, 400, rng, scale=(0.1, 0.4)) for _ in range(4000)
  ]
  left, top, right, bottom = np.array(boxes).T
  assert left.min() >= 0 and top.min() >= 0
  assert right.max() <= 500 and bottom.max() <= 400
  width, height = right - left, bottom - top
  share, aspect = width * height / 200_000, width / height
  # Rounding a side of at least 120 px to whole pixels moves either by < 1 %.
  assert 0.099 < share.min() < 0.102 and 0.397 < share.max() < 0.404
  assert 0.745 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.345
  # Uniform area: mean 0.25, sd 0.0866; log-uniform aspect: mean log 0. Five
  # standard errors of 4,000 draws each.
  assert abs(share.mean() - 0.25) < 5 * 0.0866 / math.sqrt(4000)
  assert abs(np.log(aspect).mean()) < 5 * 0.166 / math.sqrt(4000)
  # The place is uniform: on average the middle.
  assert abs((left + right).mean() / 2 - 250) < 5 * 85 / math.sqrt(4000)


@pytest.mark.parametrize(
  ("size", "want"),
  [
    # Nothing of 90 % of the area fits: a centred box at the nearest aspect.
    ((1000, 100), (433, 0, 566, 100)),  # width round(100 * 4/3) = 133
    ((60, 300), (0, 110, 60, 190)),  # height round(60 / (3/4)) = 80
  ],
)
def test_crop_falls_back_to_the_centre(size: tuple, want: tuple) -> None:
  assert transforms.crop_box(*size, _rng(), scale=(0.9, 1.0)) == want


def test_crop_comes_before_the_resize() -> None:
  # Left half black, right half white: a crop inside the left half must stay
  # black, while a resize with a box would let the filter see the white.
  pixels = np.zeros((64, 64, 3), np.uint8)
  pixels[:, 32:] = 255
  image = Image.fromarray(pixels)
  checked = 0
  for seed in range(200):
    box = transforms.crop_box(64, 64, _rng(seed), scale=(0.05, 0.1))
    if box[2] == 32:
      crop = transforms.random_resized_crop(
        image, _rng(seed), size=48, scale=(0.05, 0.1)
      )
      assert not np.asarray(crop).any()
      checked += 1
  assert checked > 0


def test_flip_mirrors_half_of_the_images() -> None:
  image = _noise(4, 3)
  rng = _rng()
  mirrored = np.asarray(image)[:, ::-1]
  flips = sum(
    np.array_equal(transforms.random_flip(image, rng), mirrored)
    for _ in range(1000)
  )
  assert 420 < flips < 580  # 500 +- 5 standard deviations of 15.8


@pytest.mark.parametrize(
  ("size", "shorter"), [(224, 256), (96, 109), (64, 73), (32, 36)]
)
def test_eval_crop_resizes_then_cuts_the_centre(
  size: int, shorter: int
) -> None:
  image = _noise(300, 200)
  got = np.asarray(transforms.eval_crop(image, size))
  longer = int(shorter * 300 / 200)
  want = np.asarray(image.resize((longer, shorter), Image.Resampling.BICUBIC))
  top, left = round((shorter - size) / 2), round((longer - size) / 2)
  np.testing.assert_array_equal(got, want[top : top + size, left : left + size])


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
  "size",
  [(7, 1000), (1000, 7), (11, 2003), (5, 900), (1, 300), (300, 1), (30, 250)],
)
def test_eval_crop_of_long_pictures_is_that_of_the_whole(
  size: tuple[int, int], resample: str
) -> None:
  image = _noise(*size)
  for picture in (image, image.convert("L")):
    got = np.asarray(transforms.eval_crop(picture, 56, resample=resample))
    scale = 64 / min(size)
    target = tuple(int(64 * side / min(size)) for side in size)
    assert max(target) > 8 * 64 and scale > 1
    whole = np.asarray(picture.resize(target, transforms.RESAMPLE[resample]))
    left, top = (round((side - 56) / 2) for side in target)
    np.testing.assert_array_equal(got, whole[top : top + 56, left : left + 56])


def test_eval_crop_of_a_line_takes_no_memory_of_the_whole() -> None:
  # Enlarged, the line has 2,560,000,000 rows: more than Pillow can count.
  line = Image.new("L", (1, 10_000_000), 7)
  line.paste(200, (0, 5_000_000, 1, 10_000_000))
  got = np.asarray(transforms.eval_crop(line, 224))
  assert got.shape == (224, 224)
  # The edge in the middle, spread over 256 rows a pixel; 16 columns are cut.
  assert (got == got[:, :1]).all() and np.unique(got[:, 0]).size > 100


# --- colour -----------------------------------------------------------------


@pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.07, 0.1])
def test_hue_turns_the_circle_and_wraps(shift: float) -> None:
  circle = [(250, 30, 30), (30, 250, 30), (30, 30, 250), (250, 30, 60)]
  for colour in circle:
    turn = colours.Jitter((colours.HUE,), (1.0, 1.0, 1.0), shift)
    got = colours.apply_jitter(_plain(colour), turn).getpixel((0, 0))
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    want = colorsys.hsv_to_rgb((h + int(shift * 255) / 255) % 1, s, v)
    # Two steps of the 8-bit hue (rounding; it wraps at 256, not 255), each
    # worth 6 * 220 / 255 grey levels.
    np.testing.assert_allclose(got, np.array(want) * 255, atol=10.4)


@pytest.fixture(scope="module")
def every_colour() -> Image.Image:
  """All colours with a blue of 0, 5, 10, ..., 255, and all greys."""
  red, green, blue = np.meshgrid(
    np.arange(256), np.arange(256), np.arange(0, 256, 5), indexing="ij"
  )
  pixels = np.stack([red, green, blue], -1).reshape(-1, 256, 3)
  greys = np.repeat(np.arange(256)[None, :, None], 3, -1)
  return Image.fromarray(np.concatenate([pixels, greys]).astype(np.uint8))


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.0, 0.004, 0.07, 0.1])
def test_hue_of_every_colour_is_that_of_pillow(
  shift: float, every_colour: Image.Image
) -> None:
  got = colours.shift_planes(
    colours.split(every_colour), int(shift * 255) % 256
  )
  want = np.asarray(pillow_steps.shift_hue(every_colour, shift))
  np.testing.assert_array_equal(colours.join(got), want)


def test_enhancement_of_every_value_is_that_of_pillow() -> None:
  image = _noise(256, 40)
  kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for step, kind in enumerate(kinds):
    for factor in (0.0, 0.6, 0.83, 1.0, 1.2, 1.4, 3.1):
      got = colours.enhance(colours.split(image), step, factor)
      want = np.asarray(kind(image).enhance(factor))
      np.testing.assert_array_equal(colours.join(got), want)


def test_luma_of_every_colour_is_that_of_pillow(
  every_colour: Image.Image,
) -> None:
  got = colours.luma(colours.split(every_colour))
  np.testing.assert_array_equal(got, np.asarray(every_colour.convert("L")))


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("blur", [0.0, 1.7])
@pytest.mark.parametrize("jitters", [False, True])
def test_colours_of_a_view_by_pillow(
  jitters: bool, blur: float, grey: bool
) -> None:
  want = image = _noise(23, 23)
  jitter = colours.Jitter((colours.CONTRAST,), (1.0, 1.4, 1.0), 0.0)
  if jitters:
    want = ImageEnhance.Contrast(want).enhance(1.4)
  want = want.convert("L").convert("RGB") if grey else want
  want = want.filter(ImageFilter.GaussianBlur(blur)) if blur else want
  for solarise in (False, True):
    view = draws.View(
      (0, 0, 23, 23), False, jitter if jitters else None, grey, blur, solarise
    )
    last = ImageOps.solarize(want) if solarise else want
    np.testing.assert_array_equal(draws.recolour(image, view), last)


def test_jitter_blends_by_the_drawn_factors_in_the_drawn_order() -> None:
  image = _noise(16, 16)
  orders = set()
  for seed in range(40):
    rng = _rng(seed)
    order = rng.permutation(4).tolist()
    factors = (
      rng.uniform(0.6, 1.4),
      rng.uniform(0.6, 1.4),
      rng.uniform(0.8, 1.2),
    )
    turn = rng.uniform(-0.1, 0.1)
    want = image
    for step in order:
      if step == 0:
        want = ImageEnhance.Brightness(want).enhance(factors[0])
      elif step == 1:
        want = ImageEnhance.Contrast(want).enhance(factors[1])
      elif step == 2:
        want = ImageEnhance.Color(want).enhance(factors[2])
      else:
        want = pillow_steps.shift_hue(want, turn)
    got = colours.color_jitter(image, _rng(seed))
    np.testing.assert_array_equal(got, want)
    orders.add(tuple(order))
  assert len(orders) > 12  # of 24


def test_brightness_alone_by_hand() -> None:
  rng = _rng(3)
  rng.permutation(4)
  factor = rng.uniform(0.6, 1.4)
  got = colours.color_jitter(
    _plain((40, 100, 250)), _rng(3), contrast=0, saturation=0, hue=0
  )
  want = [min(int(factor * c), 255) for c in (40, 100, 250)]
  assert got.getpixel((0, 0)) == tuple(want)


def test_grey_is_the_luma() -> None:
  got = colours.luma(colours.split(_plain((200, 100, 50))))
  assert (got == round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)).all()


def test_solarise_inverts_from_the_threshold() -> None:
  got = colours.solarise(np.array([0, 127, 128, 255], np.uint8))
  assert got.tolist() == [0, 127, 127, 0]


def test_blur_radius_is_a_standard_deviation_in_pixels() -> None:
  dot = np.zeros((41, 41, 3), np.uint8)
  dot[20, 20] = 255
  dot[19:22, 19:22] = 255
  radius = 1.5
  got = np.asarray(colours.gaussian_blur(Image.fromarray(dot), radius))
  weight = got[..., 0].astype(float)
  spread = np.sum(weight * (np.arange(41) - 20) ** 2) / weight.sum()
  # Variances add: 2/3 of the 3-pixel square; 8 bits cut the tails short.
  np.testing.assert_allclose(spread, radius**2 + 2 / 3, rtol=0.1)


# --- recipe -----------------------------------------------------------------


def _recipe(**changes: object) -> transforms.MultiCrop:
  sizes = dict(image_size=24, local_size=12, local_crops=3) | changes
  return transforms.MultiCrop(**sizes)


def test_multi_crop_shapes_and_repeatability() -> None:
  image, recipe = _noise(60, 40), _recipe()
  first, again, other = (recipe(image, _rng(s)) for s in (5, 5, 6))
  assert first["images"].shape == (2, 24, 24, 3)
  assert first["local_images"].shape == (3, 12, 12, 3)
  assert first["images"].dtype == first["local_images"].dtype == np.uint8
  for name in first:
    np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first[name], other[name])


def test_no_local_crops_leaves_the_key_out() -> None:
  assert set(_recipe(local_crops=0)(_noise(30, 30), _rng())) == {"images"}


def test_multi_crop_takes_images_smaller_than_the_crops() -> None:
  crops = _recipe()(_noise(3, 2), _rng())
  assert crops["images"].shape == (2, 24, 24, 3)


@pytest.mark.parametrize(
  ("colour", "blur", "solarise"),
  [
    (draws.FIRST_GLOBAL, 1.0, 0.0),
    (draws.OTHER_GLOBAL, 0.1, 0.2),
    (draws.LOCAL, 0.5, 0.0),
  ],
)
def test_how_often_each_colour_step_happens(
  colour: draws.Photometric, blur: float, solarise: float
) -> None:
  geometry, rng = draws.View((0, 0, 4, 4), True), _rng()
  views = [colour.draw(geometry, rng) for _ in range(2000)]
  assert {(view.box, view.flip) for view in views} == {((0, 0, 4, 4), True)}
  radii = [view.blur for view in views if view.blur]
  assert 0.1 <= min(radii) < 0.2 and 1.8 < max(radii) <= 2.0
  want = dict(jitter=0.8, grey=0.2, blur=blur, solarise=solarise)
  for name, prob in want.items():
    count = sum(bool(getattr(view, name)) for view in views)
    # Five standard deviations of 2,000 draws; none when it is certain.
    margin = 5 * math.sqrt(prob * (1 - prob) / 2000)
    assert abs(count / 2000 - prob) <= margin, name


def test_order_of_the_colour_steps() -> None:
  jitter = colours.Jitter((colours.BRIGHTNESS,), (1.3, 1.0, 1.0), 0.0)
  view = draws.View((0, 0, 9, 7), True, jitter, True, 1.2, True)
  image = _noise(9, 7)
  (got,) = transforms.render(image, [view], size=5)
  want = image.resize((5, 5), transforms.BICUBIC)
  want = ImageOps.mirror(want)
  want = ImageEnhance.Brightness(want).enhance(1.3)
  want = want.convert("L").convert("RGB")
  want = want.filter(ImageFilter.GaussianBlur(1.2))
  np.testing.assert_array_equal(got, ImageOps.solarize(want))


def test_each_view_gets_its_own_recipe(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  seen = []

  def draw(self: draws.Photometric, view: draws.View, _: object) -> draws.View:
    seen[-1] = (self, *seen[-1])
    return view

  def geometry(size: tuple, _: object, scale: tuple) -> draws.View:
    seen.append((size, scale))
    return draws.View((0, 0, 4, 4), False)

  monkeypatch.setattr(draws.Photometric, "draw", draw)
  monkeypatch.setattr(transforms, "draw_geometry", geometry)
  recipe = _recipe(
    global_crops=3, global_scale=(0.3, 1), local_scale=(0.1, 0.3)
  )
  views = recipe(_noise(30, 30), _rng())
  assert [view.shape[:2] for view in views.values()] == [(3, 24), (3, 12)]
  assert seen == [
    (draws.FIRST_GLOBAL, (30, 30), (0.3, 1)),
    (draws.OTHER_GLOBAL, (30, 30), (0.3, 1)),
    (draws.OTHER_GLOBAL, (30, 30), (0.3, 1)),
    *[(draws.LOCAL, (30, 30), (0.1, 0.3))] * 3,
  ]


def test_colour_strength_reaches_every_view() -> None:
  grey = transforms.MultiCrop(
    image_size=8, local_size=4, local_crops=2, jitter=0.0, grey=1.0
  )
  crops = grey(_noise(16, 16), _rng())
  for views in crops.values():
    assert (views == views[..., :1]).all()
  sharp = transforms.MultiCrop(
    image_size=16, local_crops=0, jitter=0.0, grey=0.0, blur_radius=0.1
  )
  soft = dataclasses.replace(sharp, blur_radius=4.0)
  detail = lambda recipe: np.diff(
    recipe(_noise(16, 16), _rng())["images"][0].astype(float), axis=1
  ).std()
  assert detail(soft) < detail(sharp) / 2


def test_views_are_mirrored_half_of_the_time_each_by_itself() -> None:
  ramp = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 3)
  image = Image.fromarray(np.repeat(ramp, 32, axis=0))
  recipe = _recipe(jitter=0.0, grey=0.0, blur_radius=0.1)
  mirrored = []
  for seed in range(400):
    crops = recipe(image, _rng(seed))
    # The other global views may be solarised, which turns brightness around.
    views = [crops["images"][0][None], crops["local_images"]]
    views = [view.astype(float).mean((1, 3)) for view in views]
    mirrored.append([row[0] > row[-1] for view in views for row in view])
  mirrored = np.array(mirrored)
  # Five standard deviations of 400 fair coins.
  assert np.abs(mirrored.mean(0) - 0.5).max() < 0.125
  for i, one in enumerate(mirrored.T):
    for other in mirrored.T[:i]:
      assert abs((one == other).mean() - 0.5) < 0.125
