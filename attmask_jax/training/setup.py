"""Builds and checks the parts of a run from its config; writes nothing."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import ml_collections
import optax

from attmask_jax import data, methods, schema
from attmask_jax import mesh as meshes
from attmask_jax.augment import TRANSFORMS, canvas, device, mixup, supervised
from attmask_jax.augment.transforms import Drawn
from attmask_jax.data import keys
from attmask_jax.data.pipeline import Transform
from attmask_jax.errors import InputError
from attmask_jax.evals import accuracy, features, inputs, online
from attmask_jax.evals.knn import BankKeys, SearchKeys
from attmask_jax.evals.label_free import SizeKeys
from attmask_jax.methods import losses
from attmask_jax.methods.base import Method
from attmask_jax.models import vit
from attmask_jax.runs import config as run_config
from attmask_jax.runs import metrics
from attmask_jax.training import lengths, optim, schedules, train_step

Classes = dict[str, tuple[type, ...]]  # by section, "" = top of the config


@dataclasses.dataclass(frozen=True)
class OnlineKeys(SizeKeys, BankKeys, features.Keys):
  """Evaluation of the teacher during pretraining."""

  knn: bool = schema.key(True, "evaluate k-NN; needs labels")
  label_free: bool = schema.key(
    True, "evaluate rank, uniformity, ... (label_free/*); needs no labels"
  )
  eval_epochs: int = schema.key(
    20, "period; also before the first step and at the end", low=1
  )
  knn_ks: tuple[int, ...] = schema.key(
    (10, 20, 100, 200),
    "numbers of neighbours; knn/top1 uses the first",
    low=1,
  )
  knn_temp: float = schema.inherit(SearchKeys, "knn_temp", 0.0)
  mask_images: int = schema.key(
    8, "rows of figures/masks.png, 0 = no figure", low=0
  )
  overlap_images: int = schema.key(
    200, "images for overlap/*, if object masks are known", low=0
  )


@dataclasses.dataclass(frozen=True)
class AccuracyKeys:
  """Evaluation of a classifier during training."""

  eval_epochs: int = schema.key(1, "period; also at the end", low=1)
  mask_images: int = schema.inherit(OnlineKeys, "mask_images", 0)


@dataclasses.dataclass(frozen=True)
class EvaluationKeys(inputs.Keys):
  """Settings of every evaluation."""

  name: str = schema.key("", "of the evaluation, see configs/evals.py")


RUN_KEYS = (
  run_config.RunKeys, keys.LoadKeys, vit.ComputeKeys, losses.ComputeKeys
)  # fmt: skip
OPTIM_KEYS = (
  optim.NameKeys, optim.Optimizer, schedules.RateKeys, schedules.Schedules,
  lengths.ShareKeys,
)  # fmt: skip
# Recipes of supervised training; the last one sets the defaults.
SUPERVISED = (supervised.Supervised, supervised.CropFlip)


def classes(method: str, transform: str) -> Classes:
  """Dataclasses that declare the keys of a training run, by section.

  Raises:
    InputError: an unknown method or transform.
  """
  schema.check("method", {"name": method}, methods.Keys)
  schema.check("data", {"transform": transform}, keys.BatchKeys)
  cls, recipe = methods.METHODS[method], TRANSFORMS[transform]
  common = (keys.SourceKeys, keys.ReadKeys, keys.BatchKeys)
  sections: Classes = {
    "": (run_config.InitKeys, run_config.FileKeys),
    "method": (methods.Keys, cls, *cls.config_parts),
    "data": (*common, recipe),
    "optim": OPTIM_KEYS,
    "evals": (OnlineKeys, inputs.Keys),
    "run": RUN_KEYS,
  }
  if cls.classifies:
    more = (keys.RepeatKeys, mixup.Keys)
    sections |= {
      "": (run_config.WeightsKeys, run_config.FileKeys),
      "data": (*common, *more, *SUPERVISED, recipe),
      "evals": (AccuracyKeys, EvaluationKeys),
    }
  return sections


def evaluation_classes(*own: type, trains: bool = False) -> Classes:
  """Dataclasses that declare the keys of an evaluation, by section.

  Args:
    *own: those of its own settings, in the section `evals`.
    trains: it trains a classifier, so its config also has the keys of one.
  """
  sections: Classes = {
    "": (run_config.WeightsKeys, run_config.FileKeys),
    "evals": (EvaluationKeys, *own),
    "data": (keys.OpenKeys, keys.ReadKeys),
    "run": RUN_KEYS,
  }
  if trains:
    training = classes("classify", "crop_flip")
    sections |= {
      "evals": (AccuracyKeys, *sections["evals"]),
      "method": training["method"],
      # Network and images default to those of the weights.
      "data": (*training["data"], *sections["data"]),
      "optim": training["optim"],
    }
  return sections


def default_config(
  method: str = "attmask", transform: str = "multi_crop"
) -> ml_collections.ConfigDict:
  """A pretraining config with all keys at their defaults.

  Args:
    method: one of METHODS.
    transform: augmentation, one of TRANSFORMS.
  """
  config = _sections(classes(method, transform))
  config.method.name = method
  config.data.transform = transform
  return config


def evaluation_config(
  name: str, *own: type, **settings: Any
) -> ml_collections.ConfigDict:
  """The config of an evaluation without training.

  Args:
    name: of the evaluation.
    *own: dataclasses of its own settings.
    **settings: values that differ from the defaults.
  """
  config = _sections(evaluation_classes(*own))
  config.evals.update(name=name, **settings)
  return config


def supervised_config(
  name: str, *own: type, **settings: Any
) -> ml_collections.ConfigDict:
  """`evaluation_config` of an evaluation that trains a classifier."""
  config = _sections(evaluation_classes(*own, trains=True))
  config.method.name = "classify"
  config.data.transform = "crop_flip"
  config.evals.update(name=name, **settings)
  return config


def _sections(sections: Classes) -> ml_collections.ConfigDict:
  """Every key at its default."""
  config = schema.section(*sections[""])
  for name, declared in sections.items():
    if name:
      config[name] = schema.section(*declared)
  return config


def defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The defaults of the keys of a training config."""
  return _sections(_classes_of(config))


def check(config: ml_collections.ConfigDict, sections: Classes) -> None:
  """Checks a config against the declarations of its keys.

  Raises:
    InputError: the first invalid value.
  """
  for name, declared in sections.items():
    schema.check(name, config[name] if name else config, *declared)


def _classes_of(config: ml_collections.ConfigDict) -> Classes:
  # Older runs of AttMask do not name their transform.
  transform = config.data.get("transform", keys.BatchKeys.transform)
  return classes(config.method.name, transform)


class Run(NamedTuple):
  """Checked parts of a run, before anything is written.

  Attributes:
    config: the whole config, see `lengths.resolve`.
    mesh: the devices.
    method: one of METHODS.
    schedules: rates per step.
    tx: the optimiser.
    train_source: images to train on.
    val_source: images to evaluate on, or None.
    pipeline: batches of this process's rows.
    augment: makes the views of a batch on the device, where the pipeline does
      not: see `train_step.make_step`.
    evaluator: evaluation during training.
  """

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  method: Method
  schedules: schedules.Schedules
  tx: optax.GradientTransformationExtraArgs
  train_source: data.Source
  val_source: data.Source | None
  pipeline: data.TrainPipeline
  augment: train_step.Augment
  evaluator: online.Evaluator | accuracy.Evaluator


def build(
  config: ml_collections.ConfigDict, devices: list[jax.Device] | None = None
) -> Run:
  """Builds all parts of a run from its config; writes nothing.

  Args:
    config: a complete training config.
    devices: to train on, None = all of JAX.

  Raises:
    InputError: the first value that cannot work, with its remedy.
  """
  check(config, _classes_of(config))
  if config.run.wandb.project:
    metrics.import_wandb()  # before anything is written
  mesh = meshes.make_mesh(fsdp=config.run.fsdp, devices=devices)
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
  config = lengths.resolve(config, steps_per_epoch)
  rates = schedules.Schedules.from_config(
    config, steps_per_epoch=steps_per_epoch
  )
  first, last = config.run.profile_steps
  if (first, last) != (0, 0) and not 1 <= first <= last <= rates.total_steps:
    raise InputError(
      f"run.profile_steps {first},{last} must be the first and the last step "
      f"of a trace, from 1 to {rates.total_steps}, such as 10,12"
    )
  method = methods.METHODS[config.method.name].from_config(
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
  transform, augment = _augmentation(config)
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
    _pipeline(config, method, train_source, mesh, transform),
    augment,
    evaluation.Evaluator(config, method, train_source, val_source, mesh),
  )


def _pipeline(
  config: ml_collections.ConfigDict,
  method: Method,
  source: data.Source,
  mesh: jax.sharding.Mesh,
  transform: Transform,
) -> data.TrainPipeline:
  """Training batches of this process's rows."""
  section, batch_size = config.data, config.data.batch_size
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
    repeats=section.get("repeats", keys.RepeatKeys.repeats),
  )


def _augmentation(
  config: ml_collections.ConfigDict,
) -> tuple[Transform, train_step.Augment]:
  """The augmentation that the section `data` names: on host and device.

  Raises:
    InputError: keys are missing, or the device cannot do it.
  """
  section = config.data
  name = section.get("transform", keys.BatchKeys.transform)
  recipe = TRANSFORMS[name]
  absent = sorted(key for key in schema.keys(recipe) if key not in section)
  if absent:
    raise InputError(
      f'data.transform "{name}" needs data.{absent[0]}, which this config '
      "does not have: choose the transform of its method"
    )
  transform = recipe(**schema.take(recipe, section))
  # Older runs do not name their pipeline.
  if section.get("pipeline", keys.BatchKeys.pipeline) == "host":
    return transform, lambda batch: batch
  if not isinstance(transform, Drawn):
    able = [key for key, cls in TRANSFORMS.items() if issubclass(cls, Drawn)]
    raise InputError(
      f"data.pipeline=device does not know data.transform={name}, only "
      f"{', '.join(able)}: set data.pipeline=host"
    )
  placed = canvas.OnCanvas(transform, section.canvas_size)
  return placed, functools.partial(device.augment, recipe=transform)
