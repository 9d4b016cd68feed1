"""A trace of some steps of a run, for profilers."""

import contextlib
import pathlib
from typing import Any

import jax
from absl import logging


class Trace(contextlib.AbstractContextManager):
  """Traces whole steps, and ends with its block, however that ends.

  What follows the last step before the next one, such as an evaluation, is in
  the trace, too.
  """

  def __init__(self, folder: pathlib.Path, steps: tuple[int, int]) -> None:
    """Begins nothing yet.

    Args:
      folder: that the trace is written to; made if missing.
      steps: the first and the last, counted from 1; (0, 0) = none.
    """
    self._folder, self._steps = folder, steps
    self._running = False

  def before(self, step: int, state: Any) -> None:
    """Begins or ends the trace before a step.

    Args:
      step: its number, from 1.
      state: arrays of the step before it, which is waited for where the trace
        begins or ends.
    """
    wanted = self._steps[0] <= step <= self._steps[1]
    if wanted == self._running:
      return
    jax.block_until_ready(state)
    if wanted:
      jax.profiler.start_trace(self._folder)
      self._running = True
    else:
      self._end()

  def _end(self) -> None:
    jax.profiler.stop_trace()
    self._running = False
    logging.info("trace: %s", self._folder)

  def __exit__(self, *error: object) -> None:
    if self._running:
      self._end()
