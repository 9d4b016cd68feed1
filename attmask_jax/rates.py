"""Schedules: rates and temperatures as functions of step and epoch, float64.

Source: cosine_scheduler and iBOTLoss of DINO, iBOT and AttMask.
"""

import dataclasses
from typing import Self

import ml_collections
import numpy as np

from attmask_jax.errors import InputError


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
