"""Teacher temperature per epoch.

Source: the temperature schedules of DINOLoss and iBOTLoss in DINO, iBOT and
AttMask.
"""

import dataclasses

import numpy as np

from attmask_jax import schema
from attmask_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ShareKeys:
  """Warm-up of the temperatures as a share of the run."""

  temp_warmup_share: float = schema.key(
    0.0,
    "warm-up of both teacher temperatures as a share of the run, rounded to "
    "epochs; 0 = by temp_warmup_epochs",
    low=0,
    high=1,
  )


def warmup_table(
  start: float, end: float, *, warmup: int, total: int, delay: int = 0
) -> np.ndarray:
  """Value per epoch: `delay` epochs at start, a linear warm-up, then end.

  Returns:
    [total] float64; `end` is reached at epoch delay + warmup - 1.

  Raises:
    InputError: delay and warm-up are longer than the run.
  """
  rest = total - delay - warmup
  if rest < 0:
    raise InputError(
      f"a warm-up of {warmup} epochs after {delay} does not fit optim.epochs "
      f"{total}: lower method.temp_warmup_epochs or train longer"
    )
  ramp = np.linspace(start, end, warmup)
  return np.concatenate([np.full(delay, start), ramp, np.full(rest, end)])
