"""Linear probe: accuracy of a linear layer trained on frozen features.

The method `classify` trains the layer; this module measures its checkpoints.
evals/finetune.py does the same with all weights trained.
"""

import dataclasses
import pathlib

import ml_collections
import numpy as np

from attmask_jax.evals import accuracy
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.runs import metrics
from attmask_jax.weights import classifier, loading

Scores = dict[str, np.ndarray]  # see `accuracy.scores`: [J] each
NAMES = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss"}


def run(job: Job) -> Result:
  """Measures the last and the best epoch of the run in the job's folder.

  Marks the run as complete, see `classifier.finish`.

  Returns:
    "last/top1", "best/top1", ... of the best layer, and "last/lr0.1/top1", ...
    of each layer if there are several learning rates. The best epoch is chosen
    on the same validation images (as published).
  """
  last, best = _steps(job.folder)
  scores = {"last": _measure(job, last)}
  scores["best"] = scores["last"] if best == last else _measure(job, best)
  layer = int(np.argmax(scores["best"]["top1"]))
  train = job.source("train")
  classifier.finish(
    job.folder, step=best, layer=layer, class_names=train.class_names
  )
  return _result(job.config, scores, (last, best), layer, len(train))


def _measure(job: Job, step: int) -> Scores:
  """Scores of every linear layer of a checkpoint."""
  where = f"{job.folder}/checkpoints/{step}"
  trained = loading.load(where, network="student", mesh=job.mesh)
  section, aux = job.config.method, dict(trained.aux)
  if section.frozen:
    backbone = classifier.pretrained_backbone(job.weights, section)
    aux["backbone"] = backbone
  measured = classifier.Classifier(
    trained.method,
    trained.method.assemble(trained.params, aux),
    tuple(job.source("train").class_names),
    trained.digest,
    where,
    classifier.crop_of(job.config.data),
  )
  return accuracy.measure(dataclasses.replace(job, classifier=measured))


def _steps(folder: pathlib.Path) -> tuple[int, int]:
  """The last step, and the one with the best accuracy among those kept."""
  kept = {
    int(entry.name)
    for entry in (folder / "checkpoints").iterdir()
    if entry.name.isdigit()
  }
  top1 = {
    line["step"]: line["val/top1"]
    for line in metrics.read_metrics(folder / "metrics.jsonl")
    if "val/top1" in line and line["step"] in kept
  }
  # Of equally good steps the later one, as in the reference.
  return max(kept), max(top1, key=lambda step: (top1[step], step))


def _result(
  config: ml_collections.ConfigDict,
  scores: dict[str, Scores],
  steps: tuple[int, int],
  layer: int,
  train_images: int,
) -> Result:
  """Values, table and notes for the last and the best epoch.

  Args:
    config: of the training run.
    scores: by epoch, "last" and "best".
    steps: of these two epochs.
    layer: index of the best layer.
    train_images: size of the training set.
  """
  steps_per_epoch = train_images // config.data.batch_size
  rates = tuple(config.method.lrs) or (config.optim.lr_per_256,)
  kinds = [k for k in NAMES if k in scores["last"]]
  values, rows = {}, []
  for (name, parts), step in zip(scores.items(), steps, strict=True):
    values |= {f"{name}/{k}": float(parts[k][layer]) for k in kinds}
    for j, rate in enumerate(rates):
      if len(rates) > 1:
        values |= {f"{name}/lr{rate:g}/{k}": float(parts[k][j]) for k in kinds}
      cells = [f"{parts[k][j]:.2f}" for k in kinds]
      rows.append((name, str(step // steps_per_epoch), f"{rate:g}", *cells))
  headings = ("epoch", "number", "lr per 256", *(NAMES[k] for k in kinds))
  counts = {
    "train images": train_images,
    "validation images": int(scores["last"]["images"]),
    "classes": config.method.num_classes,
    "best step": steps[1],
    "last step": steps[0],
  }
  notes = ("The best epoch was chosen on the same validation images.",)
  if len(rates) > 1:
    notes += ("So was the learning rate.",)
  return Result(values, counts, Table(headings, tuple(rows)), notes=notes)


EVAL = Eval(run, trains=True)
