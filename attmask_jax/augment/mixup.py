"""Mixup, CutMix and random erasing: drawn on the host, applied on the device.

Mixing is drawn once per batch. The numbers enter compiled code as traced
arguments, so Mixup and CutMix of any strength are the same program.

Source: timm.data.mixup and timm.data.random_erasing (v0.4.12), batch mode.
differs: images are paired within fixed groups instead of within the batch of a
device, so pairs do not depend on the number of devices.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax import schema
from attmask_jax.rows import row_keys


@dataclasses.dataclass(frozen=True)
class Keys:
  """Pairs of mixup and cutmix."""

  mixup_group: int = schema.key(
    0,
    "size of the groups that images are paired in, 0 = a device's batch in the "
    "releases",
    low=0,
  )


# --- on the host ------------------------------------------------------------


def draw(
  rng: np.random.Generator,
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  prob: float,
  switch_prob: float,
  size: tuple[int, int],
) -> dict[str, np.generic | np.ndarray]:
  """Draws how one batch is mixed.

  Args:
    rng: of this step.
    mixup_alpha, cutmix_alpha: both parameters of the Beta distribution of an
      image's own share; 0 turns that kind off.
    prob: probability of mixing the batch, 0-1.
    switch_prob: probability of CutMix if both kinds are on, 0-1.
    size: (H, W) in pixels.

  Returns:
    "mix_lam" float32, an image's share in its own target, 1 for no mixing, and
    "mix_box" [4] int32: top, left, bottom, right of the box that CutMix takes
    from the partner, zeros for Mixup.
  """
  box = np.zeros(4, np.int32)
  mixes, cuts = rng.random() < prob, rng.random() < switch_prob
  if not mixup_alpha or not cutmix_alpha:
    cuts = cutmix_alpha > 0
  alpha = cutmix_alpha if cuts else mixup_alpha
  if not mixes or not alpha:
    return {"mix_lam": np.float32(1), "mix_box": box}
  lam = rng.beta(alpha, alpha)
  if cuts:
    lam, box = _cut(rng, lam, size)
  return {"mix_lam": np.float32(lam), "mix_box": box}


def _cut(
  rng: np.random.Generator, lam: float, size: tuple[int, int]
) -> tuple[float, np.ndarray]:
  """The share outside a box of about 1 - lam of the image, and the box [4]."""
  share = math.sqrt(1 - lam)
  edges = []
  for side in size:
    centre, half = int(rng.integers(side)), int(side * share) // 2
    edges.append((max(centre - half, 0), min(centre + half, side)))
  (top, bottom), (left, right) = edges
  lam = 1 - (bottom - top) * (right - left) / (size[0] * size[1])
  if lam == 1:
    return lam, np.zeros(4, np.int32)
  return lam, np.array([top, left, bottom, right], np.int32)


# --- on the device ----------------------------------------------------------


def partners(x: jax.Array, group: int | None) -> jax.Array:
  """Reverses the order of rows within each group: [B, ...] -> [B, ...].

  Nothing moves between devices as long as each holds whole groups.

  Args:
    x: [B, ...].
    group: rows per group: even, divides B; None = B.
  """
  grouped = x.reshape(-1, group or len(x), *x.shape[1:])
  return grouped[:, ::-1].reshape(x.shape)


def mix_images(
  images: jax.Array, lam: jax.Array, box: jax.Array, *, group: int | None
) -> jax.Array:
  """Blends every image with its partner, or pastes the partner's box into it.

  Args:
    images: [B, H, W, C] float32.
    lam: [] float32, share of the image itself; unused with a box.
    box: [4] int32 top, left, bottom, right; blends if it is empty.
    group: see `partners`.

  Returns:
    [B, H, W, C] float32.
  """
  _, height, width, _ = images.shape
  inside = _inside(box[None], height, width)
  own = jnp.where(_empty(box), lam, jnp.where(inside, 0.0, 1.0))
  return own * images + (1 - own) * partners(images, group)


def soft_targets(
  labels: jax.Array, num_classes: int, *, smoothing: float
) -> jax.Array:
  """Smoothed one-hot rows: [B] int32 -> [B, num_classes] float32.

  Every class gets smoothing / num_classes, and the labelled one 1 - smoothing
  on top.
  """
  off = smoothing / num_classes
  hot = labels[:, None] == jnp.arange(num_classes)[None]
  return jnp.where(hot, 1 - smoothing + off, off)


def mix_targets(
  targets: jax.Array, lam: jax.Array, *, group: int | None
) -> jax.Array:
  """Targets of mixed images: [B, C], [] -> [B, C], see `mix_images`."""
  return lam * targets + (1 - lam) * partners(targets, group)


def erase(
  images: jax.Array, boxes: jax.Array, key: jax.Array, rows: jax.Array
) -> jax.Array:
  """Fills one box per image with standard normal noise, value by value.

  Args:
    images: [B, H, W, C] float32, normalised.
    boxes: [B, 4] int32 top, left, bottom, right; an empty one erases nothing.
    key: random key of this step.
    rows: [B] int32, identities of the rows in the global batch; they make the
      noise independent of the number of devices.

  Returns:
    [B, H, W, C] float32.
  """
  _, height, width, _ = images.shape
  noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))
  keys = row_keys(key, rows)
  return jnp.where(_inside(boxes, height, width), noise(keys), images)


def _empty(box: jax.Array) -> jax.Array:
  """[4] -> [] bool, True for a box without pixels."""
  top, left, bottom, right = box
  return (bottom <= top) | (right <= left)


def _inside(boxes: jax.Array, height: int, width: int) -> jax.Array:
  """[B, 4] -> [B, height, width, 1] bool, True within the box of the row."""
  top, left, bottom, right = jnp.moveaxis(boxes, 1, 0)[:, :, None]
  y, x = jnp.arange(height)[None], jnp.arange(width)[None]
  tall, wide = (y >= top) & (y < bottom), (x >= left) & (x < right)
  return tall[:, :, None, None] & wide[:, None, :, None]
