"""Attention rollout: relevance of each patch for the output token.

Every block mixes tokens, so the attention of the last block alone says little
about pixels. Rollout multiplies the attention of all blocks, each averaged with
the identity for the residual branch.

Source: arXiv:2005.00928, as in the explanation tools of MAE-priv (heads fused,
weak links discarded, gradients). Differs:
- any number of images;
- without a class token, the rows of all patches are averaged;
- the row of a "readout" class token is multiplied with the blocks' product;
- gradients are paired with the attention of their own block; "reference" pairs
  them as MAE-priv does.
"""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from attmask_jax import Params
from attmask_jax.models import embedding, vit

if TYPE_CHECKING:
  from attmask_jax.methods.classify import Classify

FUSIONS = ("mean", "max", "min")
ROW_SUMS = ("reference", "rows")
PAIRINGS = ("blocks", "reference")


def fuse(attention: jax.Array, fusion: str) -> jax.Array:
  """Fuses the heads by one of FUSIONS: [..., A, L, L] -> [..., L, L]."""
  return {"mean": jnp.mean, "max": jnp.max, "min": jnp.min}[fusion](
    attention, axis=-3
  )


def fuse_gradients(
  attention: jax.Array, gradients: jax.Array, *, pairing: str = "blocks"
) -> jax.Array:
  """Attention times gradient, mean over heads, negatives set to 0.

  Args:
    attention: [depth, B, A, L, L].
    gradients: [depth, B, A, L, L], of the score that is explained with respect
      to the logits of the attention.
    pairing: "blocks", or "reference": block l's attention with the gradient of
      block depth - 1 - l.

  Returns:
    [depth, B, L, L].
  """
  if pairing == "reference":
    gradients = gradients[::-1]
  return jnp.maximum(jnp.mean(attention * gradients, axis=-3), 0)


def roll(
  fused: jax.Array,
  *,
  discard: float,
  layer: int = -1,
  protect: bool = True,
  row_sums: str = "reference",
) -> jax.Array:
  """Product of the attention of all blocks.

  Args:
    fused: [depth, B, L, L] >= 0, of every block.
    discard: share of the entries of a block, the smallest ones, that are set to
      0; in [0, 1). Ties go by index.
    layer: the only block to use, or -1 for all.
    protect: never discard entry (0, 0), the class token's on itself.
    row_sums: what entry (i, j) is divided by: "rows", the sum of row i; or
      "reference", the sum of row j, as in published figures.

  Returns:
    [B, L, L]; row i holds the contributions to token i.
  """
  _, b, tokens, _ = fused.shape
  if layer >= 0:
    fused = fused[layer : layer + 1]
  identity = jnp.eye(tokens)[None]
  rolled = jnp.broadcast_to(identity, (b, tokens, tokens))
  for links in fused:
    links = (_without_weak(links, discard, protect) + identity) / 2
    sums = jnp.sum(links, axis=-1)
    # quirk: a broadcasting error, kept to reproduce published figures.
    by_column = row_sums == "reference"
    links = links / (sums[:, None, :] if by_column else sums[:, :, None])
    rolled = links @ rolled
  return rolled


def _without_weak(links: jax.Array, discard: float, protect: bool) -> jax.Array:
  """Sets the smallest entries of links [B, L, L] to 0, see `roll`."""
  b, tokens, _ = links.shape
  flat = links.reshape(b, tokens**2)
  order = jnp.argsort(flat, axis=-1, stable=True)
  weak = jnp.argsort(order, axis=-1) < int(tokens**2 * discard)
  if protect:
    weak = weak.at[:, 0].set(False)
  return jnp.where(weak, 0, flat).reshape(links.shape)


def relevance(
  rolled: jax.Array,
  *,
  num_prefix_tokens: int,
  mean: bool,
  row: jax.Array | None = None,
) -> jax.Array:
  """Relevance of each patch over the largest: [B, N]; nan if all are 0.

  Args:
    rolled: [B, L, L], see `roll`.
    num_prefix_tokens: tokens in front of the patches, 0 or 1.
    mean: explain the mean patch, else the class token.
    row: [B, N] attention of a "readout" class token, or None.
  """
  if row is not None:
    values = jnp.einsum("bn,bnm->bm", row, rolled)
  elif mean:
    values = jnp.mean(rolled[:, num_prefix_tokens:, num_prefix_tokens:], axis=1)
  else:
    values = rolled[:, 0, num_prefix_tokens:]
  return values / jnp.max(values, axis=-1, keepdims=True)


def attention_rollout(
  backbone: vit.ViT,
  params: Params,
  images: jax.Array,
  *,
  fusion: str,
  discard: float,
  layer: int = -1,
  mean: bool | None = None,
  row_sums: str = "reference",
) -> jax.Array:
  """Rollout of a network: [B, H, W, 3] -> [B, N], see `relevance`.

  Args:
    backbone: the network.
    params: its parameters.
    images: uint8 or normalised.
    fusion: one of FUSIONS.
    discard: see `roll`.
    layer: see `roll`.
    mean: explain the mean patch; by default if there is no class token.
    row_sums: see `roll`.
  """
  if mean is None:
    mean = backbone.class_token == "none"
  num_prefix_tokens = backbone.num_prefix_tokens

  def of_image(image: jax.Array) -> jax.Array:
    image = vit.normalize_images(image[None])
    apply = functools.partial(backbone.apply, {"params": params}, image)
    attention, row = apply(return_attention="all").attention, None
    if backbone.class_token == "readout" and not mean:
      row = apply(return_attention="cls").attention[:, :, None]  # [1, A, 1, N]
      row = fuse(row, fusion)[:, 0]
    rolled = roll(
      fuse(attention, fusion),
      discard=discard,
      layer=layer,
      protect=bool(num_prefix_tokens),
      row_sums=row_sums,
    )
    return relevance(
      rolled, num_prefix_tokens=num_prefix_tokens, mean=mean, row=row
    )[0]

  # One image at a time: the attention of all blocks needs much memory.
  return jax.lax.map(of_image, images)


def logit_gradients(
  method: "Classify", weights: Params, images: jax.Array, *, category: int = -1
) -> tuple[jax.Array, jax.Array]:
  """Attention, and the gradient of a class score by the attention's logits.

  Args:
    method: a classifier.
    weights: its parameters, see `Classify.assemble`.
    images: [B, H, W, 3], uint8 or normalised.
    category: index of the class, -1 = the most probable one of each image.

  Returns:
    Attention and gradient, [depth, B, A, L, L] each; the gradient is with
    respect to the attention before its softmax.
  """
  # Fused kernels lack the gradient of the bias for some sizes.
  backbone = method.backbone.clone(attention="xla")
  images = vit.normalize_images(images)
  params = weights["backbone"]
  out = backbone.apply({"params": params}, images, return_attention="all")

  def score(bias: jax.Array) -> jax.Array:
    x = embedding.embed(
      functools.partial(embedding.features, backbone, params, logit_bias=bias),
      images,
      last=method.last_blocks,
      pool=method.pool,
      final_norm=method.final_norm,
    )
    logits = method.classify(weights, x)[:, 0]
    chosen = jnp.max(logits, axis=-1) if category < 0 else logits[:, category]
    return jnp.sum(chosen)

  return out.attention, jax.grad(score)(jnp.zeros_like(out.attention))


def gradient_rollout(
  method: "Classify",
  weights: Params,
  images: jax.Array,
  *,
  category: int,
  discard: float,
  layer: int = -1,
  pairing: str = "blocks",
  row_sums: str = "reference",
) -> jax.Array:
  """Relevance for a class: [B, H, W, 3] -> [B, N], see `relevance`.

  Args:
    method: see `logit_gradients`.
    weights: see `logit_gradients`.
    images: see `logit_gradients`.
    category: see `logit_gradients`.
    discard: see `roll`.
    layer: see `roll`.
    pairing: see `fuse_gradients`.
    row_sums: see `roll`.
  """
  backbone = method.backbone
  mean = method.pool == "mean"

  def of_image(image: jax.Array) -> jax.Array:
    attention, gradients = logit_gradients(
      method, weights, image[None], category=category
    )
    row = None
    if backbone.class_token == "readout" and not mean:
      row = embedding.class_attention(
        backbone, weights["backbone"], image[None]
      )
      row = jnp.mean(row, axis=1)
    rolled = roll(
      fuse_gradients(attention, gradients, pairing=pairing),
      discard=discard,
      layer=layer,
      protect=False,
      row_sums=row_sums,
    )
    return relevance(
      rolled, num_prefix_tokens=backbone.num_prefix_tokens, mean=mean, row=row
    )[0]

  return jax.lax.map(of_image, images)
