"""Schedules: rates and temperatures as functions of step and epoch, float64.

Source: cosine_scheduler and iBOTLoss of DINO, iBOT and AttMask.
"""

import dataclasses
import math
from typing import Self

import ml_collections
import numpy as np

from attmask_jax.errors import InputError

SCHEDULES = ("cosine", "smooth_cosine", "epoch_cosine", "late_epoch_cosine")


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


def smooth_cosine(
  step: int, *, base: float, final: float, warmup: int, total: int
) -> float:
  """Warm-up `base * step / warmup`, then a half cosine; arguments of `cosine`.

  Unlike `cosine` it reaches `base` once, at step `warmup`.

  Source: adjust_learning_rate of MoCo v3, ExtreMA and the official MAE.
  """
  if step < warmup:
    return base * step / warmup
  part = (step - warmup) / (total - warmup)
  return final + 0.5 * (base - final) * (1 + math.cos(math.pi * part))


def epoch_cosine(epoch: int, *, base: float, final: float, total: int) -> float:
  """Half a cosine in steps of an epoch, from `base`; never quite `final`.

  Source: CosineAnnealingLR as eval_linear.py of AttMask steps it.
  """
  return final + 0.5 * (base - final) * (1 + math.cos(math.pi * epoch / total))


def late_epoch_cosine(
  epoch: int,
  *,
  base: float,
  final: float,
  total: int,
  warmup: int,
  start: float,
) -> float:
  """Linear warm-up from `start` and half a cosine, one epoch late.

  quirk: the reference sets the rate after each epoch, so epochs 0 and 1 both
  run at `start`; the cosine counts from epoch 0, not from the warm-up's end.

  Source: timm's CosineLRScheduler as the fine-tuning of AttMask steps it.
  """
  e = max(epoch - 1, 0)
  if e < warmup:
    return start + e * (base - start) / warmup
  return epoch_cosine(e, base=base, final=final, total=total)


@dataclasses.dataclass(frozen=True)
class Schedules:
  """Learning rate, weight decay, teacher momentum and freezing per step.

  Attributes:
    lr: peak learning rate, already scaled by the batch.
    min_lr: learning rate at the end, not scaled by the batch.
    warmup_epochs: linear warm-up of the learning rate.
    weight_decay: (start, end).
    momentum: (start, end) of the teacher momentum, a cosine per step.
    freeze_epochs: epochs in which the method's `frozen_at_start` leaves hold.
    epochs: length of the run.
    steps_per_epoch: S.
    schedule: of the learning rate, one of SCHEDULES.
    warmup_lr: learning rate at the start of "late_epoch_cosine".
  """

  lr: float
  min_lr: float
  warmup_epochs: int
  weight_decay: tuple[float, float]
  momentum: tuple[float, float]
  freeze_epochs: int
  epochs: int
  steps_per_epoch: int
  schedule: str = "cosine"
  warmup_lr: float = 0.0

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
    if o.schedule not in SCHEDULES:
      raise InputError(
        f'optim.schedule "{o.schedule}" is unknown: use {", ".join(SCHEDULES)}'
      )
    if o.schedule == "epoch_cosine" and o.warmup_epochs:
      raise InputError(
        f"optim.warmup_epochs {o.warmup_epochs}: the schedule epoch_cosine has "
        "no warm-up, set 0"
      )
    return cls(
      lr=o.lr_per_256 * config.data.batch_size / 256.0,
      min_lr=o.min_lr,
      warmup_epochs=o.warmup_epochs,
      weight_decay=tuple(o.weight_decay),
      momentum=(o.teacher_momentum, o.teacher_momentum_end),
      freeze_epochs=o.freeze_epochs,
      epochs=o.epochs,
      steps_per_epoch=steps_per_epoch,
      schedule=o.schedule,
      warmup_lr=o.warmup_lr,
    )

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.epochs * self.steps_per_epoch

  def values(self, step: int) -> dict[str, float]:
    """lr, wd and momentum of one step in float64."""
    total = self.total_steps
    whole_run = lambda pair: cosine(
      step, base=pair[0], final=pair[1], warmup=0, total=total
    )
    return {
      "lr": self.learning_rate(step),
      "wd": whole_run(self.weight_decay),
      "momentum": whole_run(self.momentum),
    }

  def learning_rate(self, step: int) -> float:
    """Learning rate of one step in float64."""
    ends = dict(base=self.lr, final=self.min_lr)
    if self.schedule in ("cosine", "smooth_cosine"):
      shape = cosine if self.schedule == "cosine" else smooth_cosine
      warmup = self.warmup_epochs * self.steps_per_epoch
      return shape(step, **ends, warmup=warmup, total=self.total_steps)
    epoch = step // self.steps_per_epoch
    if self.schedule == "epoch_cosine":
      return epoch_cosine(epoch, **ends, total=self.epochs)
    return late_epoch_cosine(
      epoch,
      **ends,
      total=self.epochs,
      warmup=self.warmup_epochs,
      start=self.warmup_lr,
    )

  def at(self, step: int) -> dict[str, np.generic]:
    """What the compiled step takes: `values` in float32, and `frozen`."""
    scalars = {k: np.float32(v) for k, v in self.values(step).items()}
    epoch = step // self.steps_per_epoch
    return scalars | {"frozen": np.bool_(epoch < self.freeze_epochs)}
