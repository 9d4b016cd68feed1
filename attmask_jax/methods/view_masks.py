"""Masks of the global views in AttMask, iBOT and DINO.

With attmask_*, the number of masked patches is drawn per step on the host, and
the teacher's attention chooses them in the compiled step. With random and
block, the host draws the whole mask per image and view.

Source: train_one_epoch, AttMask and ImageFolderMask of the AttMask release.
"""

import dataclasses
import random

import jax
import numpy as np

from attmask_jax import Batch, schema
from attmask_jax.augment.transforms import MultiCrop
from attmask_jax.errors import InputError
from attmask_jax.methods import masking
from attmask_jax.methods.base import Method, Scalars
from attmask_jax.rows import flatten, row_ids, row_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewMasks(Method):
  """Masks of the global views; base class of AttMask.

  Attributes:
    global_crops: G.
  """

  global_crops: int = MultiCrop.global_crops
  mask: str = schema.key(
    "attmask_high",
    "policy of masking the student's global views",
    choices=masking.POLICIES,
  )
  mask_ratio: tuple[float, ...] = schema.key(
    (0.3,),
    "share of patches hidden: one ratio, or several to choose from per draw",
    low=0,
    high=1,
  )
  mask_ratio_var: tuple[float, ...] = schema.key(
    (0.2,),
    "uniform jitter of the ratio, +-; one value or one per ratio",
    low=0,
    high=1,
  )
  mask_prob: float = schema.key(
    0.5, "probability of masking a view (attmask_* only)", low=0, high=1
  )
  show_max: float = schema.key(
    0.1, "hints come from this share of most attended patches", low=0, high=1
  )
  mask_start_epoch: int = schema.key(0, "first epoch with masks", low=0)
  mask_input: bool = schema.key(True, "False: the student sees all patches")
  seed: int = schema.key(
    0, "of weights, masks and stochastic depth", low=0, high=2**32 - 1
  )

  def _check_ratios(self) -> None:
    """Repeats a single variance; rejects ratios that it takes out of [0, 1]."""
    if len(self.mask_ratio_var) == 1 < len(self.mask_ratio):
      spread = self.mask_ratio_var * len(self.mask_ratio)
      object.__setattr__(self, "mask_ratio_var", spread)
    if len(self.mask_ratio) != len(self.mask_ratio_var):
      raise InputError(
        f"method.mask_ratio has {len(self.mask_ratio)} values and "
        f"method.mask_ratio_var {len(self.mask_ratio_var)}: give one variance "
        "or as many as ratios"
      )
    for r, v in zip(self.mask_ratio, self.mask_ratio_var, strict=True):
      if r < v or r + v > 1:
        raise InputError(
          f"method.mask_ratio {r} with method.mask_ratio_var {v} leaves [0, 1]:"
          " the ratio must be at least its variance, and their sum at most 1"
        )

  @property
  def max_hidden(self) -> int:
    """M, the most patches that a mask of this configuration hides."""
    pairs = zip(self.mask_ratio, self.mask_ratio_var, strict=True)
    return max(1, *(int(self.num_patches * (r + v)) for r, v in pairs))

  @property
  def picture_mask_ratio(self) -> float:
    """The largest of the mask ratios."""
    return max(self.mask_ratio)

  @property
  def picture_show_max(self) -> float:
    """As in training."""
    return self.show_max

  @property
  def by_attention(self) -> bool:
    """Whether masks come from the teacher's attention."""
    return self.mask in masking.ATTENTION_POLICIES

  def mask_counts(self, step: int, epoch: int) -> dict[str, np.generic]:
    """Patches to mask and hints to reveal in a step; {} for host policies.

    quirk: the number of hints uses a second draw of the ratio.
    """
    rng = random.Random(f"{self.seed}-ratio-{step}")
    ratio, hint_ratio = (self.ratio(rng, epoch) for _ in range(2))
    if not self.by_attention:
      return {}
    n_mask, n_show = masking.attention_counts(
      self.num_patches, ratio, hint_ratio, self.show_max
    )
    return {"n_mask": np.int32(n_mask), "n_show": np.int32(n_show)}

  def ratio(self, rng: random.Random, epoch: int) -> float:
    """One draw of the mask ratio; 0 before `mask_start_epoch`."""
    if self.mask == "none" or epoch < self.mask_start_epoch:
      return 0.0
    return masking.draw_ratio(rng, self.mask_ratio, self.mask_ratio_var)

  def item_extras(self, epoch: int, index: int) -> dict[str, np.ndarray]:
    """Masks of one image, drawn on the host: masks [G, N] bool."""
    if self.mask not in masking.HOST_POLICIES:
      return {}
    started = epoch >= self.mask_start_epoch
    masks = masking.host_masks(
      self.mask,
      seeds=(self.seed, epoch, index),
      grid=(self.backbone.grid, self.backbone.grid),
      views=self.global_crops,
      ratios=self.mask_ratio if started else (0.0,),
      variances=self.mask_ratio_var if started else (0.0,),
    )
    return {"masks": masks}

  def select_masks(
    self,
    attention: jax.Array | None,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> masking.Hidden | None:
    """Masks of all rows, or None for mask "none".

    Args:
      attention: [R, N] of the teacher, for attmask_*.
      batch: position [B]; masks [B, G, N] for random and block.
      rng: key of the masks of this step.
      scalars: see `mask_counts`.
    """
    if self.mask == "none":
      return None
    if not self.by_attention:
      return masking.Hidden.of(flatten(batch["masks"]), self.max_hidden)
    rows = row_ids(batch["position"], self.global_crops)
    mask = masking.attention_mask(
      attention,
      policy=self.mask,
      n_mask=scalars["n_mask"],
      keys=row_keys(rng, rows),
      probability=self.mask_prob,
      n_show=scalars["n_show"],
      n_eligible=int(self.num_patches * self.show_max),
    )
    return masking.Hidden.of(mask, self.max_hidden)
