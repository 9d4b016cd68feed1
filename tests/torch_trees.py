"""Small trees of parameters, and whether they survive a conversion."""

import jax
import numpy as np

from attmask_jax.methods import METHODS, classify
from attmask_jax.models import vit
from attmask_jax.weights.torch_io import names
from configs import tiny

GRID = (8, 8)  # of patches of 4 of 32 pixels
SMALL = dict(width=16, depth=2, num_heads=2, patch_size=4, image_size=16)


def filled(shapes, dtype=np.float32):
  """Random values everywhere, but no bias of keys where there is none."""
  rng = np.random.default_rng(0)
  make = lambda x: rng.normal(size=x.shape).astype(dtype)
  return jax.tree.map(make, shapes)


def without_key_bias(tree):
  for part in tree.values():
    if "blocks" in part:
      bias = part["blocks"]["attn"]["qkv"]["bias"]
      bias[:, bias.shape[1] // 3 : 2 * bias.shape[1] // 3] = 0
  return tree


def trees(name, **method):
  """params, teacher and aux of a tiny method."""
  config = tiny.get_config(name)
  config.method.update(patch_size=4, **method)
  made = METHODS[config.method.name].from_config(config, steps_per_epoch=1)
  return jax.eval_shape(made.init, jax.random.key(0))


def classifier(head_norm="none", unused_norm=False, **backbone):
  """Weights of a classifier."""
  network = vit.ViT(**SMALL | backbone)
  method = classify.Classify(
    network, num_classes=5, epochs=1, steps_per_epoch=1,
    image_size=16, batch_size=4, head_norm=head_norm,
    pool="mean" if network.class_token == "none" else "cls",
  )  # fmt: skip
  params, _, aux = jax.eval_shape(method.init, jax.random.key(0))
  weights = filled({**aux, **params})
  if unused_norm:
    weights["backbone"]["norm"] = {"scale": np.ones(16), "bias": np.zeros(16)}
  return weights


def shapes_of(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(got, want, path=""):
  assert type(got) is type(want) and np.shape(got) == np.shape(want), path
  if isinstance(want, dict):
    assert got.keys() == want.keys(), path
    for name in want:
      same(got[name], want[name], f"{path}/{name}")
  else:
    assert got.dtype == want.dtype, path
    assert got.tobytes() == want.tobytes(), path


def back(tensors, table, tree):
  """The tree of a file that fits completely."""
  got = names.to_ours(tensors, table, shapes_of(tree))
  assert got.missing == [] and got.unexpected == []
  assert got.matched == sorted(tensors)
  return got.tree
