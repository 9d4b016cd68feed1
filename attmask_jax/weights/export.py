"""Writes loaded weights as files of other code bases.

The inverse of `torch_io.files`, with the same tables of names.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging

from attmask_jax import Params
from attmask_jax.errors import InputError
from attmask_jax.methods.classify import BN_EPS
from attmask_jax.methods.mae import Mae
from attmask_jax.models import positions
from attmask_jax.weights.loading import Weights
from attmask_jax.weights.torch_io import (
  hf_config,
  layouts,
  names,
  pth,
  tables,
  tensors,
)

DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SUFFIXES = (".pth", ".safetensors")
PAIRS = ("attmask", "mae", "extrema")  # formats that hold student and teacher
# What a classifier's linear layer reads.
_LAYER_READS = {
  "attmask": "normed class tokens of any number of blocks but two, or one with "
  "the mean patch, without another norm",
  "timm": "one normed class token or the normed mean patch",
  "hf": "one normed class token",
}
Flat = dict[str, np.ndarray]


def export(
  path: str,
  student: Weights,
  teacher: Weights,
  *,
  format: str,
  dtype: str = "float32",
  backbone_only: bool = False,
  centers: Params | None = None,
  epoch: int = 0,
  class_names: Sequence[str] = (),
) -> list[str]:
  """Writes weights under the names of another code base.

  Args:
    path: .pth or .safetensors.
    student: the student, or the only network.
    teacher: the teacher, or the only network; the one that "timm" and "hf"
      hold.
    format: one of FORMATS.
    dtype: one of DTYPES.
    backbone_only: leave heads, decoder and predictor out.
    centers: loss centres of AttMask, for "attmask".
    epoch: completed epochs, for the formats that store them.
    class_names: of a classifier, for the config.json of "hf".

  Returns:
    Names of the tensors written.

  Raises:
    InputError: an unknown format, type or suffix, or a network that the format
      cannot hold.
  """
  file = pathlib.Path(path).expanduser()
  if format not in FORMATS:
    raise InputError(f'format "{format}" is unknown: use {", ".join(FORMATS)}')
  if dtype not in DTYPES:
    raise InputError(f'dtype "{dtype}" is unknown: use {", ".join(DTYPES)}')
  if file.suffix not in SUFFIXES:
    raise InputError(
      f"{file} must end in {' or '.join(SUFFIXES)}: the suffix selects the "
      "kind of file"
    )
  content = FORMATS[format](student, teacher, backbone_only)
  content = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), content)
  if format == "attmask" and "student" in content:
    if centers:
      content["ibot_loss"] = names.to_theirs(centers, tables.CENTERS)
    content["epoch"] = epoch
  elif format == "extrema":
    content["epoch"] = epoch
  elif format == "mae":
    content["epoch"] = epoch - 1  # of the last epoch, counted from 0
  flat, notes = _flatten(content)
  heads = {"heads": teacher.method.backbone.num_heads}
  if isinstance(student.method, Mae):
    heads["decoder_heads"] = student.method.decoder.num_heads
  if format == "hf":
    if file.name != "model.safetensors":
      logging.warning(
        "from_pretrained of transformers looks for model.safetensors in a "
        "folder: rename %s",
        file.name,
      )
    hf_config.write(file.parent, teacher.method, flat, class_names)
  if file.suffix == ".safetensors":
    notes |= {"format": "pt"} | {k: str(v) for k, v in heads.items()}
    tensors.write(file, flat, notes)
  else:
    # Flat files hold only tensors, as timm and transformers expect.
    wrapped = any(isinstance(value, dict) for value in content.values())
    pth.write(file, content | (heads if wrapped else {}))
  return list(flat)


def _flatten(tree: dict[str, Any]) -> tuple[Flat, dict[str, str]]:
  """One dict of tensors, "student.NAME" for several networks, and notes."""
  flat: Flat = {}
  notes = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      prefix = "" if name in ("state_dict", "model") else f"{name}."
      flat |= {f"{prefix}{k}": v for k, v in value.items()}
    elif isinstance(value, np.ndarray):
      flat[name] = value
    else:
      notes[name] = str(value)
  return flat, notes


def _attmask(student: Weights, teacher: Weights, bare: bool) -> dict[str, Any]:
  """The release's checkpoint, its extracted backbone, or a combined file."""
  backbone = teacher.method.backbone
  plain = backbone.positions == "learned" and backbone.class_token == "input"
  _needs(teacher, "attmask", plain)
  _needs(teacher, "attmask", "head" in teacher.params or bare, bare_fits=True)
  if bare:
    return {"state_dict": _backbone(teacher)}
  if teacher.method.classifies:
    return {"state_dict": _combined(teacher)}

  def renamed(weights: Weights) -> Flat:
    head = weights.params["head"]
    separate = "last_layer2" in head
    layers = sum(name.startswith("layer_") for name in head["mlp"])
    table = tables.attmask(
      "separate" if separate else "shared",
      layers=layers,
      norm="norm" in head["mlp"],
    )
    return names.to_theirs(weights.params, table)

  wrapped = {f"module.{name}": x for name, x in renamed(student).items()}
  return {"student": wrapped, "teacher": renamed(teacher)}


def _combined(teacher: Weights) -> Flat:
  """Backbone and linear probe in one file, for the backgrounds challenge.

  The number of features says what the layer reads, see `networks.probe_of`.

  Source: combine_ckpt.py of AttMask.
  """
  method, head = teacher.method, teacher.params["head"]
  reads = method.pool, method.last_blocks
  fits = (method.pool == "cls" and reads[1] != 2) or reads == ("cls+mean", 1)
  fits &= method.final_norm and method.head_norm == "none"
  _needs_layer(teacher, "attmask", fits)
  tree = {"backbone": _trunk(teacher), "head": head}
  return names.to_theirs(tree, tables.combined())


def _timm(student: Weights, teacher: Weights, bare: bool) -> Flat:
  """timm's VisionTransformer: trunk, and a linear layer if there is one."""
  del student
  if not teacher.method.classifies or bare:
    return _backbone(teacher)
  params = _classifier(teacher, "timm")
  if "norm" in params["head"]:
    return names.to_theirs(params, tables.classifier_fc_norm())
  return names.to_theirs(params, tables.classifier())


def _hf(student: Weights, teacher: Weights, bare: bool) -> Flat:
  """A ViT, ViTMAE or, without class token, SiglipVisionModel."""
  del student
  method, params = teacher.method, teacher.params
  if method.classifies and not bare:
    with_class = method.pool == "cls"
    _needs_layer(teacher, "hf", with_class)
    return names.to_theirs(_classifier(teacher, "hf"), tables.hf_classifier())
  tree = {"backbone": _trunk(teacher)}
  if method.backbone.class_token != "input":
    return names.to_theirs(tree, tables.hf_patches())
  if method.backbone.positions == "learned":
    return names.to_theirs(tree, tables.hf_vit())
  table = tables.hf_mae(order=method.backbone.positions)
  grid = (method.backbone.grid,) * 2
  if "decoder" in params and not bare:
    if _official_decoder(teacher):
      tree["decoder"] = params["decoder"]
    else:
      logging.warning(
        "this format cannot hold the decoder, since its decoders see the class "
        "token and its targets have the official order: writing the encoder"
      )
  return names.to_theirs(tree, table, grid=grid)


def _classifier(weights: Weights, format: str) -> Params:
  """Trunk and linear layer of a classifier, as timm or transformers have them.

  Theirs normalise all tokens and take the class token, or take the mean patch
  and normalise that; ours express this in several ways. A batch norm is folded
  into the linear layer.

  Returns:
    "backbone", and "head" with a norm if it applies to the mean patch.

  Raises:
    InputError: the classifier reads something else.
  """
  method, backbone = weights.method, _trunk(weights)
  head = dict(weights.params["head"])
  norm = head.pop("norm", None)
  if method.head_norm == "batch":
    both = {**weights.aux, **weights.params}
    head = _folded(head, both["batch_norm"])
  means = method.pool == "mean"
  # Features without the final norm need the head's norm, and no others do.
  fits = (
    len(head["kernel"]) == 1
    and (means or (method.last_blocks == 1 and method.pool == "cls"))
    and (means or method.backbone.class_token == "input")
    and method.final_norm == (norm is None)
  )
  _needs_layer(weights, format, fits)
  if norm is not None and means:
    return {
      "backbone": _without(backbone, ("norm",)),
      "head": head | {"norm": norm},
    }
  if norm is not None:
    backbone["norm"] = norm
  return {"backbone": backbone, "head": head}


def _folded(head: Params, batch_norm: Params) -> Params:
  """Folds a batch norm [F] into the linear layer [1, F, C] after it."""
  mean, var = (np.asarray(batch_norm[k], np.float64) for k in ("mean", "var"))
  kernel = np.asarray(head["kernel"], np.float64)
  kernel = kernel / np.sqrt(var + BN_EPS)[:, None]
  bias = head["bias"] - mean @ kernel
  return {"kernel": np.float32(kernel), "bias": np.float32(bias)}


def _mae(student: Weights, teacher: Weights, bare: bool) -> dict[str, Any]:
  """MAE-priv's pretraining checkpoint, or the official release's."""
  del teacher
  whole = "decoder" in student.params
  _needs(student, "mae", whole or bare, bare_fits=True)
  backbone = student.method.backbone
  official = _official_decoder(student)
  table = (tables.facebook_mae if official else tables.mae)(backbone.positions)
  grid = (backbone.grid,) * 2
  parts = ("backbone",) if bare else ("backbone", "decoder")
  tree = {name: student.params[name] for name in parts}
  return {"model": names.to_theirs(tree, table, grid=grid)}


def _official_decoder(weights: Weights) -> bool:
  """Whether the decoder is of the official MAE rather than MAE-priv.

  Raises:
    InputError: it is neither.
  """
  method = weights.method
  if not isinstance(method, Mae):
    return False
  layout = {True: "hwc", False: "chw"}[method.decoder.class_token]
  if method.target_layout != layout:
    raise InputError(
      f'{weights.where} has method.target_layout "{method.target_layout}" and '
      f"method.decoder_class_token {method.decoder.class_token}, and no code "
      f'base has both (with it "hwc", without "chw"): add --backbone_only'
    )
  return method.decoder.class_token


def _extrema(student: Weights, teacher: Weights, bare: bool) -> dict[str, Any]:
  """ExtreMA's checkpoint: both encoders."""
  backbone = student.method.backbone
  _needs(student, "extrema", backbone.class_token == "readout")
  grid = (backbone.grid,) * 2

  def renamed(weights: Weights) -> Flat:
    tree = {"backbone": weights.params["backbone"]} if bare else weights.params
    table = tables.extrema(backbone.positions)
    return names.to_theirs(tree, table, grid=grid)

  joined = layouts.wrap_extrema(
    {"student": renamed(student), "teacher": renamed(teacher)}
  )
  return {"state_dict": joined}


FORMATS: dict[str, Callable[[Weights, Weights, bool], dict[str, Any]]] = {
  "attmask": _attmask,
  "timm": _timm,
  "hf": _hf,
  "mae": _mae,
  "extrema": _extrema,
}


def _backbone(weights: Weights) -> Flat:
  """The trunk under timm's names."""
  return names.to_theirs({"backbone": _trunk(weights)}, tables.backbone())


def _trunk(weights: Weights) -> Params:
  """The backbone without parts that others lack; warns about the readout.

  Fixed positions are written out, with zeros for the class token.
  """
  network, backbone = weights.method.backbone, weights.params["backbone"]
  dropped = ["mask_token"]
  if network.class_token == "readout":
    dropped += ["cls_token", *(n for n in backbone if n.startswith("readout_"))]
    logging.warning(
      "this format cannot hold the class token of ExtreMA and the blocks that "
      "read the patches: use the mean of the patch tokens"
    )
  backbone = _without(backbone, dropped)
  if network.positions != "learned":
    backbone["pos_embed"] = positions.adapt(
      None, network, num_prefix_tokens=network.num_prefix_tokens
    )
  return backbone


def _without(tree: Params, left_out: Any) -> Params:
  return {k: v for k, v in tree.items() if k not in left_out}


def _needs(
  weights: Weights, format: str, fits: bool, *, bare_fits: bool = False
) -> None:
  """Raises InputError unless a format can hold these weights."""
  if fits:
    return
  kind = weights.config.method.name
  known = [name for name in ("timm", "hf", kind) if name in FORMATS]
  others = " or ".join(name for name in known if name != format)
  raise InputError(
    f'format "{format}" cannot hold {weights.where} (method {kind}): choose '
    f"{others}" + ", or --backbone_only" * bare_fits
  )


def _needs_layer(weights: Weights, format: str, fits: bool) -> None:
  """Raises InputError unless a format's linear layer reads what this does."""
  if fits:
    return
  method = weights.method
  raise InputError(
    f'format "{format}" cannot hold a linear layer behind last_blocks='
    f"{method.last_blocks}, pool={method.pool}, final_norm="
    f"{method.final_norm}, head_norm={method.head_norm}: it reads "
    f"{_LAYER_READS[format]}; train such a layer, or add --backbone_only"
  )
