"""Progress line of a run, and its speed for the log."""

import collections
import contextlib
import logging as python_logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import tqdm
from absl import logging

T = TypeVar("T")

SPEED_WINDOW_STEPS = 50  # steps over which speed is averaged
LEAST_STEPS = 5  # steps before the time left is estimated


@contextlib.contextmanager
def _logging_above_bars() -> Iterator[None]:
  """Log lines inside do not break the bars of a terminal."""
  # absl writes to sys.stderr whatever the stream of its handler.
  handler = logging.get_absl_handler().python_handler
  before = handler.emit

  def emit(record: python_logging.LogRecord) -> None:
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
      before(record)

  handler.emit = emit
  try:
    yield
  finally:
    handler.emit = before


class Progress(contextlib.AbstractContextManager):
  """Progress of a run: loss, images per second and the time left.

  The speed and the time left need a few steps after the first.

  A tqdm bar on a terminal, otherwise a log line every `every_seconds`; silent
  on all processes but the first.
  """

  def __init__(
    self,
    total: int,
    initial: int,
    desc: str,
    *,
    images_per_step: int,
    every_seconds: float = 30.0,
  ):
    """Starts the clock.

    Args:
      total: steps at the end; initial: steps already done.
      desc: label of the line.
      images_per_step: global batch size, for images/s.
      every_seconds: minimum time between log lines without a terminal.
    """
    self._total, self._desc = total, desc
    self._images_per_step = images_per_step
    self._every_seconds = every_seconds
    self._silent = jax.process_index() != 0
    self._times = collections.deque(maxlen=SPEED_WINDOW_STEPS + 1)
    self._logged = -math.inf
    self._bar: tqdm.tqdm | None = None
    self._exit = contextlib.ExitStack()
    if not self._silent and initial < total:
      logging.info("compiling the %s step: the first one takes longest", desc)
    if not self._silent and sys.stderr.isatty():
      self._exit.enter_context(_logging_above_bars())
      self._bar = tqdm.tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit="step",
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f} % |{bar}| {n}/{total}{postfix}",
      )

  def update(self, step: int, loss: float) -> None:
    """Reports that `step` steps are done, the last one with `loss`."""
    if self._silent:
      return
    now = time.monotonic()
    self._times.append((now, step))
    text = self._text(loss)
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
    elif now - self._logged >= self._every_seconds or step >= self._total:
      self._logged = now
      logging.info("%s %d/%d, %s", self._desc, step, self._total, text)

  def _text(self, loss: float) -> str:
    """Loss, speed over the window and time left at that speed.

    The first step, which is compiled, is in neither.
    """
    (start, first), (end, last) = self._times[0], self._times[-1]
    text = f"loss {loss:.4f}"
    if last - first < min(LEAST_STEPS, self._total - first):
      return text
    steps_per_second = (last - first) / max(end - start, 1e-9)
    if not steps_per_second:
      return text
    left = (self._total - last) / steps_per_second
    speed = steps_per_second * self._images_per_step
    time_left = tqdm.tqdm.format_interval(left)
    return f"{text}, {speed:.0f} images/s, {time_left} left"

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the bar, leaving its last state on the terminal."""
    if self._bar is not None:
      self._bar.refresh()
      self._bar.close()
    self._exit.close()


def track(
  items: Iterable[T], total: int, desc: str, *, every_seconds: float = 30.0
) -> Iterator[T]:
  """Yields the items, with a bar on a terminal, otherwise with log lines.

  Args:
    items: passed on one by one.
    total: how many there are.
    desc: label of the line.
    every_seconds: minimum time between log lines.
  """
  if jax.process_index():
    yield from items
  elif sys.stderr.isatty():
    with _logging_above_bars():
      yield from tqdm.tqdm(items, desc=desc, total=total, dynamic_ncols=True)
  else:
    logged = time.monotonic()
    for done, item in enumerate(items, start=1):
      yield item
      if time.monotonic() - logged >= every_seconds or done == total:
        logged = time.monotonic()
        logging.info("%s %d/%d batches", desc, done, total)


class Clock:
  """Images per second and the share of time spent waiting for data.

  Evaluations and saves are excluded.
  """

  def __init__(self, batch_size: int) -> None:
    self._batch_size = batch_size
    self._steps, self._waited = 0, 0.0
    self._since = time.perf_counter()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as waiting for data."""
    begin = time.perf_counter()
    yield
    self._waited += time.perf_counter() - begin

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time inside."""
    begin = time.perf_counter()
    yield
    self._since += time.perf_counter() - begin

  def step(self) -> None:
    """Counts one more batch."""
    self._steps += 1

  def lap(self) -> dict[str, float]:
    """Rates since the last lap: img_per_s, data_wait (0-1)."""
    now = time.perf_counter()
    spent = max(now - self._since, 1e-9)
    rates = {
      "img_per_s": self._steps * self._batch_size / spent,
      "data_wait": self._waited / spent,
    }
    self._steps, self._waited, self._since = 0, 0.0, now
    return rates
