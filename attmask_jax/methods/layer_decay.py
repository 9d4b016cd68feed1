"""Layer-wise learning-rate decay for fine-tuning.

Source: get_layer_id of BEiT, as MAE and ExtreMA use it.
"""

import re

import jax
import numpy as np

EMBEDDING = "patch_embed|cls_token|pos_embed"  # before the first block


def rate(
  name: str, leaf: jax.Array, *, depth: int, decay: float
) -> np.ndarray | np.float32:
  """Factor on the learning rate of a backbone leaf.

  Args:
    name: path of the leaf.
    leaf: [...], or [depth, ...] of stacked blocks.
    depth: number of blocks.
    decay: rate of a block relative to the next; leaves after the blocks keep
      the full rate.

  Returns:
    A number, or [depth, 1, ...] for stacked blocks.
  """
  if re.search("/blocks/", name):
    layers = 1 + np.arange(depth).reshape(-1, *[1] * (leaf.ndim - 1))
  else:
    layers = 0 if re.search(EMBEDDING, name) else depth + 1
  return np.float32(decay) ** (depth + 1 - np.float32(layers))
