"""The Vision Transformer that all methods share.

Parameter names follow timm. Blocks are stored stacked (`blocks/...` with a
leading axis of length depth), whether they are scanned or unrolled.

Source: ViT (arXiv:2010.11929) as DINO, iBOT and AttMask use it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.models import blocks, layers, positions
from attmask_jax.models.positions import DINO_OFFSET
from attmask_jax.rows import gather

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Width, depth and heads of the published sizes.
VARIANTS = {
  "tiny": dict(width=192, depth=12, num_heads=3),
  "small": dict(width=384, depth=12, num_heads=6),
  "base": dict(width=768, depth=12, num_heads=12),
  "large": dict(width=1024, depth=24, num_heads=16),
  "huge": dict(width=1280, depth=32, num_heads=16),
  "giant": dict(width=1664, depth=48, num_heads=16),
}

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class BackboneKeys:
  """The backbone of attmask, extrema and mae; classify has its own."""

  variant: str = schema.key(
    "small", f"{', '.join(VARIANTS)}, or WIDTHxDEPTHxHEADS such as 192x6x3"
  )
  patch_size: int = schema.key(16, "side of a patch, pixels", low=1)
  dtype: str = schema.key("float32", "of matrix products", choices=DTYPES)
  drop_path: float = schema.key(
    0.1,
    "stochastic depth of the last block in training",
    low=0,
    high=0.99,
  )


@dataclasses.dataclass(frozen=True)
class AttentionDropKeys:
  """Attention dropout, where a release has its flag."""

  attn_drop: float = schema.key(
    0.0,
    "attention dropout in all blocks in training: share of attention weights "
    "that are set to 0; above 0 no fused attention kernel can be used there",
    low=0,
    high=0.99,
  )


@dataclasses.dataclass(frozen=True)
class InitKeys:
  """Initialisation, where it is a choice."""

  init: str = schema.key(
    "normal",
    "linear layers of blocks and heads: normal is the published standard "
    "deviation of 0.02, xavier grows as the width falls, which networks "
    "narrower than the published ones need to learn in few steps",
    choices=layers.INITS,
  )


@dataclasses.dataclass(frozen=True)
class ComputeKeys:
  """How the blocks of all networks are computed."""

  scan: bool = schema.key(True, "one compiled block for all layers")
  remat: str = schema.key(
    "auto",
    "what the backward pass recomputes: elementwise is norms and activations "
    "(and attention by cuDNN or with dropout), dots also attention, full "
    "everything; auto is elementwise for scanned blocks on a CPU, else none",
    choices=tuple(blocks.REMAT),
  )
  attention: str = schema.key(
    "auto",
    "attention kernel; auto is cuDNN for bfloat16 on a GPU, else XLA",
    choices=layers.ATTENTION,
  )


class Output(NamedTuple):
  """Output of a forward pass.

  Attributes:
    tokens: [R, L, D] float32, after the final norm, with the class token first
      if there is one.
    raw: the same before the final norm.
    blocks: the last `last` block outputs, oldest first, each [R, L, D]
      float32 before the final norm.
    attention: of the last block, float32, rows sum to 1 over all L tokens:
      None, [R, A, N] (to patches from the class token or, without one, the mean
      over all patches) or [R, A, L, L]; or of every block [depth, R, A, L, L],
      where L does not include a "readout" class token.
  """

  tokens: jax.Array
  raw: jax.Array
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


def denormalize_images(images: jax.Array) -> jax.Array:
  """Inverse of `normalize_images`: [..., 3], floats in about 0-1."""
  axes = (1,) * (images.ndim - 1) + (3,)
  mean = jnp.asarray(IMAGENET_MEAN, jnp.float32).reshape(axes)
  std = jnp.asarray(IMAGENET_STD, jnp.float32).reshape(axes)
  return images * std + mean


class ViT(nn.Module):
  """Vision Transformer.

  Attributes:
    width: D.
    depth: number of blocks.
    num_heads: A; divides D.
    patch_size: P in pixels.
    image_size: side in pixels that the position table is made for.
    mlp_ratio: hidden width of the MLP over D.
    drop_path: stochastic-depth rate of the last block; block i of n uses
      `drop_path * i / (n - 1)`. Active only when noise is given.
    attn_drop: rate of attention dropout. Active only when keys are given.
    dtype: of the matrix products; all else is float32.
    scan: scan over stacked blocks (compiles faster) or unroll them.
    remat: what the backward pass recomputes, see `blocks.REMAT`.
    attention: "auto" (cuDNN for bfloat16 on a GPU), "xla" or "cudnn".
    class_token: "input" (runs through all blocks, first of the L tokens),
      "readout" (enters after them and reads the patches by class-attention) or
      "none".
    positions: "learned", or fixed "yx" or "xy" (see `positions.sin_cos`),
      which are 0 for a class token and recomputed for any size.
    grid_offset: how learned positions are resampled for another size, see
      `positions.bicubic_weights`.
    key_bias: keys have a bias.
    initial: initialisation of linear layers, "normal" or "xavier".
    xavier_embed: initialise the patch embedding with "xavier", too.
    readout_layers: class-attention blocks of class_token "readout".
    layer_scale: initial value of their scales.
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int = BackboneKeys.patch_size
  image_size: int = 224
  mlp_ratio: float = 4.0
  drop_path: float = 0.0
  attn_drop: float = 0.0
  dtype: Any = jnp.float32
  scan: bool = ComputeKeys.scan
  remat: str = ComputeKeys.remat
  attention: str = ComputeKeys.attention
  class_token: str = "input"
  positions: str = "learned"
  grid_offset: float = DINO_OFFSET
  key_bias: bool = True
  initial: str = "normal"
  xavier_embed: bool = False
  readout_layers: int = 2
  layer_scale: float = 0.1

  @property
  def num_prefix_tokens(self) -> int:
    """Tokens in front of the patches in `Output.blocks`."""
    return int(self.class_token == "input")

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
    keep_ids: jax.Array | None = None,
    drop_path_noise: jax.Array | None = None,
    attn_drop_keys: jax.Array | None = None,
    last: int = 1,
    return_attention: str = "none",
    logit_bias: jax.Array | None = None,
  ) -> Output:
    """Forward pass.

    Args:
      images: [R, H, W, 3] float32, normalised.
      mask: [R, N] bool; True replaces the patch embedding by the mask token,
        before positions are added.
      keep_ids: [R, T, M] int32, visible patches, in T subsets of each image:
        rows become R * T, image-major. None = all patches.
      drop_path_noise: [depth, 2, R * T] uniform in [0, 1) from
        `noise.drop_path`, or None for no stochastic depth.
      attn_drop_keys: [depth, R * T] keys from `noise.attention_keys`, or None
        for no attention dropout.
      last: how many block outputs to return, 1 to depth.
      return_attention: "none", "cls", "full" or "all": see `Output.attention`.
      logit_bias: [depth, R * T, A, L, L], see `layers.Attention`: for the
        gradient of the attention's logits.
    """
    _, height, width, _ = images.shape
    x = layers.PatchEmbed(
      self.width,
      self.patch_size,
      self.dtype,
      self.xavier_embed,
      name="patch_embed",
    )(images)
    if mask is not None:
      token = self.param(
        "mask_token", nn.initializers.zeros, (1, 1, self.width)
      )
      x = jnp.where(mask[:, :, None], token, x)
    table = self._positions(height, width)  # [1, num_prefix_tokens + N, D]
    x = x + table[:, self.num_prefix_tokens :]
    if keep_ids is not None:
      rows, subsets, kept = keep_ids.shape
      x = gather(x, keep_ids.reshape(rows, -1))
      x = x.reshape(rows * subsets, kept, self.width)
    if self.num_prefix_tokens:
      cls = self._class_token(len(x)) + table[:, :1]
      x = jnp.concatenate([cls, x], axis=1)
    kind = (
      "received"
      if return_attention == "cls" and not self.num_prefix_tokens
      else return_attention
    )
    if self.class_token == "readout" and return_attention == "cls":
      kind = "none"
    block = layers.Block(
      self.num_heads,
      self.mlp_ratio,
      self.dtype,
      self.attention,
      self.initial,
      self.key_bias,
      self.attn_drop,
      parent=None,
    )
    outputs, attention = blocks.apply(
      self,
      block,
      x,
      depth=self.depth,
      drop_path=self.drop_path,
      drop_path_noise=drop_path_noise,
      last=last,
      return_attention=kind,
      logit_bias=logit_bias,
      attn_drop_keys=attn_drop_keys,
      scan=self.scan,
      remat=self.remat,
    )
    tokens = outputs[-1]
    if self.class_token == "readout":
      cls, row = self._read(tokens)
      tokens = jnp.concatenate([cls, tokens], axis=1)
      attention = row if return_attention == "cls" else attention
    return Output(
      layers.LayerNorm(name="norm")(tokens), tokens, outputs, attention
    )

  def _class_token(self, rows: int) -> jax.Array:
    """The class token, repeated for all rows: [R, 1, D]."""
    cls = self.param("cls_token", layers.trunc_normal(), (1, 1, self.width))
    return jnp.broadcast_to(cls, (rows, 1, self.width))

  def _positions(self, height: int, width: int) -> jax.Array:
    """Position table of this image size: [1, num_prefix_tokens + N, D]."""
    if self.positions != "learned":
      grid = height // self.patch_size, width // self.patch_size
      table = positions.fixed_table(
        grid,
        self.width,
        self.positions,
        num_prefix_tokens=self.num_prefix_tokens,
      )
      return jnp.asarray(table)
    shape = (1, self.num_prefix_tokens + self.grid**2, self.width)
    table = self.param("pos_embed", layers.trunc_normal(), shape)
    return positions.interpolate(
      table,
      height,
      width,
      self.patch_size,
      num_prefix_tokens=self.num_prefix_tokens,
      offset=self.grid_offset,
    )

  def _read(self, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Class token before the norm [R, 1, D], and its attention [R, A, N]."""
    cls = self._class_token(len(patches))
    for i in range(self.readout_layers):
      cls, row = layers.ReadoutBlock(
        self.num_heads,
        self.mlp_ratio,
        self.dtype,
        self.initial,
        self.layer_scale,
        name=f"readout_{i}",
      )(cls, patches)
    return cls, row


def from_config(config: ml_collections.ConfigDict) -> ViT:
  """Builds the backbone from the sections method, data and run.

  Raises:
    InputError: unknown variant or option, an indivisible size, or a kernel
      without attention dropout.
  """
  m, run, image_size = config.method, config.run, config.data.image_size
  schema.check("method", m, BackboneKeys)
  schema.check("run", run, ComputeKeys)
  schema.check_multiple(
    "data.image_size", image_size, m.patch_size, "method.patch_size"
  )
  attn_drop = m.get("attn_drop", 0.0)  # absent from some methods, older runs
  if attn_drop and run.attention == "cudnn":
    raise InputError(
      f"method.attn_drop {attn_drop} needs the attention weights, which "
      "run.attention=cudnn does not compute: use --config.run.attention=auto, "
      "or --config.method.attn_drop=0"
    )
  return ViT(
    **variant_size(m.variant),
    patch_size=m.patch_size,
    image_size=image_size,
    drop_path=m.drop_path,
    attn_drop=attn_drop,
    dtype=jnp.dtype(m.dtype),
    scan=run.scan,
    remat=run.remat,
    attention=run.attention,
  )


def variant_size(variant: str) -> dict[str, int]:
  """width, depth and heads of a published size or of "WIDTHxDEPTHxHEADS".

  Raises:
    InputError: neither, or a width that is not a multiple of the heads.
  """
  if variant in VARIANTS:
    return VARIANTS[variant]
  parts = variant.split("x")
  if len(parts) != 3 or not all(p.isdigit() and int(p) for p in parts):
    raise InputError(
      f'method.variant "{variant}" is unknown: use one of '
      f'{", ".join(VARIANTS)} or WIDTHxDEPTHxHEADS such as "192x6x3"'
    )
  width, depth, num_heads = map(int, parts)
  if width % num_heads:
    raise InputError(
      f"method.variant {variant}: width {width} is not a multiple of the "
      f"{num_heads} heads, choose {width // num_heads * num_heads}"
    )
  return dict(width=width, depth=depth, num_heads=num_heads)
