"""Sources for evaluations: their layouts, labels and complaints."""

import os
import types

import backgrounds_set
import numpy as np
import pytest
from PIL import Image
from scipy import io

from attmask_jax import errors
from attmask_jax.data import (
  backgrounds,
  decoding,
  flowers,
  imagenet,
  pictures,
  segmented,
  shapes,
  sources,
)


def config(**values):
  defaults = dict(
    source="folder", path="", subset=0, seed=0, image_size=16,
    shapes_train=40, shapes_val=16,
  )  # fmt: skip
  return types.SimpleNamespace(**defaults | values)


def save(path, size=(20, 16), value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (value, value, value)).save(path)


def refused(match, function, *args, **kwargs):
  with pytest.raises(errors.InputError, match=match) as error:
    function(*args, **kwargs)
  assert "\n" not in str(error.value)


# ImageNet -------------------------------------------------------------------


def test_imagenet_classes_in_order_of_their_wnids():
  table = imagenet.classes()
  assert [row.index for row in table] == list(range(1000))
  wnids = [row.wnid for row in table]
  assert wnids == sorted(wnids) and len(set(wnids)) == 1000
  # Known from the data set itself.
  assert wnids[0] == "n01440764" and wnids[999] == "n15075141"
  assert "tench" in table[0].name.lower()


def test_nine_classes_have_the_published_members():
  in9 = np.array([row.in9 for row in imagenet.classes()])
  counts = [116, 52, 42, 36, 35, 27, 26, 20, 16]  # dog ... fish
  assert [int(np.sum(in9 == c)) for c in range(9)] == counts
  assert np.sum(in9 == -1) == 630
  assert set(np.flatnonzero(in9 == 0)) == {*range(151, 171), *range(173, 269)}
  assert set(np.flatnonzero(in9 == 5)) == set(range(300, 327))
  assert set(np.flatnonzero(in9 == 8)) == {*range(7), *range(389, 398)}


def test_which_folder_a_class_belongs_to():
  nine = [f"0{i}_x" for i in range(9)]
  table = imagenet.classes()
  whole = [row.in9 for row in table]
  by_number = [str(i) for i in range(1000)]
  assert imagenet.in9_map(by_number, nine, where="w").tolist() == whole
  some = [table[i].wnid for i in (300, 999, 151)]
  assert imagenet.in9_map(some, nine, where="w").tolist() == [5, -1, 0]
  same = imagenet.in9_map(["b", "z", "a"], ["a", "b"], where="w")
  assert same.tolist() == [1, -1, 0]
  refused("10 classes of runs/x.*9 folders", imagenet.in9_map,
          [str(i) for i in range(10)], nine, where="runs/x")  # fmt: skip


# Backgrounds ----------------------------------------------------------------


def test_backgrounds_of_shapes(tmp_path):
  backgrounds_set.write_shapes(tmp_path, per_class=2, size=24, seed=1)
  save(tmp_path / "fg_mask" / "val" / "x" / "a.png")  # no variant: left out
  found = backgrounds.variants(str(tmp_path))
  assert tuple(v.variant for v in found) == backgrounds.VARIANTS
  by_name = {v.variant: v for v in found}
  picture = lambda name, i: np.asarray(by_name[name].load(i)).astype(int)
  source = shapes.Shapes(2 * len(shapes.CLASSES), size=24, seed=1, split="val")
  for variant in found:
    assert list(variant.class_names) == sorted(shapes.CLASSES)
    assert len(variant) == len(source)
  for i in range(len(source)):
    name = by_name["original"].class_names[by_name["original"].label(i)]
    number = int(os.path.basename(by_name["original"].describe(i))[:-4])
    assert name == shapes.CLASSES[source.label(number)]
    cover = source.layers(number)[2][..., 0]
    inside, outside = cover == 1, cover == 0
    original = picture("original", i)
    for variant in ("mixed_same", "mixed_rand", "mixed_next", "only_fg"):
      # Same object everywhere.
      assert np.array_equal(picture(variant, i)[inside], original[inside])
    assert np.all(picture("only_fg", i)[outside] == 0)
    assert np.all(picture("no_fg", i)[inside] == 0)
    assert np.array_equal(picture("no_fg", i)[outside], original[outside])
    assert np.all(picture("only_bg_b", i)[inside] == 0)
    same = picture("mixed_same", i)[outside]
    assert not np.array_equal(same, original[outside])


def test_backgrounds_that_are_not_there(tmp_path):
  refused("evals.backgrounds= is no folder", backgrounds.variants, "")
  refused("none of the variants", backgrounds.variants, str(tmp_path))
  save(tmp_path / "original" / "00_dog" / "a.png")
  refused("has no folder val/", backgrounds.variants, str(tmp_path))
  save(tmp_path / "original" / "val" / "00_dog" / "a.png")
  save(tmp_path / "no_fg" / "val" / "01_bird" / "a.png")
  refused("other class folders", backgrounds.variants, str(tmp_path))
  (tmp_path / "only_fg" / "val" / "00_dog").mkdir(parents=True)
  refused("holds no images", backgrounds.variants, str(tmp_path))


# Segmented ------------------------------------------------------------------


def test_segmented_pairs_images_with_masks(tmp_path):
  for name in ("b", "a"):
    save(tmp_path / "images" / f"{name}.jpg")
    mask = np.zeros((16, 20), np.uint8)
    mask[2:5, 3 : 7 + (name == "b")] = 255
    mask[0, 0] = 127  # not above 127
    (tmp_path / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
  source = sources.build(config(source="segmented", path=str(tmp_path)), "val")
  assert len(source) == 2 and not source.class_names
  assert source.describe(0).endswith("a.jpg")
  assert source.object_mask(0).sum() == 12
  assert source.object_mask(1).sum() == 15
  before = source.fingerprint()
  Image.new("L", (20, 16)).save(tmp_path / "masks" / "a.png")
  assert source.fingerprint() != before
  assert not source.object_mask(0).any()
  Image.new("L", (16, 20)).save(tmp_path / "masks" / "a.png")
  refused("16 x 20 pixels and its image 20 x 16", source.object_mask, 0)
  (tmp_path / "masks" / "a.png").write_bytes(b"no image")
  refused("mask .*a.png cannot be read", source.object_mask, 0)
  (tmp_path / "masks" / "a.png").unlink()
  refused("1 images of .* have no mask, such as a.jpg",
          segmented.Segmented, str(tmp_path))  # fmt: skip
  inside = str(tmp_path / "images")
  refused("images/images is missing", segmented.Segmented, inside)


# Flowers --------------------------------------------------------------------


def test_flowers_splits_and_labels(tmp_path):
  for i in range(1, 7):
    save(tmp_path / "jpg" / f"image_{i:05d}.jpg", value=40 * i)
  io.savemat(tmp_path / "imagelabels.mat", {"labels": [[7, 3, 102, 1, 5, 9]]})
  splits = {"trnid": [[2, 6]], "valid": [[1]], "tstid": [[3, 4, 5]]}
  io.savemat(tmp_path / "setid.mat", splits)
  train = flowers.Flowers(str(tmp_path), "train")
  val = flowers.Flowers(str(tmp_path), "val")
  assert train.labels.tolist() == [2, 8, 6]  # images 2, 6, 1; from 0
  assert val.labels.tolist() == [101, 0, 4]
  assert len(train.class_names) == 102
  grey = np.asarray(train.load(2)).mean()
  assert abs(grey - 40) < 3  # image 1
  (tmp_path / "jpg" / "image_00004.jpg").unlink()
  refused("1 images are missing.*image_00004", flowers.Flowers,
          str(tmp_path), "val")  # fmt: skip
  (tmp_path / "setid.mat").write_bytes(b"nothing")
  refused("setid.mat cannot be read", flowers.Flowers, str(tmp_path), "val")
  refused("imagelabels.mat is missing", flowers.Flowers,
          str(tmp_path / "jpg"), "val")  # fmt: skip


# Folders --------------------------------------------------------------------


def test_a_folder_without_val_is_evaluated_on_test(tmp_path):
  save(tmp_path / "train" / "a" / "1.png")
  save(tmp_path / "test" / "a" / "2.png")
  options = config(path=str(tmp_path))
  assert sources.build(options, "val").describe(0).endswith("test/a/2.png")
  save(tmp_path / "val" / "a" / "3.png")
  assert sources.build(options, "val").describe(0).endswith("val/a/3.png")


def test_fingerprints_change_with_the_images(tmp_path):
  for name in ("a", "b"):
    save(tmp_path / "train" / name / "1.png")
    save(tmp_path / "train" / name / "2.png")
  options = config(path=str(tmp_path))
  of = lambda **changes: sources.build(
    types.SimpleNamespace(**vars(options) | changes), "train"
  ).fingerprint()
  first = of()
  assert of() == first
  assert of(subset=1) != first
  save(tmp_path / "train" / "b" / "2.png", value=9)
  second = of()
  assert second != first
  os.utime(tmp_path / "train" / "b" / "2.png", ns=(0, 0))
  assert of() != second
  drawn = {
    of(source="shapes", **changes)
    for changes in ({}, {"seed": 1}, {"shapes_train": 41}, {"image_size": 32})
  }
  assert len(drawn) == 4


# Pictures to look at --------------------------------------------------------


def test_pictures_from_files_folders_and_animations(tmp_path):
  for i in range(5):
    save(tmp_path / "some" / f"{i}.png", value=10 * i)
  of = lambda *args, **kwargs: [
    (name, np.asarray(image)[0, 0, 0])
    for name, image in pictures.load(str(args[0]), **kwargs)
  ]
  assert of(tmp_path / "some" / "2.png") == [("2.png", 20)]
  assert of(tmp_path / "some", every=2) == [
    ("0.png", 0), ("2.png", 20), ("4.png", 40),
  ]  # fmt: skip
  assert of(tmp_path / "some", limit=1) == [("0.png", 0)]
  frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (0, 100, 200)]
  moving = tmp_path / "moving.gif"
  frames[0].save(moving, save_all=True, append_images=frames[1:])
  found = of(moving, every=2)
  assert [name for name, _ in found] == ["moving.gif 0", "moving.gif 2"]
  assert [int(v) for _, v in found] == [0, 200]


def test_a_broken_picture_among_others_is_named(tmp_path, caplog):
  for i in range(5):
    save(tmp_path / f"{i}.png", value=10 * i)
  data = (tmp_path / "2.png").read_bytes()
  (tmp_path / "1b.png").write_bytes(data[: len(data) // 2])
  (tmp_path / "x.gif").write_bytes(data)
  names = lambda **options: [
    name for name, _ in pictures.load(str(tmp_path), **options)
  ]
  assert names() == [f"{i}.png" for i in range(5)]
  assert "1b.png cannot be read: " in caplog.text
  assert "1 .gif (--config.data.extensions=.gif adds them)" in caplog.text
  assert names(limit=3) == ["0.png", "1.png", "2.png"]
  reading = decoding.Reading(extensions=".gif")
  assert names(reading=reading)[-1] == "x.gif"
  moving = tmp_path / "moving.gif"
  frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (0, 100, 200)]
  frames[0].save(moving, save_all=True, append_images=frames[1:])
  moving.write_bytes(moving.read_bytes()[:-30])
  read = [name for name, _ in pictures.load(str(moving))]
  assert read == ["moving.gif 0", "moving.gif 1"]
  assert "moving.gif cannot be read beyond frame" in caplog.text


def test_pictures_that_are_not_there(tmp_path):
  refused("does not exist", pictures.load, str(tmp_path / "x"))
  (tmp_path / "x").mkdir()
  refused("holds no images", pictures.load, str(tmp_path / "x"))
  (tmp_path / "x" / "a.png").write_bytes(b"nothing")
  refused("a.png cannot be read", pictures.load, str(tmp_path / "x"))
  refused("a.png cannot be read", pictures.load, str(tmp_path / "x" / "a.png"))
  refused("every 0", pictures.load, str(tmp_path / "x"), every=0)


def test_a_video_without_opencv_says_what_to_do(tmp_path, monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, "cv2", None)
  (tmp_path / "a.mp4").write_bytes(b"")
  refused("needs OpenCV: pip install", pictures.load, str(tmp_path / "a.mp4"))


def test_frames_of_a_video(tmp_path):
  cv2 = pytest.importorskip("cv2")
  path = str(tmp_path / "a.avi")
  writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 32))
  for value in (0, 90, 180):
    writer.write(np.full((32, 32, 3), (0, 0, value), np.uint8))  # red
  writer.release()
  found = pictures.load(path, every=2)
  assert [name for name, _ in found] == ["a.avi 0", "a.avi 2"]
  red = np.asarray(found[1][1]).mean(axis=(0, 1))
  assert red[0] > 150 and red[1] < 30 and red[2] < 30
