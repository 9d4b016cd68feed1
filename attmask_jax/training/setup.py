"""A run as its config describes it: checked parts, nothing written yet."""

import dataclasses
from typing import NamedTuple

import jax
import ml_collections
import optax

from attmask_jax import data
from attmask_jax import mesh as meshes
from attmask_jax.augment import pair, supervised, transforms
from attmask_jax.errors import InputError
from attmask_jax.evals import accuracy, online
from attmask_jax.methods import METHODS
from attmask_jax.methods.base import Method
from attmask_jax.training import optim, schedules

# Config keys that hold several numbers; the command line takes any tuple.
PAIRS = (
  "method.teacher_temp",
  "method.teacher_patch_temp",
  "data.global_scale",
  "data.local_scale",
  "data.scale",
  "optim.weight_decay",
  "optim.betas",
)
INFINITE = float("inf")
RANGES = {
  "method.patch_size": (1, INFINITE),
  "method.drop_path": (0, 0.99),
  "method.out_dim": (1, INFINITE),
  "method.head_hidden": (1, INFINITE),
  "method.head_bottleneck": (1, INFINITE),
  "method.student_temp": (1e-6, INFINITE),
  "method.teacher_temp": (1e-6, INFINITE),
  "method.teacher_patch_temp": (1e-6, INFINITE),
  "method.temp_warmup_epochs": (0, INFINITE),
  "method.mask_start_epoch": (0, INFINITE),
  "method.center_momentum": (0, 1),
  "method.seed": (0, 2**32 - 1),
  "data.seed": (0, INFINITE),
  "data.batch_size": (1, INFINITE),
  "data.image_size": (1, INFINITE),
  "data.local_size": (1, INFINITE),
  "data.max_broken": (0, 1),
  "data.jitter": (0, 1),
  "data.grey": (0, 1),
  "data.blur_radius": (0.1, INFINITE),
  "optim.lr_per_256": (0, INFINITE),
  "optim.teacher_momentum": (0, 1),
  "optim.clip": (0, INFINITE),
  "optim.epochs": (1, INFINITE),
  "optim.warmup_epochs": (0, INFINITE),
  "optim.freeze_epochs": (0, INFINITE),
  "optim.min_lr": (0, INFINITE),
  "optim.weight_decay": (0, INFINITE),
  "optim.betas": (0, 0.999999),
  "optim.eps": (0, INFINITE),
  "optim.teacher_momentum_end": (0, 1),
  "evals.batch_size": (1, INFINITE),
  "evals.knn_bank": (0, INFINITE),
  "evals.knn_queries": (0, INFINITE),
  "evals.mask_images": (0, INFINITE),
  "evals.overlap_images": (0, INFINITE),
  "evals.knn_temp": (0, INFINITE),
  "run.log_steps": (1, INFINITE),
  "run.save_steps": (0, INFINITE),
  "run.keep_steps": (0, INFINITE),
  "run.patch_loss_chunks": (1, INFINITE),
  "run.prefetch": (1, INFINITE),
  "run.threads": (0, INFINITE),
}
TRANSFORMS = {
  "multi_crop": transforms.MultiCrop,
  "crop_flip": supervised.CropFlip,
  "supervised": supervised.Supervised,
  "two_colours": pair.TwoColours,
  "centre_crop": pair.CentreCrop,
}
LISTS = ("method.mask_ratio", "method.mask_ratio_var", "evals.knn_ks")


class Run(NamedTuple):
  """What a config describes, checked and ready, before anything is written.

  Attributes:
    config: the whole config.
    mesh: all devices.
    method: one of METHODS.
    schedules: rates per step.
    tx: the optimiser.
    train_source: images to train on.
    val_source: images to evaluate on, or None.
    pipeline: batches of this process's rows.
    evaluator: what is measured on the way.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  method: Method
  schedules: schedules.Schedules
  tx: optax.GradientTransformationExtraArgs
  train_source: data.Source
  val_source: data.Source | None
  pipeline: data.TrainPipeline
  evaluator: online.Evaluator | accuracy.Evaluator


def build(config: ml_collections.ConfigDict) -> Run:
  """Builds all parts of a run from its config; writes nothing.

  Raises:
    InputError: the first value that cannot work, and what to do.
  """
  if config.method.name not in METHODS:
    raise InputError(
      f'method.name "{config.method.name}" is unknown: use one of '
      f"{', '.join(METHODS)}"
    )
  _check_numbers(config)
  mesh = meshes.make_mesh(fsdp=config.run.fsdp)
  batch_size, accumulate = config.data.batch_size, config.run.accumulate
  meshes.check_batch(batch_size, mesh=mesh, accumulate=accumulate)
  optimizer = optim.Optimizer.from_config(config)

  train_source = data.build(config.data, "train")
  steps_per_epoch = len(train_source) // batch_size
  if not steps_per_epoch:
    raise InputError(
      f"data.batch_size {batch_size} is larger than the training set of "
      f"{len(train_source)} images: lower it or add images"
    )
  rates = schedules.Schedules.from_config(
    config, steps_per_epoch=steps_per_epoch
  )
  method = METHODS[config.method.name].from_config(
    config, steps_per_epoch=steps_per_epoch
  )
  if method.batch_coupled and accumulate > 1:
    raise InputError(
      f"run.accumulate {accumulate} would change method {config.method.name}, "
      "whose loss compares the images of a batch: set run.accumulate=1"
    )
  evaluation = accuracy if method.classifies else online
  needs_val = method.classifies or config.evals.knn
  val_source = data.build(config.data, "val") if needs_val else None
  evaluation.check(config, method, train_source, val_source)
  tx = optimizer.build(
    frozen_at_start=method.frozen_at_start,
    untrained=method.untrained,
    undecayed=method.undecayed,
    lr_scale=method.lr_scale,
  )
  return Run(
    config,
    mesh,
    method,
    rates,
    tx,
    train_source,
    val_source,
    _pipeline(config, method, train_source, mesh),
    evaluation.Evaluator(config, method, train_source, val_source, mesh),
  )


def _pipeline(
  config: ml_collections.ConfigDict,
  method: Method,
  source: data.Source,
  mesh: jax.sharding.Mesh,
) -> data.TrainPipeline:
  """Training batches with the augmentation that the section `data` names."""
  section, batch_size = config.data, config.data.batch_size
  name = section.get("transform", "multi_crop")
  if name not in TRANSFORMS:
    raise InputError(
      f'data.transform "{name}" is unknown: use {", ".join(TRANSFORMS)}'
    )
  recipe = TRANSFORMS[name]
  names = {f.name for f in dataclasses.fields(recipe)}
  lacking = sorted(name for name in names if name not in section)
  if lacking:
    raise InputError(
      f'data.transform "{name}" needs data.{lacking[0]}, which this config '
      "does not have: choose the transform of its method"
    )
  transform = recipe(**{k: section[k] for k in names})
  return data.TrainPipeline(
    source,
    transform,
    batch_size=batch_size,
    seed=section.seed,
    positions=meshes.local_positions(mesh, batch_size),
    extras=method.item_extras,
    threads=config.run.threads,
    prefetch=config.run.prefetch,
    max_broken=section.max_broken,
    repeats=section.get("repeats", 1),
  )


def _check_numbers(config: ml_collections.ConfigDict) -> None:
  """Refuses words among numbers, and one number in the place of two."""
  for key in PAIRS + LISTS:
    section, name = key.split(".")
    if name not in config[section]:
      continue  # another method's
    if isinstance(config[section][name], int | float):
      continue  # one number by design, in this method
    values = tuple(config[section][name])
    kinds = int if key == "evals.knn_ks" else (int, float)
    fits = len(values) == 2 if key in PAIRS else len(values) > 0
    if not fits or not all(isinstance(x, kinds) for x in values):
      what = "two numbers" if key in PAIRS else "one number or several"
      if kinds is int:
        what = "one whole number or several"
      raise InputError(
        f"{key} {values} must be {what}, written as --config.{key}=A,B"
      )
  for key, (low, high) in RANGES.items():
    section, name = key.split(".")
    if name not in config[section]:
      continue
    value = config[section][name]
    values = value if isinstance(value, list | tuple) else (value,)
    if not all(low <= x <= high for x in values):
      limit = f"at least {low:g}" + f" and at most {high:g}" * (high < INFINITE)
      raise InputError(f"{key} {value} must be {limit}")
