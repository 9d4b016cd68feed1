"""Training a classifier on pretrained weights, and using one that is trained.

Linear probe and fine-tuning run on the loop of pretraining with the method
`classify`; here its config is completed from the weights, and its checkpoints
become scores and classifiers.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from attmask_jax import Params, atomic, data, train
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import accuracy
from attmask_jax.evals.job import Classifier, Result, Table
from attmask_jax.methods.classify import Classify
from attmask_jax.models import positions
from attmask_jax.runs import checkpoint, metrics
from attmask_jax.runs import config as run_config
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import files, networks

CLASSIFIER = "classifier.json"  # in the run directory, when it is complete
MAX_GROUP = 150  # images that mixup pairs


def complete(
  config: ml_collections.ConfigDict, source: loading.Weights
) -> ml_collections.ConfigDict:
  """A whole training config: the architecture is that of the weights.

  Args:
    config: of an evaluation with a section `method`, data complete.
    source: what is trained on.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  theirs, backbone = source.config, source.method.backbone
  classes = data.build(config.data, "train").class_names
  config.method.update(
    variant=theirs.method.variant,
    patch_size=theirs.method.patch_size,
    position_size=backbone.image_size,
    num_classes=len(classes),
    dtype=config.method.dtype or theirs.method.dtype,
    class_token=config.method.class_token or backbone.class_token,
    positions=config.method.positions or backbone.positions,
    grid_offset=backbone.grid_offset,
    mlp_ratio=backbone.mlp_ratio,
    key_bias=backbone.key_bias,
    readout_layers=backbone.readout_layers,
  )
  mixes = config.method.mixup or config.method.cutmix
  if mixes and not config.data.mixup_group:
    config.data.mixup_group = mixup_group(config.data.batch_size)
  config.digest = source.digest
  return config


def mixup_group(batch_size: int) -> int:
  """Images that exchange partners: an even divisor of the batch.

  The largest up to 150, which is what a device of the releases gets: 150 of
  AttMask's 900, 128 of MAE's 1024. Never what a device of ours gets: a run
  could not go on with another number of them.
  """
  groups = range(2, min(batch_size, MAX_GROUP) + 1, 2)
  return max((g for g in groups if batch_size % g == 0), default=batch_size)


def run(
  config: ml_collections.ConfigDict,
  source: loading.Weights,
  folder: pathlib.Path,
) -> Result:
  """Trains to the end, continuing what the folder holds; then measures.

  Args:
    config: see `complete`.
    source: pretrained weights.
    folder: run directory.

  Returns:
    Accuracy of the last and of the best epoch; which epoch is best was decided
    on the same validation images (as published).
  """
  frozen = config.method.frozen
  own = _backbone(source, config.method)
  start = {"aux" if frozen else "params": {"backbone": own}}
  if config.method.ema and not frozen:
    start["teacher"] = start["params"]
  built = train.train(config, str(folder), start=start)
  last, best = _steps(folder)
  scores = {}
  for name, step in (("last", last), ("best", best)):
    if name == "best" and best == last:
      scores[name] = scores["last"]
      continue
    where = f"{folder}/checkpoints/{step}"
    found = loading.load(where, network="student", mesh=built.mesh)
    aux = {"backbone": own} if frozen else {}
    scores[name] = built.evaluator.measure(found.params, aux | found.aux)
  layer = int(np.argmax(scores["best"]["top1"]))
  _write_classifier(folder, best, layer, built.train_source.class_names)
  return _result(config, built, scores, (last, best), layer)


def _backbone(
  source: loading.Weights, section: ml_collections.ConfigDict
) -> Params:
  """The pretrained parameters that the classifier takes up."""
  own = dict(source.params["backbone"])
  own.pop("mask_token", None)
  theirs, num_prefix_tokens = (
    source.method.backbone,
    int(section.class_token == "input"),
  )
  if section.class_token == "none":  # fine-tuning of ExtreMA drops its reader
    own = {
      name: x
      for name, x in own.items()
      if name != "cls_token" and not name.startswith("readout_")
    }
  if section.positions == "learned":
    if theirs.positions != "learned":
      table = positions.sin_cos(
        (theirs.grid,) * 2, theirs.width, theirs.positions
      )
      own["pos_embed"] = jnp.pad(
        table, ((0, 0), (num_prefix_tokens, 0), (0, 0))
      )
    elif (
      theirs.num_prefix_tokens > num_prefix_tokens
    ):  # the class token's, which is dropped
      own["pos_embed"] = own["pos_embed"][:, theirs.num_prefix_tokens :]
  return own


def load(
  where: str, source: loading.Weights, *, mesh: jax.sharding.Mesh
) -> Classifier:
  """A trained probe with the backbone it was trained on, or a fine-tuned net.

  Args:
    where: run directory of a linear probe or of a fine-tuning; a .pth or
      .safetensors file of one; or imported weights with a linear layer.
    source: the backbone of a probe.
    mesh: devices that get a copy.

  Raises:
    InputError: no finished classifier there, or one of other weights.
  """
  if files.is_file(where):
    return _of_file(where, source, mesh)
  folder = pathlib.Path(where).expanduser()
  if not folder.exists():
    raise InputError(
      f"the probe {where} does not exist: give the directory of a linear probe "
      "or fine-tuning, or a file of one"
    )
  config = run_config.read_config(folder)
  if config.method.name == networks.NAME:
    return _imported(loading.load(where, network="student", mesh=mesh))
  path = folder / CLASSIFIER
  if config.method.name != "classify" or not path.exists():
    raise InputError(
      f"{where} holds no finished classifier: give the directory of a linear "
      "probe or fine-tuning that ran to its end (--config=configs/evals.py:"
      "linear)"
    )
  told = json.loads(path.read_text())
  trained = loading.load(
    f"{folder}/checkpoints/{told['step']}", network="student", mesh=mesh
  )
  found = _classifier(trained, source, told)
  if trained.method.frozen and config.digest != source.digest:
    raise InputError(
      f"the probe in {where} was trained on other weights ({config.digest}) "
      f"than {source.where} ({source.digest}): give the weights it belongs to"
    )
  return found


def own(source: loading.Weights) -> Classifier:
  """The classifier that fine-tuned weights, ours or imported, are.

  Raises:
    InputError: they are of a fine-tuning that has not come to its end.
  """
  if source.run_dir is None or source.config.method.name == networks.NAME:
    return _imported(source)
  path = source.run_dir / CLASSIFIER
  if not path.exists():
    raise InputError(
      f"{source.run_dir} has not finished its training: run it to its end first"
    )
  return _classifier(source, source, json.loads(path.read_text()))


def _classifier(
  trained: loading.Weights, source: loading.Weights, told: dict[str, Any]
) -> Classifier:
  """A linear layer of `trained` behind the network it was trained with.

  Args:
    trained: of a probe or of a fine-tuning.
    source: network of a probe.
    told: what `_write_classifier` wrote.
  """
  method: Classify = trained.method
  backbone = trained.params.get("backbone")
  if method.frozen:
    method = dataclasses.replace(method, backbone=source.method.backbone)
    backbone = _backbone(source, trained.config.method)
  params = checkpoint.combine(
    backbone,
    trained.params["head"],
    width=method.feature_width,
    layer=told["layer"],
  )
  params |= trained.aux
  return Classifier(
    method,
    params,
    tuple(told["class_names"]),
    loading.digest(params),
    trained.where,
    accuracy.crop_of(trained.config.data),
  )


def _of_file(
  where: str, source: loading.Weights, mesh: jax.sharding.Mesh
) -> Classifier:
  """A classifier of another code base: whole, or the linear layer alone."""
  if where == source.where:
    return _imported(source)
  file = files.read(where)
  if files.kind_of(file) != "linear":
    return _imported(loading.load(where, network="student", mesh=mesh))
  head = files.load_probe(file)
  _, features, classes = head["kernel"].shape
  method = networks.probe_of(source.method.backbone, features, classes)
  params = checkpoint.combine(
    source.params["backbone"],
    meshes.put(mesh, head),
    width=method.feature_width,
  )
  return Classifier(
    method, params, numbered(classes), loading.digest(params), where
  )


def _imported(found: loading.Weights) -> Classifier:
  """Weights of another code base that end in a linear layer."""
  if not found.method.classifies:
    raise InputError(
      f"{found.where} has no linear layer: give a fine-tuned network, or a "
      "probe's file"
    )
  params = dict(found.params) | found.aux
  classes = numbered(found.method.num_classes)
  return Classifier(found.method, params, classes, found.digest, found.where)


def numbered(classes: int) -> tuple[str, ...]:
  """Class names of weights that do not know any: "0", "1", ..."""
  return tuple(map(str, range(classes)))


def _steps(folder: pathlib.Path) -> tuple[int, int]:
  """The last step and, of those kept, the one with the best accuracy."""
  kept = {
    int(entry.name)
    for entry in (folder / "checkpoints").iterdir()
    if entry.name.isdigit()
  }
  accuracy = {
    line["step"]: line["val/top1"]
    for line in metrics.read_metrics(folder / "metrics.jsonl")
    if "val/top1" in line and line["step"] in kept
  }
  # As in the reference, of equal ones the later.
  return max(kept), max(accuracy, key=lambda step: (accuracy[step], step))


def _write_classifier(
  folder: pathlib.Path, step: int, layer: int, class_names: Any
) -> None:
  """Marks the run as complete and says which of its layers to use."""
  if jax.process_index():
    multihost_utils.sync_global_devices(CLASSIFIER)
    return
  told = {"step": step, "layer": layer, "class_names": list(class_names)}
  with atomic.replaced(folder / CLASSIFIER) as temporary:
    temporary.write_text(json.dumps(told) + "\n")
  if jax.process_count() > 1:  # the others read it next
    multihost_utils.sync_global_devices(CLASSIFIER)


def _result(
  config: ml_collections.ConfigDict,
  built: Any,
  scores: dict[str, dict[str, np.ndarray]],
  steps: tuple[int, int],
  layer: int,
) -> Result:
  """Numbers of the last and the best epoch."""
  per_epoch = built.schedules.steps_per_epoch
  rates = tuple(config.method.lrs) or (config.optim.lr_per_256,)
  values, rows = {}, []
  for (name, found), step in zip(scores.items(), steps, strict=True):
    kinds = [k for k in ("top1", "top5", "loss") if k in found]
    values |= {f"{name}/{k}": float(found[k][layer]) for k in kinds}
    for j, rate in enumerate(rates):
      if len(rates) > 1:
        values |= {f"{name}/lr{rate:g}/{k}": float(found[k][j]) for k in kinds}
      cells = [f"{found[k][j]:.2f}" for k in kinds]
      rows.append((name, str(step // per_epoch), f"{rate:g}", *cells))
  names = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss"}
  headings = ("epoch", "number", "lr per 256", *(names[k] for k in kinds))
  counts = {
    "train images": len(built.train_source),
    "validation images": int(scores["last"]["images"]),
    "classes": config.method.num_classes,
    "best step": steps[1],
    "last step": steps[0],
  }
  notes = ("The best epoch was chosen on the same validation images.",)
  if len(rates) > 1:
    notes += ("So was the learning rate.",)
  return Result(values, counts, Table(headings, tuple(rows)), notes=notes)
