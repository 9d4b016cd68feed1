"""Teacher temperature per epoch.

Source: the temperature schedules of DINOLoss and iBOTLoss in DINO, iBOT and
AttMask.
"""

import numpy as np

from attmask_jax.errors import InputError


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
