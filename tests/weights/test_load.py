"""attmask_jax.load, and what its weights take as images."""

import dataclasses

import jax
import ml_collections
import numpy as np
import pytest
import small
from PIL import Image

import attmask_jax
from attmask_jax import interchange, train
from attmask_jax.augment import transforms
from attmask_jax.errors import InputError
from configs import evals, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of one epoch."""
  folder = tmp_path_factory.mktemp("load") / "run"
  changes = {"optim.epochs": 1, "evals.knn": False, "evals.mask_images": 0}
  with pytest.MonkeyPatch.context() as patch:
    small.use_devices(patch, 1)
    train.train(small.config(changes), str(folder))
  return folder


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_features_and_attention_are_those_of_the_method(run, images):
  w = attmask_jax.load(str(run), network="teacher")
  cls, patches = w.features(images, last=2, final_norm=False, batch_size=2)
  want = w.method.features(w.params, images, last=2, norm=False)
  np.testing.assert_allclose(cls, want[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(patches, want[1], rtol=1e-5, atol=1e-5)
  attention = w.attention(images, batch_size=2)
  np.testing.assert_allclose(
    attention, w.method.attention(w.params, images), rtol=1e-5, atol=1e-6
  )
  assert isinstance(cls, np.ndarray) and attention.shape == (5, 2, 16)


def test_a_run_a_checkpoint_and_a_file_are_loaded_alike(run, images, tmp_path):
  file = tmp_path / "whole.pth"
  config = evals.get_config("knn")
  config.weights = str(run)
  interchange.export_weights(
    config, str(file), format="attmask", dtype="float32", backbone_only=False
  )
  want, _ = attmask_jax.load(str(run)).features(images)
  for where in (run / "checkpoints" / "8", file):
    got, _ = attmask_jax.load(str(where), num_heads=2).features(images)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  student, _ = attmask_jax.load(str(run), network="student").features(images)
  assert np.abs(student - want).max() > 1e-4


def test_files_and_pillow_images_get_the_evaluation_crop(run, tmp_path):
  w = attmask_jax.load(str(run))
  pixels = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
  picture = Image.fromarray(pixels)
  picture.save(tmp_path / "a.png")
  crop = np.asarray(transforms.eval_crop(picture, 16))
  want, _ = w.features(crop[None])
  for given in (
    picture,
    tmp_path / "a.png",
    str(tmp_path / "a.png"),
    [picture],
    crop,
    [crop],
    picture.convert("RGBA"),
  ):
    got, _ = w.features(given)
    np.testing.assert_array_equal(got, want)
  mixed, _ = w.features([picture, crop])
  np.testing.assert_allclose(mixed, np.repeat(want, 2, axis=0), rtol=1e-5)


def test_the_crop_is_that_of_the_runs_evaluations(run):
  """Shorter side to floor(256/224 * size), then the centre, by hand."""
  w = attmask_jax.load(str(run))
  pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
  config = ml_collections.ConfigDict(w.config.to_dict())
  config.data.update(image_size=20, eval_resample="bilinear")
  cases = (
    (w, 16, (18, 24), (1, 4), Image.Resampling.BICUBIC),
    (
      w._replace(config=config),
      20,
      (22, 29),
      (1, 4),
      Image.Resampling.BILINEAR,
    ),
  )
  for weights, side, resized, (left, top), filter in cases:
    crop = np.asarray(Image.fromarray(pixels).resize(resized, filter))
    crop = crop[top : top + side, left : left + side]
    want = weights.features(crop)[1]
    np.testing.assert_array_equal(
      weights.features(Image.fromarray(pixels))[1], want
    )


def test_products_are_as_precise_as_in_evaluations(run, images):
  seen = []
  w = attmask_jax.load(str(run))

  class Spy(type(w.method)):
    def attention(self, weights, images):
      seen.append(jax.config.jax_default_matmul_precision)
      return super().attention(weights, images)

  fields = dataclasses.fields(w.method)
  method = Spy(**{f.name: getattr(w.method, f.name) for f in fields})
  with jax.default_matmul_precision("default"):
    w._replace(method=method).attention(images)
  assert seen == ["highest"]


def test_weights_are_on_one_device(run):
  w = attmask_jax.load(str(run))
  devices = {d for x in jax.tree.leaves(w.params) for d in x.devices()}
  assert devices == {jax.devices()[0]} and jax.device_count() == 8


def test_floats_count_only_as_normalised_ones(run, images):
  w = attmask_jax.load(str(run))
  want, _ = w.features(images)
  got, _ = w.features(small.normalised(images), normalised=True)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  with pytest.raises(InputError, match="normalised=True"):
    w.features(images / 255)


@pytest.mark.parametrize(
  "wrong, words",
  [
    (np.zeros((2, 16, 16, 4), np.uint8), "4 channels"),
    (np.zeros((2, 16, 16, 1), np.uint8), "1 channels"),
    (np.zeros((2, 16, 18, 3), np.uint8), "16 x 18 pixels"),
    (np.zeros((2, 16, 16, 3), np.int32), "int32"),
    (np.zeros((16, 16), np.uint8), r"shape \(16, 16\)"),
    ([np.zeros((s, s, 3), np.uint8) for s in (16, 32)], "several shapes"),
    ([], "empty"),
    (np.zeros((0, 16, 16, 3), np.uint8), "no images"),
    ("nowhere.png", "nowhere.png cannot be read"),
    (__file__, "cannot be read: not an image"),
    (None, r"shape \(\)"),
  ],
)
def test_anything_else_is_one_sentence(run, wrong, words):
  w = attmask_jax.load(str(run))
  for ask in (w.features, w.attention):
    with pytest.raises(InputError, match=words) as error:
      ask(wrong)
    assert "\n" not in str(error.value)


def test_settings_out_of_range(run, images):
  with pytest.raises(InputError, match="batch_size 0 must be at least 1"):
    attmask_jax.load(str(run)).features(images, batch_size=0)
  with pytest.raises(InputError, match="last 3 must lie between 1 and the 2"):
    attmask_jax.load(str(run)).features(images, last=3)


def test_a_linear_probe_has_no_features(run, images):
  w = attmask_jax.load(str(run))
  probe = w._replace(params={"head": w.params["head"]})
  for ask in (probe.features, probe.attention):
    with pytest.raises(InputError, match="probe without a network: load the"):
      ask(images)


def test_the_import_is_light():
  """`import attmask_jax` brings the notation, and neither jax nor a network."""
  import subprocess
  import sys

  code = (
    "import sys, attmask_jax; print([m for m in sys.modules if m.startswith("
    "('jax', 'flax', 'optax', 'orbax', 'attmask_jax.'))])"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == "[]"


def test_configs_are_found_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = attmask_jax.get_config("tiny:mae")
  assert config.to_dict() == tiny.get_config("mae").to_dict()
  assert attmask_jax.get_config("evals").evals.name == "knn"
  with pytest.raises(AttributeError, match="batch_size"):
    config.data.batch_sise = 32
  with pytest.raises(InputError, match="no config nowhere.*extrema.*tiny"):
    attmask_jax.get_config("nowhere")
