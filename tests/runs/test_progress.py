"""Progress of a run: the bar, the log lines, and what stands above the bar."""

import io
import logging as python_logging
import sys

import jax
import pytest
from absl import logging

from attmask_jax.runs import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_progress_logs_lines_without_a_terminal(monkeypatch, clock):
  shown = []
  monkeypatch.setattr(logging, "info", lambda text, *a: shown.append(text % a))
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  bar = progress.Progress(200, 100, "train", images_per_step=64)
  with bar:
    for step in range(101, 201):
      clock[0] += 0.5
      bar.update(step, 100 / step)
  # Two steps a second; one line per 30 s = 60 steps, and the last step.
  assert shown == [
    "compiling the train step: the first one takes longest",
    "train 101/200, loss 0.9901",
    "train 161/200, loss 0.6211, 128 images/s, 00:19 left",
    "train 200/200, loss 0.5000, 128 images/s, 00:00 left",
  ]


def test_progress_on_a_terminal(monkeypatch, clock):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with progress.Progress(200, 100, "train", images_per_step=64) as bar:
    for step in range(101, 151):
      clock[0] += 0.5
      bar.update(step, 2.0)
  last = terminal.getvalue().rstrip("\n").split("\r")[-1]
  assert last.startswith("train ") and "75 %" in last and "150/200" in last
  assert "loss 2.0000, 128 images/s, 00:25 left" in last


def test_the_first_step_and_few_steps_give_no_time_left(monkeypatch, clock):
  shown = []
  monkeypatch.setattr(logging, "info", lambda text, *a: shown.append(text % a))
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  with progress.Progress(
    100, 0, "train", images_per_step=64, every_seconds=0
  ) as bar:
    clock[0] += 60  # the first step is compiled for a minute
    for step in range(1, 8):
      clock[0] += 0.5
      bar.update(step, 1.0)
  texts = [line.partition(", loss 1.0000")[2] for line in shown[1:]]
  # Five steps after the first: 128 images/s, and 94 and 93 steps to go.
  assert texts[:5] == [""] * 5
  assert texts[5:] == [
    ", 128 images/s, 00:47 left", ", 128 images/s, 00:46 left"
  ]  # fmt: skip


@pytest.mark.parametrize("part", ["run", "evaluation"])
def test_log_lines_stand_above_the_bar(monkeypatch, clock, part):
  terminal = Terminal()
  handler = logging.get_absl_handler().python_handler
  monkeypatch.setattr(sys, "stderr", terminal)
  record = python_logging.LogRecord("a", 30, "f", 1, "a line", (), None)
  if part == "run":
    with progress.Progress(9, 0, "train", images_per_step=1) as bar:
      bar.update(1, 2.0)
      handler.emit(record)
  else:
    for _ in progress.track(range(1), 1, "k-NN"):
      handler.emit(record)
  before, after = terminal.getvalue().split("a line\n")
  # The bar is cleared: the line starts at the left, on a blank line.
  bar, blank, header = before.split("\r")[-3:]
  assert "|" in bar and blank and not blank.strip()
  assert header.startswith("W") and header.endswith("f:1] ")
  assert "|" in after  # and drawn again below


def test_progress_is_silent_elsewhere(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with progress.Progress(2, 0, "train", images_per_step=1) as bar:
    bar.update(1, 1.0)
  assert terminal.getvalue() == ""
