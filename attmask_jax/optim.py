"""Schedules and optimisers.

Rates come from the global step and enter each update as arguments, never as
optax schedules with a count of their own: a frozen leaf's count would lag.
Every per-tensor rule sees the layers of stacked blocks one by one.

Source: cosine_scheduler, clip_gradients, get_params_groups, LARS and
cancel_gradients_last_layer of DINO, iBOT and AttMask.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from attmask_jax import Params
from attmask_jax.errors import InputError

OPTIMIZERS = ("adamw", "sgd", "lars")
CLIPS = ("tensor", "global")

# Leaves without weight decay, by name: biases and LayerNorm scales. quirk: the
# class, mask and position tokens and the prototype gains are decayed.
UNDECAYED = r"(^|/)(bias|scale)$"
# Leaves whose leading axis runs over layers.
STACKED = r"(^|/)blocks/"


def cosine(
  step: int, *, base: float, final: float, warmup: int, total: int
) -> float:
  """Linear warm-up from 0, then a half cosine, in float64.

  quirk: `linspace(0, base, warmup)` includes its end, so `base` holds for two
  steps and `final` is never quite reached.

  Args:
    step: 0-based global step.
    base: value after warm-up.
    final: value the cosine tends to.
    warmup: steps of warm-up.
    total: steps of the run.
  """
  if step < warmup:
    return float(np.linspace(0, base, warmup)[step])
  k, n = step - warmup, total - warmup
  return float(final + 0.5 * (base - final) * (1 + np.cos(np.pi * k / n)))


def warmup_table(
  start: float, end: float, *, warmup: int, total: int, lead: int = 0
) -> np.ndarray:
  """Value per epoch: `lead` epochs at start, a linear warm-up, then end.

  Returns:
    [total] float64; `end` is reached at epoch lead + warmup - 1.

  Raises:
    InputError: lead and warm-up are longer than the run.
  """
  rest = total - lead - warmup
  if rest < 0:
    raise InputError(
      f"a warm-up of {warmup} epochs after {lead} does not fit optim.epochs "
      f"{total}: lower method.temp_warmup_epochs or train longer"
    )
  ramp = np.linspace(start, end, warmup)
  return np.concatenate([np.full(lead, start), ramp, np.full(rest, end)])


@dataclasses.dataclass(frozen=True)
class Schedules:
  """Learning rate, weight decay, teacher momentum and freezing per step.

  Attributes:
    lr: peak learning rate, already scaled by the batch.
    min_lr: learning rate at the end, not scaled by the batch.
    warmup_epochs: linear warm-up of the learning rate.
    weight_decay: (start, end).
    momentum: start of the teacher momentum, which tends to 1.
    freeze_epochs: epochs in which the method's `frozen_at_start` leaves hold.
    epochs: length of the run.
    steps_per_epoch: S.
  """

  lr: float
  min_lr: float
  warmup_epochs: int
  weight_decay: tuple[float, float]
  momentum: float
  freeze_epochs: int
  epochs: int
  steps_per_epoch: int

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Scales `optim.lr_per_256` by the global batch.

    Raises:
      InputError: a warm-up longer than the run, or a non-positive length.
    """
    o = config.optim
    if o.epochs < 1:
      raise InputError(f"optim.epochs {o.epochs} must be at least 1")
    if o.warmup_epochs > o.epochs:
      raise InputError(
        f"optim.warmup_epochs {o.warmup_epochs} is longer than optim.epochs "
        f"{o.epochs}: shorten the warm-up or train longer"
      )
    return cls(
      lr=o.lr_per_256 * config.data.batch_size / 256.0,
      min_lr=o.min_lr,
      warmup_epochs=o.warmup_epochs,
      weight_decay=tuple(o.weight_decay),
      momentum=o.teacher_momentum,
      freeze_epochs=o.freeze_epochs,
      epochs=o.epochs,
      steps_per_epoch=steps_per_epoch,
    )

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.epochs * self.steps_per_epoch

  def values(self, step: int) -> dict[str, float]:
    """lr, wd and momentum of one step in float64."""
    total = self.total_steps
    start, end = self.weight_decay
    warmup = self.warmup_epochs * self.steps_per_epoch
    return {
      "lr": cosine(
        step, base=self.lr, final=self.min_lr, warmup=warmup, total=total
      ),
      "wd": cosine(step, base=start, final=end, warmup=0, total=total),
      "momentum": cosine(
        step, base=self.momentum, final=1.0, warmup=0, total=total
      ),
    }

  def at(self, step: int) -> dict[str, np.generic]:
    """What the compiled step takes: `values` in float32, and `frozen`."""
    scalars = {k: np.float32(v) for k, v in self.values(step).items()}
    epoch = step // self.steps_per_epoch
    return scalars | {"frozen": np.bool_(epoch < self.freeze_epochs)}


def path_name(path: tuple[Any, ...]) -> str:
  """Key path of a leaf as "backbone/blocks/attn/qkv/kernel"."""
  return "/".join(str(getattr(key, "key", key)) for key in path)


def map_named(f: Callable[..., Any], tree: Params, *rest: Params) -> Params:
  """tree.map whose function also gets the leaf's name first."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: f(path_name(path), *leaves), tree, *rest
  )


def per_layer(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Applies f(*leaves) to each layer of stacked leaves; f(name, *leaves)."""

  def apply(name: str, *leaves: jax.Array) -> jax.Array:
    stacked = re.search(STACKED, name)
    return (jax.vmap(f) if stacked else f)(*leaves)

  return apply


def norms(tree: Params) -> Params:
  """L2 norm of every tensor: [] each, [depth] for stacked leaves."""
  return map_named(per_layer(_norm), tree)


def clip_per_tensor(limit: float) -> optax.GradientTransformation:
  """Scales each tensor by limit / (norm + 1e-6) where that is below 1.

  quirk: not a global-norm clip (clip_gradients).
  """

  def clip(g: jax.Array) -> jax.Array:
    return g * jnp.minimum(1.0, limit / (_norm(g) + 1e-6))

  return optax.stateless(
    lambda grads, params: map_named(per_layer(clip), grads)
  )


def _norm(x: jax.Array) -> jax.Array:
  """L2 norm over all axes: [...] -> []."""
  return jnp.sqrt(jnp.sum(jnp.square(x)))


def scale_by_rates(*, decoupled: bool) -> optax.GradientTransformationExtraArgs:
  """updates -> -lr * (updates + wd * params on decayed leaves).

  Args:
    decoupled: add the decay here (AdamW); else only the learning rate acts.
  """

  def update(updates, state, params=None, *, lr, wd, **_):
    def scale(name: str, u: jax.Array, p: jax.Array) -> jax.Array:
      if decoupled and not re.search(UNDECAYED, name):
        u = u + wd * p
      return -lr * u

    return map_named(scale, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def coupled_decay(
  *, trust: float | None
) -> optax.GradientTransformationExtraArgs:
  """g + wd * w on decayed leaves; with `trust`, LARS's rate per tensor.

  Args:
    trust: LARS coefficient: decayed tensors are scaled by
      trust * |w| / |g + wd * w|, or 1 where either norm is 0.
  """

  def update(updates, state, params=None, *, lr, wd, **_):
    def one(g: jax.Array, p: jax.Array) -> jax.Array:
      g = g + wd * p
      if trust is None:
        return g
      w_norm, g_norm = _norm(p), _norm(g)
      safe = jnp.where(g_norm > 0, g_norm, 1.0)
      q = jnp.where((w_norm > 0) & (g_norm > 0), trust * w_norm / safe, 1.0)
      return g * q

    def decay(name: str, g: jax.Array, p: jax.Array) -> jax.Array:
      return g if re.search(UNDECAYED, name) else per_layer(one)(name, g, p)

    return map_named(decay, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def freezable(
  inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """While `frozen`, keeps the leaves and the whole state of `inner`.

  So moments do not decay and Adam's step count starts when the leaves thaw,
  as for PyTorch parameters without a gradient.
  """

  def update(updates, state, params=None, *, frozen, **extra):
    moved, new_state = inner.update(updates, state, params, **extra)
    hold = lambda old, new: jnp.where(frozen, old, new)
    zeros = jax.tree.map(lambda u: jnp.where(frozen, 0.0, u), moved)
    return zeros, jax.tree.map(hold, state, new_state)

  return optax.GradientTransformationExtraArgs(inner.init, update)


class Optimizer(NamedTuple):
  """Recipe of an update; `build` makes the optax transformation.

  Attributes:
    name: "adamw", "sgd" or "lars".
    clip: norm limit, 0 = none.
    clip_by: "tensor" or "global".
    betas: of Adam.
    eps: of Adam, outside the root, after bias correction.
    sgd_momentum: of SGD and LARS.
  """

  name: str = "adamw"
  clip: float = 3.0
  clip_by: str = "tensor"
  betas: tuple[float, float] = (0.9, 0.999)
  eps: float = 1e-8
  sgd_momentum: float = 0.9

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> Self:
    """Reads the section `optim`.

    Raises:
      InputError: an unknown optimiser or kind of clip.
    """
    o = config.optim
    for key, known in (("optimizer", OPTIMIZERS), ("clip_by", CLIPS)):
      if o[key] not in known:
        raise InputError(
          f'optim.{key} "{o[key]}" is unknown: use {", ".join(known)}'
        )
    return cls(
      name=o.optimizer,
      clip=o.clip,
      clip_by=o.clip_by,
      betas=tuple(o.betas),
      eps=o.eps,
      sgd_momentum=o.sgd_momentum,
    )

  def build(
    self, *, frozen_at_start: str | None = None, untrained: str | None = None
  ) -> optax.GradientTransformationExtraArgs:
    """The chain clip -> freeze -> rule; update(..., lr=, wd=, frozen=).

    Args:
      frozen_at_start: regex of leaves that hold while `frozen` is true.
      untrained: regex of leaves that never move.
    """

    def label(name: str, _: jax.Array) -> str:
      if untrained and re.search(untrained, name):
        return "untrained"
      if frozen_at_start and re.search(frozen_at_start, name):
        return "freezable"
      return "free"

    groups = optax.partition(
      {
        "free": self._rule(),
        "freezable": freezable(self._rule()),
        "untrained": optax.set_to_zero(),
      },
      lambda params: map_named(label, params),
    )
    if not self.clip:
      return groups
    clip = clip_per_tensor(self.clip)
    if self.clip_by == "global":
      clip = optax.clip_by_global_norm(self.clip)
    return optax.chain(clip, groups)

  def _rule(self) -> optax.GradientTransformationExtraArgs:
    if self.name == "adamw":
      b1, b2 = self.betas
      adam = optax.scale_by_adam(b1=b1, b2=b2, eps=self.eps)
      return optax.chain(adam, scale_by_rates(decoupled=True))
    trust = 0.001 if self.name == "lars" else None
    return optax.chain(
      coupled_decay(trust=trust),
      optax.trace(decay=self.sgd_momentum),
      scale_by_rates(decoupled=False),
    )


def ema(teacher: Params, params: Params, momentum: jax.Array) -> Params:
  """momentum * teacher + (1 - momentum) * student, leaf by leaf.

  Args:
    teacher: tree whose leaf paths all exist in `params`.
    params: student.
    momentum: [] float32.
  """
  students = {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  return map_named(
    lambda name, t: momentum * t + (1 - momentum) * students[name], teacher
  )
