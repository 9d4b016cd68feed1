"""Recognises the code base of a state dict and the sizes of its network.

Sizes come from names and shapes, not from a stored config. Only the number of
attention heads cannot be told from a file.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from attmask_jax.errors import InputError
from attmask_jax.models import vit
from attmask_jax.weights.torch_io import prefixes, sizes, tables
from attmask_jax.weights.torch_io.lazy import ARRAYS
from attmask_jax.weights.torch_io.names import Table, Tensors
from attmask_jax.weights.torch_io.unpickling import quoted

# Keys of a file under which a state dict stands, and the average of one.
NETWORKS = (
  "student", "model", "state_dict", "module", "model_state_dict", "network",
  "net",
)  # fmt: skip
AVERAGES = (
  "teacher", "model_ema", "state_dict_ema", "ema", "ema_state_dict",
  "model_ema_state_dict", "ema_model",
)  # fmt: skip
# ExtreMA's two encoders, and the networks of ours that they are.
_ENCODERS = {"base_encoder.": "student", "momentum_encoder.": "teacher"}
# Masked autoencoders; whether their decoders see the class token.
DECODERS = {"mae": False, "facebook_mae": True, "hf_mae": True}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Result of `recognise`; 0, "" and None for parts that a network lacks.

  Attributes:
    kind: "backbone", "attmask" (with its head), "mae", "facebook_mae",
      "mae_classifier", "extrema", "extrema_probe", "extrema_classifier",
      "classifier" and "classifier_fc_norm" (timm), "official_probe" (of MAE),
      "linear" (only a probe), "combined" (trunk and probe), "hf_vit",
      "hf_classifier", "hf_mae" or "hf_patches".
    table: its names.
    width: D.
    depth: blocks.
    num_heads: given, or by convention.
    patch_size: P.
    image_size: pixels that the position table is made for.
    mlp_ratio: hidden width of the MLPs over D.
    class_token: see `vit.ViT`.
    positions: see `vit.ViT`; "learned" unless the table is a fixed one.
    key_bias: keys have a bias.
    mask_token: the backbone has one.
    readout_layers: class-attention blocks.
    prototypes: see `tables.head`.
    out_dim: K of the head, or the width of ExtreMA's projector.
    patch_out_dim: prototypes of patches.
    head_hidden: width of its hidden layers.
    head_bottleneck: E.
    head_layers: linear layers.
    head_norm: "none" or "ln".
    predictor: it has the predictor of ExtreMA's student.
    decoder_width: of the decoder's tokens.
    decoder_depth: its blocks.
    decoder_num_heads: given, or by convention.
    decoder_class_token: its decoder sees the class token (official MAE).
    num_classes: of a classifier.
    features: F, width of its input.
    probe_norm: `head_norm` of `classify.Classify`.
  """

  kind: str
  table: Table
  width: int = 0
  depth: int = 0
  num_heads: int = 0
  patch_size: int = 0
  image_size: int = 0
  mlp_ratio: float = 0.0
  class_token: str = ""
  positions: str = ""
  key_bias: bool = True
  mask_token: bool = False
  readout_layers: int = 0
  prototypes: str = ""
  out_dim: int = 0
  patch_out_dim: int = 0
  head_hidden: int = 0
  head_bottleneck: int = 0
  head_layers: int = 0
  head_norm: str = ""
  predictor: bool = False
  decoder_width: int = 0
  decoder_depth: int = 0
  decoder_num_heads: int = 0
  decoder_class_token: bool = False
  num_classes: int = 0
  features: int = 0
  probe_norm: str = ""

  @property
  def variant(self) -> str:
    """`method.variant` of a config: a published size or "WxDxH"."""
    size = dict(width=self.width, depth=self.depth, num_heads=self.num_heads)
    for name, known in vit.VARIANTS.items():
      if known == size:
        return name
    return f"{self.width}x{self.depth}x{self.num_heads}"


def unwrap(
  obj: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, dict[str, Any]]]:
  """The networks of a checkpoint, by name.

  A state dict stands under one of `NETWORKS`, perhaps with an average of it
  under one of `AVERAGES`, or is the file itself. "module." and "_orig_mod." in
  front of names are taken off (in front of an encoder's of ExtreMA too), and so
  is what a trainer puts in front of a known layout, see `prefixes`. Names of
  transformers 5 become those of version 4.

  Args:
    obj: content of the file.
    prefix: takes the tensors behind it alone, see `prefixes.split`.

  Returns:
    "student" and "teacher" (ExtreMA's base encoder with predictor and its
    momentum encoder; a model and its average) or the one "model".

  Raises:
    InputError: it holds no tensors, or several networks and no way to choose.
  """
  first, second = (_first_of(obj, keys) for keys in (NETWORKS, AVERAGES))
  if second or "student" in obj:
    pair = [("student", first), ("teacher", second)]
    networks = [
      (name, _one(_split(tensors, prefix), name))
      for name, tensors in pair
      if tensors
    ]
  else:
    networks = _split(first or _tensors(obj) or _nested(obj), prefix)
  networks = [
    (name, prefixes.transformers_4(tensors))
    for name, tensors in networks
    if tensors
  ]
  if not networks:
    listed = ", ".join(map(quoted, list(obj)[:5])) or "nothing"
    raise InputError(
      f"no state dict here (the file holds {listed}): give a checkpoint with "
      "student and teacher, state_dict, model, or a bare state dict"
    )
  return networks


def wrap_extrema(
  networks: Mapping[str, Tensors],
) -> dict[str, Any]:
  """The inverse of `unwrap`: {"student": ..., "teacher": ...} as one dict."""
  joined = {}
  for encoder, network in _ENCODERS.items():
    for name, value in networks.get(network, {}).items():
      prefix = "" if name.startswith("predictor.") else encoder
      joined[f"module.{prefix}{name}"] = value
  return joined


def recognise(
  tensors: Tensors,
  *,
  num_heads: int | None = None,
  decoder_num_heads: int | None = None,
) -> Layout:
  """Code base and sizes of one network of `unwrap`.

  Args:
    tensors: {name: array}.
    num_heads: of its attention; None = those of the published size of this
      width, or else 64 wide.
    decoder_num_heads: the same of a decoder; None = as its release has them.

  Raises:
    InputError: an unknown file, a tensor of an impossible shape, or a width
      without a conventional number of heads.
  """
  kind, table = _kind(tensors)
  known: dict[str, Any] = {}
  if kind != "linear":
    known |= sizes.trunk(tensors, table, num_heads)
  if kind == "attmask":
    known |= sizes.prototypes(tensors)
  elif kind == "extrema":
    known |= sizes.projector(tensors)
  elif kind in DECODERS:
    known |= sizes.decoder(tensors, table, DECODERS[kind], decoder_num_heads)
  known |= sizes.classifier(tensors, table)
  return Layout(kind=kind, table=table, **known)


def kind_of(tensors: Tensors) -> str:
  """`Layout.kind` of a network.

  Raises:
    InputError: an unknown one.
  """
  return _kind(tensors)[0]


def _first_of(obj: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
  """The first state dict under one of these keys, {} for none."""
  return next(filter(None, (_tensors(obj.get(key)) for key in keys)), {})


def _tensors(obj: Any, depth: int = 1) -> dict[str, Any]:
  """The arrays of a state dict without prefixes of wrapped modules.

  Without any, those of a state dict one level below.
  """
  if not isinstance(obj, Mapping):
    return {}
  renamed = {
    re.sub(r"^((module|_orig_mod)\.)+", "", name): value
    for name, value in obj.items()
    if isinstance(name, str) and isinstance(value, ARRAYS)
  }
  below = [obj.get(key) for key in (*NETWORKS, *AVERAGES)] if depth else []
  return renamed or next(filter(None, (_tensors(x, 0) for x in below)), {})


def _nested(obj: Mapping[str, Any]) -> dict[str, Any]:
  """The arrays of state dicts under keys of any other name, if one is a ViT."""
  flat = {
    f"{key}.{name}": value
    for key, state in obj.items()
    if isinstance(key, str)
    for name, value in _tensors(state, 0).items()
  }
  return flat if prefixes.has_network(flat) else {}


def _one(
  networks: list[tuple[str, dict[str, Any]]], name: str
) -> dict[str, Any]:
  """The network of this name, or the only one."""
  return dict(networks).get(name, networks[0][1])


def _split(
  tensors: dict[str, Any], prefix: str
) -> list[tuple[str, dict[str, Any]]]:
  """The networks of one state dict, of ExtreMA or as `prefixes` finds them."""
  if prefix or not any(name.startswith(tuple(_ENCODERS)) for name in tensors):
    return prefixes.split(tensors, prefix)
  networks: dict[str, dict[str, Any]] = {"student": {}, "teacher": {}}
  for name, value in tensors.items():
    for start, network in _ENCODERS.items():
      if name.startswith(start):
        networks[network][name.removeprefix(start)] = value
        break
    else:
      networks["student"][name] = value  # the predictor
  return list(networks.items())


def _kind(tensors: Tensors) -> tuple[str, Table]:
  """Kind and table of a state dict."""
  for prefix in ("vit.", "vision_model.", ""):
    if f"{prefix}embeddings.cls_token" in tensors:
      return _hf_kind(tensors, prefix)
    if f"{prefix}embeddings.position_embedding.weight" in tensors:
      return "hf_patches", tables.hf_patches(prefix)
  if "encoder.patch_embed.proj.weight" in tensors:
    order = sizes.order(tensors, "encoder.pos_embed")
    return "mae", tables.mae("xy" if order == "xy" else "yx")
  for prefix in ("backbone.", ""):
    if f"{prefix}patch_embed.proj.weight" in tensors:
      if "head.mlp.0.weight" in tensors and "linear.weight" not in tensors:
        return "attmask", _attmask_table(tensors, prefix)
      if prefix:
        return "backbone", tables.backbone(prefix)
      return _bare_kind(tensors)
  if "linear.weight" in tensors:
    return "linear", tables.linear()
  listed = ", ".join(map(quoted, sorted(tensors)[:5]))
  raise InputError(
    f"a state dict with the names {listed} ... is of an unknown code base: "
    "give one of AttMask, iBOT, DINO, timm, MAE, ExtreMA or transformers ViTs"
  )


def _hf_kind(tensors: Tensors, prefix: str) -> tuple[str, Table]:
  """`_kind` of a state dict with transformers names."""
  if "classifier.weight" in tensors:
    return "hf_classifier", tables.hf_classifier()
  order = sizes.order(tensors, f"{prefix}embeddings.position_embeddings")
  if order != "learned" or "decoder.decoder_embed.weight" in tensors:
    order = "yx" if order == "yx" else "xy"
    return "hf_mae", tables.hf_mae(prefix, order)
  return "hf_vit", tables.hf_vit(prefix)


def _bare_kind(tensors: Tensors) -> tuple[str, Table]:
  """`_kind` of a trunk without prefix."""
  order = sizes.order(tensors, "pos_embed")
  known = "yx" if order == "yx" else "xy"
  if "blocks_token.0.gamma_1" in tensors:
    if "head.0.running_mean" in tensors:
      return "extrema_probe", tables.extrema_probe(known)
    return "extrema", tables.extrema(known)
  if "blocks.0.attn.q_bias" in tensors:
    known = "xy" if order == "xy" else "yx"
    return "mae_classifier", tables.mae_classifier(known)
  if "linear.weight" in tensors:
    return "combined", tables.combined()
  if "head.0.running_mean" in tensors and "norm.weight" in tensors:
    return "official_probe", tables.official_probe()
  if "head.weight" in tensors:
    if "fc_norm.weight" not in tensors:
      return "classifier", tables.classifier()
    if sizes.sides(tensors, "pos_embed")[1] or "cls_token" not in tensors:
      return "classifier_fc_norm", tables.classifier_fc_norm()
    return "extrema_classifier", tables.extrema_classifier()
  if "decoder_embed.weight" in tensors or order != "learned":
    return "facebook_mae", tables.facebook_mae(known)
  return "backbone", tables.backbone()


def _attmask_table(tensors: Tensors, prefix: str) -> Table:
  """The table for this kind of head."""
  known = sizes.prototypes(tensors)
  return tables.attmask(
    known["prototypes"],
    layers=known["head_layers"],
    norm=known["head_norm"] == "ln",
    prefix=prefix,
  )
