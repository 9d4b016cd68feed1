"""Pixels of deep and unusual files, and what is said of those refused."""

import pathlib
import struct
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from attmask_jax.augment.rgb import to_rgb
from attmask_jax.data import decoding, pipeline, sources

SIDE = 40
_Y, _X = np.mgrid[:SIDE, :SIDE]
RAMP = (_X + _Y) / (2 * SIDE - 2)  # 0 to 1, 79 values


def _grey(path: pathlib.Path, **options: float) -> np.ndarray:
  """One channel of a decoded file, all three being alike."""
  image = decoding.decode(str(path), decoding.Reading(**options))
  pixels = np.asarray(image)
  assert image.mode == "RGB" and (pixels == pixels[..., :1]).all()
  return pixels[..., 0].astype(int)


def _refused(path: pathlib.Path, match: str, **options: float) -> None:
  with pytest.raises(decoding.BrokenImage, match=match) as error:
    decoding.decode(str(path), decoding.Reading(**options))
  assert "\n" not in str(error.value)


def _png(path: pathlib.Path, kind: int, pixels: np.ndarray) -> None:
  """A PNG of 16 bits per channel; kind 0 is grey, 2 RGB."""

  def chunk(tag: bytes, body: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(tag + body))
    return struct.pack(">I", len(body)) + tag + body + crc

  height, width = pixels.shape[:2]
  header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


def _tiff(
  path: pathlib.Path,
  pixels: np.ndarray,
  *,
  photometric: int = 1,
  extra: tuple[int, ...] = (),
  big: bool = False,
) -> None:
  """An uncompressed TIFF (or BigTIFF) of [H, W, bands]."""
  height, width, bands = pixels.shape
  format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
  data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
  start = 16 if big else 8
  shorts = lambda values: struct.pack(f"<{len(values)}H", *values)
  bits = [8 * pixels.dtype.itemsize] * bands
  tags = [
    (256, [width]), (257, [height]), (258, bits), (259, [1]),
    (262, [photometric]), (273, [start]), (277, [bands]), (278, [height]),
    (279, [len(data)]), (284, [1]), (338, list(extra)),
    (339, [format] * bands),
  ]  # fmt: skip
  tail, entries = b"", []
  fits = 8 if big else 4
  for tag, values in tags:
    if not values:
      continue
    wide = max(values) > 65535
    body = struct.pack("<I", *values) if wide else shorts(values)
    kind = 4 if wide else 3
    if len(body) > fits:
      offset = start + len(data) + len(tail)
      tail += body
      body = struct.pack("<Q" if big else "<I", offset)
    count = struct.pack("<Q" if big else "<I", len(values))
    entries.append(
      struct.pack("<HH", tag, kind) + count + body.ljust(fits, b"\0")
    )
  directory = start + len(data) + len(tail)
  if big:
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, directory)
    number, end = struct.pack("<Q", len(entries)), struct.pack("<Q", 0)
  else:
    head = struct.pack("<2sHI", b"II", 42, directory)
    number, end = struct.pack("<H", len(entries)), struct.pack("<I", 0)
  path.write_bytes(head + data + tail + number + b"".join(entries) + end)


# --- more than 8 bits -------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_sixteen_bits_keep_their_upper_eight(
  tmp_path: pathlib.Path, kind: type
) -> None:
  values = np.round(RAMP * 65535).astype(kind)
  for name in ("x.tif",) + ("x.png",) * (kind == np.uint16):
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(_grey(tmp_path / name), values // 256)
    # The same where the limit is written out.
    got = _grey(tmp_path / name, white=65535)
    np.testing.assert_array_equal(got, values // 256)


def test_twelve_bits_in_sixteen_need_their_white(
  tmp_path: pathlib.Path,
) -> None:
  values = np.round(RAMP * 4095).astype(np.uint16)
  path = tmp_path / "x.png"
  _png(path, 0, values)
  _refused(path, "reach 4095 where 65535 is white, which leaves 16 of 256 grey")
  got = _grey(path, white=4095)
  np.testing.assert_allclose(got, RAMP * 255, atol=0.6)
  assert len(np.unique(got)) == 79
  assert _grey(path, white=65535).max() == 15  # asked for
  assert (_grey(path, white=2000)[values >= 2000] == 255).all()


def test_twelve_bits_that_a_file_declares(tmp_path: pathlib.Path) -> None:
  values = np.round(RAMP * 2000).astype(np.uint16)  # not up to white
  first, second = values.reshape(-1, 2).T
  packed = np.stack(
    [first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1
  ).astype(np.uint8)
  path = tmp_path / "x.tif"
  _tiff(path, packed.reshape(SIDE, -1, 1))
  content = bytearray(path.read_bytes())
  for tag, value in ((256, SIDE), (258, 12)):
    place = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
    content[place : place + 2] = struct.pack("<H", value)
  path.write_bytes(content)
  np.testing.assert_allclose(_grey(path), values / 4095 * 255, atol=0.5001)


def test_floats_run_from_zero_to_one(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.tif"
  save = lambda values: Image.fromarray(values.astype(np.float32)).save(path)
  save(RAMP)
  np.testing.assert_allclose(_grey(path), RAMP * 255, atol=0.5001)
  save(RAMP * 4000)
  _refused(path, "floats run from 0 to 4000, where 0 is black and 1 white")
  np.testing.assert_allclose(_grey(path, white=4000), RAMP * 255, atol=0.5001)
  save(RAMP - 0.5)
  _refused(path, "floats run from -0.5 to 0.5")
  assert (_grey(path, white=0.5)[RAMP < 0.5] == 0).all()
  save(RAMP / 100)
  _refused(path, "reach 0.01 where 1 is white, which leaves 3 of 256")
  save(np.where(RAMP > 0.9, np.nan, RAMP))
  _refused(path, "not finite", white=1)


def test_pictures_of_one_value_lose_nothing(tmp_path: pathlib.Path) -> None:
  flat = np.full((4, 4), 3, np.uint16)
  Image.fromarray(flat).save(tmp_path / "x.png")
  assert (_grey(tmp_path / "x.png") == 0).all()


def test_sixteen_bit_colour(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.png"
  colours = np.stack([RAMP, RAMP[::-1], np.ones_like(RAMP)], -1)
  values = np.round(colours * 65535).astype(np.uint16)
  _png(path, 2, values)
  np.testing.assert_array_equal(
    np.asarray(decoding.decode(str(path))), values // 256
  )
  values = np.round(colours * 4095).astype(np.uint16)
  _png(path, 2, values)
  few = "Pillow keeps the upper 8, which leaves 16 of 256 levels"
  _refused(path, few)
  _refused(path, few, white=4095)  # of deep grey images: no help here
  dark = decoding.decode(str(path), decoding.Reading(white=65535))
  np.testing.assert_array_equal(np.asarray(dark), values // 256)
  # Eight bits may be as dark as they like.
  Image.fromarray((colours * 15).astype(np.uint8)).save(path)
  assert np.asarray(decoding.decode(str(path))).max() == 15


def test_white_of_a_picture_in_memory() -> None:
  values = np.round(RAMP * 4095).astype(np.uint16)
  got = np.asarray(to_rgb(Image.fromarray(values), white=4095))
  np.testing.assert_allclose(got[..., 1], RAMP * 255, atol=0.6)


# --- bands ------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
  ("bands", "kind", "message"),
  [
    (4, np.uint8, "a TIFF of 4 bands of 8-bit integers"),
    (5, np.uint8, "a TIFF of 5 bands of 8-bit integers"),
    (8, np.uint16, "a TIFF of 8 bands of 16-bit integers"),
    (3, np.float32, "a TIFF of 3 bands of 32-bit floats"),
  ],
)
def test_bands_that_pillow_does_not_read(
  tmp_path: pathlib.Path, bands: int, kind: type, message: str, big: bool
) -> None:
  pixels = np.repeat(RAMP[..., None], bands, 2).astype(kind)
  _tiff(tmp_path / "x.tif", pixels, big=big)
  _refused(tmp_path / "x.tif", f"^{message}, which Pillow does not read: save")


def test_bands_beside_colour_are_mentioned(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8)
  for name, extra in (("alpha", (2,)), ("infrared", (0,)), ("unsaid", ())):
    path = tmp_path / f"{name}.tif"
    _tiff(path, pixels, photometric=2, extra=extra)
    image = np.asarray(decoding.decode(str(path)))
    np.testing.assert_array_equal(image, pixels[..., :3])
    said = (
      f"{name}.tif is a TIFF of 4 bands: the first 3 are used" in caplog.text
    )
    assert said == (name != "alpha")


def test_other_files_are_no_tiffs(tmp_path: pathlib.Path) -> None:
  (tmp_path / "x.tif").write_bytes(b"II*\0 and nothing more")
  _refused(tmp_path / "x.tif", "^not an image in a format that Pillow knows$")


# --- size -------------------------------------------------------------------


def test_a_frame_that_is_far_too_large(tmp_path):
  """Its header declares a small picture, its first frame 65535 x 65535."""
  path = tmp_path / "a.gif"
  Image.new("L", (12, 10)).save(path)
  content = bytearray(path.read_bytes())
  frame = content.index(struct.pack("<BHHHH", 0x2C, 0, 0, 12, 10))
  content[frame + 5 : frame + 9] = b"\xff" * 4
  path.write_bytes(content)
  _refused(path, "pixels are more than 178956970")


def test_more_pixels_than_pillow_allows(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = tmp_path / "x.png"
  Image.new("1", (14000, 13000)).save(path)
  _refused(
    path,
    "^its 14000 x 13000 pixels are more than 178956970: raise the limit with "
    "--config.data.max_pixels=182000000, or save it smaller$",
  )
  Image.new("RGB", (12, 10)).save(path)
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # refuses more than 100
  _refused(path, "its 12 x 10 pixels")
  _refused(path, "its 12 x 10 pixels are more than 119", max_pixels=119)
  assert (_grey(path, max_pixels=120) == 0).all()
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  _refused(path, "its 12 x 10 pixels are more than 119", max_pixels=119)


def test_a_large_picture_in_training_and_evaluation(
  tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  for name, side in (("0", 8), ("1", 20), ("2", 8)):
    Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
  config = types.SimpleNamespace(
    source="flat", path=str(tmp_path), subset=0, max_pixels=64
  )
  source = sources.build(config, "train")
  message = "1.png (its 20 x 20 pixels are more than 64: raise the limit with"
  pipe = pipeline.TrainPipeline(
    source,
    lambda image, rng: {"images": np.asarray(image)},
    batch_size=3,
    seed=0,
    threads=1,
    max_broken=0.5,
  )
  (batch,) = pipe.batches(0, 1)
  assert sorted(batch["index"]) == [0, 2, 2] and message in caplog.text
  caplog.clear()
  batches = pipeline.eval_batches(
    source, image_size=8, batch_size=3, threads=1, max_broken=0.5
  )
  (batch,) = batches
  assert batch["valid"].tolist() == [True, False, True]
  assert message in caplog.text
