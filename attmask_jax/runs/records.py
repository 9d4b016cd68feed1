"""Reads run directories: metrics, results.json, evals.jsonl, damaged or not."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from attmask_jax.runs import metrics


def append(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Adds the record of an evaluation to FOLDER/evals.jsonl, one line."""
  with (folder / "evals.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps(record) + "\n")


def read(
  folder: pathlib.Path, problems: list[str] | None = None
) -> list[dict[str, Any]]:
  """Records of evals.jsonl and results.json, in order of writing.

  If an evaluation was repeated with the same settings on the same weights, only
  the last record is returned.

  Args:
    folder: run or evaluation directory.
    problems: receives a sentence for each damaged file or line.
  """
  problems = [] if problems is None else problems
  entries = []
  path = folder / "evals.jsonl"
  if path.is_file():
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
      try:
        entries.append(dict(json.loads(line)))
      except (ValueError, TypeError):
        problems.append(f"{path.name} line {number} is damaged.")
  own = read_json(folder / "results.json", problems)
  latest = {}
  for record in [*entries, *([own] if own else [])]:
    weights = record.get("weights") or {}
    key = json.dumps(
      [
        record.get("evaluation"),
        weights.get("digest"),
        weights.get("network"),
        record.get("config"),
      ]
    )
    latest.pop(key, None)  # a later record moves to the end
    latest[key] = record
  return list(latest.values())


def read_json(path: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
  """A JSON object, or None if the file is missing or damaged.

  Args:
    path: of the file.
    problems: receives a sentence if it is damaged.
  """
  if not path.is_file():
    return None
  try:
    return dict(json.loads(path.read_text()))
  except (ValueError, TypeError, OSError):
    problems.append(f"{path.name} is damaged.")
    return None


def read_metrics(
  path: pathlib.Path, problems: list[str]
) -> list[dict[str, Any]]:
  """Lines of a metrics.jsonl; damaged ones are left out and reported.

  Args:
    path: of the file, which may be missing.
    problems: receives a sentence if lines are damaged.
  """
  if not path.is_file():
    return []
  lines, damaged = [], 0
  for line in path.read_bytes().splitlines():
    try:
      record = json.loads(line)
      lines.append({k: metrics.decode(v) for k, v in record.items()})
    except (ValueError, AttributeError):
      damaged += 1
  if damaged:
    problems.append(f"{damaged} lines of {path.name} are damaged.")
  return [line for line in lines if isinstance(line.get("step"), int)]


def count(config: Mapping[str, Any], key: str) -> int:
  """A whole number above 0 of a flat config; 0 if it does not hold one."""
  value = config.get(key)
  known = isinstance(value, int | float) and 0 < value < 2**63
  return int(value) if known else 0


def steps_per_epoch(config: Mapping[str, Any]) -> int:
  """Of a flat config; 0 if it does not say."""
  try:
    return int(config["data.images"]) // int(config["data.batch_size"])
  except (KeyError, TypeError, ValueError, ZeroDivisionError):
    return 0
