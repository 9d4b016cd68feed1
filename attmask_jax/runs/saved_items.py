"""Reads the items of a checkpoint, and says in one sentence what is damaged."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from absl import logging

from attmask_jax import Params
from attmask_jax.errors import DamagedError, InputError

ARRAY_ITEMS = ("params", "teacher", "train", "epoch")


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator[None]:
  """Turns what Orbax raises on damaged files into one sentence.

  It raises nearly anything, down to a bare Exception; what comes from the
  device, such as a lack of memory, passes through.

  Args:
    folder: of a checkpoint, or of one of its items.

  Raises:
    DamagedError: in the place of errors about the files.
  """
  try:
    yield
  except (InputError, MemoryError, RuntimeError):
    raise
  except Exception as error:
    reason = first_line(error)[:200]
    raise DamagedError(f"checkpoint {folder} is damaged ({reason})") from error


def check_whole(folder: pathlib.Path) -> None:
  """Makes sure that every item of a checkpoint is there; reads no arrays.

  Args:
    folder: RUN/checkpoints/STEP.

  Raises:
    DamagedError: with the first item that is missing.
  """
  path = folder / "_CHECKPOINT_METADATA"
  try:
    items = sorted(json.loads(path.read_text())["item_handlers"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DamagedError(f"{path} cannot be read ({error})") from error
  for item in items:
    # Orbax writes this file of an item last.
    last = "_METADATA" if item in ARRAY_ITEMS else "*"
    if not any((folder / item).glob(last)):
      raise DamagedError(f"{folder / item} is missing or not complete")


def prepare(folder: pathlib.Path) -> None:
  """Sets aside what Orbax reads of all checkpoints, and cannot read of one.

  It would open none of them. Without metrics a checkpoint is not the best one;
  without its description it is damaged, see `check_whole`.

  Args:
    folder: RUN/checkpoints.
  """
  for path in folder.glob("*/metrics/metrics"):
    try:
      values = json.loads(path.read_text()).values()
      damaged = not all(isinstance(x, int | float) for x in values)
    except (ValueError, AttributeError):  # no JSON, not UTF-8, no object
      damaged = True
    if damaged:
      _set_aside(path)
  names = ocp.path.step.standard_name_format()
  for step in names.find_all(folder.absolute()) if folder.is_dir() else ():
    try:
      _ = step.commit_timestamp  # checks the types of all values
    except Exception:  # values of wrong types and sizes cause many
      _set_aside(folder / step.path.name / "_CHECKPOINT_METADATA")


def _set_aside(path: pathlib.Path) -> None:
  logging.warning("%s is damaged: kept as %s.damaged", path, path.name)
  path.rename(f"{path}.damaged")


def read_item(folder: pathlib.Path, like: Params) -> Params:
  """Arrays of one item of a checkpoint, on the shardings of `like`.

  Unlike Orbax's checkpointers it waits for no other process at the end, which
  may have failed.

  Args:
    folder: RUN/checkpoints/STEP/ITEM.
    like: ShapeDtypeStructs with shardings.

  Raises:
    Exception: nearly any, see `reading`.
  """
  with contextlib.closing(ocp.StandardCheckpointHandler()) as reader:
    return reader.restore(folder, args=ocp.args.StandardRestore(like))


def first_line(error: Exception) -> str:
  """Of the message; the name of the error if it has none."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
