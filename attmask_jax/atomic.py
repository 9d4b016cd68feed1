"""Atomic file writes."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary path whose file then replaces `path` in one move.

  Creates the folder; leaves nothing behind if writing fails.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Replaces a file by indented JSON, see `replaced`."""
  with replaced(path) as temporary:
    temporary.write_text(json.dumps(content, indent=2) + "\n")
