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


def set_aside_damaged_metrics(folder: pathlib.Path) -> None:
  """Renames metrics that are no numbers, so that a checkpoint has none.

  Orbax reads those of every checkpoint before any of its arrays, and they only
  decide which one is the best.

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
      path.rename(f"{path}.damaged")
      logging.warning(
        "%s is damaged: kept as %s.damaged, and this checkpoint counts as one "
        "that was not evaluated",
        path,
        path.name,
      )


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
