"""What the host does for the device: sizes, reduction, packing."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from attmask_jax.augment import canvas, device, draws, supervised, transforms
from attmask_jax.data import decoding, files


class Fixed(transforms.Drawn):
  """Boxes that are given, for views of 20 pixels."""

  def __init__(self, *boxes):
    object.__setattr__(self, "boxes", boxes)

  @property
  def sides(self):
    return {"images": 20}

  def draw(self, size, rng):
    return {"images": [draws.View(box, False) for box in self.boxes]}


def _jpeg(size, *, orientation=1):
  """A photograph-like JPEG: smooth, so that reduced decoding changes little."""
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = io.BytesIO()
  image.resize(size, transforms.BICUBIC).save(
    file, "JPEG", exif=exif, quality=95
  )
  return file


@pytest.mark.parametrize(
  ("boxes", "side", "want"),
  [
    # 39 of 20 pixels would be less than twice as many: not smaller.
    ([(0, 0, 79, 200)], 500, 1),
    ([(0, 0, 80, 200)], 500, 2),
    ([(0, 0, 160, 200)], 500, 4),
    ([(0, 0, 300, 300), (0, 0, 79, 79)], 500, 1),  # the smallest box decides
    # What does not fit on the canvas is reduced anyhow, but not below it.
    ([(10, 0, 30, 20), (180, 0, 200, 20)], 100, 1),
    ([(10, 0, 30, 20), (190, 0, 210, 20)], 100, 2),
    ([(0, 0, 1500, 1500)], 100, 8),
  ],
)
def test_reduction_keeps_what_the_views_need(boxes, side, want):
  place = canvas.OnCanvas(Fixed(*boxes), side).start(np.random.default_rng(0))
  assert place.reduction((2000, 2000)) == want


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(333, 250), (90, 77)])
def test_reduced_files_give_the_same_views(size, orientation):
  """The boxes stay where they were in the image."""
  file = _jpeg(size, orientation=orientation)
  whole = decoding.decode(file)
  width, height = whole.size
  box = (width // 5, height // 4, width - 3, height - 7)
  start = canvas.OnCanvas(Fixed(box), 512).start(np.random.default_rng(0))
  seen = []

  def reduction(size):
    seen.append((size, start.reduction(size)))
    return seen[-1][1]

  file.seek(0)
  image = decoding.decode(file, reduction=reduction)
  factor = 1  # of what is turned
  if orientation == 1:
    ((got_size, factor),) = seen
    assert got_size == whole.size and factor == (4 if width > 200 else 1)
  assert image.size == (-(-width // factor), -(-height // factor))
  arrays = start.arrays(image)
  (row,) = device.unpack(arrays["images_views"]).box
  crop = device.crop(
    arrays[canvas.CANVAS], row, np.float32(0), side=20, resample="bicubic"
  )
  want = transforms.render(whole, [draws.View(box, False)], size=20)[0]
  # A shift by one pixel of the file changes 2 levels.
  assert np.abs(np.asarray(crop) - want).mean() < 0.7


def test_files_are_reduced_by_the_decoder_then_cropped_then_resized():
  file = _jpeg((333, 250))
  box = (66, 62, 330, 243)
  start = canvas.OnCanvas(Fixed(box), 40).start(np.random.default_rng(0))
  image = decoding.decode(file, reduction=start.reduction)
  assert image.size == (84, 63)  # by 4, and 66 x 46 of them are needed
  arrays = start.arrays(image)
  assert arrays[canvas.CANVAS].shape == (40, 40, 3)
  # 330 / 4 is half a pixel less than the 83 that are there, 66 / 4 half a pixel
  # more than the first of the 67; 62 / 4 to 243 / 4 among the rows 15 to 60.
  (got,) = device.unpack(arrays["images_views"]).box
  want = (0.5 * 40 / 67, 0.5 * 40 / 46, 66.5 * 40 / 67, 45.75 * 40 / 46)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_larger_images_are_cropped_and_reduced_to_the_canvas():
  boxes = (100, 40, 300, 120), (160, 20, 340, 100)
  image = Image.effect_noise((400, 200), 50).convert("RGB")
  image = image.resize((400, 200), transforms.BICUBIC, (0, 0, 60, 30))
  start = canvas.OnCanvas(Fixed(*boxes), 120).start(np.random.default_rng(0))
  arrays = start.arrays(image)
  # 240 x 100 pixels from (100, 20) on, half as wide.
  assert arrays[canvas.CANVAS].shape == (100, 120, 3)
  rows = device.unpack(arrays["images_views"]).box
  np.testing.assert_allclose(rows, [(0, 20, 100, 100), (30, 0, 120, 80)])
  for row, box in zip(rows, boxes, strict=True):
    got = device.crop(
      arrays[canvas.CANVAS], row, np.float32(0), side=20, resample="bicubic"
    )
    want = transforms.render(image, [draws.View(box, False)], size=20)[0]
    assert np.abs(np.asarray(got) - want).mean() < 1.5


def test_one_line_of_pixels():
  for size in [(3000, 1), (1, 3000), (1, 1)]:
    file = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(file, "JPEG", quality=100)
    file.seek(0)
    recipe = supervised.CropFlip(image_size=8)
    start = canvas.OnCanvas(recipe, 16).start(np.random.default_rng(0))
    arrays = start.arrays(decoding.decode(file, reduction=start.reduction))
    (draw,) = arrays["images_views"]
    draw = device.unpack(draw)
    got = device.view(arrays[canvas.CANVAS], draw, recipe=recipe, side=8)
    assert np.abs(np.asarray(got) - (9, 99, 199)).max() <= 2


def test_stack_puts_images_at_the_upper_left():
  place = canvas.OnCanvas(supervised.CropFlip(), 5)
  small, whole = (
    np.full((2, 3, 3), 7, np.uint8),
    np.full((5, 5, 3), 9, np.uint8),
  )
  got = place.stack([small, whole])
  want = np.zeros((2, 5, 5, 3), np.uint8)
  want[0, :2, :3], want[1] = 7, 9
  np.testing.assert_array_equal(got, want)


def test_files_that_are_no_jpeg_keep_their_size(tmp_path: pathlib.Path):
  Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
  _jpeg((64, 64)).getbuffer()
  (tmp_path / "y.jpg").write_bytes(_jpeg((64, 64)).getvalue())
  source = files.Flat(str(tmp_path))
  sizes = [source.load(i, lambda size: 4).size for i in range(2)]
  assert sizes == [(64, 64), (16, 16)]
