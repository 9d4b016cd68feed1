"""Evaluates trained weights: loads them, runs an evaluation, writes results.

The evaluations are the modules of evals/, see `evals.NAMES`. Those that train,
such as linear, first run the training loop of pretraining.
"""

import copy
import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_collections
from absl import logging

from attmask_jax import evals, runtime, schema, train
from attmask_jax import mesh as meshes
from attmask_jax.data import keys
from attmask_jax.errors import InputError
from attmask_jax.evals import linear, results
from attmask_jax.evals.job import Eval, Job, Result
from attmask_jax.runs import checkpoint
from attmask_jax.training import setup, supervised
from attmask_jax.weights import classifier, loading

GENERATED = ("shapes",)  # sources without a path


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> Result:
  """Runs the evaluation `config.evals.name` and writes its results.

  Args:
    config: see configs/evals.py.
    workdir: directory of this evaluation; made if missing.

  Returns:
    What results.json holds; the same on every process.

  Raises:
    InputError: bad config, weights, data or directory.
    NotFiniteError, StoppedError: of an evaluation that trains, see `train`.
  """
  if "name" not in config.get("evals", {}):
    raise InputError(
      "this config describes a training run: name an evaluation, such as "
      "--config=evals:knn, and the run with --config.weights=RUN"
    )
  evaluation = evals.by_name(config.evals.name)
  check_values(config)
  runtime.setup(config.run)
  needs = evaluation.needed(config.evals)
  mesh = meshes.make_mesh(fsdp=config.run.fsdp)
  source = None
  if needs != "none":
    source = _load(config, mesh)
    config = complete(config, source)
  folder = checkpoint.check_workdir(workdir)
  _check_folder(config, folder, source, evaluation)
  job = Job(config, mesh, folder, source)
  if evaluation.check:  # before a probe is trained, or images are read
    evaluation.check(job)
  warning = _pool_warning(job, evaluation)
  if warning:
    logging.warning("%s", warning)
  if evaluation.trains:
    job = _trained(job)
  elif needs == "classifier":
    job = _with_classifier(job)
  result = results.with_notes(job, evaluation.run(job), warning)
  result = results.everywhere(result)
  if jax.process_index() == 0:
    results.write(job, result)
  return result


def _load(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> loading.Weights:
  """The weights that are evaluated."""
  source = loading.load(
    config.weights,
    network=config.network,
    mesh=mesh,
    num_heads=config.num_heads,
    allow_missing=config.allow_missing,
    tensor_prefix=config.tensor_prefix,
  )
  if "backbone" not in source.params:
    raise InputError(
      f"{source.where} is a linear probe without a network: give the weights "
      "it was trained on with --config.weights, and the probe itself with "
      "--config.probe (masked, backgrounds, tokens, rollout of a class)"
    )
  return source


def check_values(config: ml_collections.ConfigDict) -> None:
  """Checks the config of an evaluation against the declarations of its keys.

  Raises:
    InputError: the first invalid value.
  """
  own = evals.by_name(config.evals.name).keys
  trains = "method" in config
  classes = setup.evaluation_classes(*own, trains=trains)
  setup.check(config, classes)


def complete(
  config: ml_collections.ConfigDict, source: loading.Weights
) -> ml_collections.ConfigDict:
  """Fills unset data keys from the config of the weights' own run."""
  config = copy.deepcopy(config).unlock()
  mine, theirs = config.data, source.config.get("data", {})
  own = not mine.source and not mine.path  # the run's images
  unset = schema.section(keys.OpenKeys)
  for key in unset:
    if mine[key] != unset[key]:
      continue
    if own or key not in ("source", "path", "subset"):
      mine[key] = theirs.get(key, mine[key])
    elif key == "subset":  # the run's is for its own images
      mine[key] = 0
    elif key == "source" and "source" in theirs:  # another path, same source
      mine[key] = theirs["source"]
  for key, described in schema.keys(keys.SourceKeys).items():
    if key not in ("source", "path") and mine[key] == unset[key]:
      mine[key] = described.default
  if mine.path and mine.source in GENERATED:
    raise InputError(
      f"data.path {mine.path} is given, but images of data.source="
      f"{mine.source} are generated: set --config.data.source, such as folder"
    )
  schema.check_multiple(
    "data.image_size",
    mine.image_size,
    source.method.backbone.patch_size,
    "the weights' patch size",
  )
  if not mine.source and not config.evals.get("images"):
    raise InputError(
      f"{source.where} does not say what images it was trained on: set "
      "--config.data.source and --config.data.path"
    )
  return config


def _pool_warning(job: Job, evaluation: Eval) -> str:
  """Whether these weights are usually evaluated by other tokens, see `Method`.

  Of the probes and fine-tuning of config.method, or the features of
  config.evals.
  """
  section = job.config.method if evaluation.trains else job.config.evals
  if job.weights is None or "pool" not in section:
    return ""
  return job.weights.method.pool_warning(section.pool)


def _check_folder(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  source: loading.Weights | None,
  evaluation: Eval,
) -> None:
  """Rejects a directory that holds a run or another evaluation."""
  path = folder / "results.json"
  if source is not None and folder.resolve() == source.run_dir:
    raise InputError(
      f"workdir {folder} is the run that is evaluated: give the evaluation a "
      f"directory of its own, such as {folder}/{config.evals.name}"
    )
  if path.exists():
    try:
      record = json.loads(path.read_text())
      name, weights = record["evaluation"], record["weights"] or {}
    except (ValueError, KeyError, TypeError):
      name, weights = "damaged", {}
    if name != config.evals.name:
      raise InputError(
        f"{path} holds results of another evaluation ({name}): use another "
        "--workdir"
      )
    if source is not None and weights and not _replaces(source, weights):
      raise InputError(
        f"{path} holds results of other weights (the {weights['network']} of "
        f"{weights['where']}; these are the {source.network} of "
        f"{source.where}): use another --workdir"
      )
  elif (folder / "config.json").exists() and not evaluation.trains:
    raise InputError(
      f"workdir {folder} holds a training run: use another --workdir"
    )


def _replaces(source: loading.Weights, old: dict[str, Any]) -> bool:
  """Whether new results of `source` may replace those of older weights.

  Those of the same values may, wherever they are; and those of the same
  network of the same run, as it trains on.
  """
  if source.digest == old["digest"]:
    return True
  run = lambda where: where.split("/checkpoints/")[0]
  same = source.network == old["network"]
  same = same and run(source.where) == run(old["where"])
  return same and source.step >= old["step"]


def _trained(job: Job) -> Job:
  """Trains on the job's weights, or continues the run in its folder.

  Returns:
    The job with the run's complete config and its images.
  """
  config = supervised.complete(job.config, job.weights)
  start = supervised.start_values(config, job.weights)
  run = train.train(config, str(job.folder), start=start)
  sources = {"train": run.train_source, "val": run.val_source}
  return dataclasses.replace(job, config=config, mesh=run.mesh, sources=sources)


def _with_classifier(job: Job) -> Job:
  """Adds the classifier: a given probe, a fine-tuned net, or a short probe."""
  source, where = job.weights, job.config.probe
  if where:
    loaded = classifier.load(where, source, mesh=job.mesh)
  elif source.method.classifies:
    loaded = classifier.own(source)
  else:
    epochs = job.config.optim.epochs
    logging.info("no config.probe: training one for %d epochs", epochs)
    config = copy.deepcopy(job.config)
    config.evals.update(name="linear", eval_epochs=1)
    folder = checkpoint.check_workdir(str(job.folder / "probe"))
    probe = _trained(dataclasses.replace(job, config=config, folder=folder))
    linear.run(probe)  # chooses the layer to use
    loaded = classifier.load(str(folder), source, mesh=job.mesh)
    loaded = loaded._replace(trained_here=epochs)
  return dataclasses.replace(job, classifier=loaded)
