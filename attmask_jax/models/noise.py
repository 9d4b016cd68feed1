"""Random draws of a training step: stochastic depth and attention dropout.

Each row of the global batch has a stream of its own, so that the draws depend
neither on the number of devices nor on accumulation.
"""

import jax
import jax.numpy as jnp

from attmask_jax.models.vit import ViT
from attmask_jax.rows import row_keys

ATTENTION_TAG = 2**32 - 1  # no row has this identity


def sample(
  backbone: ViT, key: jax.Array, rows: jax.Array
) -> dict[str, jax.Array]:
  """The arguments of `ViT.__call__` that make its forward pass random.

  Args:
    backbone: the network; what its rates switch off is left out.
    key: random key of this step and this forward pass.
    rows: [R] int32, identities of the rows in the global batch.
  """
  drawn = {}
  if backbone.drop_path:
    drawn["drop_path_noise"] = drop_path(key, rows, depth=backbone.depth)
  if backbone.attn_drop:
    drawn["attn_drop_keys"] = attention_keys(key, rows, depth=backbone.depth)
  return drawn


def drop_path(key: jax.Array, rows: jax.Array, *, depth: int) -> jax.Array:
  """Uniform draws for stochastic depth: [depth, 2, R].

  Args:
    key: see `sample`.
    rows: see `sample`.
    depth: number of blocks; two residual branches each.
  """
  draw = lambda row: jax.random.uniform(
    jax.random.fold_in(key, row), (depth, 2)
  )
  return jnp.moveaxis(jax.vmap(draw)(rows), 0, -1)


def attention_keys(key: jax.Array, rows: jax.Array, *, depth: int) -> jax.Array:
  """Keys of attention dropout: [depth, R], see `drop_path`."""
  keys = row_keys(jax.random.fold_in(key, ATTENTION_TAG), rows)
  return jnp.moveaxis(
    jax.vmap(lambda k: jax.random.split(k, depth))(keys), 0, 1
  )
