"""ExtreMA (arXiv:2206.04667): a few visible patches must predict the image.

The student sees one or several small subsets of the patches, the teacher all
of them. A class token reads the final patches of each network, and the
student's must predict the teacher's. Masking is the augmentation; nothing is
reconstructed.

Source: the ExtreMA release (MIT). Differs:
- fixed positions are recomputed for images of another size (the release has one
  size); fine-tuning makes them learned and resamples them without an offset,
  like the release;
- subsets are batched image-major, which keeps a sharded batch in place;
- any grid size, and independent subsets, which the release cannot enable;
- InfoNCE works, over the global batch (the release crashes);
- the teacher's attention may choose the visible patches.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from attmask_jax import Batch, Params, schema
from attmask_jax.errors import InputError
from attmask_jax.methods import losses, masking
from attmask_jax.methods.base import InitialState, LossOutput, Method, Scalars
from attmask_jax.models import heads, noise, positions, vit
from attmask_jax.rows import row_ids, row_keys, unflatten

MIN_HIDDEN = 0.1  # warn if guided masks hide a smaller share of the patches


@dataclasses.dataclass(frozen=True)
class ReadoutKeys:
  """The class token of ExtreMA, which reads the patches."""

  readout_layers: int = schema.key(2, "class-attention blocks", low=1)
  layer_scale: float = schema.key(
    0.1, "initial value of their scales; 1e-5 suggested for ViT-L"
  )


@dataclasses.dataclass(frozen=True)
class ExtreMA(Method):
  """Masks and loss of ExtreMA.

  Attributes:
    backbone: ViT whose class token reads the patches after the last block.
    projector: of student and teacher.
    predictor: of the student only.
  """

  backbone: vit.ViT
  projector: heads.Projector
  predictor: heads.Projector
  mask: str = schema.key(
    "random",
    "choice of visible patches: guided policies hide the same patches from all "
    "subsets",
    choices=("random", *masking.ATTENTION_POLICIES),
  )
  mask_ratio: float = schema.key(
    0.8, "share of patches hidden in each subset", low=0, high=1
  )
  num_masks: int = schema.key(5, "subsets per image", low=1)
  disjoint: bool = schema.key(True, "no patch is in two subsets")
  show_max: float = schema.key(
    0.1, "hints come from this share of most attended patches", low=0, high=1
  )
  contrast: str = schema.key(
    "byol", "loss between student and teacher", choices=("byol", "infonce")
  )
  contrast_temp: float = schema.key(1.0, "temperature of infonce", above=0)
  seed: int = schema.key(
    0, "of weights, masks and stochastic depth", low=0, high=2**32 - 1
  )

  config_parts = (
    vit.BackboneKeys,
    vit.AttentionDropKeys,
    ReadoutKeys,
    heads.ProjectorKeys,
  )
  teacher_first = True  # updated before the forward pass, from old weights
  # All vectors, including layer scales and the class token.
  undecayed = r"(^|/)(bias|scale|cls_token|gamma_[12])$"

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
    schema.check("method", m, *cls.config_parts)
    backbone = vit.from_config(config).clone(
      class_token="readout",
      positions="xy",
      grid_offset=0.0,
      initial="xavier",
      xavier_embed=True,
      readout_layers=m.readout_layers,
      layer_scale=m.layer_scale,
    )
    positions.check_width(backbone.width)
    head = dict(hidden=m.head_hidden, out=m.out_dim, dtype=backbone.dtype)
    method = cls(
      backbone,
      projector=heads.Projector(layers=3, **head),
      predictor=heads.Projector(layers=2, **head),
      **schema.take(cls, m),
    )
    if method.contrast == "infonce" and config.data.batch_size < 2:
      raise InputError(
        "InfoNCE contrasts the images of a batch, and data.batch_size is "
        f"{config.data.batch_size}: use at least 2, or method.contrast=byol"
      )
    method._warn_if_few_hidden()
    return method

  def __post_init__(self) -> None:
    schema.check("method", vars(self), type(self))
    m, k, n = self.num_masks, self.kept, self.num_patches
    if k < 1:
      raise InputError(
        f"method.mask_ratio {self.mask_ratio} leaves none of {n} patches "
        "visible: lower it"
      )
    if self.mask_ratio == 0 and self.mask != "random":
      raise InputError(
        f'method.mask_ratio 0 leaves nothing for method.mask "{self.mask}" to '
        "hide: raise the ratio, or set --config.method.mask=random"
      )
    if self.mask_ratio == 0 and m > 1:
      raise InputError(
        f"method.mask_ratio 0 hides nothing, so the method.num_masks {m} "
        "subsets would be equal: set num_masks to 1"
      )
    if self.disjoint and m * k > n:
      raise InputError(
        f"method.num_masks {m} times {k} visible patches is more than the {n} "
        f"of an image: use at most {n // k} masks, or method.disjoint=False"
      )
    if self.mask != "random" and not self.disjoint:
      raise InputError(
        f'method.mask "{self.mask}" would make all {m} independent subsets the '
        "same: set method.disjoint=True"
      )

  def _warn_if_few_hidden(self) -> None:
    """Guided policies choose the patches outside all subsets: warns if few."""
    hidden = self.num_patches - self.num_masks * self.kept
    if self.mask != "random" and hidden < MIN_HIDDEN * self.num_patches:
      logging.warning(
        "%s hides only %d of %d patches, as %d subsets show %d each: attention "
        "has little effect; lower method.num_masks or raise method.mask_ratio",
        self.mask,
        hidden,
        self.num_patches,
        self.num_masks,
        self.kept,
      )

  @property
  def batch_coupled(self) -> bool:
    """InfoNCE contrasts the images of a batch."""
    return self.contrast == "infonce"

  @property
  def picture_mask_ratio(self) -> float:
    """As in training."""
    return self.mask_ratio

  @property
  def picture_show_max(self) -> float:
    """As in training."""
    return self.show_max

  @property
  def kept(self) -> int:
    """M, patches per subset: a product in double precision, truncated."""
    return int(self.num_patches * (1 - self.mask_ratio))

  def init(self, rng: jax.Array) -> InitialState:
    """Initial params and teacher (a copy without predictor); no aux."""
    rng_backbone, rng_class, rng_head, rng_pred = jax.random.split(rng, 4)
    side = self.backbone.image_size
    images = jnp.zeros((1, side, side, 3))
    backbone = dict(self.backbone.init(rng_backbone, images)["params"])
    shape = backbone["cls_token"].shape
    backbone["cls_token"] = 0.02 * jax.random.normal(rng_class, shape)
    x = jnp.zeros((1, self.backbone.width))
    head = self.projector.init(rng_head, x)["params"]
    z = jnp.zeros((1, self.projector.out))
    predictor = self.predictor.init(rng_pred, z)["params"]
    params = {"backbone": backbone, "head": head, "predictor": predictor}
    teacher = {"backbone": backbone, "head": head}
    return InitialState(params, jax.tree.map(jnp.copy, teacher), {})

  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> LossOutput:
    """Loss between the student's predictions and the teacher's vector.

    Args:
      params: encoder, projector and predictor.
      teacher: encoder and projector.
      aux: {}.
      batch: images [B, V, H, W, 3], the student's view first, the teacher's
        last (V = 1: both see the same), position [B].
      rng: key of this step.
      scalars: `at(step)`.

    Returns:
      Metrics loss; mask_ratio of each subset; seen, see `seen`; target_std, the
      deviation of the teacher's unit vectors over images, 0 for collapse.
    """
    rng_mask, rng_drop = jax.random.split(rng)
    images = vit.normalize_images(batch["images"])
    whole = self.backbone.apply(
      {"params": teacher["backbone"]},
      images[:, -1],
      return_attention="cls"
      if self.mask in masking.ATTENTION_POLICIES
      else "none",
    )
    head = {"params": teacher["head"]}
    target = self.projector.apply(head, whole.tokens[:, 0])  # [B, E]
    keep_ids = self.subsets(whole.attention, batch, rng_mask)
    pred = self.predict(params, images[:, 0], keep_ids, batch, rng_drop)
    if self.contrast == "byol":
      loss = losses.byol(pred, target)
    else:
      loss = losses.info_nce(pred, target, temp=self.contrast_temp)
    metrics = {
      "loss": loss,
      "mask_ratio": jnp.asarray(1 - self.kept / self.num_patches, jnp.float32),
      "seen": self.seen(keep_ids),
      "target_std": jnp.mean(jnp.std(losses.unit(target), axis=0)),
    }
    return LossOutput(loss, metrics)

  def subsets(
    self, attention: jax.Array | None, batch: Batch, rng: jax.Array
  ) -> jax.Array | None:
    """Visible patches: [B, T, M] int32, or None for all.

    Args:
      attention: [B, A, N] of the teacher, if the policy uses it.
      batch: position [B].
      rng: key of the masks of this step.
    """
    if not self.mask_ratio:
      return None
    position, t, m = batch["position"], self.num_masks, self.kept
    if not self.disjoint:
      keys = row_keys(rng, row_ids(position, t))
      order = self._order("random", keys, self.num_patches - m, None)
      return unflatten(order[:, :m], len(position))
    scores = None
    if attention is not None:
      scores = jax.lax.stop_gradient(jnp.mean(attention, axis=1))
    rng_order, rng_shuffle = jax.random.split(rng)
    keys = row_keys(rng_order, position)
    hidden = self.num_patches - t * m
    seen = self._order(self.mask, keys, hidden, scores)[:, : t * m]
    if self.mask != "random":
      # Visible patches come sorted by attention: distribute them at random.
      keys = row_keys(rng_shuffle, position)
      noise = jax.vmap(lambda key: jax.random.uniform(key, (t * m,)))(keys)
      seen = jnp.take_along_axis(seen, jnp.argsort(noise, axis=1), axis=1)
    return seen.reshape(-1, t, m)

  def seen(self, keep_ids: jax.Array | None) -> jax.Array:
    """Mean share of an image's patches that are in any subset: [] float32.

    Args:
      keep_ids: see `subsets`.
    """
    if keep_ids is None:
      return jnp.ones(())
    ids = jnp.sort(keep_ids.reshape(len(keep_ids), -1), axis=1)
    new = (ids[:, 1:] != ids[:, :-1]).astype(jnp.float32)
    return jnp.mean(1 + jnp.sum(new, axis=1)) / self.num_patches

  def _order(
    self,
    policy: str,
    keys: jax.Array,
    n_hidden: int,
    scores: jax.Array | None,
  ) -> jax.Array:
    """`masking.visible_first` of keys [R] and scores [R, N]: [R, N]."""
    return masking.visible_first(
      policy,
      keys=keys,
      grid=(self.backbone.grid, self.backbone.grid),
      n_hidden=n_hidden,
      scores=scores,
      show_max=self.show_max,
    )

  def predict(
    self,
    params: Params,
    images: jax.Array,
    keep_ids: jax.Array | None,
    batch: Batch,
    rng: jax.Array,
  ) -> jax.Array:
    """Predicts the teacher's vector from each subset keep_ids [B, T, M].

    Args:
      params: see `loss`.
      images: [B, H, W, 3] normalised.
      keep_ids: see `subsets`.
      batch: position [B].
      rng: key of the drop path and attention dropout of this step.

    Returns:
      [B, T, E].
    """
    subsets = 1 if keep_ids is None else keep_ids.shape[1]
    drawn = noise.sample(
      self.backbone, rng, row_ids(batch["position"], subsets)
    )
    out = self.backbone.apply(
      {"params": params["backbone"]},
      images,
      keep_ids=keep_ids,
      **drawn,
    )
    z = self.projector.apply({"params": params["head"]}, out.tokens[:, 0])
    z = self.predictor.apply({"params": params["predictor"]}, z)
    return unflatten(z, len(images))
