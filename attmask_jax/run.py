"""A run as its config describes it: checked parts, nothing written yet."""

import dataclasses
from typing import Any, NamedTuple

import jax
import ml_collections
import optax

from attmask_jax import augment, data, optim
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import online
from attmask_jax.methods import METHODS


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
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  method: Any
  schedules: optim.Schedules
  tx: optax.GradientTransformationExtraArgs
  train_source: data.Source
  val_source: data.Source | None
  pipeline: data.TrainPipeline


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
  schedules = optim.Schedules.from_config(
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
  val_source = data.build(config.data, "val")
  online.check(config, train_source, val_source)
  pipeline = data.TrainPipeline(
    train_source,
    _recipe(config.data),
    batch_size=batch_size,
    seed=config.data.seed,
    positions=meshes.local_positions(mesh, batch_size),
    extras=method.item_extras,
    threads=config.run.threads,
    prefetch=config.run.prefetch,
    max_broken=config.data.max_broken,
  )
  tx = optimizer.build(
    frozen_at_start=method.frozen_at_start, untrained=method.untrained
  )
  return Run(
    config,
    mesh,
    method,
    schedules,
    tx,
    train_source,
    val_source,
    pipeline,
  )


def _recipe(section: ml_collections.ConfigDict) -> augment.MultiCrop:
  """The augmentation that the section `data` describes."""
  names = {f.name for f in dataclasses.fields(augment.MultiCrop)}
  return augment.MultiCrop(**{k: section[k] for k in names})
