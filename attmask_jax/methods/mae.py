"""MAE (arXiv:2111.06377): reconstruct the pixels of hidden patches.

The encoder sees only the visible patches; a light decoder sees all positions,
with a mask token at hidden ones, and predicts the pixels of every patch. One of
`masking.VISIBLE_POLICIES` chooses the visible patches; attention-guided ones
use a moving average of the encoder, in the same compiled step.

Source: MAE-priv (an unofficial MAE), whose behaviour and numbers are
reproduced. Differs:
- the mask is drawn per image, or per batch with `shared_mask`, and does not
  depend on the number of devices;
- fixed positions are recomputed for images of another size; the release
  resamples its table, plain bicubic, as we do for positions that fine-tuning
  has made learned (ViT.grid_offset);
- options for the official release's choices: target layout and variance, order
  of position axes, a class token in the decoder.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from attmask_jax import Batch, Params, schema
from attmask_jax.errors import InputError
from attmask_jax.methods import losses, masking
from attmask_jax.methods.base import InitialState, LossOutput, Method, Scalars
from attmask_jax.models import decoder as decoders
from attmask_jax.models import embedding, layers, noise, positions, vit
from attmask_jax.models.decoder import Decoder, DecoderKeys
from attmask_jax.rows import gather, row_keys


@dataclasses.dataclass(frozen=True)
class EncoderKeys:
  """Encoder of MAE."""

  class_token: bool = schema.key(False, "True: CLS mode, False: GAP mode")
  position_order: str = schema.key(
    "yx", "order of position axes; xy = official MAE", choices=("yx", "xy")
  )


@dataclasses.dataclass(frozen=True)
class Mae(Method):
  """Masks and targets of MAE.

  Attributes:
    backbone: the encoder.
    decoder: see `Decoder`.
  """

  backbone: vit.ViT
  decoder: Decoder
  mask: str = schema.key(
    "random",
    "which patches are hidden; grid: one fixed mask for all images, which at "
    "0.75 keeps every second patch of every second row",
    choices=masking.VISIBLE_POLICIES,
  )
  mask_ratio: float = schema.key(
    0.75, "share of patches hidden, the same for all images", low=0, high=1
  )
  shared_mask: bool = schema.key(
    False, "one mask for all images of a batch (MAE-priv)"
  )
  show_max: float = schema.key(
    0.1, "hints come from this share of most attended patches", low=0, high=1
  )
  norm_target: bool = schema.key(True, "normalise pixels per patch")
  target_layout: str = schema.key(
    "chw",
    "order of the values of a patch; hwc = official MAE",
    choices=("chw", "hwc"),
  )
  target_variance: str = schema.key(
    "biased",
    "estimator for norm_target; unbiased = official MAE",
    choices=("biased", "unbiased"),
  )
  seed: int = schema.key(0, "of weights and masks", low=0, high=2**32 - 1)

  config_parts = (vit.BackboneKeys, EncoderKeys, DecoderKeys)
  undecayed = r"(^|/)(bias|scale|mask_token)$"  # the class token is decayed
  reconstructs = True
  refills_hints = True

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Builds the method from the sections method, data and run.

    Raises:
      InputError: a value out of range or values that do not fit together.
    """
    del steps_per_epoch  # no schedules
    m = config.method
    schema.check("method", m, EncoderKeys)
    backbone = vit.from_config(config).clone(
      class_token="input" if m.class_token else "none",
      positions=m.position_order,
      grid_offset=0.0,
      key_bias=False,
      initial="xavier",
    )
    positions.check_width(backbone.width)
    return cls(
      backbone, decoders.from_config(m, backbone), **schema.take(cls, m)
    )

  def __post_init__(self) -> None:
    schema.check("method", vars(self), type(self))
    if self.shared_mask and self.mask not in ("random", "grid"):
      raise InputError(
        "method.shared_mask shares one random mask, but "
        f'"{self.mask}" depends on the image: set '
        "--config.method.shared_mask=False or --config.method.mask=random"
      )
    if not 0 < self.n_hidden < self.num_patches:
      raise InputError(
        f"method.mask_ratio {self.mask_ratio} hides {self.n_hidden} of "
        f"{self.num_patches} patches: at least one must be hidden, and one "
        "visible"
      )

  @property
  def n_hidden(self) -> int:
    """Hidden patches per image: a product in double precision, truncated."""
    return int(self.mask_ratio * self.num_patches)

  @property
  def picture_mask_ratio(self) -> float:
    """As in training."""
    return self.mask_ratio

  @property
  def picture_show_max(self) -> float:
    """As in training."""
    return self.show_max

  def pool_warning(self, pool: str) -> str:
    """Warns of the mean patch of a network with class token."""
    return pool_warning(self.backbone, pool)

  @property
  def guided(self) -> bool:
    """Whether attention chooses the visible patches."""
    return self.mask in masking.ATTENTION_POLICIES

  def init(self, rng: jax.Array) -> InitialState:
    """Initial params and teacher (the encoder's average, or {}); no aux."""
    rng_encoder, rng_class, rng_decoder = jax.random.split(rng, 3)
    side, n = self.backbone.image_size, self.num_patches
    images = jnp.zeros((1, side, side, 3))
    encoder = dict(self.backbone.init(rng_encoder, images)["params"])
    if "cls_token" in encoder:
      shape = encoder["cls_token"].shape
      encoder["cls_token"] = layers.clipped_normal(rng_class, shape)
    visible = n - self.n_hidden + int(self.decoder.class_token)
    tokens = jnp.zeros((1, visible, self.backbone.width))
    decoder = self.decoder.init(
      rng_decoder, tokens, jnp.arange(n)[None], self.grid
    )
    params = {"backbone": encoder, "decoder": decoder["params"]}
    teacher = {}
    if self.guided:
      teacher = {"backbone": jax.tree.map(jnp.copy, encoder)}
    return InitialState(params, teacher, {})

  def item_extras(self, epoch: int, index: int) -> dict[str, np.ndarray]:
    """Block-wise mask of one image, drawn on the host: masks [1, N] bool."""
    if self.mask != "block":
      return {}
    masks = masking.host_masks(
      "block",
      seeds=(self.seed, epoch, index),
      grid=self.grid,
      views=1,
      ratios=(self.mask_ratio,),
      variances=(0.0,),
    )
    return {"masks": masks}

  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> LossOutput:
    """Mean squared error of the hidden patches.

    Args:
      params: encoder and decoder.
      teacher: the encoder's average for guided masks, else {}.
      aux: {}.
      batch: images [B, 1, H, W, 3], position [B]; masks [B, 1, N] for
        block-wise ones.
      rng: key of this step.
      scalars: `at(step)`.

    Returns:
      Metrics loss and mask_ratio, the share of patches hidden.
    """
    rng_mask, rng_drop = jax.random.split(rng)
    images = vit.normalize_images(batch["images"][:, 0])
    order = self.order(teacher, images, batch, rng_mask)
    pred = self.predict(params, images, order, batch, rng_drop)
    target = self.target(images)
    hidden = order[:, self.num_patches - self.n_hidden :]
    loss = losses.pixel_loss(gather(pred, hidden), gather(target, hidden))
    share = jnp.asarray(self.n_hidden / self.num_patches, jnp.float32)
    return LossOutput(loss, {"loss": loss, "mask_ratio": share})

  def order(
    self, teacher: Params, images: jax.Array, batch: Batch, rng: jax.Array
  ) -> jax.Array:
    """All patches, visible ones first: [B, N] int32.

    Args:
      teacher: see `loss`.
      images: [B, H, W, 3] normalised.
      batch: see `loss`.
      rng: key of the masks of this step.
    """
    scores = None
    if self.guided:
      attention = embedding.class_attention(
        self.backbone, teacher["backbone"], images
      )
      scores = jax.lax.stop_gradient(jnp.mean(attention, axis=1))
    rows = batch["position"]
    if self.shared_mask:
      rows = jnp.zeros_like(rows)
    return masking.visible_first(
      self.mask,
      keys=row_keys(rng, rows),
      grid=self.grid,
      n_hidden=self.n_hidden,
      scores=scores,
      masks=batch["masks"][:, 0] if "masks" in batch else None,
      show_max=self.show_max,
    )

  def predict(
    self,
    params: Params,
    images: jax.Array,
    order: jax.Array,
    batch: Batch | None = None,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts the pixels of all patches from the visible ones.

    Args:
      params: encoder and decoder.
      images: [B, H, W, 3] normalised.
      order: [B, N] int32, visible patches first.
      batch: position [B] for drop path; None = without drop path.
      rng: key of the drop path of this step.

    Returns:
      [B, N, 3 P^2] float32.
    """
    drawn = {}
    if batch is not None and self.backbone.drop_path:
      drawn = noise.sample(self.backbone, rng, batch["position"])
    visible = order[:, : self.num_patches - self.n_hidden]
    encoded = self.backbone.apply(
      {"params": params["backbone"]},
      images,
      keep_ids=visible[:, None],
      **drawn,
    )
    tokens = encoded.tokens
    if not self.decoder.class_token:  # drop the encoder's, if it has one
      tokens = tokens[:, self.backbone.num_prefix_tokens :]
    return self.decoder.apply(
      {"params": params["decoder"]}, tokens, order, self.grid
    )

  def target(self, images: jax.Array) -> jax.Array:
    """Prediction target: [B, H, W, 3] normalised -> [B, N, 3 P^2]."""
    pixels = patchify(images, self.backbone.patch_size, self.target_layout)
    if not self.norm_target:
      return pixels
    mean, std = self.statistics(pixels)
    return (pixels - mean) / std

  def statistics(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and sqrt(variance + 1e-6) of each patch: [B, N, 1] each."""
    mean = jnp.mean(pixels, axis=-1, keepdims=True)
    ddof = int(self.target_variance == "unbiased")
    variance = jnp.var(pixels, axis=-1, keepdims=True, ddof=ddof)
    return mean, jnp.sqrt(variance + 1e-6)

  def reconstruct(
    self, params: Params, images: jax.Array, order: jax.Array
  ) -> jax.Array:
    """Images with all patches as predicted, including visible ones.

    Args:
      params: encoder and decoder.
      images: [B, H, W, 3] uint8.
      order: [B, N] int32, visible patches first.

    Returns:
      [B, H, W, 3] float32 in 0-1. Predictions of normalised targets are scaled
      back with the statistics of the true patch.
    """
    images = vit.normalize_images(images)
    pixels = self.predict(params, images, order)
    if self.norm_target:
      patches = patchify(images, self.backbone.patch_size, self.target_layout)
      mean, std = self.statistics(patches)
      pixels = pixels * std + mean
    whole = unpatchify(
      pixels, self.backbone.patch_size, self.grid, self.target_layout
    )
    return jnp.clip(vit.denormalize_images(whole), 0, 1)

  @property
  def grid(self) -> tuple[int, int]:
    return self.backbone.grid, self.backbone.grid


def patchify(images: jax.Array, p: int, layout: str) -> jax.Array:
  """[B, H, W, 3] -> [B, N, 3 P^2]; a patch's values in order "chw" or "hwc"."""
  b, height, width, c = images.shape
  h, w = height // p, width // p
  x = images.reshape(b, h, p, w, p, c)
  axes = (0, 1, 3, 5, 2, 4) if layout == "chw" else (0, 1, 3, 2, 4, 5)
  return x.transpose(axes).reshape(b, h * w, p * p * c)


def unpatchify(
  patches: jax.Array, p: int, grid: tuple[int, int], layout: str
) -> jax.Array:
  """Inverse of `patchify`: [B, N, 3 P^2] -> [B, H, W, 3]."""
  b, (h, w) = len(patches), grid
  if layout == "chw":
    x = patches.reshape(b, h, w, 3, p, p).transpose(0, 1, 4, 2, 5, 3)
  else:
    x = patches.reshape(b, h, w, p, p, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * p, w * p, 3)


def pool_warning(encoder: vit.ViT, pool: str) -> str:
  """See `base.Method.pool_warning`; without class token there is no choice."""
  if encoder.class_token != "input" or pool != "mean":
    return ""
  return (
    "this MAE was pretrained with a class token and is evaluated by its mean "
    "patch, as in the official fine-tuning: to evaluate it by the class token, "
    "as MAE-priv and the official linear probe do, use the recipe that ends in "
    "_cls, or pool=cls"
  )
