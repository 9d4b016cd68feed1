"""What methods refuse: one sentence with the value and the remedy.

Every function raises InputError or returns nothing.
"""

import dataclasses
from typing import Any

import ml_collections

from attmask_jax.errors import InputError
from attmask_jax.methods import masking
from attmask_jax.models import heads, vit

DTYPES = ("float32", "bfloat16")


def own_fields(cls: type, section: ml_collections.ConfigDict) -> dict[str, Any]:
  """The section's values for fields of a dataclass; lists become tuples."""
  names = {f.name for f in dataclasses.fields(cls)} & set(section.keys())
  # The command line gives lists or tuples; a method must hash.
  plain = lambda x: tuple(x) if isinstance(x, (list, tuple)) else x
  return {name: plain(section[name]) for name in names}


def section(config: ml_collections.ConfigDict) -> None:
  """Refuses method and data settings that do not fit together."""
  m, data = config.method, config.data
  if m.dtype not in DTYPES:
    raise InputError(
      f'method.dtype "{m.dtype}" is unknown: use {" or ".join(DTYPES)}'
    )
  if data.local_crops and (
    data.local_size < m.patch_size or data.local_size % m.patch_size
  ):
    down = max(data.local_size // m.patch_size, 1) * m.patch_size
    raise InputError(
      f"data.local_size {data.local_size} is not a multiple of "
      f"method.patch_size {m.patch_size}: choose {down} or "
      f"{down + m.patch_size} pixels"
    )
  for name in ("global_scale", "local_scale"):
    low, high = data[name]
    if not 0 < low <= high <= 1:
      raise InputError(
        f"data.{name} {(low, high)} must be two shares of the image's area, "
        "the smaller first, above 0 and at most 1"
      )
  _heads(m)


def _heads(m: ml_collections.ConfigDict) -> None:
  if m.head_norm not in heads.NORMS:
    raise InputError(
      f'method.head_norm "{m.head_norm}" is unknown: use '
      f"{' or '.join(heads.NORMS)}"
    )
  if m.head_act not in heads.ACTIVATIONS:
    raise InputError(
      f'method.head_act "{m.head_act}" is unknown: use '
      f"{' or '.join(heads.ACTIVATIONS)}"
    )
  if m.shared_head and not m.shared_head_teacher:
    raise InputError(
      "method.shared_head=True with method.shared_head_teacher=False leaves "
      "the teacher's patch layer without a student to follow: set both alike"
    )
  if (
    not m.shared_head and m.shared_head_teacher and m.patch_out_dim != m.out_dim
  ):
    raise InputError(
      f"a separate student head with method.patch_out_dim {m.patch_out_dim} "
      f"cannot follow a shared teacher head with method.out_dim {m.out_dim}: "
      "set both to one size, or method.shared_head_teacher=False"
    )


def masks(method: Any) -> None:
  """Refuses mask fields out of range."""
  if method.mask not in masking.POLICIES:
    raise InputError(
      f'method.mask "{method.mask}" is unknown: use '
      f"{', '.join(masking.POLICIES)}"
    )
  if len(method.mask_ratio) != len(method.mask_ratio_var):
    raise InputError(
      f"method.mask_ratio has {len(method.mask_ratio)} values and "
      f"method.mask_ratio_var {len(method.mask_ratio_var)}: give one variance "
      "or as many as ratios"
    )
  for r, v in zip(method.mask_ratio, method.mask_ratio_var, strict=True):
    if r < v or r + v > 1 or v < 0:
      raise InputError(
        f"method.mask_ratio {r} with method.mask_ratio_var {v} leaves [0, 1]: "
        "the ratio must be at least its variance, and their sum at most 1"
      )
  for name in ("mask_prob", "show_max"):
    value = getattr(method, name)
    if not 0 <= value <= 1:
      raise InputError(f"method.{name} {value} must lie between 0 and 1")


def views(method: Any) -> None:
  """Refuses crops without a pair to compare."""
  g, local = method.global_crops, method.local_crops
  if g < 1 or local < 0 or g + local < 2:
    raise InputError(
      f"data.global_crops {g} and data.local_crops {local} leave no other "
      "view to predict: use at least two global crops, or one and local ones"
    )


def classify(method: Any, config: ml_collections.ConfigDict) -> None:
  """Refuses settings of supervised training out of range."""
  m, data = config.method, config.data
  if m.dtype not in DTYPES:
    raise InputError(
      f'method.dtype "{m.dtype}" is unknown: use {" or ".join(DTYPES)}'
    )
  if method.num_classes < 2:
    raise InputError(
      f"a classifier needs at least 2 classes, and the data have "
      f"{method.num_classes}: give images of several classes"
    )
  if method.pool not in vit.POOLS:
    raise InputError(
      f'method.pool "{method.pool}" is unknown: use {", ".join(vit.POOLS)}'
    )
  if method.head_norm not in ("none", "layer", "batch"):
    raise InputError(
      f'method.head_norm "{method.head_norm}" is unknown: use none, layer or '
      "batch"
    )
  if method.backbone.class_token == "none" and method.pool != "mean":
    raise InputError(
      f"method.pool {method.pool} reads the class token, which this network "
      "does not have: set --config.method.pool=mean"
    )
  if (
    method.backbone.class_token == "readout"
    and method.pool != "mean"
    and method.last_blocks > 1
  ):
    raise InputError(
      f"method.last_blocks {method.last_blocks} takes class tokens of several "
      "blocks, and that of ExtreMA exists once, after the last: set "
      "--config.method.last_blocks=1, or use configs/evals.py:linear_extrema"
    )
  depth = method.backbone.depth
  if not 1 <= method.last_blocks <= depth:
    raise InputError(
      f"method.last_blocks {method.last_blocks} must lie between 1 and the "
      f"{depth} blocks of the weights"
    )
  if not all(rate > 0 for rate in method.rates):
    raise InputError(
      f"method.lrs {tuple(m.lrs)} and optim.lr_per_256 must be positive"
    )
  if len(m.lrs) > 1 and config.optim.optimizer.startswith("lars"):
    raise InputError(
      f"method.lrs {tuple(m.lrs)} with optim.optimizer="
      f"{config.optim.optimizer} would share one trust ratio among the linear "
      "layers: give one rate, or use --config.optim.optimizer=sgd"
    )
  for name in ("smoothing", "mix_prob", "switch_prob"):
    value = getattr(method, name)
    if not 0 <= value <= 1:
      raise InputError(f"method.{name} {value} must lie between 0 and 1")
  if not 0 < method.layer_decay <= 1:
    raise InputError(
      f"method.layer_decay {method.layer_decay} must lie above 0 and at most 1"
    )
  group = method.mixup_group or data.batch_size
  if method.mixes and (group % 2 or data.batch_size % group):
    raise InputError(
      f"data.mixup_group {group} must be even and divide data.batch_size "
      f"{data.batch_size}: mixup pairs the images of a group"
    )


def fixed_positions(method: Any) -> None:
  """Refuses a width that sines and cosines of two axes do not fill."""
  width = method.backbone.width
  if width % 4:
    raise InputError(
      f"fixed positions need a width that divides by 4, and that of "
      f"method.variant is {width}: choose {max(width // 4, 1) * 4} or "
      f"{(width // 4 + 1) * 4}"
    )


def visible(method: Any) -> None:
  """Refuses masks that leave nothing to see or nothing to predict."""
  if method.mask not in masking.VISIBLE_POLICIES:
    raise InputError(
      f'method.mask "{method.mask}" is unknown: use '
      f"{', '.join(masking.VISIBLE_POLICIES)}"
    )
  if not 0 < method.n_hidden < method.num_patches:
    raise InputError(
      f"method.mask_ratio {method.mask_ratio} hides {method.n_hidden} of "
      f"{method.num_patches} patches: at least one must be hidden, and one "
      "stay visible"
    )
  _show_max(method)


def _show_max(method: Any) -> None:
  if not 0 <= method.show_max <= 1:
    raise InputError(
      f"method.show_max {method.show_max} must lie between 0 and 1"
    )


def mae(config: ml_collections.ConfigDict) -> None:
  """Refuses MAE settings that name nothing known or do not divide."""
  m = config.method
  known = {
    "dtype": DTYPES,
    "position_order": ("yx", "xy"),
    "target_layout": ("chw", "hwc"),
    "target_variance": ("biased", "unbiased"),
  }
  for key, values in known.items():
    if m[key] not in values:
      raise InputError(
        f'method.{key} "{m[key]}" is unknown: use {" or ".join(values)}'
      )
  if config.evals.knn and config.evals.pool != "mean" and not m.class_token:
    raise InputError(
      f"evals.pool {config.evals.pool} reads the class token, and "
      "method.class_token is off: set --config.evals.pool=mean"
    )
  if m.shared_mask and m.mask not in ("random", "grid"):
    raise InputError(
      f'method.shared_mask shares the draw of random masks, and "{m.mask}" '
      "depends on the image: set --config.method.shared_mask=False or "
      "--config.method.mask=random"
    )
  if m.decoder_class_token and not m.class_token:
    raise InputError(
      "method.decoder_class_token is on and method.class_token is off: the "
      "decoder's class token is the encoder's, set both alike"
    )
  num_heads = m.decoder_num_heads or max(m.decoder_width // 64, 1)
  fits = m.decoder_width % 4 == 0 and m.decoder_width % num_heads == 0
  if m.decoder_depth < 1 or m.decoder_width < 1 or not fits:
    raise InputError(
      f"a decoder of width {m.decoder_width}, {m.decoder_depth} blocks and "
      f"{num_heads} heads cannot be: the width must be positive and divide by "
      "4 and by the heads, and there must be a block"
    )


def extrema(config: ml_collections.ConfigDict) -> None:
  """Refuses ExtreMA settings that name nothing known."""
  m = config.method
  known = {"dtype": DTYPES, "contrast": ("byol", "infonce")}
  for key, values in known.items():
    if m[key] not in values:
      raise InputError(
        f'method.{key} "{m[key]}" is unknown: use {" or ".join(values)}'
      )
  if m.contrast == "infonce" and config.data.batch_size < 2:
    raise InputError(
      f"InfoNCE tells the images of a batch apart, and data.batch_size is "
      f"{config.data.batch_size}: use at least 2, or method.contrast=byol"
    )
  for name in (
    "contrast_temp", "readout_layers", "num_masks", "head_hidden", "out_dim",
  ):  # fmt: skip
    if m[name] <= 0:
      raise InputError(f"method.{name} {m[name]} must be positive")


def subsets(method: Any) -> None:
  """Refuses subsets of patches that cannot be."""
  policies = ("random", *masking.ATTENTION_POLICIES)
  if method.mask not in policies:
    raise InputError(
      f'method.mask "{method.mask}" is unknown: use {", ".join(policies)}'
    )
  if not 0 <= method.mask_ratio < 1 or method.kept < 1:
    raise InputError(
      f"method.mask_ratio {method.mask_ratio} leaves no patch of "
      f"{method.num_patches} to see: lower it"
    )
  _show_max(method)
  if method.mask_ratio == 0 and method.mask != "random":
    raise InputError(
      f'method.mask_ratio 0 leaves nothing for method.mask "{method.mask}" to '
      "hide: raise the ratio, or set --config.method.mask=random"
    )
  if method.mask_ratio == 0 and method.num_masks > 1:
    raise InputError(
      f"method.mask_ratio 0 shows everything, so method.num_masks "
      f"{method.num_masks} would repeat it: set num_masks to 1"
    )
  m, k, n = method.num_masks, method.kept, method.num_patches
  if method.disjoint and m * k > n:
    raise InputError(
      f"method.num_masks {m} times {k} visible patches is more than the {n} "
      f"of an image: use at most {n // k} masks, or method.disjoint=False"
    )
  if method.mask != "random" and not method.disjoint:
    raise InputError(
      f'method.mask "{method.mask}" would make all {m} independent subsets the '
      "same: set method.disjoint=True"
    )
