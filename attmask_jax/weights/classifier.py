"""Loads classifiers: a backbone with the linear layer trained on it.

From the directory of a finished linear probe or fine-tuning, or from a file of
another code base.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_collections
from PIL import Image

from attmask_jax import Params, atomic, data
from attmask_jax import mesh as meshes
from attmask_jax.augment import transforms
from attmask_jax.errors import InputError
from attmask_jax.methods.classify import Classify
from attmask_jax.models import positions
from attmask_jax.runs import config as run_config
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import files, networks

FILE = "classifier.json"  # in the run directory, when the run is complete
Crop = Callable[[Image.Image, int], Image.Image]  # (image, size) -> square


class Classifier(NamedTuple):
  """A backbone with a linear layer.

  Attributes:
    method: `logits(params, images [B, H, W, 3]) -> [B, C]`.
    params: its parameters, whole on every device.
    class_names: [C], of the images it was trained on.
    digest: of the parameters.
    where: its checkpoint.
    crop: how its validation images were cropped; None = the evaluation crop.
    trained_here: epochs of a probe that was trained only for this evaluation.
  """

  method: Classify
  params: Params
  class_names: tuple[str, ...]
  digest: str
  where: str
  crop: Crop | None = None
  trained_here: int = 0


def load(
  where: str, source: loading.Weights, *, mesh: jax.sharding.Mesh
) -> Classifier:
  """Loads a trained probe with its backbone, or a fine-tuned network.

  Args:
    where: run directory of a linear probe or of a fine-tuning; a .pth or
      .safetensors file of one; or imported weights with a linear layer.
    source: the backbone of a probe.
    mesh: devices that get a copy.

  Raises:
    InputError: there is no finished classifier, or it is of other weights.
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
  path = folder / FILE
  if config.method.name != "classify" or not path.exists():
    raise InputError(
      f"{where} holds no finished classifier: give the directory of a linear "
      "probe or fine-tuning that ran to its end (--config=configs/evals.py:"
      "linear)"
    )
  record = _finished(path)
  trained = loading.load(
    f"{folder}/checkpoints/{record.step}", network="student", mesh=mesh
  )
  loaded = _classifier(trained, source, record)
  if trained.method.frozen and config.digest != source.digest:
    raise InputError(
      f"the probe in {where} was trained on other weights ({config.digest}) "
      f"than {source.where} ({source.digest}): give the weights it belongs to"
    )
  return loaded


def own(source: loading.Weights) -> Classifier:
  """Fine-tuned weights, ours or imported, as a classifier.

  Raises:
    InputError: their fine-tuning has not finished.
  """
  if source.run_dir is None or source.config.method.name == networks.NAME:
    return _imported(source)
  path = source.run_dir / FILE
  if not path.exists():
    raise InputError(
      f"{source.run_dir} has not finished its training: run it to its end first"
    )
  return _classifier(source, source, _finished(path))


class _Finished(NamedTuple):
  """What `finish` wrote."""

  step: int
  layer: int
  class_names: tuple[str, ...]


def _finished(path: pathlib.Path) -> _Finished:
  """Reads a FILE.

  Raises:
    InputError: it is damaged.
  """
  try:
    record = json.loads(path.read_text())
    step, layer, names = (record[name] for name in _Finished._fields)
    if not isinstance(names, list):
      raise ValueError(f"class_names {names!r}")
    return _Finished(int(step), int(layer), tuple(map(str, names)))
  except (ValueError, KeyError, TypeError) as error:
    raise InputError(
      f"{path} is damaged ({type(error).__name__}: {error}): restore it, or "
      "train in a new directory"
    ) from error


def _classifier(
  trained: loading.Weights, source: loading.Weights, record: _Finished
) -> Classifier:
  """Joins a linear layer of `trained` and the network it was trained on.

  Args:
    trained: of a probe or of a fine-tuning.
    source: network of a probe.
    record: what `finish` wrote.
  """
  method: Classify = trained.method
  backbone = trained.params.get("backbone")
  if method.frozen:
    method = dataclasses.replace(method, backbone=source.method.backbone)
    backbone = pretrained_backbone(source, trained.config.method)
  params = combine(
    backbone,
    trained.params["head"],
    width=method.feature_width,
    layer=record.layer,
  )
  params |= trained.aux
  return Classifier(
    method,
    params,
    record.class_names,
    loading.digest(params),
    trained.where,
    crop_of(trained.config.data),
  )


def _of_file(
  where: str, source: loading.Weights, mesh: jax.sharding.Mesh
) -> Classifier:
  """A classifier of another code base, or a linear layer of one on `source`."""
  if where == source.where:
    return _imported(source)
  file = files.read(where)
  if files.kind_of(file) != "linear":
    return _imported(loading.load(where, network="student", mesh=mesh))
  head = files.load_probe(file)
  _, features, classes = head["kernel"].shape
  method = networks.probe_of(source.method.backbone, features, classes)
  params = combine(
    source.params["backbone"],
    meshes.put(mesh, head),
    width=method.feature_width,
  )
  return Classifier(
    method, params, numbered(classes), loading.digest(params), where
  )


def _imported(source: loading.Weights) -> Classifier:
  """Weights of another code base that end in a linear layer."""
  if not source.method.classifies:
    raise InputError(
      f"{source.where} has no linear layer: give a fine-tuned network, or a "
      "probe's file"
    )
  params = dict(source.params) | source.aux
  classes = numbered(source.method.num_classes)
  return Classifier(source.method, params, classes, source.digest, source.where)


def class_names(source: loading.Weights) -> tuple[str, ...]:
  """Class names of fine-tuned weights; () if they are unknown.

  They are those of the evaluation of the run, else of its images, else of a
  file of transformers beside the weights.
  """
  if not source.method.classifies:
    return ()
  if source.run_dir is None:
    return _names_beside(pathlib.Path(source.where))
  path = source.run_dir / FILE
  if path.exists():
    return _finished(path).class_names
  try:
    names = data.build(source.config.data, "train").class_names
  except (InputError, AttributeError):  # moved, or an imported file
    return ()
  return tuple(names) * (len(names) == source.method.num_classes)


def _names_beside(file: pathlib.Path) -> tuple[str, ...]:
  """id2label of the config.json of transformers, () if there is none."""
  try:
    labels = json.loads((file.parent / "config.json").read_text())["id2label"]
    return tuple(labels[str(i)] for i in range(len(labels)))
  except (OSError, ValueError, KeyError, TypeError):
    return ()


def numbered(classes: int) -> tuple[str, ...]:
  """Class names of weights without any: "0", "1", ..."""
  return tuple(map(str, range(classes)))


def pretrained_backbone(
  source: loading.Weights, section: ml_collections.ConfigDict
) -> Params:
  """Parameters of the backbone that a classifier fine-tunes or freezes.

  Args:
    source: pretrained weights.
    section: `method` of the classifier; class_token and positions are read.
  """
  params = dict(source.params["backbone"])
  params.pop("mask_token", None)
  network = source.method.backbone
  num_prefix_tokens = int(section.class_token == "input")
  if section.class_token == "none":  # fine-tuning of ExtreMA drops its readout
    params = {
      name: x
      for name, x in params.items()
      if name != "cls_token" and not name.startswith("readout_")
    }
  if section.positions == "learned":
    params["pos_embed"] = positions.adapt(
      params.get("pos_embed"), network, num_prefix_tokens=num_prefix_tokens
    )
  return params


def combine(
  backbone: Params, head: Params, *, width: int, layer: int = 0
) -> Params:
  """A classifier from a backbone and a linear layer trained on its features.

  Args:
    backbone: parameters of the ViT.
    head: kernel [J, F, C], bias [J, C], of J layers trained side by side, and
      other parameters that they share.
    width: F of the backbone's features.
    layer: which of the J.

  Raises:
    InputError: the layer is for features of another width.
  """
  probe_width = head["kernel"].shape[1]
  if probe_width != width:
    raise InputError(
      f"the probe is for features of width {probe_width}, and these weights "
      f"give {width}: use the weights that the probe was trained on"
    )
  selected = {k: head[k][layer : layer + 1] for k in ("kernel", "bias")}
  return {"backbone": backbone, "head": head | selected}


def crop_of(section: ml_collections.ConfigDict) -> Crop | None:
  """How validation images of a classifier are cropped; None = as in evaluation.

  Args:
    section: `data` of its training.
  """
  # Small images are trained on whole.
  whole = section.transform == "supervised" and section.image_size <= 32
  return transforms.eval_whole if whole else None


def finish(
  folder: pathlib.Path, *, step: int, layer: int, class_names: Sequence[str]
) -> None:
  """Marks the run as complete and records which of its layers to use.

  Called by every process; the first one writes.

  Args:
    folder: run directory.
    step: of the checkpoint.
    layer: index among the linear layers trained side by side.
    class_names: [C].
  """
  if jax.process_index() == 0:
    record = {"step": step, "layer": layer, "class_names": list(class_names)}
    with atomic.replaced(folder / FILE) as temporary:
      temporary.write_text(json.dumps(record) + "\n")
  meshes.barrier(FILE)  # the others read it afterwards
