"""Networks of one state dict, by what stands in front of their tensor names.

Trainers wrap a network under names of their own: "model.backbone." (Lightning),
"student_backbone.vit." and "teacher_backbone.vit." (lightly),
"teacher.backbone." (DINOv2). One tensor that every ViT has shows where each
network begins.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from attmask_jax.errors import InputError
from attmask_jax.weights.torch_io.unpickling import quoted

# A tensor of every ViT, and what `layouts` knows to stand in front of it.
_FIRST = {
  "patch_embed.proj.weight": ("backbone.", "encoder."),
  "embeddings.patch_embeddings.projection.weight": ("vit.",),
  "embeddings.patch_embedding.weight": ("vision_model.",),
}
# Tells other encoders from that of MAE-priv, whose biases are apart.
_FUSED_BIAS = "blocks.0.attn.qkv.bias"
_DINO_HEAD = "head.mlp.0.weight"
# Words in a prefix that say which of two networks is the average.
_TEACHER = {
  "teacher", "ema", "momentum", "target", "average", "averaged", "avg",
}  # fmt: skip
# What transformers 5 calls otherwise in memory; it saves the names of version 4
# but for the blocks of a decoder.
_TRANSFORMERS_5 = (
  (r"^(vit\.|)layers\.", r"\1encoder.layer."),
  (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
  (r"\.attention\.q_proj\.", ".attention.attention.query."),
  (r"\.attention\.k_proj\.", ".attention.attention.key."),
  (r"\.attention\.v_proj\.", ".attention.attention.value."),
  (r"\.attention\.o_proj\.", ".attention.output.dense."),
  (r"\.mlp\.fc1\.", ".intermediate.dense."),
  (r"\.mlp\.fc2\.", ".output.dense."),
)


def split(
  tensors: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, dict[str, Any]]]:
  """The networks of a state dict under the names of their own code base.

  Args:
    tensors: {name: tensor}, without "module." and "_orig_mod." in front.
    prefix: takes the tensors behind it alone; "" = all.

  Returns:
    "student" and "teacher", where one of two prefixes says that it is an
    average (teacher, ema, momentum, target), or the one network: "teacher" if
    its prefix says so, else "model".

  Raises:
    InputError: no tensor has the prefix, or there are several networks and
      their prefixes do not say which is which.
  """
  if prefix:
    return split(_behind(tensors, prefix))
  starts = _starts(tensors)
  teachers = [start for start in starts if _is_teacher(start)]
  if len(starts) > 2 or len(starts) == 2 and len(teachers) != 1:
    raise InputError(
      f"there are several networks, behind {_listed(starts)}: name one with "
      "--config.tensor_prefix=PREFIX"
    )
  if not starts:
    return [("model", dict(tensors))]
  networks = []
  for start, known in starts.items():
    name = "student" if len(starts) == 2 else "model"
    name = "teacher" if start in teachers else name
    own = _without(tensors, [s for s in starts if not start.startswith(s)])
    networks.append((name, _extracted(own, start, known)))
  return sorted(networks, key=lambda network: network[0])


def has_network(tensors: Mapping[str, Any]) -> bool:
  """Whether a ViT is among the tensors, behind any prefix."""
  return bool(_starts(tensors))


def transformers_4(tensors: dict[str, Any]) -> dict[str, Any]:
  """Tensors of transformers 5 under the names of version 4."""
  if not any(name.endswith("embeddings.cls_token") for name in tensors):
    return tensors
  renamed = {}
  for name, value in tensors.items():
    for new, old in _TRANSFORMERS_5:
      name = re.sub(new, old, name)
    renamed[name] = value
  return renamed


def _starts(tensors: Mapping[str, Any]) -> dict[str, str]:
  """{what stands in front of a network's first tensor: its known end}, sorted.

  The known end belongs to the layout, "" for none.
  """
  starts = {}
  for name in sorted(tensors):
    for first, endings in _FIRST.items():
      if f".{name}".endswith(f".{first}"):
        start = name.removesuffix(first)
        known = [e for e in endings if f".{start}".endswith(f".{e}")]
        if known == ["encoder."] and start + _FUSED_BIAS in tensors:
          known = []
        starts[start] = "".join(known)
  return starts


def _behind(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """The tensors behind a prefix, without it."""
  prefix = prefix.removesuffix(".") + "."
  chosen = {
    name.removeprefix(prefix): tensor
    for name, tensor in tensors.items()
    if name.startswith(prefix)
  }
  if not chosen:
    raise InputError(
      f"no tensor begins with tensor_prefix={prefix}: the networks are behind "
      f"{_listed(_starts(tensors))}"
    )
  return chosen


def _listed(starts: Collection[str]) -> str:
  """Prefixes for a message."""
  return ", ".join(f'"{quoted(start)}"' for start in starts) or "none"


def _is_teacher(start: str) -> bool:
  return not _TEACHER.isdisjoint(re.split(r"[._]", start.lower()))


def _without(tensors: Mapping[str, Any], starts: list[str]) -> dict[str, Any]:
  """The tensors but for those behind these prefixes, of other networks."""
  return {n: x for n, x in tensors.items() if not n.startswith(tuple(starts))}


def _extracted(
  tensors: Mapping[str, Any], start: str, known: str
) -> dict[str, Any]:
  """One network with what its code base has beside it, such as a head.

  A state dict that has a known layout as it is stays whole: whatever it holds
  besides is compared by name.
  """
  root = start.removesuffix(known)
  if not root:
    return dict(tensors)
  behind = [root]
  if known == "backbone.":  # a trainer's own head is beside it, or AttMask's
    behind = [start, *[f"{root}head."] * (root + _DINO_HEAD in tensors)]
  chosen = {
    name.removeprefix(root): tensor
    for name, tensor in tensors.items()
    if name.startswith(tuple(behind))
  }
  others = sorted(n for n in tensors if not n.startswith(tuple(behind)))
  logging.info(
    "taking the %d tensors behind %s%s",
    len(chosen),
    _listed(behind),
    f", and not {len(others)} others, such as {quoted(others[0])}"
    if others
    else "",
  )
  return chosen
