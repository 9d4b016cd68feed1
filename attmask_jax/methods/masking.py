"""Mask policies: by rank in the compiled step, by random draws on the host.

Counts vary from step to step and shapes must not, so a mask in the compiled
step is `rank < n` with a traced n. Counts are computed on the host in float64,
because the references truncate double-precision products: 100 patches at ratio
0.29 give 28, but 29 in float32.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax.rows import gather

ATTENTION_POLICIES = ("attmask_high", "attmask_hint", "attmask_low")
HOST_POLICIES = ("random", "block")
# For methods that gather visible patches: one count for all images.
VISIBLE_POLICIES = ("random", "block", "grid", *ATTENTION_POLICIES)
POLICIES = (*ATTENTION_POLICIES, *HOST_POLICIES, "none")

# Block-wise masking: attempts per rectangle and bounds of its aspect ratio.
BLOCK_ATTEMPTS = 10
BLOCK_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


def draw_ratio(
  rng: random.Random, ratios: Sequence[float], variances: Sequence[float]
) -> float:
  """One mask ratio: uniform in r +- v for one of the (r, v) pairs.

  Every pair with v > 0 consumes a draw, then one pair is chosen, as in
  ImageFolderMask.get_pred_ratio; a single pair needs no choice.

  Args:
    rng: source of the draws.
    ratios: mask ratios in [0, 1].
    variances: half-widths, one per ratio.
  """
  drawn = [
    rng.uniform(r - v, r + v) if v > 0 else r
    for r, v in zip(ratios, variances, strict=True)
  ]
  return drawn[0] if len(drawn) == 1 else rng.choice(drawn)


def random_mask(
  rng: np.random.RandomState, grid: tuple[int, int], ratio: float
) -> np.ndarray:
  """Masks exactly int(ratio * N) patches, uniformly: [h, w] bool."""
  n = grid[0] * grid[1]
  hidden = int(ratio * n)
  mask = np.concatenate([np.zeros(n - hidden, bool), np.ones(hidden, bool)])
  rng.shuffle(mask)
  return mask.reshape(grid)


def block_mask(
  rng: random.Random, grid: tuple[int, int], ratio: float
) -> np.ndarray:
  """Masks rectangles up to about ratio * N patches: [h, w] bool.

  The count never exceeds ratio * N and usually stays slightly below it.

  Source: the block-wise masks of iBOT (BEiT), draw for draw.
  """
  mask = np.zeros(grid, bool)
  target = ratio * mask.size
  hidden = 0
  while hidden < target:
    added = _add_block(rng, mask, target - hidden)
    if not added:
      break
    hidden += added
  return mask


def _add_block(rng: random.Random, mask: np.ndarray, room: float) -> int:
  """Masks one rectangle of up to `room` new patches; returns their number."""
  height, width = mask.shape
  smallest = (min(height, width) // 3) ** 2
  for _ in range(BLOCK_ATTEMPTS):
    # quirk: with little room left the interval is reversed; still uniform.
    area = rng.uniform(smallest, room)
    aspect = math.exp(rng.uniform(*BLOCK_LOG_ASPECT))
    h = round(math.sqrt(area * aspect))
    w = round(math.sqrt(area / aspect))
    if h >= height or w >= width:
      continue
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    block = mask[top : top + h, left : left + w]
    new = h * w - int(block.sum())
    if 0 < new <= room:
      block[:] = True
      return new
  return 0


def host_masks(
  policy: str,
  *,
  seeds: tuple[int, ...],
  grid: tuple[int, int],
  views: int,
  ratios: Sequence[float],
  variances: Sequence[float],
) -> np.ndarray:
  """Block-wise or random masks of one image, with one ratio per view.

  Args:
    policy: one of HOST_POLICIES.
    seeds: what the draws depend on, such as (seed, epoch, index).
    grid: (h, w) with h * w = N.
    views: V.
    ratios: see `draw_ratio`.
    variances: see `draw_ratio`.

  Returns:
    [V, N] bool.
  """
  rng, array_rng = random.Random(str(seeds)), np.random.RandomState(seeds)
  masks = []
  for _ in range(views):
    ratio = draw_ratio(rng, ratios, variances)
    if policy == "block":
      masks.append(block_mask(rng, grid, ratio))
    else:
      masks.append(random_mask(array_rng, grid, ratio))
  return np.stack(masks).reshape(views, -1)


def attention_counts(
  patches: int, ratio: float, hint_ratio: float, show_max: float
) -> tuple[int, int]:
  """Patches to mask and hints to reveal, truncated in double precision.

  quirk: the number of hints uses a second draw of the ratio, independent of
  the size of the mask (train_one_epoch).
  """
  return int(patches * ratio), int((show_max * hint_ratio) * patches)


def rank(scores: jax.Array) -> jax.Array:
  """Rank, 0 = largest, ties by lowest index: [..., N] -> [..., N] int32.

  Sorts twice, because `lax.top_k` gathers a batch-sharded array on every
  device.
  """
  order = jnp.argsort(-scores, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def priority(
  policy: str,
  *,
  scores: jax.Array | None = None,
  noise: jax.Array | None = None,
) -> jax.Array:
  """Priority of masking, [R, N] float32: the largest values are masked first.

  Args:
    policy: "attmask_high" and "attmask_hint" the most attended patches,
      "attmask_low" the least attended, "random" any.
    scores: [R, N] attention, for ATTENTION_POLICIES.
    noise: [R, N] uniform in [0, 1), for "random".
  """
  if policy == "random":
    return noise
  return -scores if policy == "attmask_low" else scores


def uniform(keys: jax.Array, n: int) -> jax.Array:
  """Draws n numbers in [0, 1) with each of [R] keys: [R, n] float32."""
  return jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)


def attention_mask(
  scores: jax.Array,
  *,
  policy: str,
  n_mask: jax.Array | int,
  keys: jax.Array | None = None,
  probability: float = 1.0,
  n_show: jax.Array | int = 0,
  n_eligible: int = 0,
) -> jax.Array:
  """AttMask: masks patches by the teacher's attention to them.

  Args:
    scores: [R, N] float32, attention of the class token, mean over heads.
    policy: "attmask_high" masks the most attended patches, "attmask_hint" the
      same except a few revealed ones, "attmask_low" the least attended.
    n_mask: patches to mask per row.
    keys: [R] random keys. None: every row keeps its mask and no hint is
      revealed, whatever `probability` and `n_show` say.
    probability: a row keeps its mask with this probability.
    n_show: hints revealed per row.
    n_eligible: number of most attended patches that hints are chosen from.

  Returns:
    [R, N] bool, True = hidden.

  Source: AttMask and get_mask in AttMask (main_attmask.py, utils.py).
  differs: draws are per row, so they do not depend on the device count;
  revealing nothing is allowed (the release crashes).
  """
  mask = rank(priority(policy, scores=scores)) < n_mask
  if keys is None:
    return mask
  noise = uniform(keys, scores.shape[-1] + 1)
  mask &= noise[:, :1] <= probability
  if policy == "attmask_hint":
    place = rank(scores)
    mask &= ~reveal(place, noise[:, 1:], n_show=n_show, n_eligible=n_eligible)
  return mask


def reveal(
  place: jax.Array,
  noise: jax.Array,
  *,
  n_show: jax.Array | int,
  n_eligible: int,
) -> jax.Array:
  """Hints: n_show distinct patches among the n_eligible most attended.

  Args:
    place: [R, N] int32, rank of attention.
    noise: [R, N] uniform in [0, 1).
    n_show: patches to reveal.
    n_eligible: size of the eligible set.

  Returns:
    [R, N] bool, True = revealed (whether or not it was hidden).
  """
  eligible = place < n_eligible
  noise_rank = rank(jnp.where(eligible, noise, -1.0))
  return eligible & (noise_rank < n_show)


def visible_first(
  policy: str,
  *,
  keys: jax.Array,
  grid: tuple[int, int],
  n_hidden: int,
  scores: jax.Array | None = None,
  masks: jax.Array | None = None,
  show_max: float = 0.0,
) -> jax.Array:
  """Orders patches so that the last n_hidden are hidden: [R, N] int32.

  Every policy hides exactly n_hidden patches: block-wise masks are filled up or
  trimmed at random, and a revealed hint is replaced by the next most attended
  patch. "grid" is not random: all rows get the same order, whatever their keys.

  Args:
    policy: one of VISIBLE_POLICIES.
    keys: [R] random keys.
    grid: (h, w) with h * w = N.
    n_hidden: patches to hide, 0 to N.
    scores: [R, N] attention, for ATTENTION_POLICIES.
    masks: [R, N] bool, for "block".
    show_max: hints come from this share of the most attended patches; their
      number is this share of n_hidden, at most the number of visible patches.
  """
  n = grid[0] * grid[1]
  noise = uniform(keys, n)
  if policy == "block":
    order = masks + noise
  elif policy == "grid":
    order = jnp.broadcast_to(jnp.asarray(_bayer(grid)), (len(keys), n))
  else:
    order = priority(policy, scores=scores, noise=noise)
  if policy == "attmask_hint":
    # More would tie, and ties go to the first patches of the image.
    n_show = min(int(show_max * n_hidden), n - n_hidden)
    hints = reveal(
      rank(scores), noise, n_show=n_show, n_eligible=int(n * show_max)
    )
    order = jnp.where(hints, -jnp.inf, order)
  return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def random_patches(keys: jax.Array, n: int, n_mask: int) -> jax.Array:
  """Masks n_mask of n patches per row, uniformly: [R] keys -> [R, n] bool."""
  return rank(priority("random", noise=uniform(keys, n))) < n_mask


def hidden_of(order: np.ndarray, n_hidden: int) -> np.ndarray:
  """Mask of an order by `visible_first`: [n, N] -> [n, N] bool."""
  mask = np.zeros(order.shape, bool)
  np.put_along_axis(mask, order[:, order.shape[1] - n_hidden :], True, axis=1)
  return mask


def _bayer(grid: tuple[int, int]) -> np.ndarray:
  """Bayer matrix of ordered dithering, cropped to the grid: [N] float32.

  Its lowest quarter is every second cell of every second row.
  """
  side, order = 1, np.zeros((1, 1))
  while side < max(grid):
    order = np.block(
      [[4 * order, 4 * order + 2], [4 * order + 3, 4 * order + 1]]
    )
    side *= 2
  return order[: grid[0], : grid[1]].reshape(-1).astype(np.float32)


class Hidden(NamedTuple):
  """A mask, and the indices of its patches in a static shape.

  Attributes:
    mask: [R, N] bool.
    ids: [R, M] int32, hidden patches first, padded with visible ones.
    valid: [R, M] bool, False = padding.
  """

  mask: jax.Array
  ids: jax.Array
  valid: jax.Array

  @classmethod
  def of(cls, mask: jax.Array, limit: int) -> "Hidden":
    """Lists at most `limit` = M hidden patches per row of mask [R, N]."""
    order = jnp.argsort(~mask, axis=-1, stable=True)
    ids = order[:, :limit].astype(jnp.int32)
    return cls(mask, ids, gather(mask[:, :, None], ids)[:, :, 0])

  def metrics(self) -> dict[str, jax.Array]:
    """mask_ratio, the share of hidden patches; masked_share, of masked rows.

    Both are [] float32 and plain means, so that means over micro-batches are
    means over the batch; their quotient is the ratio among masked rows.
    """
    masked = jnp.any(self.mask, axis=-1)
    return {
      "mask_ratio": jnp.mean(self.mask.astype(jnp.float32)),
      "masked_share": jnp.mean(masked.astype(jnp.float32)),
    }
