"""Parameter trees by path: {"backbone/norm/scale": leaf}."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util

from attmask_jax import Params


def path_name(path: tuple[Any, ...]) -> str:
  """Key path of a leaf as "backbone/blocks/attn/qkv/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(f: Callable[..., Any], tree: Params, *rest: Params) -> Params:
  """tree.map whose function receives the leaf's path as its first argument."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: f(path_name(path), *leaves), tree, *rest
  )


def flat(tree: Any) -> dict[str, Any]:
  """Leaves by path; anything with a shape is a leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda x: hasattr(x, "shape")
  )
  return {path_name(path): leaf for path, leaf in leaves}


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes by path, of arrays or Orbax's metadata."""
  return {
    path: tuple(leaf.shape)
    for path, leaf in flat(tree).items()
    if hasattr(leaf, "shape")
  }


def nested(leaves: Mapping[str, Any]) -> Params:
  """The inverse of `flat` for nested dicts."""
  return traverse_util.unflatten_dict(dict(leaves), sep="/")
