"""Views of a batch as rows, image-major: the reshape keeps shards in place.

View-major rows, as the references stack them, would make every device gather
the others' images.
"""

import jax
import jax.numpy as jnp


def flatten(x: jax.Array) -> jax.Array:
  """[B, V, ...] -> [B * V, ...]."""
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unflatten(x: jax.Array, batch: int) -> jax.Array:
  """[B * V, ...] -> [B, V, ...] with B = batch."""
  return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def row_ids(position: jax.Array, views: int) -> jax.Array:
  """Identity of each row in the global batch: [B] -> [B * V] int32.

  Random draws keyed by it do not depend on how the batch is split.
  """
  view = jnp.arange(views, dtype=position.dtype)
  return (position[:, None] * views + view[None]).reshape(-1)


def gather(tokens: jax.Array, ids: jax.Array) -> jax.Array:
  """Picks tokens per row: [R, N, D], [R, M] -> [R, M, D]."""
  return jnp.take_along_axis(tokens, ids[:, :, None], axis=1)


def row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
  """One random key per row identity: [R] int32 -> [R] keys."""
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
