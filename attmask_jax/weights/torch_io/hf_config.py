"""Writes the config.json of transformers beside weights."""

import json
import pathlib
from collections.abc import Container, Sequence
from typing import Any

from attmask_jax import atomic
from attmask_jax.errors import InputError
from attmask_jax.methods.base import Method
from attmask_jax.methods.mae import Mae


def write(
  folder: pathlib.Path,
  method: Method,
  names: Container[str],
  class_names: Sequence[str] = (),
) -> None:
  """Writes the file.

  Args:
    folder: of the weights.
    method: of the weights.
    names: of the tensors that were written.
    class_names: of a classifier; () = their numbers.

  Raises:
    InputError: the folder has another config.json, such as that of a run, or
      cannot be written.
  """
  path = folder / "config.json"
  text = json.dumps(_content(method, names, class_names), indent=2) + "\n"
  try:
    if path.exists() and path.read_text() != text:
      raise InputError(
        f'{path} exists, and format "hf" writes its own: give a file in '
        "another folder"
      )
    with atomic.replaced(path) as temporary:
      temporary.write_text(text)
  except OSError as error:
    raise InputError(
      f"{path} cannot be written ({error.strerror}): give another file"
    ) from error


def _content(
  method: Method, names: Container[str], class_names: Sequence[str]
) -> dict[str, Any]:
  """Keys and values of the file."""
  backbone = method.backbone
  content = {
    "architectures": ["ViTModel"],
    "model_type": "vit",
    "hidden_size": backbone.width,
    "num_hidden_layers": backbone.depth,
    "num_attention_heads": backbone.num_heads,
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
  if "classifier.weight" in names:
    return content | _classifier(class_names or range(method.num_classes))
  if backbone.class_token != "input":
    # The only ViT of transformers without a class token; without its head.
    kind = dict(model_type="siglip_vision_model", vision_use_head=False)
    return content | kind | {"architectures": ["SiglipVisionModel"]}
  if "decoder.mask_token" in names:
    return content | _decoder(method)
  if backbone.positions != "learned":
    content |= {"architectures": ["ViTMAEModel"], "model_type": "vit_mae"}
  return content


def _classifier(class_names: Sequence[Any]) -> dict[str, Any]:
  labels = {str(i): str(name) for i, name in enumerate(class_names)}
  return {
    "architectures": ["ViTForImageClassification"],
    "id2label": labels,
    "label2id": {v: int(k) for k, v in labels.items()},
  }


def _decoder(method: Mae) -> dict[str, Any]:
  return {
    "architectures": ["ViTMAEForPreTraining"],
    "model_type": "vit_mae",
    "decoder_hidden_size": method.decoder.width,
    "decoder_num_hidden_layers": method.decoder.depth,
    "decoder_num_attention_heads": method.decoder.num_heads,
    "decoder_intermediate_size": 4 * method.decoder.width,
    "mask_ratio": method.mask_ratio,
    "norm_pix_loss": method.norm_target,
  }
