"""The one Vision Transformer, as pure functions of its parameters.

Parameter names follow timm. Blocks are stored stacked (`blocks/...` with a
leading axis of length depth), whether they are scanned or unrolled.

Source: ViT (arXiv:2010.11929) as DINO, iBOT and AttMask use it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from attmask_jax import Params, layers, positions
from attmask_jax.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# depth, width and heads of the published sizes.
VARIANTS = {
  "tiny": dict(width=192, depth=12, heads=3),
  "small": dict(width=384, depth=12, heads=6),
  "base": dict(width=768, depth=12, heads=12),
  "large": dict(width=1024, depth=24, heads=16),
}
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Output(NamedTuple):
  """What a forward pass gives.

  Attributes:
    tokens: [R, L, D] float32, after the final norm.
    blocks: the last `last` block outputs, oldest first, each [R, L, D]
      float32 before the final norm.
    attention: of the last block, float32, rows sum to 1 over all L tokens:
      None, [R, A, N] (class row without the class column) or [R, A, L, L].
  """

  tokens: jax.Array
  blocks: tuple[jax.Array, ...]
  attention: jax.Array | None


def normalize_images(images: jax.Array) -> jax.Array:
  """uint8 [..., 3] -> ImageNet-normalised float32; floats pass unchanged."""
  if images.dtype != jnp.uint8:
    return images.astype(jnp.float32)
  axes = (1,) * (images.ndim - 1) + (3,)
  mean = jnp.asarray(IMAGENET_MEAN, jnp.float32).reshape(axes)
  std = jnp.asarray(IMAGENET_STD, jnp.float32).reshape(axes)
  return (images.astype(jnp.float32) / 255.0 - mean) / std


def drop_path_draws(
  key: jax.Array, rows: jax.Array, *, depth: int
) -> jax.Array:
  """Uniform draws for stochastic depth, one stream per row: [depth, 2, R].

  Args:
    key: random key of this step and this forward pass.
    rows: [R] int32, identities of the rows in the global batch; they make the
      draws independent of the number of devices and of accumulation.
    depth: number of blocks; two residual branches each.
  """
  draw = lambda row: jax.random.uniform(
    jax.random.fold_in(key, row), (depth, 2)
  )
  return jnp.moveaxis(jax.vmap(draw)(rows), 0, -1)


class ViT(nn.Module):
  """Vision Transformer with a class token and learned positions.

  Attributes:
    width: D.
    depth: number of blocks.
    heads: A; divides D.
    patch_size: P in pixels.
    image_size: side in pixels that the position table is made for.
    mlp_ratio: hidden width of the MLP over D.
    drop_path: stochastic-depth rate of the last block; block i of n uses
      `drop_path * i / (n - 1)`. Active only when draws are given.
    dtype: of the matrix products; all else is float32.
    scan: scan over stacked blocks (compiles faster) or unroll them.
    remat: "none", "full" or "dots": what the backward pass recomputes.
    attention: "auto" (cuDNN for bfloat16 on a GPU), "xla" or "cudnn".
  """

  width: int
  depth: int
  heads: int
  patch_size: int = 16
  image_size: int = 224
  mlp_ratio: float = 4.0
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  scan: bool = True
  remat: str = "none"
  attention: str = "auto"

  @property
  def grid(self) -> int:
    """Patches along one side of an image of `image_size`."""
    return self.image_size // self.patch_size

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    mask: jax.Array | None = None,
    *,
    draws: jax.Array | None = None,
    last: int = 1,
    want: str = "none",
  ) -> Output:
    """Forward pass.

    Args:
      images: [R, H, W, 3] float32, normalised.
      mask: [R, N] bool; True replaces the patch embedding by the mask token,
        before positions are added.
      draws: [depth, 2, R] uniform in [0, 1) from `drop_path_draws`, or None
        for no stochastic depth.
      last: how many block outputs to return, 1 to depth.
      want: "none", "cls" or "full": see `Output.attention`.
    """
    rows, height, width, _ = images.shape
    x = layers.PatchEmbed(
      self.width, self.patch_size, self.dtype, name="patch_embed"
    )(images)
    if mask is not None:
      token = self.param(
        "mask_token", nn.initializers.zeros, (1, 1, self.width)
      )
      x = jnp.where(mask[:, :, None], token, x)
    cls = self.param("cls_token", layers.trunc_normal(), (1, 1, self.width))
    table = self.param(
      "pos_embed", layers.trunc_normal(), (1, 1 + self.grid**2, self.width)
    )
    cls = jnp.broadcast_to(cls, (rows, 1, self.width))
    x = jnp.concatenate([cls, x], axis=1)
    x = x + positions.interpolate(table, height, width, self.patch_size)
    blocks, attention = self._blocks(x, draws, last, want)
    return Output(layers.layer_norm("norm")(blocks[-1]), blocks, attention)

  def _blocks(
    self, x: jax.Array, draws: jax.Array | None, last: int, want: str
  ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Runs all blocks; the last `last` ones unrolled, since they are kept."""
    block = layers.Block(
      self.heads, self.mlp_ratio, self.dtype, self.attention, parent=None
    )

    def init(key: jax.Array) -> Params:
      one = lambda key: block.init(key, x[:1])["params"]
      return jax.vmap(one)(jax.random.split(key, self.depth))

    weights = self.param("blocks", init)
    keep = None
    if draws is not None and self.drop_path > 0:
      rates = np.linspace(0, self.drop_path, self.depth, dtype=np.float32)
      rates = jnp.asarray(rates)[:, None, None]
      keep = jnp.where(draws >= rates, 1 / (1 - rates), 0.0)

    def body(x: jax.Array, layer: tuple[Params, jax.Array | None]):
      return block.apply({"params": layer[0]}, x, layer[1])[0], None

    if self.remat != "none":
      body = jax.checkpoint(
        body, policy=REMAT[self.remat], prevent_cse=not self.scan
      )
    stacked, scanned = (weights, keep), self.depth - last
    if self.scan and scanned:
      first = jax.tree.map(lambda a: a[:scanned], stacked)
      x, _ = jax.lax.scan(body, x, first)
    outputs, attention = [], None
    for i in range(scanned if self.scan else 0, self.depth):
      layer = jax.tree.map(lambda a, i=i: a[i], stacked)
      if i == self.depth - 1 and want != "none":
        x, attention = block.apply({"params": layer[0]}, x, layer[1], want=want)
      else:
        x, _ = body(x, layer)
      outputs.append(x)
    return tuple(outputs[-last:]), attention


def from_config(config: ml_collections.ConfigDict) -> ViT:
  """The backbone that the sections method, data and run describe.

  Raises:
    InputError: unknown size or option, or sizes that do not divide.
  """
  m, run, image_size = config.method, config.run, config.data.image_size
  size = variant_size(m.variant)
  if image_size < m.patch_size or image_size % m.patch_size:
    down = max(image_size // m.patch_size, 1) * m.patch_size
    raise InputError(
      f"data.image_size {image_size} is not a multiple of method.patch_size "
      f"{m.patch_size}: choose {down} or {down + m.patch_size} pixels"
    )
  for key, known in (("remat", tuple(REMAT)), ("attention", layers.ATTENTION)):
    if run[key] not in known:
      raise InputError(
        f'run.{key} "{run[key]}" is unknown: use {", ".join(known)}'
      )
  return ViT(
    **size,
    patch_size=m.patch_size,
    image_size=image_size,
    drop_path=m.drop_path,
    dtype=jnp.dtype(m.dtype),
    scan=run.scan,
    remat=run.remat,
    attention=run.attention,
  )


def variant_size(variant: str) -> dict[str, int]:
  """width, depth and heads of a published size or of "WIDTHxDEPTHxHEADS".

  Raises:
    InputError: neither, or a width that does not divide over its heads.
  """
  if variant in VARIANTS:
    return VARIANTS[variant]
  parts = variant.split("x")
  if len(parts) != 3 or not all(p.isdigit() and int(p) for p in parts):
    raise InputError(
      f'method.variant "{variant}" is unknown: use one of '
      f'{", ".join(VARIANTS)} or WIDTHxDEPTHxHEADS such as "192x6x3"'
    )
  width, depth, heads = map(int, parts)
  if width % heads:
    raise InputError(
      f"method.variant {variant}: width {width} does not divide over {heads} "
      f"heads, choose {width // heads * heads}"
    )
  return dict(width=width, depth=depth, heads=heads)


def features(
  backbone: ViT,
  params: Params,
  images: jax.Array,
  *,
  last: int = 1,
  norm: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Frozen features of whole images.

  Args:
    backbone: the network.
    params: its parameters.
    images: [B, H, W, 3], uint8 or normalised.
    last: class tokens of that many last blocks, oldest first.
    norm: apply the final norm to each of them.

  Returns:
    cls [B, last * D] and patches of the last block [B, N, D], float32.
  """
  out = backbone.apply({"params": params}, normalize_images(images), last=last)
  blocks = out.blocks
  if norm:
    final = functools.partial(
      layers.layer_norm(None).apply, {"params": params["norm"]}
    )
    blocks = [final(x) for x in blocks]
  cls = jnp.concatenate([x[:, 0] for x in blocks], axis=-1)
  return cls, blocks[-1][:, 1:]
