"""Features and attention of whole images, and pooling to one vector."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attmask_jax import Params
from attmask_jax.errors import InputError
from attmask_jax.models import layers
from attmask_jax.models.vit import ViT, normalize_images

POOLS = ("cls", "mean", "cls+mean")  # see `pool`


def features(
  backbone: ViT,
  params: Params,
  images: jax.Array,
  *,
  last: int = 1,
  norm: bool = True,
  drop_path_noise: jax.Array | None = None,
  attn_drop_keys: jax.Array | None = None,
  logit_bias: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array]:
  """Features of whole images.

  Args:
    backbone: the network.
    params: its parameters.
    images: [B, H, W, 3], uint8 or normalised.
    last: number of last blocks to take class tokens from, oldest first.
    norm: apply the final norm to each of them.
    drop_path_noise: for stochastic depth, see `ViT`.
    attn_drop_keys: for attention dropout, see `ViT`.
    logit_bias: see `ViT`.

  Returns:
    cls [B, last * D], or None for a network without class token, and patches
    of the last block [B, N, D], float32. A class token of kind "readout" exists
    only after the last block, whatever `last` is.
  """
  images = normalize_images(images)
  out = backbone.apply(
    {"params": params},
    images,
    drop_path_noise=drop_path_noise,
    attn_drop_keys=attn_drop_keys,
    last=last,
    logit_bias=logit_bias,
  )
  final = functools.partial(
    layers.LayerNorm().apply, {"params": params["norm"]}
  )
  if not norm:
    final = lambda x: x
  if backbone.class_token == "readout":
    cls, patches = jnp.split(out.raw, [1], axis=1)
    return final(cls)[:, 0], final(patches)
  blocks = [final(x) for x in out.blocks]
  patches = blocks[-1][:, backbone.num_prefix_tokens :]
  if not backbone.num_prefix_tokens:
    return None, patches
  return jnp.concatenate([x[:, 0] for x in blocks], axis=-1), patches


def class_attention(
  backbone: ViT, params: Params, images: jax.Array
) -> jax.Array:
  """Last attention to patches: [B, H, W, 3] -> [B, A, N], see `vit.Output`."""
  images = normalize_images(images)
  return backbone.apply(
    {"params": params}, images, return_attention="cls"
  ).attention


def pool(cls: jax.Array | None, patches: jax.Array, *, pool: str) -> jax.Array:
  """Pools `features` to one vector per image.

  Args:
    cls: [B, last * D], or None for a network without a class token.
    patches: [B, N, D].
    pool: "cls" class tokens, "mean" mean patch, "cls+mean" both, concatenated.

  Returns:
    [B, last * D], [B, D] or [B, (last + 1) * D].

  Raises:
    InputError: the class token of a network that has none.
  """
  if pool == "mean":
    return jnp.mean(patches, axis=1)
  if cls is None:
    raise InputError(
      f'pool "{pool}" reads the class token, and this network has none: set '
      'pool to "mean"'
    )
  if pool == "cls":
    return cls
  return jnp.concatenate([cls, jnp.mean(patches, axis=1)], axis=-1)


_pool = pool  # `embed` has an argument of that name


def embed(
  features_fn: Callable[..., tuple[jax.Array | None, jax.Array]],
  images: jax.Array,
  *,
  last: int = 1,
  pool: str = "cls",
  final_norm: bool = True,
) -> jax.Array:
  """One feature vector per image: [B, H, W, 3] -> [B, F] float32, see `pool`.

  Args:
    features_fn: `features` of a method, with its weights.
    images: uint8 or normalised.
    last: number of last blocks to take class tokens from.
    pool: one of POOLS.
    final_norm: apply the backbone's final LayerNorm to all tokens before they
      are pooled. The AttMask release omits it for mean patches, MAE-priv and
      ExtreMA always.
  """
  cls, patches = features_fn(images, last=last, norm=final_norm)
  return _pool(cls, patches, pool=pool)
