"""Sizes of a network from the names and shapes of its tensors."""

import math
import re
from typing import Any

import numpy as np

from attmask_jax.errors import InputError
from attmask_jax.models import vit
from attmask_jax.weights.torch_io import fixed, names
from attmask_jax.weights.torch_io.names import Constant, Table, Tensors

_HEADS = {v["width"]: v["num_heads"] for v in vit.VARIANTS.values()}


def trunk(
  tensors: Tensors, table: Table, num_heads: int | None
) -> dict[str, Any]:
  """Sizes of the backbone."""
  name = lambda ours: names.name_of(table, f"backbone/{ours}") or ""
  conv = _shape(tensors, name("patch_embed/kernel"), 4)
  if conv[1] != 3:
    raise InputError(
      f"{name('patch_embed/kernel')} has shape {conv}: it reads images of "
      f"{conv[1]} channels, and this program has RGB images: give weights of a "
      "network for 3 channels"
    )
  width, patch = conv[0], conv[2]
  depth = _depth(tensors, name("blocks/norm1/scale[i]"))
  fc1 = name("blocks/mlp/fc1/kernel[i]").format(i=0)
  table_name = name("pos_embed")
  side, num_prefix_tokens = sides(tensors, table_name)
  readouts = _count(tensors, "blocks_token.{i}.gamma_1")
  token = "readout" if readouts else "input" if num_prefix_tokens else "none"
  # If no fixed table is expected, as in a fine-tuned network, one that was not
  # updated still counts as learned.
  known = any(isinstance(r, Constant) and r.theirs == table_name for r in table)
  return {
    "width": width,
    "depth": depth,
    "num_heads": _heads(width, num_heads),
    "patch_size": patch,
    "image_size": side * patch,
    "mlp_ratio": _ratio(_shape(tensors, fc1, 2)[0], width),
    "class_token": token,
    "positions": order(tensors, table_name) if known else "learned",
    "key_bias": not any("attn.q_bias" in n for n in tensors),
    "mask_token": name("mask_token") in tensors,
    "readout_layers": readouts,
  }


def prototypes(tensors: Tensors) -> dict[str, Any]:
  """Sizes of a DINO or iBOT head."""
  hidden = _shape(tensors, "head.mlp.0.weight", 2)[0]
  linear = [
    n
    for n, x in tensors.items()
    if re.fullmatch(r"head\.mlp\.\d+\.weight", n) and x.ndim == 2
  ]
  last = max(linear, key=lambda n: int(n.split(".")[2]))
  norm = _is(tensors, "head.mlp.1.weight", 1)
  out = _shape(tensors, "head.last_layer.weight_g", 2)[0]
  kind, patches = "class_only", 0
  if "head.last_layer2.weight_g" in tensors:
    patches = _shape(tensors, "head.last_layer2.weight_g", 2)[0]
    same = all(
      _equal(tensors, f"head.last_layer.{x}", f"head.last_layer2.{x}")
      for x in ("weight_g", "weight_v")
    )
    kind = "shared" if same else "separate"
  return {
    "prototypes": kind,
    "out_dim": out,
    "patch_out_dim": patches,
    "head_hidden": hidden,
    "head_bottleneck": tensors[last].shape[0],
    "head_layers": len(linear),
    "head_norm": "ln" if norm else "none",
  }


def projector(tensors: Tensors) -> dict[str, Any]:
  """Sizes of ExtreMA's heads."""
  if "head.0.weight" not in tensors:
    return {}
  return {
    "head_hidden": _shape(tensors, "head.0.weight", 2)[0],
    "out_dim": _shape(tensors, "head.6.weight", 2)[0],
    "head_layers": 3,
    "predictor": "predictor.0.weight" in tensors,
  }


def decoder(
  tensors: Tensors, table: Table, class_token: bool, num_heads: int | None
) -> dict[str, Any]:
  """Sizes of a masked autoencoder's decoder, {} if there is none."""
  name = lambda ours: names.name_of(table, f"decoder/{ours}") or ""
  if name("embed/kernel") not in tensors:
    return {}
  width = _shape(tensors, name("embed/kernel"), 2)[0]
  if num_heads is None:
    # The official decoders have 16 heads, those of MAE-priv heads of width 64.
    num_heads = 16 if class_token else max(width // 64, 1)
  if width % num_heads or width % 4:
    raise InputError(
      f"the decoder of these weights has width {width}, not a multiple of 4 "
      f"and of {num_heads} heads: they are damaged or of an unknown kind"
    )
  return {
    "decoder_width": width,
    "decoder_depth": _depth(tensors, name("blocks/norm1/scale[i]")),
    "decoder_num_heads": num_heads,
    "decoder_class_token": class_token,
  }


def classifier(tensors: Tensors, table: Table) -> dict[str, Any]:
  """Sizes of a linear layer on top."""
  weight = names.name_of(table, "head/kernel")
  if weight is None:
    return {}
  classes, features = _shape(tensors, weight, 2)
  norm = "none"
  for ours, kind in (
    ("head/norm/scale", "layer"),
    ("batch_norm/mean", "batch"),
  ):
    if names.name_of(table, ours) in tensors:
      norm = kind
  return {"num_classes": classes, "features": features, "probe_norm": norm}


def _ratio(hidden: int, width: int) -> float:
  """hidden / width, rounded so that ratio * width is at least hidden."""
  ratio = hidden / width
  return math.nextafter(ratio, np.inf) if ratio * width < hidden else ratio


def _heads(width: int, num_heads: int | None) -> int:
  """Number of heads, given or by convention; must divide the width."""
  if num_heads is None:
    num_heads = _HEADS.get(width, width // 64 if width % 64 == 0 else 0)
    if not num_heads:
      raise InputError(
        f"weights of width {width} do not say how many attention heads they "
        "have: set --config.num_heads"
      )
  if num_heads < 1 or width % num_heads:
    raise InputError(
      f"width {width} of these weights is not a multiple of {num_heads} heads: "
      "set --config.num_heads"
    )
  return num_heads


def _count(tensors: Tensors, template: str) -> int:
  """Number of blocks, counted from 0."""
  count = 0
  while template.format(i=count) in tensors:
    count += 1
  return count


def _depth(tensors: Tensors, template: str) -> int:
  """Number of blocks, at least one."""
  _shape(tensors, template.format(i=0), 1)
  return _count(tensors, template)


def _equal(tensors: Tensors, *two: str) -> bool:
  """Whether two tensors exist and hold the same values."""
  if not all(name in tensors for name in two):
    return False
  return np.array_equal(*(np.asarray(tensors[name]) for name in two))


def _is(tensors: Tensors, name: str, ndim: int) -> bool:
  return name in tensors and tensors[name].ndim == ndim


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
  """Shape of a tensor that must exist, without empty axes."""
  if name not in tensors:
    raise InputError(
      f"{name} is missing from these weights: they are incomplete"
    )
  shape = tuple(tensors[name].shape)
  if len(shape) != ndim or 0 in shape:
    raise InputError(
      f"{name} has shape {shape} and not {ndim} axes: these weights are "
      "damaged or of an unknown kind"
    )
  return shape


def sides(tensors: Tensors, name: str) -> tuple[int, int]:
  """(patches along a side, class tokens) of a position table."""
  flat = _is(tensors, name, 2)  # an Embedding's
  tokens = _shape(tensors, name, 2 if flat else 3)[-2]
  sizes = fixed.square(tokens)
  if sizes is None:
    raise InputError(
      f"{name} has {tokens} positions, neither a square number of patches nor "
      "one more for a class token: such networks are not supported"
    )
  return sizes


def order(tensors: Tensors, name: str) -> str:
  """Order of a fixed position table, or "learned"."""
  if name not in tensors:
    return "learned"
  return fixed.order_of(np.asarray(tensors[name]))
