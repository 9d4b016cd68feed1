"""Logs of a run: metrics.jsonl, TensorBoard, wandb; running means."""

import contextlib
import importlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any, Self, TextIO

import jax
import numpy as np
from absl import logging
from PIL import Image

from attmask_jax.errors import InputError


class MetricsWriter(contextlib.AbstractContextManager):
  """Writes the numbers of a run; only process 0 of a run writes anything.

  `workdir/metrics.jsonl` holds one JSON object per call of `write`:
  {"step": s, "train/loss": ...}. Finite floats read back bit for bit; others
  are written as the strings "nan", "inf", "-inf", so every line is valid JSON.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    resume_step: int | None,
    tensorboard: bool = True,
    wandb: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
  ):
    """Opens the logs of a run, or continues them.

    Args:
      workdir: run directory, created if missing.
      resume_step: the run continues after this many steps: later lines of an
        earlier attempt are dropped. -1 drops all; None keeps all and appends.
      tensorboard: also write events to workdir/tensorboard, if tensorboardX
        is installed.
      wandb: arguments of `wandb.init` (project, name, ...); None = no wandb.
      config: of the run, flat; the hyperparameters of TensorBoard and wandb.

    Raises:
      InputError: wandb is requested but not installed, or metrics.jsonl is
        damaged.
    """
    # On every process: a missing package must not stop process 0 alone.
    wandb_module = None if wandb is None else import_wandb()
    self._file: TextIO | None = None
    self._events: Any = None
    self._wandb: Any = None
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "metrics.jsonl"
    if path.exists():
      _trim(path, resume_step)
    self._file = path.open("a", encoding="utf-8")
    if tensorboard:
      self._events = _open_events(workdir / "tensorboard", resume_step)
    if self._events is not None and config:
      _write_hparams(self._events, config)
    if wandb_module is not None:
      options = dict(wandb or {}) | {"config": dict(config or {})}
      self._wandb = _open_wandb(wandb_module, workdir, options)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Logs named numbers (Python, numpy or 0-d jax) after `step` steps."""
    if self._file is None:
      return
    numbers = {name: _number(value) for name, value in values.items()}
    record = {"step": int(step)} | {k: _encode(v) for k, v in numbers.items()}
    # One call and one flush per line: a kill can only cut the last line.
    self._file.write(json.dumps(record, allow_nan=False) + "\n")
    self._file.flush()
    if self._events is not None:
      for name, value in numbers.items():
        self._events.add_scalar(name, value, int(step))
    if self._wandb is not None:
      self._wandb.log({"step": int(step), **numbers})

  def write_image(
    self, step: int, name: str, path: str | os.PathLike[str]
  ) -> None:
    """Logs an image file to TensorBoard and wandb, not to metrics.jsonl."""
    if self._events is not None:
      with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
      self._events.add_image(name, pixels, int(step), dataformats="HWC")
    if self._wandb is not None:
      image = self._wandb.Image(os.fspath(path))
      self._wandb.log({"step": int(step), name: image})

  def flush(self) -> None:
    """Flushes everything written so far to disk, e.g. before a checkpoint."""
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())
    if self._events is not None:
      self._events.flush()

  def __exit__(self, *error: object) -> None:
    self.close()

  def close(self) -> None:
    """Flushes and closes; a second call does nothing."""
    self.flush()
    if self._file is not None:
      self._file.close()
    if self._events is not None:
      self._events.close()
    if self._wandb is not None:
      self._wandb.finish()
    self._file = self._events = self._wandb = None


def percent(value: float) -> str:
  """An accuracy in percent as every log, table and page writes it: "12.25"."""
  return f"{value:.2f}"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
  """The records of a metrics.jsonl, in file order, as they were written.

  A last line that a kill cut short is left out.

  Raises:
    InputError: the file is missing, or a line before the last is damaged.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"No metrics at {path}: give the run's metrics.jsonl.")
  return [
    {name: decode(value) for name, value in record.items()}
    for _, record in _read_lines(path)
  ]


class Averager:
  """Plain means of named floats, for example over the steps of an epoch.

  Sums are Python floats added in call order, and JSON preserves `state` bit for
  bit: a run that stops within an epoch and resumes gives the same means.
  """

  def __init__(self) -> None:
    self._sums: dict[str, float] = {}
    self._counts: dict[str, int] = {}

  def add(self, values: Mapping[str, float]) -> None:
    """Adds one value to each name; the names may differ between calls."""
    for name, value in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + float(value)
      self._counts[name] = self._counts.get(name, 0) + 1

  def mean(self) -> dict[str, float]:
    """Sum over count of every name seen since the last reset."""
    return {name: s / self._counts[name] for name, s in self._sums.items()}

  def reset(self) -> None:
    """Clears all sums and counts."""
    self._sums.clear()
    self._counts.clear()

  def state(self) -> dict[str, Any]:
    """The state to save, as valid JSON values."""
    return {
      "sums": {name: _encode(total) for name, total in self._sums.items()},
      "counts": dict(self._counts),
    }

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> Self:
    """An averager that continues from a saved `state`."""
    averager = cls()
    averager._sums = {k: decode(v) for k, v in state["sums"].items()}
    averager._counts = {k: int(v) for k, v in state["counts"].items()}
    return averager


def _number(value: Any) -> float | int:
  """A Python, numpy or jax scalar as a Python number."""
  if isinstance(value, (int, np.integer)):
    return int(value)
  return float(value)


def _encode(value: float | int) -> float | int | str:
  """A number as a JSON value; json writes finite floats with repr."""
  return value if math.isfinite(value) else str(value)


def decode(value: float | int | str) -> float | int:
  """A number from its JSON value, "nan" and the like included."""
  return float(value) if isinstance(value, str) else value


def _parse(line: bytes) -> dict[str, Any] | None:
  """A line of metrics.jsonl as a dict, None when it is damaged."""
  try:
    record = json.loads(line)
    for value in record.values():
      float(decode(value))
  except (ValueError, TypeError, AttributeError, OverflowError):
    return None  # not JSON, not UTF-8, no object, or of other values
  return record if type(record.get("step")) is int else None


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """Lines of a metrics.jsonl, raw and parsed, without a truncated last one."""
  lines = path.read_bytes().splitlines()
  parsed = [(line, _parse(line)) for line in lines]
  while parsed and parsed[-1][1] is None:
    parsed.pop()
  for number, (_, record) in enumerate(parsed, start=1):
    if record is None:
      raise InputError(
        f"{path} line {number} is not a metrics record: repair or remove it."
      )
  return parsed


def _trim(path: pathlib.Path, resume_step: int | None) -> None:
  """Drops a truncated last line and, if given, lines after `resume_step`."""
  kept = [
    line
    for line, record in _read_lines(path)
    if resume_step is None or record["step"] <= resume_step
  ]
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("wb") as file:
    file.writelines(line + b"\n" for line in kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _open_events(folder: pathlib.Path, resume_step: int | None) -> Any:
  """A tensorboardX writer, None (and a warning) if it is not installed."""
  try:
    import tensorboardX  # optional
  except ImportError:
    logging.warning(
      "tensorboardX is not installed: no TensorBoard events are written"
      " (metrics.jsonl is)."
    )
    return None
  # TensorBoard hides what an earlier attempt logged at purge_step or later.
  purge_step = None if resume_step is None else resume_step + 1
  return tensorboardX.SummaryWriter(str(folder), purge_step=purge_step)


def _write_hparams(events: Any, config: Mapping[str, Any]) -> None:
  """Writes the config for TensorBoard's page of hyperparameters.

  `SummaryWriter.add_hparams` would write a second run beside this one.
  """
  from tensorboardX.summary import hparams

  plain = {
    key: value if isinstance(value, (bool, int, float, str)) else str(value)
    for key, value in config.items()
  }
  for summary in hparams(plain, {})[:2]:  # names, values; the run goes on
    events.file_writer.add_summary(summary)


def import_wandb() -> Any:
  """The wandb module, or a clear error."""
  try:
    return importlib.import_module("wandb")
  except ImportError:
    raise InputError(
      "Logging to wandb was requested but the package is not installed: run"
      " `pip install wandb` or switch it off."
    ) from None


def _open_wandb(module: Any, workdir: pathlib.Path, options: dict) -> Any:
  """Starts the wandb run of this directory, or continues it."""
  id_file = workdir / "wandb_id"
  if not id_file.exists():
    id_file.write_text(uuid.uuid4().hex[:12])
  run = {"id": id_file.read_text().strip(), "resume": "allow"}
  module.init(**{**run, "dir": os.fspath(workdir), **options})
  # wandb's own step must never decrease; ours does when a run resumes.
  module.define_metric("step")
  module.define_metric("*", step_metric="step")
  return module
