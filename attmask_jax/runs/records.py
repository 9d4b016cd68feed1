"""Evaluation records: results.json, and evals.jsonl of the evaluated run."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any


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
