"""Optimisers, freezing, clipping and the moving average.

Rates follow the global step and are arguments of each update, not optax
schedules with their own count, which would lag for a frozen leaf. Per-tensor
rules apply to each layer of stacked blocks separately.

Source: clip_gradients, get_params_groups, LARS, cancel_gradients_last_layer and
the average in train_one_epoch of DINO, iBOT and AttMask.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_collections
import optax

from attmask_jax import Params, schema, trees

OPTIMIZERS = ("adamw", "sgd", "lars", "lars_mae")
CLIPS = ("tensor", "global")
# (name, leaf) -> factor on the learning rate that broadcasts against the leaf.
LrScale = Callable[[str, jax.Array], Any]

# Leaves without weight decay, by name: biases and LayerNorm scales. quirk: the
# class, mask and position tokens and the prototype gains are decayed.
UNDECAYED = r"(^|/)(bias|scale)$"
# Leaves whose leading axis runs over layers.
STACKED = r"(^|/)blocks/"


def without(grads: Params, untrained: str | None) -> Params:
  """Zeroes the gradients of untrained leaves, so that norms exclude them.

  Args:
    grads: tree of gradients, each of its parameter's shape.
    untrained: regex of leaf paths, None = no such leaf.
  """
  if untrained is None:
    return grads
  return trees.map_named(
    lambda name, g: jnp.zeros_like(g) if re.search(untrained, name) else g,
    grads,
  )


def per_layer(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Applies f to each layer of stacked leaves.

  Args:
    f: (leaves [...]) -> [...], of one layer.

  Returns:
    (name, leaves): leaves are [depth, ...] where the name is of a stacked
    parameter, else [...].
  """

  def apply(name: str, *leaves: jax.Array) -> jax.Array:
    stacked = re.search(STACKED, name)
    return (jax.vmap(f) if stacked else f)(*leaves)

  return apply


def clip_per_tensor(limit: float) -> optax.GradientTransformation:
  """Scales each tensor by limit / (norm + 1e-6) where that is below 1.

  Source: clip_gradients of DINO, iBOT and AttMask. quirk: not a global-norm
  clip.
  """

  def clip(g: jax.Array) -> jax.Array:
    return g * jnp.minimum(1.0, limit / (_norm(g) + 1e-6))

  return optax.stateless(
    lambda grads, params: trees.map_named(per_layer(clip), grads)
  )


def _norm(x: jax.Array) -> jax.Array:
  """L2 norm over all axes: [...] -> []."""
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def scale_by_rates(
  *, decoupled: bool, undecayed: str, lr_scale: LrScale | None = None
) -> optax.GradientTransformationExtraArgs:
  """updates -> -lr * (updates + wd * params on decayed leaves).

  Args:
    decoupled: add the decay here (AdamW); else only scale by -lr.
    undecayed: regex of leaves without decay.
    lr_scale: factor on the lr of a leaf, None = 1 for all.
  """

  def update(updates, state, params=None, *, lr, wd, **_):
    def scale(name: str, u: jax.Array, p: jax.Array) -> jax.Array:
      if decoupled and not re.search(undecayed, name):
        u = u + wd * p
      return -lr * u if lr_scale is None else -lr * lr_scale(name, p) * u

    return trees.map_named(scale, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def coupled_decay(
  *, trust: float | None, undecayed: str
) -> optax.GradientTransformationExtraArgs:
  """g + wd * w on decayed leaves; with `trust`, LARS's rate per tensor.

  Args:
    trust: LARS coefficient: decayed tensors are scaled by
      trust * |w| / |g + wd * w|, or 1 where either norm is 0.
    undecayed: regex of leaves without decay.

  Source: LARS of DINO, iBOT and AttMask; without `trust`, PyTorch's SGD.
  """

  def update(updates, state, params=None, *, lr, wd, **_):
    def decayed(g: jax.Array, p: jax.Array) -> jax.Array:
      g = g + wd * p
      if trust is None:
        return g
      w_norm, g_norm = _norm(p), _norm(g)
      safe = jnp.where(g_norm > 0, g_norm, 1.0)
      q = jnp.where((w_norm > 0) & (g_norm > 0), trust * w_norm / safe, 1.0)
      return g * q

    def decay(name: str, g: jax.Array, p: jax.Array) -> jax.Array:
      return g if re.search(undecayed, name) else per_layer(decayed)(name, g, p)

    return trees.map_named(decay, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def mae_trust(*, trust: float = 0.001) -> optax.GradientTransformationExtraArgs:
  """MAE-priv's LARS, which scales gradients, and only if wd != 0.

  quirk: the shipped recipes have wd = 0, so nothing is scaled; otherwise the
  decay enters the norm but is not added. No tensor is excluded, not even
  biases.

  Args:
    trust: coefficient of the rate per tensor.

  Source: utils/lars.py of MAE-priv, with its default options.
  """

  def update(updates, state, params=None, *, lr, wd, **_):
    def scaled(g: jax.Array, p: jax.Array) -> jax.Array:
      w_norm, g_norm = _norm(p), _norm(g)
      q = trust * w_norm / (g_norm + wd * w_norm + 1e-8)
      q = jnp.where((w_norm > 0) & (g_norm > 0), q, 1.0)
      return g * jnp.where(wd != 0, q, 1.0)

    scale = lambda name, g, p: per_layer(scaled)(name, g, p)
    return trees.map_named(scale, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def freezable(
  inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Keeps leaves and the whole state of `inner` unchanged while `frozen`.

  Moments do not decay and Adam's step count starts after freezing, as for
  PyTorch parameters without a gradient.

  Source: cancel_gradients_last_layer of DINO, iBOT and AttMask.
  """
  # optax.transforms.conditionally_mask does the same, but adds a step count to
  # the state, which checkpoints of earlier versions do not have.

  def update(updates, state, params=None, *, frozen, **extra):
    moved, new_state = inner.update(updates, state, params, **extra)
    keep = lambda old, new: jnp.where(frozen, old, new)
    zeroed = jax.tree.map(lambda u: jnp.where(frozen, 0.0, u), moved)
    return zeroed, jax.tree.map(keep, state, new_state)

  return optax.GradientTransformationExtraArgs(inner.init, update)


@dataclasses.dataclass(frozen=True)
class NameKeys:
  """Update rule."""

  optimizer: str = schema.key(
    "adamw",
    "update rule; lars_mae is MAE-priv's, see configs/supervised.py",
    choices=OPTIMIZERS,
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Settings of the optimiser; `build` makes the optax transformation.

  Attributes:
    name: one of OPTIMIZERS.
  """

  name: str = NameKeys.optimizer
  clip: float = schema.key(3.0, "gradient norm limit, 0 = none", low=0)
  clip_by: str = schema.key(
    "tensor", "norm of each tensor or of all together", choices=CLIPS
  )
  betas: tuple[float, float] = schema.key(
    (0.9, 0.999), "of adamw", low=0, high=0.999999
  )
  eps: float = schema.key(
    1e-8, "of adamw: outside the root, after bias correction", low=0
  )
  sgd_momentum: float = schema.key(0.9, "of sgd, lars and lars_mae")
  nesterov: bool = schema.key(
    False, "Nesterov momentum of sgd, lars and lars_mae"
  )

  def __post_init__(self) -> None:
    schema.check("optim", vars(self), type(self))
    schema.check("optim", {"optimizer": self.name}, NameKeys)

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> Self:
    """Reads the section `optim`.

    Raises:
      InputError: a value out of range.
    """
    o = config.optim
    return cls(name=o.optimizer, **schema.take(cls, o))

  def build(
    self,
    *,
    frozen_at_start: str | None = None,
    untrained: str | None = None,
    undecayed: str | None = None,
    lr_scale: LrScale | None = None,
  ) -> optax.GradientTransformationExtraArgs:
    """The chain clip -> freeze -> rule; update(..., lr=, wd=, frozen=).

    Args:
      frozen_at_start: regex of leaves that are kept while `frozen` is true.
      untrained: regex of leaves that are never updated.
      undecayed: regex of leaves without weight decay, None = UNDECAYED.
      lr_scale: see `scale_by_rates`.
    """

    def label(name: str, _: jax.Array) -> str:
      if untrained and re.search(untrained, name):
        return "untrained"
      if frozen_at_start and re.search(frozen_at_start, name):
        return "freezable"
      return "free"

    rule = lambda: self._rule(undecayed or UNDECAYED, lr_scale)
    groups = optax.partition(
      {
        "free": rule(),
        "freezable": freezable(rule()),
        "untrained": optax.set_to_zero(),
      },
      lambda params: trees.map_named(label, params),
    )
    if not self.clip:
      return groups
    clip = clip_per_tensor(self.clip)
    if self.clip_by == "global":
      clip = optax.clip_by_global_norm(self.clip)
    return optax.chain(clip, groups)

  def _rule(
    self, undecayed: str, lr_scale: LrScale | None
  ) -> optax.GradientTransformationExtraArgs:
    """The update rule `name`, without clipping and freezing."""
    rate = functools.partial(
      scale_by_rates, undecayed=undecayed, lr_scale=lr_scale
    )
    if self.name == "adamw":
      b1, b2 = self.betas
      adam = optax.scale_by_adam(b1=b1, b2=b2, eps=self.eps)
      return optax.chain(adam, rate(decoupled=True))
    trust = 0.001 if self.name == "lars" else None
    first = coupled_decay(trust=trust, undecayed=undecayed)
    return optax.chain(
      mae_trust() if self.name == "lars_mae" else first,
      optax.trace(decay=self.sgd_momentum, nesterov=self.nesterov),
      rate(decoupled=False),
    )


def ema(teacher: Params, params: Params, momentum: jax.Array) -> Params:
  """momentum * teacher + (1 - momentum) * student, leaf by leaf.

  Args:
    teacher: tree whose leaf paths all exist in `params`.
    params: student.
    momentum: [] float32.

  Source: train_one_epoch of DINO, iBOT and AttMask; lib/builder.py of ExtreMA.
  """
  students = {
    trees.path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  return trees.map_named(
    lambda name, t: momentum * t + (1 - momentum) * students[name], teacher
  )
