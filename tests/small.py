"""A run small enough for dozens of them."""

import contextlib
import functools
import os
import pathlib

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from attmask_jax import mesh as meshes
from attmask_jax import trees as parameter_trees
from attmask_jax.augment.transforms import MultiCrop
from attmask_jax.methods import METHODS
from attmask_jax.training import setup, train_step
from configs import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Everything that the tiny config sets, so that tuning it changes no test. A
# wide head, warm teachers and small rates keep rounding as small as it is: a
# narrow head's tiny outputs, normalised, and sharp teachers blow it up.
SIZES = {
  "method.variant": "16x2x2",
  "method.patch_size": 4,
  "method.init": "normal",
  "method.drop_path": 0.0,
  "method.out_dim": 16,
  "method.patch_out_dim": 16,
  "method.head_hidden": 256,
  "method.head_bottleneck": 16,
  "method.student_temp": 0.2,
  "method.teacher_temp": (0.08, 0.1),
  "method.teacher_patch_temp": (0.07, 0.1),
  "method.temp_warmup_epochs": 1,
  "data.source": "shapes",
  "data.image_size": 16,
  "data.local_size": 8,
  "data.local_crops": 2,
  "data.global_scale": (0.4, 1.0),
  "data.local_scale": (0.15, 0.4),
  "data.blur_radius": MultiCrop.blur_radius,
  "data.jitter": MultiCrop.jitter,
  "data.grey": 0.5,
  "data.shapes_train": 64,
  "data.shapes_val": 48,
  "data.batch_size": 8,
  "optim.epochs": 2,
  "optim.warmup_epochs": 1,
  "optim.lr_per_256": 0.02,
  "optim.teacher_momentum": 0.8,
  "optim.weight_decay": (0.04, 0.04),
  "optim.freeze_epochs": 1,
  "evals.eval_epochs": 1,
  "evals.knn_ks": (3, 5, 10),
  "evals.batch_size": 32,
  "evals.mask_images": 0,
  "evals.overlap_images": 8,
  "evals.label_free_images": 16,
  "run.scan": True,
  "run.log_steps": 3,
  "run.tensorboard": False,
}
STEPS_PER_EPOCH, TOTAL_STEPS = 8, 16
MIN_COMPILE_SECONDS = 0.1  # of a program that is worth a file
# What the other families have beside those of SIZES that they know.
FAMILIES = {
  "mae": {
    "method.decoder_width": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "data.scale": (0.4, 1.0),
    "optim.freeze_epochs": 0,
  },
  "extrema": {
    "method.mask_ratio": 0.75,
    "method.num_masks": 2,  # 8 of 16 patches are hidden from both
    "method.contrast": "byol",
    "method.contrast_temp": 1.0,
    "data.scale": (0.4, 1.0),
    "optim.freeze_epochs": 0,
  },
}

_make_mesh = meshes.make_mesh


def config(changes=None, *, arg="attmask"):
  """Locked config of 2 epochs of 8 steps; `changes` by dotted key."""
  config = tiny.get_config(arg)
  known = SIZES
  if arg in FAMILIES:
    leaf = lambda section, name: name in config[section]
    known = {k: v for k, v in SIZES.items() if leaf(*k.split("."))}
    known |= FAMILIES[arg]
  config.lock().update_from_flattened_dict(known | (changes or {}))
  return config


def use_devices(monkeypatch, count):
  """Makes all meshes of the first `count` devices."""

  def make_mesh(*, fsdp=1, devices=None):
    del devices  # all that there are
    return _make_mesh(fsdp=fsdp, devices=jax.devices()[:count])

  monkeypatch.setattr(meshes, "make_mesh", make_mesh)


def parts(config):
  """The run, its first state and its step, as the loop builds them."""
  built = setup.build(config)
  state, shardings = train_step.init_state(
    built.method, built.tx, built.mesh, seed=config.method.seed
  )
  step = train_step.make_step(
    built.method,
    built.tx,
    built.mesh,
    shardings,
    seed=config.method.seed,
    accumulate=config.run.accumulate,
    augment=built.augment,
  )
  return built, state, step


def arguments(built, count):
  """Batch and scalars of the first `count` steps, on the devices."""
  with contextlib.closing(built.pipeline.batches(0, count)) as host:
    for i, batch in enumerate(host):
      scalars = built.schedules.at(i) | built.method.at(i)
      yield meshes.shard(built.mesh, batch), meshes.put(built.mesh, scalars)


def run_steps(config, count):
  """State after `count` steps and [{name: value}] of each step."""
  built, state, step = parts(config)
  history = []
  for batch, scalars in arguments(built, count):
    state, values, per_image = step(state, batch, scalars)
    numbers = {k: float(v) for k, v in values.items()}
    numbers |= {name: np.asarray(x) for name, x in per_image.items()}
    history.append(numbers)
  return state, history


def example(changes=None, *, arg="attmask", rows=4):
  """A method, its trees (params, teacher, aux) and a batch, all of noise.

  Images are uint8. Teacher and student differ from each other. One block, or
  two where drop path is on, as the first never drops.
  """
  changes = changes or {}
  depth = 2 if changes.get("method.drop_path") else 1
  changes = {"method.variant": f"16x{depth}x2"} | changes
  cfg = config(changes, arg=arg)
  method = METHODS[arg].from_config(cfg, steps_per_epoch=STEPS_PER_EPOCH)
  noise = np.random.default_rng(1)

  def leaf(path, x):
    start = float(
      parameter_trees.path_name(path).endswith(("scale", "weight_g"))
    )
    return start + 0.2 * noise.normal(size=x.shape).astype(x.dtype)

  trees = jax.tree_util.tree_map_with_path(
    leaf, jax.eval_shape(method.init, jax.random.key(0))
  )
  views = {"extrema": 2, "mae": 1}.get(arg) or method.global_crops
  image = lambda n, side: noise.integers(
    0, 256, (rows, n, side, side, 3), np.uint8
  )
  batch = {
    "images": image(views, cfg.data.image_size),
    "position": np.arange(rows, dtype=np.int32),
    "label": np.zeros(rows, np.int32),
  }
  if arg == "attmask" and method.local_crops:
    batch["local_images"] = image(method.local_crops, cfg.data.local_size)
  extras = [method.item_extras(0, i) for i in range(rows)]
  for name in extras[0]:
    batch[name] = np.stack([item[name] for item in extras])
  return method, trees, batch


@functools.partial(jax.jit, static_argnums=0)
def loss_of(method, params, teacher, aux, batch, rng, scalars):
  """(loss, stats, metrics, per_image), compiled: tests call it alone."""
  out = method.loss(params, teacher, aux, batch, rng, scalars)
  return out.loss, out.stats, out.metrics, out.per_image


def normalised(images):
  """uint8 -> float32 as ImageNet is normalised, by hand."""
  mean = np.array([0.485, 0.456, 0.406])
  std = np.array([0.229, 0.224, 0.225])
  return ((images / 255 - mean) / std).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def gradient(method, trees, batch, rng, scalars):
  """The loss, its metrics, and its gradient by the images of the batch.

  Args:
    trees: params, teacher, aux.
    batch: images and local_images, if any, are floats.

  Returns:
    loss [], metrics, {name: [B, V, H, W, 3]}.
  """
  images = {name: x for name, x in batch.items() if name.endswith("images")}

  def loss(images):
    batch_now = batch | images
    loss, _, values, _ = loss_of(method, *trees, batch_now, rng, scalars)
    return loss, values

  (loss, values), grads = jax.value_and_grad(loss, has_aux=True)(images)
  return loss, values, grads


def floats(batch):
  """The same batch with normalised images."""
  return {
    name: normalised(x) if name.endswith("images") else x
    for name, x in batch.items()
  }


def in_patches(x, patch=4):
  """[B, V, H, W, 3] -> [B, V, N, P * P * 3]."""
  b, v, h, w, c = x.shape
  x = x.reshape(b, v, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, v, -1, patch * patch * c)


def visible(method, trees, batch, rng, scalars):
  """Patches that the student sees: [B, V, N] bool, from the loss alone.

  No gradient of the loss reaches the pixels of a hidden patch through the
  student, and none ever reaches those of the teacher.
  """
  *_, grads = gradient(method, trees, floats(batch), rng, scalars)
  return np.abs(in_patches(np.asarray(grads["images"]))).max(-1) > 0


@contextlib.contextmanager
def keep_programs(folder, *, seconds=MIN_COMPILE_SECONDS):
  """Keeps programs that take `seconds` to compile in `folder`, None = none."""
  settings = {
    "jax_persistent_cache_min_compile_time_secs": seconds,
    "jax_compilation_cache_dir": folder and os.fspath(folder),
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def environment(folder):
  """The same for another process, with the devices of this one."""
  return os.environ | {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(MIN_COMPILE_SECONDS),
    "JAX_COMPILATION_CACHE_DIR": os.fspath(folder),
  }


def assert_close(got, want, atol):
  """Trees are equal but for rounding, and but for the keys' biases.

  The true gradient of these is 0: Adam blows rounding noise up to steps of
  size lr.
  """

  def one(path, a, b):
    a, b = np.array(a), np.array(b)
    name = parameter_trees.path_name(path)
    if name.endswith("attn/qkv/bias"):
      width = a.shape[-1] // 3
      a[:, width : 2 * width] = b[:, width : 2 * width] = 0
    if name.endswith("attn/k/bias"):  # of class-attention
      a = b
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)

  jax.tree.map_with_path(one, got, want)
