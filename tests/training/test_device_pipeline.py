"""Training with augmentation on the device, on generated images."""

import contextlib
import itertools
import re
import tarfile

import jax
import numpy as np
import pytest
import small

from attmask_jax import mesh as meshes
from attmask_jax.augment import canvas
from attmask_jax.errors import InputError
from attmask_jax.training import setup

STEPS = 100
CHANGES = {"data.pipeline": "device", "data.canvas_size": 24}
SLOW = pytest.mark.slow
FAMILIES = (  # the two that take longer to compile as slow tests
  pytest.param("attmask", marks=SLOW), "mae",
  pytest.param("extrema", marks=SLOW),
)  # fmt: skip


def _batches(config, start, stop):
  built = setup.build(config)
  with contextlib.closing(built.pipeline.batches(start, stop)) as batches:
    return list(batches)


@pytest.mark.parametrize("arg", FAMILIES)
def test_first_steps_are_those_of_the_host_pipeline(arg):
  """The same draws on the same pictures: only rounding differs."""
  state, history = small.run_steps(small.config(CHANGES, arg=arg), 3)
  other, wanted = small.run_steps(small.config(arg=arg), 3)
  for got, want in zip(history, wanted, strict=True):
    # A few levels in 255 of a few pixels. Crops of other draws change the loss
    # of MAE by 0.1, and the gradients of all by a fifth.
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=3e-3)
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=0.05)
  assert int(state.step) == int(other.step) == 3


@pytest.mark.parametrize("arg", FAMILIES[:2])
def test_one_device_equals_eight(monkeypatch, arg):
  config = small.config(CHANGES, arg=arg)
  many, history = small.run_steps(config, 2)
  small.use_devices(monkeypatch, 1)
  one, wanted = small.run_steps(config, 2)
  for got, want in zip(history, wanted, strict=True):
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5)
  small.assert_close(many.params, one.params, atol=2e-4)


def test_pixels_do_not_depend_on_the_devices_and_none_move():
  config = small.config(CHANGES)
  built = setup.build(config)
  (host,) = _batches(config, 0, 1)
  augment = jax.jit(built.augment)
  sharded = meshes.shard(built.mesh, host)
  program = augment.lower(sharded).compile().as_text()
  assert not re.search(
    r"all-(gather|reduce|to-all)|collective|permute", program
  )
  got, alone = augment(sharded), augment(host)
  assert len(got["images"].sharding.device_set) == 8
  for name in ("images", "local_images"):
    np.testing.assert_array_equal(got[name], alone[name])
    assert got[name].dtype == np.uint8


def test_batches_are_a_function_of_the_step():
  config = small.config(CHANGES)
  steps = _batches(config, 0, 10)  # an epoch has 8
  config.run.threads = 1
  for later, want in zip(_batches(config, 7, 10), steps[7:], strict=True):
    assert set(later) == set(want)
    for name in want:
      np.testing.assert_array_equal(later[name], want[name])
  assert steps[0][canvas.CANVAS].shape == (8, 24, 24, 3)
  assert not np.array_equal(steps[0]["images_views"], steps[8]["images_views"])


@pytest.mark.slow
def test_micro_batches_see_the_same_views(monkeypatch):
  small.use_devices(monkeypatch, 1)
  changes = CHANGES | {"method.patch_weight": 0.0}
  _, whole = small.run_steps(small.config(changes), 1)
  _, parts = small.run_steps(small.config(changes | {"run.accumulate": 2}), 1)
  np.testing.assert_allclose(parts[0]["loss"], whole[0]["loss"], rtol=1e-5)


def test_other_transforms_are_refused():
  config = setup.default_config("extrema", "centre_crop")
  config.data.update(source="shapes", pipeline="device")
  wanted = "centre_crop, only multi_crop, crop_flip, two_colours: set data.pip"
  with pytest.raises(InputError, match=wanted):
    setup.build(config)


def test_canvas_of_no_pixels_is_refused():
  with pytest.raises(InputError, match="canvas_size"):
    setup.build(small.config(CHANGES | {"data.canvas_size": 0}))


@pytest.mark.slow
def test_loss_curve_on_photographs(images_root, tmp_path):
  """As with the host pipeline, much closer than another seed's."""
  with tarfile.open(images_root / "core" / "tiny_imagenet_a.tar.gz") as archive:
    images = (m for m in archive if m.name.endswith(".JPEG"))
    archive.extractall(tmp_path, itertools.islice(images, 600), filter="data")
  shared = {
    "data.source": "flat",
    "data.path": str(tmp_path),
    "evals.knn": False,
  }
  shared |= {"data.batch_size": 16, "optim.epochs": 4}

  def losses(**data):
    changes = shared | {f"data.{key}": x for key, x in data.items()}
    _, history = small.run_steps(small.config(changes), STEPS)
    return np.array([numbers["loss"] for numbers in history])

  host, device = losses(), losses(pipeline="device", canvas_size=64)
  other = losses(seed=1)
  off, noise = np.abs(device - host), np.abs(other - host)
  print(f"device {off.mean():.4f}, other seed {noise.mean():.4f}", host, device)
  # The loss of a self-distillation falls and rises again: a curve to follow.
  assert np.ptp(host) > 4 * noise.mean()
  # Rounding grows with the steps, as any change does.
  assert off.mean() < 0.3 * noise.mean()
  assert abs(device[-20:].mean() - host[-20:].mean()) < noise.mean()
