"""Evaluations by name: load the weights, run one, write what it found.

`run(job)` of a module in evals/ measures; the supervised ones train first,
on the loop of pretraining.
"""

import dataclasses
import datetime
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from absl import logging

from attmask_jax import atomic, schema, supervised
from attmask_jax import mesh as meshes
from attmask_jax.data import keys
from attmask_jax.errors import InputError
from attmask_jax.evals import (
  attention,
  backgrounds,
  clusters,
  compare,
  fewshot,
  knn,
  masked,
  masks,
  overlap,
  pca,
  reconstruct,
  rollout,
  token_clusters,
  tokens,
)
from attmask_jax.evals.job import Job, Result
from attmask_jax.runs import checkpoint, report
from attmask_jax.runs import config as run_config
from attmask_jax.training import setup
from attmask_jax.weights import loading

EVALS: dict[str, Callable[[Job], Result]] = {
  "knn": knn.run,
  "fewshot": fewshot.run,
  "masked": masked.run,
  "backgrounds": backgrounds.run,
  "clusters": clusters.run,
  "attention": attention.run,
  "masks": masks.run,
  "overlap": overlap.run,
  "pca": pca.run,
  "reconstruct": reconstruct.run,
  "rollout": rollout.run,
  "tokens": tokens.run,
  "token_clusters": token_clusters.run,
  "compare": compare.run,
}
CHECKS: dict[str, Callable[[Job], None]] = {
  "masked": masked.check,
  "backgrounds": backgrounds.check,
  "tokens": tokens.check,
}
SUPERVISED = ("linear", "finetune")
WITH_CLASSIFIER = ("masked", "backgrounds", "tokens")
WITHOUT_WEIGHTS = ("compare",)
GENERATED = ("shapes",)  # sources that read no path


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Runs the evaluation `config.evals.name` and writes its results.

  Args:
    config: see configs/evals.py.
    workdir: directory of this evaluation; made if missing.

  Raises:
    InputError: bad config, weights, data or directory.
  """
  if "name" not in config.get("evals", {}):
    raise InputError(
      "this config describes a training run: use --config=configs/evals.py:"
      "NAME with --mode=eval"
    )
  name = config.evals.name
  if name not in (*EVALS, *SUPERVISED):
    raise InputError(
      f'evals.name "{name}" is unknown: use {", ".join((*EVALS, *SUPERVISED))}'
    )
  check_values(config)
  mesh = meshes.make_mesh(fsdp=config.run.fsdp)
  source = None
  if name not in WITHOUT_WEIGHTS:
    source = loading.load(
      config.weights,
      network=config.network,
      mesh=mesh,
      num_heads=config.num_heads,
      allow_missing=config.allow_missing,
    )
    if "backbone" not in source.params:
      raise InputError(
        f"{source.where} is a linear probe without a network: give the weights "
        "it was trained on with --config.weights, and the probe itself with "
        "--config.probe (masked, backgrounds, tokens, rollout of a class)"
      )
    config = complete(config, source)
  folder = checkpoint.check_workdir(workdir)
  _check_folder(config, folder, source)
  if name in SUPERVISED:
    config = supervised.complete(config, source)
    job = Job(config, mesh, folder, source)
    result = supervised.run(config, source, folder)
  else:
    job = Job(config, mesh, folder, source)
    if name in CHECKS:  # before a probe is trained, or images are read
      CHECKS[name](job)
    if name in WITH_CLASSIFIER or config.evals.get("explain") == "class":
      job = _with_classifier(job)
    result = EVALS[name](job)
  if jax.process_index() == 0:
    _write(job, result)


def check_values(config: ml_collections.ConfigDict) -> None:
  """Compares the config of an evaluation with what its keys declare.

  Raises:
    InputError: the first value that is not as declared.
  """
  own = ()
  if config.evals.name in EVALS:
    own = (sys.modules[EVALS[config.evals.name].__module__].Keys,)
  trains = "method" in config
  setup.check(config, setup.evaluation_classes(*own, trains=trains))


def complete(
  config: ml_collections.ConfigDict, source: loading.Weights
) -> ml_collections.ConfigDict:
  """The config with data of the weights' own run where it says nothing."""
  config = ml_collections.ConfigDict(config.to_dict())
  mine, theirs = config.data, source.config.get("data", {})
  own = not mine.source and not mine.path  # the run's images
  unset = schema.section(keys.OpenKeys)
  for key in unset:
    if mine[key] != unset[key]:
      continue
    if own or key not in ("source", "path", "subset"):
      mine[key] = theirs.get(key, mine[key])
    elif key == "subset":  # the run's means nothing here
      mine[key] = 0
    elif key == "source" and "source" in theirs:  # another folder of the same
      mine[key] = theirs["source"]
  for key, described in schema.keys(keys.SourceKeys).items():
    if key not in ("source", "path") and mine[key] == unset[key]:
      mine[key] = described.default
  if mine.path and mine.source in GENERATED:
    raise InputError(
      f"data.path {mine.path} is given, and images of data.source="
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


def _check_folder(
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  source: loading.Weights | None,
) -> None:
  """Refuses a directory that holds a run or another evaluation."""
  path = folder / "results.json"
  if source is not None and folder.resolve() == source.run_dir:
    raise InputError(
      f"workdir {folder} is the run that is evaluated: give the evaluation a "
      f"directory of its own, such as {folder}/{config.evals.name}"
    )
  if path.exists():
    try:
      found = json.loads(path.read_text())["evaluation"]
    except (ValueError, KeyError, TypeError):
      found = "damaged"
    if found != config.evals.name:
      raise InputError(
        f"{path} holds results of another evaluation ({found}): use another "
        "--workdir"
      )
  elif (folder / "config.json").exists() and (
    config.evals.name not in SUPERVISED
  ):
    raise InputError(
      f"workdir {folder} holds a training run: use another --workdir"
    )


def _with_classifier(job: Job) -> Job:
  """Adds the classifier: a given probe, a fine-tuned net, or a short probe."""
  config, source, where = job.config, job.weights, job.config.probe
  if where:
    classifier = supervised.load(where, source, mesh=job.mesh)
  elif source.method.classifies:
    classifier = supervised.own(source)
  else:
    folder = job.folder / "probe"
    epochs = config.optim.epochs
    logging.info("no config.probe: training one for %d epochs", epochs)
    probe = supervised.complete(config, source)
    probe.evals.name = "linear"
    probe.evals.eval_epochs = 1
    supervised.run(probe, source, checkpoint.check_workdir(str(folder)))
    classifier = supervised.load(str(folder), source, mesh=job.mesh)
    classifier = classifier._replace(trained_here=epochs)
  return dataclasses.replace(job, classifier=classifier)


def _write(job: Job, result: Result) -> None:
  """results.json, the table on the terminal, and both report pages."""
  record = _record(job, result)
  path = job.folder / "results.json"
  _remove_figures(path, record["figures"])
  with atomic.replaced(path) as temporary:
    temporary.write_text(json.dumps(record, indent=2) + "\n")
  print(_text(result))
  run_dir = None if job.weights is None else job.weights.run_dir
  if run_dir is not None:
    try:
      report.append_record(run_dir, record)
      report.write(run_dir)
    except OSError as error:  # someone else's run, read-only
      logging.warning("%s is left as it is: %s", run_dir, error)
  page = report.write(job.folder)
  logging.info("written: %s, %s", path, page)


def _remove_figures(path: pathlib.Path, kept: list[str]) -> None:
  """Pictures of the evaluation before this one, but for those of one name."""
  if path.exists():
    for name in set(json.loads(path.read_text()).get("figures", ())):
      if name not in kept:
        (path.parent / name).unlink(missing_ok=True)


def _record(job: Job, result: Result) -> dict[str, Any]:
  """What results.json holds; docs/evaluation.md describes it."""
  config, source, classifier = job.config, job.weights, job.classifier
  notes = list(result.notes)
  if classifier is not None and classifier.trained_here:
    notes.insert(
      0,
      "No probe was given: one was trained for "
      f"{classifier.trained_here} epochs, which is short.",
    )
  return {
    "evaluation": config.evals.name,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "values": {k: _json(v) for k, v in result.values.items()},
    "counts": {k: int(v) for k, v in result.counts.items()},
    "table": {
      "headings": list(result.table.headings),
      "rows": [list(row) for row in result.table.rows],
    },
    "figures": [
      str(pathlib.Path(figure).relative_to(job.folder))
      for figure in result.figures
    ],
    "notes": notes,
    "weights": source
    and {
      "where": source.where,
      "network": source.network,
      "step": source.step,
      "digest": source.digest,
      "method": source.config.method.name,
    },
    "classifier": classifier
    and {"where": classifier.where, "digest": classifier.digest},
    "folder": str(job.folder.resolve()),
    "config": run_config.flat_config(config),
  }


def _json(value: float) -> float | str:
  """A number as strict JSON has it."""
  return float(value) if math.isfinite(value) else str(value)


def _text(result: Result) -> str:
  """The table in columns, the notes below."""
  rows = [result.table.headings, *result.table.rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for row in rows:
    first, *rest = (
      cell.ljust(w) if i == 0 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    lines.append("  ".join([first, *rest]).rstrip())
  lines.insert(1, "-" * len(lines[0]))
  return "\n".join([*lines, *result.notes])
