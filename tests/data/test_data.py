"""Sources and batches: bad input, odd files, order, exact resumption."""

import contextlib
import itertools
import logging
import pathlib
import tarfile
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from attmask_jax import errors
from attmask_jax.augment import transforms
from attmask_jax.data import cifar, pipeline, shapes, sources

RECIPE = transforms.MultiCrop(
  image_size=16, local_size=8, local_crops=1, global_crops=2
)


def _config(**values: object) -> types.SimpleNamespace:
  defaults = dict(
    source="folder",
    path="",
    subset=0,
    seed=0,
    image_size=16,
    shapes_train=40,
    shapes_val=16,
  )
  return types.SimpleNamespace(**defaults | values)


def _picture(seed: int, side: int = 20) -> Image.Image:
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def _shapes(
  count: int = 64, size: int = 32, **options: object
) -> shapes.Shapes:
  options = dict(seed=0, split="train") | options
  return shapes.Shapes(count, size=size, **options)


def _save(path: pathlib.Path, seed: int = 0) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  _picture(seed).save(path)


def _truncate(path: pathlib.Path) -> None:
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """Three classes: 4 + 6 + 5 training images, one each for validation."""
  for name, count in [("cat", 4), ("ant", 6), ("bee", 5)]:
    for i in range(count):
      _save(tmp_path / "train" / name / f"{i}.jpg", i)
    _save(tmp_path / "val" / name / "0.png")
  return tmp_path


def _batches(
  source: sources.Source, start: int = 0, stop: int = 1, **options: object
) -> list[dict]:
  options = dict(batch_size=4, seed=0, threads=2, prefetch=2) | options
  pipe = pipeline.TrainPipeline(source, RECIPE, **options)
  return list(pipe.batches(start, stop))


def _assert_same(got: list[dict], want: list[dict]) -> None:
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# --- bad input: one clear sentence each -------------------------------------


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(source="folders"), "data.source='folders' is unknown"),
    (dict(source="tfds:"), "data.source='tfds:' is unknown"),
    (dict(source="folder"), "data.source=folder needs a folder: set"),
    (dict(source="cifar10", path="/no/such"), "/no/such is not an existing"),
    (dict(source="shapes", shapes_train=0), "data.shapes_train=0 must be"),
    (dict(source="shapes", subset=6), "subset=6 is larger than class bar .* 5"),
    (dict(source="shapes", subset=-1), "subset=-1 needs .* positive count"),
  ],
)
def test_bad_config(values: dict, message: str) -> None:
  with pytest.raises(errors.InputError, match=message):
    sources.build(_config(**values), "train")


def test_empty_folders(tmp_path: pathlib.Path) -> None:
  for source, message in [
    ("folder", "has no folder train/"),
    ("flat", "holds no images"),
    ("cifar10", "data_batch_1.bin is missing; unpack .*cifar-10-binary.tar.gz"),
    ("cifar100", "train.bin is missing; unpack .*cifar-100-binary.tar.gz"),
  ]:
    with pytest.raises(errors.InputError, match=message):
      sources.build(_config(source=source, path=str(tmp_path)), "train")
  _save(tmp_path / "train" / "loose.jpg")
  with pytest.raises(errors.InputError, match="no class folders.*source=flat"):
    sources.build(_config(path=str(tmp_path)), "train")


def test_class_folder_without_images(folder: pathlib.Path) -> None:
  empty = folder / "train" / "dog"
  empty.mkdir()
  (empty / "notes.txt").write_text("no image")
  with pytest.raises(errors.InputError, match="train/dog holds no images"):
    sources.build(_config(path=str(folder)), "train")


def test_validation_class_unknown_to_training(folder: pathlib.Path) -> None:
  _save(folder / "val" / "dog" / "0.jpg")
  with pytest.raises(errors.InputError, match="val/dog has no counterpart"):
    sources.build(_config(path=str(folder)), "val")


def test_batch_larger_than_the_data_set(folder: pathlib.Path) -> None:
  source = sources.build(_config(path=str(folder)), "train")
  with pytest.raises(errors.InputError, match="batch_size=16 .* 15 images"):
    pipeline.TrainPipeline(source, RECIPE, batch_size=16, seed=0)


def test_subset_larger_than_a_class(folder: pathlib.Path) -> None:
  message = "data.subset=5 is larger than class cat of .* which has 4 images"
  with pytest.raises(errors.InputError, match=message):
    sources.build(_config(path=str(folder), subset=5), "train")


def test_subset_of_an_unlabelled_folder(folder: pathlib.Path) -> None:
  config = _config(source="flat", path=str(folder), subset=2)
  with pytest.raises(errors.InputError, match="needs a labelled data set"):
    sources.build(config, "train")


# --- sources ----------------------------------------------------------------


def test_folder_sorts_classes_and_files(folder: pathlib.Path) -> None:
  _save(folder / "train" / "ant" / "deep" / "er" / "x.JPEG")
  _save(folder / "train" / "ant" / ".hidden.jpg")
  (folder / "train" / "readme.txt").write_text("")
  source = sources.build(_config(path=str(folder)), "train")
  assert source.class_names == ["ant", "bee", "cat"]
  assert source.labels.tolist() == [0] * 7 + [1] * 5 + [2] * 4
  assert source.labels.dtype == np.int32
  assert source.describe(6) == str(folder / "train/ant/deep/er/x.JPEG")
  assert source.describe(7) == str(folder / "train/bee/0.jpg")
  assert source.load(0).size == (20, 20)


def test_validation_classes_take_the_training_numbers(
  folder: pathlib.Path,
) -> None:
  (folder / "val/bee/0.png").unlink()
  (folder / "val/bee").rmdir()
  source = sources.build(_config(path=str(folder), subset=2), "val")
  assert source.labels.tolist() == [0, 2]  # whole: subset is for training


def test_subset_takes_the_first_files_of_each_class(
  folder: pathlib.Path,
) -> None:
  source = sources.build(_config(path=str(folder), subset=2), "train")
  names = [source.describe(i).split("train/")[1] for i in range(len(source))]
  assert names == [
    f"{c}/{i}.jpg" for c in ("ant", "bee", "cat") for i in (0, 1)
  ]
  assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
  assert source.label(5) == 2
  np.testing.assert_array_equal(source.load(3), source.load(1))  # both seed 1


def test_flat_folder_has_no_labels_and_no_evaluation(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  config = _config(source="flat", path=str(folder))
  source = sources.build(config, "train")
  assert len(source) == 18 and set(source.labels) == {-1}
  assert _batches(source)[0]["label"].tolist() == [-1] * 4
  assert sources.build(config, "val") is None
  assert "online k-NN" in caplog.text


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("nested", [True, False])
def test_cifar_binary_by_hand(
  tmp_path: pathlib.Path, kind: str, nested: bool
) -> None:
  ten = kind == "cifar10"
  inner = "cifar-10-batches-bin" if ten else "cifar-100-binary"
  root = tmp_path / inner if nested else tmp_path
  root.mkdir(exist_ok=True)

  def record(label: int) -> bytes:
    # Red is the pixel's number mod 256, green 1 and blue the label.
    head = bytes([label]) if ten else bytes([7, label])
    red = bytes(i % 256 for i in range(1024))
    return head + red + bytes([1]) * 1024 + bytes([label]) * 1024

  train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
  for number, name in enumerate(train):
    (root / name).write_bytes(record(number) + record(9 - number))
  (root / ("test_batch.bin" if ten else "test.bin")).write_bytes(record(3))
  config = _config(source=kind, path=str(tmp_path))
  source = sources.build(config, "train")
  want = [0, 9, 1, 8, 2, 7, 3, 6, 4, 5] if ten else [0, 9]
  assert source.labels.tolist() == want
  assert len(source.class_names) == (10 if ten else 100)
  assert source.load(1).getpixel((5, 2)) == (2 * 32 + 5, 1, 9)
  assert source.describe(len(source) - 1) == f"{train[-1]}[1]"
  assert sources.build(config, "val").labels.tolist() == [3]


def test_cifar_of_the_wrong_size(tmp_path: pathlib.Path) -> None:
  (tmp_path / "test_batch.bin").write_bytes(bytes(3000))
  with pytest.raises(errors.InputError, match="3000 bytes.*3073-byte records"):
    cifar.Cifar(str(tmp_path), "cifar10", "val")


# --- odd and broken files ---------------------------------------------------


def test_odd_modes_through_the_folder(tmp_path: pathlib.Path) -> None:
  root = tmp_path / "train" / "odd"
  root.mkdir(parents=True)
  base = _picture(0)
  base.convert("L").save(root / "grey.jpg")
  base.convert("CMYK").save(root / "cmyk.jpg")
  base.convert("P").save(root / "palette.png", transparency=3)
  base.convert("RGBA").save(root / "alpha.png")
  base.convert("LA").save(root / "grey_alpha.png")
  base.convert("1").save(root / "bits.png")
  base.save(root / "web.webp")
  deep = (np.arange(400).reshape(20, 20) * 160).astype(np.uint16)
  Image.fromarray(deep).save(root / "deep.png")
  Image.fromarray(deep).save(root / "deep.tif")
  deep.astype(">u2").tofile(root / "raw")
  (root / "deep.pgm").write_bytes(
    b"P5 20 20 65535\n" + (root / "raw").read_bytes()
  )
  source = sources.build(_config(path=str(tmp_path)), "train")
  assert len(source) == 10
  by_name = {source.describe(i).split("odd/")[1]: i for i in range(10)}
  for index in by_name.values():
    image = source.load(index)
    assert image.mode == "RGB" and image.size == (20, 20)
  for name in ("deep.png", "deep.tif", "deep.pgm"):
    got = np.asarray(source.load(by_name[name]))[..., 1]
    np.testing.assert_array_equal(got, deep // 256, err_msg=name)
  assert _batches(source, batch_size=10)[0]["images"].shape == (
    10,
    2,
    16,
    16,
    3,
  )


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "gone"])
def test_broken_file_is_replaced_by_the_next_readable_one(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
  source = sources.build(_config(path=str(folder)), "train")
  for name in ("ant/5.jpg", "bee/0.jpg"):  # indices 5 and 6
    path = folder / "train" / name
    if kind == "truncated":
      _truncate(path)
    elif kind == "gone":
      path.unlink()
    else:
      path.write_bytes(b"" if kind == "empty" else b"<html>404</html>")
  options = dict(batch_size=15, seed=0, max_broken=0.2)
  pipe = pipeline.TrainPipeline(source, RECIPE, threads=4, **options)
  with caplog.at_level(logging.WARNING):
    first, second = pipe.batches(0, 2)
  assert sorted(pipe.broken) == [5, 6]
  # Named once each, although both epochs met them.
  assert caplog.text.count("ant/5.jpg") == 1
  assert caplog.text.count("bee/0.jpg") == 1
  assert first["index"].tolist() == [
    7 if i in (5, 6) else i for i in pipe.order(0).tolist()
  ]
  np.testing.assert_array_equal(first["label"], source.labels[first["index"]])
  # The stand-ins are crops of their own, not copies.
  crops = first["images"][first["index"] == 7]
  assert len(crops) == 3
  assert not np.array_equal(crops[0], crops[1])
  again = _batches(source, 0, 2, threads=1, **options)
  _assert_same([first, second], again)


def test_last_file_is_replaced_by_the_first(folder: pathlib.Path) -> None:
  _truncate(folder / "train/cat/3.jpg")  # index 14, the last
  source = sources.build(_config(path=str(folder)), "train")
  (batch,) = _batches(source, batch_size=15, max_broken=0.1)
  assert sorted(batch["index"]) == [0, 0, *range(1, 14)]


def test_too_many_broken_files_stop_with_the_list(
  tmp_path: pathlib.Path,
) -> None:
  for i in range(120):
    _save(tmp_path / f"{i:03}.jpg", i)
  config = _config(source="flat", path=str(tmp_path))
  source = sources.build(config, "train")
  _truncate(tmp_path / "007.jpg")  # 1 of 120: less than 1 %
  pipe = pipeline.TrainPipeline(source, RECIPE, batch_size=120, seed=0)
  (batch,) = pipe.batches(0, 1)
  assert np.sum(batch["index"] == 8) == 2
  for i in range(30, 60):
    _truncate(tmp_path / f"{i:03}.jpg")
  pipe = pipeline.TrainPipeline(
    source, RECIPE, batch_size=120, seed=0, max_broken=30 / 120
  )
  with pytest.raises(errors.InputError) as caught:
    list(pipe.batches(0, 1))
  message = str(caught.value)
  assert "31 of the 120 images" in message and "data.max_broken=0.25" in message
  assert message.count(".jpg") == 20 and "and 11 more" in message
  assert "007.jpg (OSError" in message and "\n" not in message


def test_share_of_broken_files_is_of_the_whole_set(
  folder: pathlib.Path,
) -> None:
  _truncate(folder / "train/bee/1.jpg")  # 1 of 15 is more than 1 %
  source = sources.build(_config(path=str(folder)), "train")
  with pytest.raises(errors.InputError, match="1 of the 15 images"):
    _batches(source, batch_size=15)
  with pytest.raises(errors.InputError, match="1 of the 15 images"):
    list(pipeline.eval_batches(source, image_size=8, batch_size=5))


def test_nothing_readable(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.jpg").write_bytes(b"")
  source = sources.build(_config(source="flat", path=str(tmp_path)), "train")
  with pytest.raises(errors.InputError, match="none of the 1 images"):
    _batches(source, batch_size=1, max_broken=1.0)


# --- order and resumption ---------------------------------------------------


def test_epochs_are_permutations_without_repeats() -> None:
  pipe = pipeline.TrainPipeline(_shapes(50), RECIPE, batch_size=8, seed=3)
  assert pipe.steps_per_epoch == 6
  orders = [pipe.order(epoch) for epoch in range(5)]
  for order in orders:
    assert len(set(order.tolist())) == len(order) == 48
    assert order.min() >= 0 and order.max() < 50
  assert len({tuple(order) for order in orders}) == 5
  # Forgotten and computed again, and by another object: the same.
  np.testing.assert_array_equal(pipe.order(0), orders[0])
  again = pipeline.TrainPipeline(_shapes(50), RECIPE, batch_size=8, seed=3)
  np.testing.assert_array_equal(again.order(4), orders[4])
  other = pipeline.TrainPipeline(_shapes(50), RECIPE, batch_size=8, seed=4)
  assert not np.array_equal(other.order(4), orders[4])


def test_batches_hold_what_they_say() -> None:
  source = _shapes(20)
  seen = []

  def extras(epoch: int, index: int) -> dict[str, np.ndarray]:
    seen.append((epoch, index))
    return {"mask": np.full(3, 100 * epoch + index)}

  batches = _batches(source, 0, 10, extras=extras)
  pipe = pipeline.TrainPipeline(source, RECIPE, batch_size=4, seed=0)
  for step, batch in enumerate(batches):
    epoch, within = divmod(step, 5)
    index = pipe.order(epoch)[4 * within : 4 * within + 4]
    np.testing.assert_array_equal(batch["index"], index)
    np.testing.assert_array_equal(batch["label"], index % 8)
    assert batch["position"].tolist() == [0, 1, 2, 3]
    for name in ("index", "label", "position"):
      assert batch[name].dtype == np.int32
    for row, i in enumerate(index):
      rng = np.random.default_rng([0, epoch, i, pipeline.AUGMENT_TAG])
      want = RECIPE(source.load(int(i)), rng)
      np.testing.assert_array_equal(batch["images"][row], want["images"])
      np.testing.assert_array_equal(
        batch["local_images"][row], want["local_images"]
      )
      assert batch["mask"][row].tolist() == [100 * epoch + i] * 3
  assert sorted(seen) == [(e, i) for e in range(2) for i in range(20)]


@pytest.mark.parametrize("start", [1, 4, 5, 7])
def test_any_start_gives_the_batches_of_an_unstopped_run(start: int) -> None:
  source = _shapes(22)  # 5 steps an epoch, two images left out
  whole = _batches(source, 0, 9)
  _assert_same(_batches(source, start, 9), whole[start:])


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (7, 5), (0, 1)])
def test_threads_and_prefetch_change_nothing(
  threads: int, prefetch: int
) -> None:
  source = _shapes(22)
  want = _batches(source, 0, 6)
  got = _batches(source, 0, 6, threads=threads, prefetch=prefetch)
  _assert_same(got, want)


def test_processes_together_load_the_global_batch() -> None:
  source = _shapes(22)
  whole = _batches(source, 0, 6)
  for positions in ([0, 3], np.array([2, 1])):
    part = _batches(source, 0, 6, positions=positions)
    rows = [{k: v[list(positions)] for k, v in b.items()} for b in whole]
    _assert_same(part, rows)


def _loader_threads() -> int:
  names = [thread.name for thread in threading.enumerate()]
  return sum(name.startswith("grain-prefetch") for name in names)


def _wait_for_no_threads() -> None:
  deadline = time.monotonic() + 10
  while _loader_threads() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not _loader_threads()


def test_closing_early_ends_the_threads() -> None:
  pipe = pipeline.TrainPipeline(_shapes(), RECIPE, batch_size=8, seed=0)
  with contextlib.closing(pipe.batches(0, 1000)) as batches:
    next(batches)
    assert _loader_threads() > 0
  _wait_for_no_threads()
  batches = pipe.batches(0, 1000)
  next(batches)
  del batches
  _wait_for_no_threads()


def test_an_error_of_the_recipe_reaches_the_caller() -> None:
  def transform(image: Image.Image, rng: np.random.Generator) -> dict:
    raise ZeroDivisionError("in the recipe")

  pipe = pipeline.TrainPipeline(_shapes(), transform, batch_size=8, seed=0)
  with pytest.raises(ZeroDivisionError, match="in the recipe"):
    next(pipe.batches(0, 1000))
  _wait_for_no_threads()


# --- evaluation -------------------------------------------------------------


@pytest.mark.parametrize("indices", [None, [7, 3, 12, 0, 5]])
def test_evaluation_in_order_with_a_padded_end(indices: list | None) -> None:
  source = _shapes(22)
  batches = list(
    pipeline.eval_batches(
      source, image_size=24, batch_size=4, indices=indices, threads=3
    )
  )
  chosen = list(range(22)) if indices is None else indices
  assert len(batches) == (6 if indices is None else 2)
  merged = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  used = len(chosen)
  assert merged["valid"].dtype == bool
  assert merged["valid"].sum() == used and merged["valid"][:used].all()
  assert merged["index"][:used].tolist() == chosen
  assert merged["label"][:used].tolist() == [i % 8 for i in chosen]
  assert set(merged["index"][used:]) == set(merged["label"][used:]) == {-1}
  for row, i in enumerate(chosen):
    want = transforms.eval_crop(source.load(i), 24)
    np.testing.assert_array_equal(merged["images"][row], want)
  assert merged["images"].dtype == np.uint8


def test_evaluation_never_replaces_a_broken_image(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  _truncate(folder / "train/ant/2.jpg")
  source = sources.build(_config(path=str(folder)), "train")
  (batch,) = pipeline.eval_batches(
    source, image_size=8, batch_size=15, max_broken=0.1
  )
  assert batch["valid"].tolist() == [i != 2 for i in range(15)]
  assert batch["label"][2] == -1 and batch["index"][2] == 2
  assert not batch["images"][2].any()
  assert "ant/2.jpg" in caplog.text


# --- real photographs -------------------------------------------------------


def test_imagenet_photographs(
  images_root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """Greyscale, tiny and huge photographs, one with EXIF orientation 0."""
  with tarfile.open(images_root / "core" / "imagenet_sample_a.tar") as archive:
    archive.extractall(tmp_path, filter="data")
  config = _config(source="flat", path=str(tmp_path))
  source = sources.build(config, "train")
  assert len(source) == 45
  pipe = pipeline.TrainPipeline(
    source, transforms.MultiCrop(local_crops=2), batch_size=45, seed=0
  )
  (batch,) = pipe.batches(0, 1)
  assert batch["images"].shape == (45, 2, 224, 224, 3)
  assert batch["local_images"].shape == (45, 2, 96, 96, 3)
  assert batch["images"].std(axis=(1, 2, 3, 4)).min() > 0
  (evaluation,) = pipeline.eval_batches(source, image_size=224, batch_size=45)
  assert evaluation["valid"].all() and not pipe.broken


def test_cifar_photographs_in_class_folders(
  images_root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  path = images_root / "core" / "cifar10_jpeg.tar.gz"
  with tarfile.open(path, "r|gz") as archive:
    # Only the first files: reading on to the rest takes seconds.
    members = itertools.islice((m for m in archive if m.isfile()), 400)
    for member in members:
      _, _, name, file = member.name.split("/")
      target = tmp_path / "train" / name / file
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(archive.extractfile(member).read())
  source = sources.build(_config(path=str(tmp_path), subset=10), "train")
  for batch in _batches(source, 0, 2, batch_size=5):
    assert batch["images"].shape == (5, 2, 16, 16, 3)
