"""tensorflow-datasets without TensorFlow: messages, and a set made here."""

import pathlib
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from attmask_jax import errors
from attmask_jax.data import pipeline, sources, tfds


def _config(**values: object) -> types.SimpleNamespace:
  return types.SimpleNamespace(**dict(path="", subset=0) | values)


def _array(image: Image.Image, rng: np.random.Generator) -> dict:
  return {"images": np.asarray(image)}


def test_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  message = "not installed.*pip install tensorflow-datasets array_record"
  with pytest.raises(errors.InputError, match=message):
    sources.build(_config(source="tfds:mnist"), "train")


@pytest.mark.parametrize(
  ("path", "package"), [("gs://bucket/x", "gcsfs"), ("s3://x", "s3fs")]
)
def test_a_bucket_without_its_package(
  monkeypatch: pytest.MonkeyPatch, path: str, package: str
) -> None:
  pytest.importorskip("tensorflow_datasets")
  monkeypatch.setitem(sys.modules, package, None)
  message = rf"tfds:mnist cannot be opened in {path} .ImportError.*{package}"
  with pytest.raises(errors.InputError, match=message) as error:
    sources.build(_config(source="tfds:mnist", path=path), "train")
  assert f"run `pip install {package}`, or copy" in str(error.value)
  assert "\n" not in str(error.value)


def test_data_set_missing(tmp_path: pathlib.Path) -> None:
  pytest.importorskip("tensorflow_datasets")
  message = (
    "tfds:mnist is not prepared as ArrayRecord in .*importlib_resources.*"
    "download_and_prepare.file_format='array_record'.*docs/data.md"
  )
  with pytest.raises(errors.InputError, match=message):
    tfds.Tfds("mnist", str(tmp_path), "train")
  with pytest.raises(
    errors.InputError, match="knows no data set 'mnist:9.9.9'"
  ):
    tfds.Tfds("mnist:9.9.9", str(tmp_path), "train")
  with pytest.raises(errors.InputError, match="knows no data set 'nonsense'"):
    tfds.Tfds("nonsense", str(tmp_path), "train")


_BUILDER = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class TinyPictures(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(encoding_format="png"),
        "label": tfds.features.ClassLabel(names=["dark", "light"]),
      })
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(12),
      "test": self._generate_examples(5),
    }

  def _generate_examples(self, count):
    for i in range(count):
      stream = io.BytesIO()
      Image.new("L", (9, 7), 10 * i).save(stream, "PNG")
      yield i, {"image": stream.getvalue(), "label": i % 2}
"""


@pytest.fixture
def tiny_pictures(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
  """Prepares a data set of encoded images; returns its data_dir."""
  pytest.importorskip("tensorflow_datasets")
  pytest.importorskip("importlib_resources")
  code = tmp_path / "code" / "tiny_pictures"
  code.mkdir(parents=True)
  (code / "__init__.py").write_text("")
  (code / "tiny_pictures_dataset_builder.py").write_text(_BUILDER)
  monkeypatch.syspath_prepend(str(tmp_path / "code"))

  def prepare(file_format: str) -> str:
    from tiny_pictures import tiny_pictures_dataset_builder

    data_dir = str(tmp_path / "data")
    builder = tiny_pictures_dataset_builder.TinyPictures(data_dir=data_dir)
    builder.download_and_prepare(file_format=file_format)
    return data_dir

  return prepare


def test_without_tensorflow(tiny_pictures: Callable[[str], str]) -> None:
  data_dir = tiny_pictures("array_record")
  config = _config(source="tfds:tiny_pictures", path=data_dir)
  source = sources.build(config, "train")
  assert source.class_names == ["dark", "light"]
  seen, labels = set(), []
  for i in range(12):
    image = source.load(i)
    assert image.mode == "RGB" and image.size == (9, 7)
    number = image.getpixel((0, 0))[0] // 10
    seen.add(number)
    labels.append(number % 2)
  records, source._records = source._records, None  # labels need no reading
  assert [source.label(i) for i in range(12)] == labels
  source._records = records
  assert seen == set(range(12))
  # A fresh source: batches never read the whole split for its labels.
  fresh = sources.build(config, "train")
  pipe = pipeline.TrainPipeline(fresh, _array, batch_size=4, seed=0)
  (batch,) = pipe.batches(0, 1)
  assert np.sum(fresh._labels >= 0) == 4
  np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])
  np.testing.assert_array_equal(fresh.labels, source.labels)
  assert len(sources.build(config, "val")) == 5  # called "test" here
  config.subset = 3
  assert sources.build(config, "train").labels.tolist() == [0] * 3 + [1] * 3
  assert "tensorflow" not in sys.modules


def test_a_set_of_tfrecords(tiny_pictures: Callable[[str], str]) -> None:
  data_dir = tiny_pictures("array_record")
  # As TensorFlow would have stored it, the records themselves apart.
  folder = pathlib.Path(data_dir) / "tiny_pictures" / "1.0.0"
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  for shard in folder.glob("*array_record*"):
    shard.rename(str(shard).replace("array_record", "tfrecord"))
  message = (
    f"tfds:tiny_pictures is stored as tfrecord in {data_dir}, without random "
    "access; prepare it in another folder: .*data_dir='ANOTHER_FOLDER'"
  )
  with pytest.raises(errors.InputError, match=message) as error:
    sources.build(_config(source="tfds:tiny_pictures", path=data_dir), "train")
  assert "\n" not in str(error.value)
