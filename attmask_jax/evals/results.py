"""Writes the result of an evaluation: results.json, a table, report pages."""

import datetime
import json
import math
import pathlib
import pickle
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from attmask_jax import atomic
from attmask_jax.evals.job import Job, Result
from attmask_jax.runs import config as run_config
from attmask_jax.runs import records, report


def everywhere(result: Result) -> Result:
  """The result of the first process, on every process."""
  if jax.process_count() == 1:
    return result
  broadcast = multihost_utils.broadcast_one_to_all
  content = np.frombuffer(pickle.dumps(result), np.uint8)
  size = int(broadcast(np.array(len(content))))
  content = np.resize(content, size)  # other processes only need the shape
  return pickle.loads(np.asarray(broadcast(content), np.uint8).tobytes())


def write(job: Job, result: Result) -> None:
  """Writes results.json and both report pages; prints the table."""
  record = _record(job, result)
  path = job.folder / "results.json"
  _remove_figures(path, record["figures"])
  atomic.write_json(path, record)
  print(_text(result))
  run_dir = None if job.weights is None else job.weights.run_dir
  if run_dir is not None:
    try:
      records.append(run_dir, record)
      report.write(run_dir)
    except OSError as error:  # someone else's run, read-only
      logging.warning("%s is not updated: %s", run_dir, error)
  page = report.write(job.folder)
  logging.info("wrote %s and %s", path, page)


def with_notes(job: Job, result: Result, warning: str) -> Result:
  """The result with notes on its classifier and pooling.

  Args:
    job: whose classifier may have been trained for it alone.
    result: of the evaluation.
    warning: see `base.Method.pool_warning`.
  """
  notes, classifier = result.notes, job.classifier
  if warning:
    notes = (f"{warning[0].upper()}{warning[1:]}.", *notes)
  if classifier is not None and classifier.trained_here:
    note = (
      "No probe was given: one was trained for "
      f"{classifier.trained_here} epochs, which is short."
    )
    notes = (note, *notes)
  return result._replace(notes=notes)


def _remove_figures(path: pathlib.Path, kept: list[str]) -> None:
  """Deletes the figures of the replaced results, except those in `kept`."""
  if path.exists():
    for name in set(json.loads(path.read_text()).get("figures", ())):
      if name not in kept:
        (path.parent / name).unlink(missing_ok=True)


def _record(job: Job, result: Result) -> dict[str, Any]:
  """Content of results.json, see docs/evaluation.md."""
  config, source, classifier = job.config, job.weights, job.classifier
  return {
    "evaluation": config.evals.name,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "values": {k: _json(v) for k, v in result.values.items()},
    "counts": {k: int(v) for k, v in result.counts.items()},
    "table": {
      "headings": list(result.table.headings),
      "rows": [list(row) for row in result.table.rows],
    },
    "figures": [
      str(pathlib.Path(figure).relative_to(job.folder))
      for figure in result.figures
    ],
    "notes": list(result.notes),
    "weights": source
    and {
      "where": source.where,
      "network": source.network,
      "step": source.step,
      "digest": source.digest,
      "method": source.config.method.name,
    },
    "classifier": classifier
    and {"where": classifier.where, "digest": classifier.digest},
    "folder": str(job.folder.resolve()),
    "config": run_config.flat_config(config),
  }


def _json(value: float) -> float | str:
  """A number as a valid JSON value."""
  return float(value) if math.isfinite(value) else str(value)


def _text(result: Result) -> str:
  """The table in aligned columns, then the notes."""
  rows = [result.table.headings, *result.table.rows]
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for row in rows:
    first, *rest = (
      cell.ljust(w) if i == 0 else cell.rjust(w)
      for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    lines.append("  ".join([first, *rest]).rstrip())
  lines.insert(1, "-" * len(lines[0]))
  return "\n".join([*lines, *result.notes])
