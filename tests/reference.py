"""Reference state dicts as our parameter trees, for the recorded numbers."""

import re

import jax.numpy as jnp
import numpy as np

from attmask_jax import trees
from attmask_jax.training import optim

_NAMES = [
  (
    r"mlp\.(\d)\.(weight|bias)$",
    lambda m: f"mlp.layer_{int(m[1]) // 2}.{m[2]}",
  ),
  (r"masked_embed$", lambda m: "mask_token"),
  (r"patch_embed\.proj", lambda m: "patch_embed"),
]


def _leaf(name, value):
  """Reference name and tensor -> path and array in our layout."""
  for pattern, new in _NAMES:
    name = re.sub(pattern, new, name)
  if name.endswith("mask_token"):
    value = value.reshape(1, 1, -1)
  elif name.endswith("weight_g"):
    value = value[:, 0]
  elif name.endswith("weight_v"):
    value = value.T
  elif re.search(r"norm\d?\.weight$", name):
    name = name.replace("weight", "scale")
  elif name.endswith("patch_embed.weight"):
    name, value = name.replace("weight", "kernel"), value.transpose(2, 3, 1, 0)
  elif name.endswith(".weight"):
    name, value = name.replace("weight", "kernel"), value.T
  return name, value


def tree(tensors):
  """{reference name: tensor} -> nested dict with stacked blocks."""
  flat, stacked = {}, {}
  tensors = _with_key_bias(tensors)
  for name, value in tensors.items():
    name, value = _leaf(name, np.asarray(value))
    name = re.sub(r"blocks_token\.(\d+)\.", r"readout_\1.", name)
    block = re.search(r"blocks\.(\d+)\.", name)
    if block:
      key = name.replace(block[0], "blocks.")
      stacked.setdefault(key, {})[int(block[1])] = value
    else:
      flat[name] = value
  for name, layers in stacked.items():
    flat[name] = np.stack([layers[i] for i in range(len(layers))])
  nested = {}
  for name, value in flat.items():
    *parents, leaf = name.split(".")
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return nested


def _with_key_bias(tensors):
  """MAE's separate biases of queries and values as one [q | 0 | v]."""
  joined = dict(tensors)
  for name in tensors:
    if name.endswith("attn.q_bias"):
      q, v = joined.pop(name), joined.pop(name.replace("q_bias", "v_bias"))
      joined[name.replace("q_bias", "qkv.bias")] = np.concatenate([q, 0 * q, v])
  return joined


def load(file, prefix):
  """The tree recorded in an .npz under `prefix`, without its duplicates."""
  return tree(
    {k[len(prefix) :]: file[k] for k in file.files if k.startswith(prefix)}
  )


def norms(tree):
  """L2 norm of every tensor: [] each, [depth] for stacked blocks."""
  return trees.map_named(optim.per_layer(jnp.linalg.norm), tree)


def nhwc(images):
  """[..., 3, H, W] of any float type -> [..., H, W, 3] float32."""
  return np.moveaxis(images.astype(np.float32), -3, -1)
