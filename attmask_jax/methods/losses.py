"""Losses and centres as pure functions: arrays in, arrays out, float32.

Means over the batch are plain means: inside a compiled program with a sharded
batch they already cover all devices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from attmask_jax import schema

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class ComputeKeys:
  """How patch losses are computed."""

  patch_loss_chunks: int = schema.key(
    1, "chunks of AttMask's patch loss, to save memory", low=1
  )


def teacher_probs(
  logits: jax.Array, center: jax.Array, *, temp: jax.Array | float
) -> jax.Array:
  """Centred and sharpened teacher: softmax((logits - center) / temp).

  Args:
    logits: [..., K]; the gradient stops here.
    center: [K] float32.
    temp: teacher temperature, > 0.

  Returns:
    [..., K] float32, each row sums to 1.

  Source: iBOTLoss.forward in main_attmask.py of AttMask, the teacher's part.
  differs: called once for class tokens and once for patches.
  """
  center = center.reshape((1,) * (logits.ndim - 1) + (-1,))
  centred = (logits.astype(jnp.float32) - center) / temp
  return jax.lax.stop_gradient(jax.nn.softmax(centred, axis=-1))


def cls_cross_entropy(
  probs: jax.Array, student_logits: jax.Array, *, temp: float
) -> jax.Array:
  """Cross-entropy of each student view against each other teacher view.

    for g in teacher views: for v in student views: if v != g:
      total += mean_over_batch(cross_entropy(probs[g], student[v] / temp))
    loss = total / pairs

  Args:
    probs: [B, G, K] float32, teacher probabilities of the global views.
    student_logits: [B, V, K], the global views first, V > 1.
    temp: student temperature, > 0.

  Returns:
    [] float32.

  Source: iBOTLoss.forward in main_attmask.py of AttMask, the class-token term.
  differs: unweighted.
  """
  g, v = probs.shape[1], student_logits.shape[1]
  logits = student_logits.astype(jnp.float32) / temp
  # Probabilities sum to 1, so cross-entropy = logsumexp - <probs, logits>.
  product = jnp.einsum("bgk,bvk->bgv", probs, logits, precision=HIGHEST)
  entropy = jax.nn.logsumexp(logits, axis=-1)[:, None] - product  # [B, G, V]
  other = 1.0 - jnp.eye(g, v, dtype=jnp.float32)
  return jnp.sum(jnp.mean(entropy, axis=0) * other) / (g * (v - 1))


def masked_cross_entropy(
  probs: jax.Array,
  student_logits: jax.Array,
  valid: jax.Array,
  *,
  temp: float,
) -> jax.Array:
  """Cross-entropy summed over the hidden patches of each row.

  Args:
    probs: [R, M, K] float32, teacher probabilities.
    student_logits: [R, M, K].
    valid: [R, M] bool, True = this patch is hidden.
    temp: student temperature, > 0.

  Returns:
    [R] float32: divide by the row's hidden count (at least 1) and average
    over all rows. A row without hidden patches adds 0 and still counts.

  Source: iBOTLoss.forward in main_attmask.py of AttMask, the patch term.
  differs: the mean per row is left to the caller.
  """
  logits = student_logits.astype(jnp.float32) / temp
  product = jnp.sum(probs * logits, axis=-1)
  entropy = jax.nn.logsumexp(logits, axis=-1) - product
  return jnp.sum(jnp.where(valid, entropy, 0.0), axis=-1)


def in_chunks(
  term: Callable[..., jax.Array], *arrays: jax.Array, chunks: int
) -> jax.Array:
  """Sum of term(*part) over parts along axis 1, one part in memory at a time.

  Args:
    term: arrays [R, m, ...] -> [R]; zero rows of padding must add 0.
    *arrays: [R, M, ...] each.
    chunks: number of parts; 1 calls `term` once.

  Returns:
    [R].

  Source: none; saves memory without changing the loss.
  """
  if chunks == 1:
    return term(*arrays)

  def split(x: jax.Array) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, -x.shape[1] % chunks)
    x = jnp.pad(x, pad)
    x = x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  part = jax.checkpoint(lambda xs: term(*xs))
  return jnp.sum(jax.lax.map(part, tuple(map(split, arrays))), axis=0)


def update_center(
  center: jax.Array, batch_mean: jax.Array, *, momentum: float
) -> jax.Array:
  """Running mean of raw teacher logits: [K], [K] -> [K] float32.

  Source: update_center of iBOTLoss in main_attmask.py of AttMask. differs: the
  batch mean, over all devices, is left to the caller.
  """
  return momentum * center + (1 - momentum) * batch_mean


def entropy(probs: jax.Array) -> jax.Array:
  """Mean entropy in nats: [..., K] -> [] float32.

  Source: none; a metric of collapse that the releases do not log.
  """
  return -jnp.mean(jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1))


def pixel_loss(pred: jax.Array, target: jax.Array) -> jax.Array:
  """Mean squared error over hidden patches and their pixels: [] float32.

  Args:
    pred: [B, M, 3 P^2], predictions for the M hidden patches of each image.
    target: [B, M, 3 P^2], gradient stopped by the caller or without one.

  Source: the loss of MAE-priv's pretraining, forward_loss of the official MAE.
  differs: takes hidden patches only, the same number for each image.
  """
  return jnp.mean(jnp.square(pred.astype(jnp.float32) - target))


def byol(pred: jax.Array, target: jax.Array) -> jax.Array:
  """Squared distance of unit vectors, mean over images and subsets: [] in 0-4.

  Args:
    pred: [B, T, E], the student's prediction from each subset of patches.
    target: [B, E], the teacher's vector; its gradient is stopped.

  Source: BYOL (arXiv:2006.07733) as in lib/builder.py of ExtreMA; equals
  2 - 2 cos.
  """
  target = jax.lax.stop_gradient(unit(target))
  return jnp.mean(jnp.sum(jnp.square(unit(pred) - target[:, None]), axis=-1))


def info_nce(pred: jax.Array, target: jax.Array, *, temp: float) -> jax.Array:
  """Contrasts each prediction with all targets of the global batch: [].

  Args:
    pred: [B, T, E], as for `byol`.
    target: [B, E]; its gradient is stopped.
    temp: temperature T > 0; the loss is multiplied by 2 T.

  Source: contrastive_loss of MoCo v3 as in lib/builder.py of ExtreMA. differs:
  it runs over the global batch (the release crashes).
  """
  target = jax.lax.stop_gradient(unit(target))
  logits = jnp.einsum("bte,ie->bti", unit(pred), target) / temp
  own = jnp.eye(len(target))[:, None]  # [B, 1, B]
  return 2 * temp * jnp.mean(optax.losses.softmax_cross_entropy(logits, own))


def unit(x: jax.Array) -> jax.Array:
  """Unit vectors: [..., E] -> [..., E] float32; zeros stay zeros.

  Source: the normalisation, with epsilon 1e-12, in lib/builder.py of ExtreMA.
  """
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # The maximum inside the root keeps the gradient of a zero row finite.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
