"""Parameter trees by path: {"backbone/norm/scale": leaf}."""

from collections.abc import Mapping
from typing import Any

import jax

from attmask_jax import Params
from attmask_jax.training import optim


def flat(tree: Any) -> dict[str, Any]:
  """Leaves by path; anything with a shape is a leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: hasattr(x, "shape")
  )
  return {optim.path_name(path): leaf for path, leaf in leaves}


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by path, of arrays or Orbax's metadata."""
  return {
    path: tuple(leaf.shape)
    for path, leaf in flat(tree).items()
    if hasattr(leaf, "shape")
  }


def nested(leaves: Mapping[str, Any]) -> Params:
  """The inverse of `flat`."""
  tree: Params = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
