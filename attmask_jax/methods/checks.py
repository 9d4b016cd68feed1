"""What methods refuse: one sentence with the value and the remedy.

Every function raises InputError or returns nothing.
"""

import dataclasses
from typing import Any

import ml_collections

from attmask_jax import heads, masking
from attmask_jax.errors import InputError

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
