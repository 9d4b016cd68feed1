"""Folders as people have them: links, leftovers, odd names and endings."""

import os
import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from attmask_jax import errors
from attmask_jax.data import decoding, files, pipeline, sources


def _config(path: pathlib.Path, **values: object) -> types.SimpleNamespace:
  defaults = dict(source="folder", subset=0, seed=0, image_size=8)
  return types.SimpleNamespace(path=str(path), **defaults | values)


def _save(path: pathlib.Path, value: int = 0) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (12, 10), (value, value, value)).save(path, "png")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  """train/a with 3 images, train/b with 2, val/a and val/b with one each."""
  for name, count in (("train/a", 3), ("train/b", 2), ("val/a", 1)):
    for i in range(count):
      _save(tmp_path / "set" / name / f"{i}.png", i)
  _save(tmp_path / "set" / "val" / "b" / "0.png")
  return tmp_path / "set"


def _names(source: sources.Source, folder: pathlib.Path) -> list[str]:
  start = len(str(folder)) + 1
  return [source.describe(i)[start:] for i in range(len(source))]


def _read(source: sources.Source, **options: object) -> list[bool]:
  """Which images an evaluation reads, in order."""
  batches = pipeline.eval_batches(
    source, image_size=8, batch_size=len(source), threads=1, **options
  )
  (batch,) = batches
  return batch["valid"].tolist()


# --- links ------------------------------------------------------------------


def test_linked_folders_and_files_are_read(folder: pathlib.Path) -> None:
  linked = folder.parent / "linked"
  (linked / "train" / "a").mkdir(parents=True)
  os.symlink(folder / "train" / "b", linked / "train" / "b")
  for file in sorted((folder / "train" / "a").iterdir()):
    os.symlink(file, linked / "train" / "a" / file.name)
  source = sources.build(_config(linked), "train")
  assert source.labels.tolist() == [0, 0, 0, 1, 1]
  assert _read(source) == [True] * 5


def test_a_dangling_link_is_a_broken_file(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  link = folder / "train" / "a" / "zz.png"
  os.symlink(folder / "gone.png", link)
  source = sources.build(_config(folder), "train")
  assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]
  before = source.fingerprint()
  assert before == source.fingerprint()
  with pytest.raises(decoding.BrokenImage, match="link to .*gone.png, which"):
    source.load(3)
  assert _read(source, max_broken=0.2) == [True, True, True, False, True, True]
  assert f"{link} (a link to {folder}/gone.png, which" in caplog.text
  _save(folder / "gone.png")
  assert source.fingerprint() != before
  assert _read(source) == [True] * 6


def test_a_dangling_class_folder_is_refused(folder: pathlib.Path) -> None:
  os.symlink(folder / "gone", folder / "train" / "c")
  with pytest.raises(errors.InputError, match="train/c is a link to .*/gone"):
    sources.build(_config(folder), "train")


def test_circles_of_links_end(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  before = sources.build(_config(folder), "train")
  os.symlink("..", folder / "train" / "a" / "back")
  os.symlink("itself", folder / "train" / "b" / "itself")
  os.symlink("itself.png", folder / "train" / "b" / "itself.png")
  for source, images in (("folder", 6), ("flat", 8)):
    built = sources.build(_config(folder, source=source), "train")
    assert len(built) == images  # with itself.png, which cannot be read
    assert len(built.fingerprint()) == 64
  assert "train/a/back links to a folder above itself" in caplog.text
  labelled = sources.build(_config(folder), "train")
  assert np.bincount(labelled.labels).tolist() == [3, 3]
  assert set(_names(before, folder)) < set(_names(labelled, folder))
  # Two folders that link to each other are each read through the other once.
  os.remove(folder / "train" / "a" / "back")
  os.symlink(folder / "train" / "b", folder / "train" / "a" / "other")
  os.symlink(folder / "train" / "a", folder / "train" / "b" / "other")
  crossed = sources.build(_config(folder), "train")
  assert np.bincount(crossed.labels).tolist() == [6, 6]


# --- which files are images -------------------------------------------------


def test_folders_named_like_images_are_folders(folder: pathlib.Path) -> None:
  for name in ("clip.tif", "scan.PNG"):
    for i in range(4):
      _save(folder / "train" / "a" / name / f"{i}.png")
  source = sources.build(_config(folder), "train")
  assert len(source) == 5 + 8
  assert all(_read(source))


def test_files_that_are_left_out_are_counted(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  some = folder / "train" / "a"
  for name in ("x.jfif", "y.JFIF", "z.gif", "noise", "table.npy"):
    (some / name).write_bytes((some / "0.png").read_bytes())
  (some / ".hidden.gif").write_bytes(b"")
  count = lambda **values: len(
    sources.build(_config(folder, **values), "train")
  )
  assert count() == 5
  assert "5 of 10 files below" in caplog.text
  for part in ("2 .jfif", "1 .gif", "1 without an ending", "1 .npy"):
    assert part in caplog.text
  assert "--config.data.extensions=.gif,.jfif,none adds them" in caplog.text
  assert count(extensions=".jfif") == 7
  assert count(extensions="gif, JFIF") == 8
  assert count(extensions=".gif,none", source="flat") == 9  # with val/
  caplog.clear()
  assert count(extensions=".gif,.jfif,none") == 9
  assert "1 of 10 files" in caplog.text and "adds them" not in caplog.text
  for ending in (".npy", ".pdf"):  # the latter can only be written
    with pytest.raises(
      errors.InputError, match=f"no files that end in {ending}"
    ):
      count(extensions=ending)


def test_a_class_of_other_files_says_what_it_holds(
  folder: pathlib.Path,
) -> None:
  for i in range(2):
    _save(folder / "train" / "c" / f"{i}.gif")
  with pytest.raises(
    errors.InputError, match="holds no images .*, but 2 .gif;"
  ):
    sources.build(_config(folder), "train")


def test_leftovers_of_programs_are_no_classes(folder: pathlib.Path) -> None:
  for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", ".hidden"):
    (folder / "train" / name).mkdir()
    _save(folder / "train" / "a" / name / "copy.png")
  source = sources.build(_config(folder), "train")
  assert source.class_names == ["a", "b"] and len(source) == 5
  assert len(sources.build(_config(folder, source="flat"), "train")) == 7


def test_images_beside_the_class_folders_are_mentioned(
  folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  for i in range(3):
    _save(folder / "train" / f"loose{i}.png")
  (folder / "train" / "readme.txt").write_text("")
  assert len(sources.build(_config(folder), "train")) == 5
  assert "3 images lie directly in" in caplog.text
  assert "such as loose0.png" in caplog.text


def test_fingerprints_of_plain_folders_stay(tmp_path: pathlib.Path) -> None:
  file = tmp_path / "é.png"
  _save(file)
  os.utime(file, ns=(5, 7))
  size, labels = file.stat().st_size, np.zeros(1, np.int32)
  import hashlib

  said = f"files{file} {size} 7\n".encode() + np.zeros(1, np.int64).tobytes()
  want = hashlib.sha256(said).hexdigest()
  plain = files.ImageFiles(str(tmp_path), ["é.png"], labels)
  assert plain.fingerprint() == want
  for reading in (decoding.Reading(white=9.0), decoding.Reading(max_pixels=9)):
    other = files.ImageFiles(str(tmp_path), ["é.png"], labels, reading)
    assert other.fingerprint() != want


# --- names ------------------------------------------------------------------


def test_names_that_are_no_utf8(tmp_path: pathlib.Path) -> None:
  for name in (b"caf\xe9", b"tab\there"):
    folder = os.path.join(os.fsencode(tmp_path), b"train", name)
    os.makedirs(folder)
    Image.new("L", (9, 9)).save(os.path.join(folder, b"n\xff.png"))
  source = sources.build(_config(tmp_path), "train")
  assert source.class_names == ["caf\\xe9", "tab\\x09here"]
  assert _names(source, tmp_path / "train") == [
    "caf\\xe9/n\\xff.png",
    "tab\\x09here/n\\xff.png",
  ]
  assert _read(source) == [True, True]
  assert len(source.fingerprint()) == 64
