"""Schedules of learning rate, weight decay and teacher momentum, in float64.

Source: cosine_scheduler of DINO, iBOT and AttMask.
"""

import dataclasses
import math
from typing import Self

import ml_collections
import numpy as np

from attmask_jax import schema
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
  """Half a cosine per epoch, from `base`; never quite reaches `final`.

  Source: CosineAnnealingLR as used in eval_linear.py of AttMask.
  """
  return final + 0.5 * (base - final) * (1 + math.cos(math.pi * epoch / total))


def late_epoch_cosine(
  epoch: int,
  *,
  base: float,
  final: float,
  total: int,
  warmup: float,
  start: float,
) -> float:
  """Linear warm-up from `start` and half a cosine, one epoch late.

  quirk: the reference sets the rate after each epoch, so epochs 0 and 1 both
  run at `start`; the cosine counts from epoch 0, not from the warm-up's end.

  Source: timm's CosineLRScheduler as used in AttMask's fine-tuning.
  """
  e = max(epoch - 1, 0)
  if e < warmup:
    return start + e * (base - start) / warmup
  return epoch_cosine(e, base=base, final=final, total=total)


@dataclasses.dataclass(frozen=True)
class RateKeys:
  """Learning rate and moving average."""

  lr_per_256: float = schema.key(
    5e-4, "peak learning rate for a batch of 256; scaled linearly", low=0
  )
  teacher_momentum: float = schema.key(
    0.996, "of the moving average, at the start of a cosine", low=0, high=1
  )
  teacher_momentum_end: float = schema.key(1.0, "at its end", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class Schedules:
  """Learning rate, weight decay, teacher momentum and freezing per step.

  Attributes:
    lr: peak learning rate, already scaled by the batch.
    momentum: (start, end) of the teacher momentum, a cosine per step.
    steps_per_epoch: S.
  """

  lr: float
  momentum: tuple[float, float]
  steps_per_epoch: int
  epochs: int = schema.key(100, "length of the run", low=1)
  steps: int = schema.key(
    0, "length of the run in place of epochs; 0 = by epochs", low=0
  )
  min_lr: float = schema.key(
    1e-6, "learning rate at the end, not scaled by the batch", low=0
  )
  warmup_epochs: float = schema.key(
    10.0, "linear warm-up of the learning rate", low=0
  )
  schedule: str = schema.key(
    "cosine",
    "of the learning rate: cosine and smooth_cosine per step, the others per "
    "epoch, see training/schedules.py",
    choices=SCHEDULES,
  )
  warmup_lr: float = schema.key(
    0.0, "initial rate of late_epoch_cosine, not scaled by the batch"
  )
  weight_decay: tuple[float, float] = schema.key(
    (0.04, 0.4), "at the start and the end of a cosine", low=0
  )
  freeze_epochs: int = schema.key(
    1, "epochs in which the prototype layer is frozen", low=0
  )

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Scales `optim.lr_per_256` by the global batch.

    Raises:
      InputError: a warm-up longer than the run, or a non-positive length.
    """
    o = config.optim
    schema.check("optim", o, RateKeys)
    return cls(
      lr=o.lr_per_256 * config.data.batch_size / 256.0,
      momentum=(o.teacher_momentum, o.teacher_momentum_end),
      steps_per_epoch=steps_per_epoch,
      **schema.take(cls, o),
    )

  def __post_init__(self) -> None:
    schema.check("optim", vars(self), type(self))
    if self.warmup_steps > self.total_steps:
      length = f"epochs {self.epochs}"
      if self.steps:
        length = f"steps {self.steps} ({self.steps_per_epoch} per epoch)"
      raise InputError(
        f"optim.warmup_epochs {self.warmup_epochs:g} is longer than "
        f"optim.{length}: shorten the warm-up or train longer"
      )
    if self.schedule == "epoch_cosine" and self.warmup_epochs:
      raise InputError(
        f"optim.warmup_epochs {self.warmup_epochs:g}: the schedule "
        "epoch_cosine has no warm-up, set 0"
      )

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.steps or self.epochs * self.steps_per_epoch

  @property
  def warmup_steps(self) -> int:
    """Steps of the learning rate's warm-up."""
    return round(self.warmup_epochs * self.steps_per_epoch)

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
      ends |= dict(warmup=self.warmup_steps, total=self.total_steps)
      return shape(step, **ends)
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
    """Arguments of the compiled step: `values` in float32, and `frozen`."""
    scalars = {k: np.float32(v) for k, v in self.values(step).items()}
    epoch = step // self.steps_per_epoch
    return scalars | {"frozen": np.bool_(epoch < self.freeze_epochs)}
