"""Our weights as files of other code bases."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging

from attmask_jax import Params, atomic
from attmask_jax.errors import InputError
from attmask_jax.torch_io import layouts, names, pth, tables, tensors
from attmask_jax.weights import Weights

DTYPES = {
  "float32": np.dtype(np.float32),
  "float16": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SUFFIXES = (".pth", ".safetensors")
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
) -> list[str]:
  """Writes weights under the names of another code base.

  Args:
    path: .pth or .safetensors.
    student: one network of the run.
    teacher: the other one; the same where there is one.
    format: one of FORMATS. "timm" and "hf" hold one network, the teacher.
    dtype: one of DTYPES.
    backbone_only: leave heads, decoder and predictor out.
    centers: loss centres of AttMask, for "attmask".
    epoch: completed epochs, for the formats that say it.

  Returns:
    Names of the tensors written.

  Raises:
    InputError: an unknown format, type or ending, or a network that the format
      cannot hold.
  """
  file = pathlib.Path(path).expanduser()
  if format not in FORMATS:
    raise InputError(f'format "{format}" is unknown: use {", ".join(FORMATS)}')
  if dtype not in DTYPES:
    raise InputError(f'dtype "{dtype}" is unknown: use {", ".join(DTYPES)}')
  if file.suffix not in SUFFIXES:
    raise InputError(
      f"{file} must end in {' or '.join(SUFFIXES)}: the ending picks the kind "
      "of file"
    )
  found = FORMATS[format](student, teacher, backbone_only)
  found = jax.tree.map(lambda x: x.astype(DTYPES[dtype]), found)
  if format == "attmask" and not backbone_only:
    if centers:
      found["ibot_loss"] = names.to_theirs(centers, tables.CENTERS)
    found["epoch"] = epoch
  elif format in ("mae", "extrema"):
    found["epoch"] = epoch
  flat, notes = _flatten(found)
  said = {"heads": teacher.method.backbone.heads}
  if hasattr(student.method, "decoder"):
    said["decoder_heads"] = student.method.decoder.heads
  if format == "hf":
    whole = "decoder.mask_token" in flat
    _write_hf_config(file.parent / "config.json", teacher, decoder=whole)
  if file.suffix == ".safetensors":
    notes |= {"format": "pt"} | {k: str(v) for k, v in said.items()}
    tensors.write(file, flat, notes)
  else:
    # Flat files hold tensors alone: timm and transformers expect nothing else.
    wrapped = any(isinstance(value, dict) for value in found.values())
    pth.write(file, found | (said if wrapped else {}))
  return list(flat)


def _flatten(tree: dict[str, Any]) -> tuple[Flat, dict[str, str]]:
  """One dict of tensors, "student.NAME" where there are several networks."""
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
  """The release's checkpoint, or its extracted backbone."""
  _needs(teacher, "attmask", "head" in teacher.params or bare)
  _needs(teacher, "attmask", _plain(teacher))
  if bare:
    return {"state_dict": _backbone(teacher)}

  def one(weights: Weights) -> Flat:
    head = weights.params["head"]
    separate = "last_layer2" in head
    layers = sum(name.startswith("layer_") for name in head["mlp"])
    table = tables.attmask(
      "separate" if separate else "shared",
      layers=layers,
      norm="norm" in head["mlp"],
    )
    return names.to_theirs(weights.params, table)

  wrapped = {f"module.{name}": x for name, x in one(student).items()}
  return {"student": wrapped, "teacher": one(teacher)}


def _timm(student: Weights, teacher: Weights, bare: bool) -> Flat:
  """timm's VisionTransformer: trunk, and a linear layer where there is one."""
  del student
  if not teacher.method.classifies or bare:
    return _backbone(teacher)
  params = {k: teacher.params[k] for k in ("backbone", "head")}
  normed = "norm" in params["head"]
  fits = (
    len(params["head"]["kernel"]) == 1
    and teacher.method.last_blocks == 1
    and teacher.method.head_norm in ("none", "layer")
    and teacher.method.avgpool == int(normed)
  )
  _needs(teacher, "timm", fits)
  table = tables.classifier_fc_norm() if normed else tables.classifier()
  if normed:
    params["backbone"] = _without(params["backbone"], ("norm",))
  return names.to_theirs(params, table)


def _hf(student: Weights, teacher: Weights, bare: bool) -> Flat:
  """transformers' ViTModel, ViTForImageClassification or ViTMAE."""
  del student
  method, params = teacher.method, teacher.params
  backbone = _trunk(teacher)
  if method.classifies and not bare:
    reads_class = method.last_blocks == 1 and method.avgpool == 0
    plain = reads_class and method.head_norm == "none" and not method.raw
    _needs(teacher, "hf", plain and len(params["head"]["kernel"]) == 1)
    tree = {"backbone": backbone, "head": params["head"]}
    return names.to_theirs(tree, tables.hf_classifier())
  _needs(teacher, "hf", method.backbone.class_token == "input")
  if method.backbone.positions == "learned":
    return names.to_theirs({"backbone": backbone}, tables.hf_vit())
  table = tables.hf_mae(order=method.backbone.positions)
  grid = (method.backbone.grid,) * 2
  tree = {"backbone": backbone}
  if "decoder" in params and not bare:
    if _official_decoder(teacher):
      tree["decoder"] = params["decoder"]
    else:
      logging.warning(
        "the decoder has no place in this format, whose decoders see the class "
        "token and whose targets are in the official order: the encoder alone"
      )
  return names.to_theirs(tree, table, grid=grid)


def _mae(student: Weights, teacher: Weights, bare: bool) -> dict[str, Any]:
  """MAE-priv's pretraining checkpoint, or the official release's."""
  del teacher
  _needs(student, "mae", "decoder" in student.params or bare)
  backbone = student.method.backbone
  official = _official_decoder(student)
  table = (tables.facebook_mae if official else tables.mae)(backbone.positions)
  grid = (backbone.grid,) * 2
  parts = ("backbone",) if bare else ("backbone", "decoder")
  tree = {name: student.params[name] for name in parts}
  return {"model": names.to_theirs(tree, table, grid=grid)}


def _official_decoder(weights: Weights) -> bool:
  """Whether the decoder is one of the official MAE, not of MAE-priv.

  Raises:
    InputError: it is neither.
  """
  method = weights.method
  if not hasattr(method, "decoder"):
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

  def one(weights: Weights) -> Flat:
    tree = {"backbone": weights.params["backbone"]} if bare else weights.params
    table = tables.extrema(backbone.positions)
    return names.to_theirs(tree, table, grid=grid)

  joined = layouts.wrap_extrema(
    {"student": one(student), "teacher": one(teacher)}
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
  """The trunk under timm's names, with its position table written out."""
  backbone = weights.method.backbone
  tree = {"backbone": _trunk(weights)}
  if backbone.positions == "learned":
    return names.to_theirs(tree, tables.backbone())
  table = tables.facebook_mae(backbone.positions)
  return names.to_theirs(tree, table, grid=(backbone.grid,) * 2)


def _trunk(weights: Weights) -> Params:
  """The backbone without what only we have; says what is left out."""
  backbone = weights.params["backbone"]
  left = ["mask_token"]
  if weights.method.backbone.class_token == "readout":
    left += ["cls_token", *(n for n in backbone if n.startswith("readout_"))]
    logging.warning(
      "the class token of ExtreMA and the blocks that read the patches have "
      "no place in this format: use the mean of the patch tokens"
    )
  return _without(backbone, left)


def _without(tree: Params, left_out: Any) -> Params:
  return {k: v for k, v in tree.items() if k not in left_out}


def _plain(weights: Weights) -> bool:
  backbone = weights.method.backbone
  return backbone.positions == "learned" and backbone.class_token == "input"


def _needs(weights: Weights, format: str, fits: bool) -> None:
  if not fits:
    raise InputError(
      f'format "{format}" cannot hold {weights.where} (method '
      f"{weights.config.method.name}): choose another of {', '.join(FORMATS)}, "
      "or --backbone_only"
    )


def _write_hf_config(
  path: pathlib.Path, weights: Weights, *, decoder: bool
) -> None:
  """config.json beside the file, as transformers reads it.

  Raises:
    InputError: another one is there, such as that of a run.
  """
  method, backbone = weights.method, weights.method.backbone
  fixed = backbone.positions != "learned"
  kind = "ViTModel"
  if method.classifies:
    kind = "ViTForImageClassification"
  elif fixed:
    kind = "ViTMAEForPreTraining" if decoder else "ViTMAEModel"
  told = {
    "architectures": [kind],
    "model_type": "vit_mae" if fixed else "vit",
    "hidden_size": backbone.width,
    "num_hidden_layers": backbone.depth,
    "num_attention_heads": backbone.heads,
    "intermediate_size": int(backbone.width * backbone.mlp_ratio),
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-6,
    "image_size": backbone.image_size,
    "patch_size": backbone.patch_size,
    "num_channels": 3,
    "qkv_bias": True,
  }
  if method.classifies:
    labels = {str(i): str(i) for i in range(method.num_classes)}
    told |= {
      "id2label": labels,
      "label2id": {v: int(k) for k, v in labels.items()},
    }
  if decoder:
    told |= {
      "decoder_hidden_size": method.decoder.width,
      "decoder_num_hidden_layers": method.decoder.depth,
      "decoder_num_attention_heads": method.decoder.heads,
      "decoder_intermediate_size": 4 * method.decoder.width,
      "mask_ratio": method.mask_ratio,
      "norm_pix_loss": method.norm_target,
    }
  text = json.dumps(told, indent=2) + "\n"
  if path.exists() and path.read_text() != text:
    raise InputError(
      f'{path} exists, and format "hf" writes its own: give a file in another '
      "folder"
    )
  with atomic.replaced(path) as temporary:
    temporary.write_text(text)
