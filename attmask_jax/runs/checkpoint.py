"""Checkpoints of a run: saved and restored with Orbax.

A checkpoint holds the items params, teacher and train (step, aux, optimiser)
as arrays on any mesh, epoch (arrays from which the epoch's scores are computed)
and progress (running sums, as JSON). Evaluation restores single items.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from attmask_jax import Params, trees
from attmask_jax import mesh as meshes
from attmask_jax.errors import DamagedError, InputError, SaveError
from attmask_jax.runs import saved_items


def new_file(workdir: str, name: str) -> pathlib.Path:
  """Path of a file that a directory does not hold yet; makes neither.

  Raises:
    InputError: it does.
  """
  path = pathlib.Path(workdir).expanduser() / name
  if path.exists():
    raise InputError(f"{path} exists: give another --workdir, or remove it")
  return path


def check_workdir(name: str) -> pathlib.Path:
  """Creates the run directory if needed, and returns its path.

  Raises:
    InputError: it cannot be created or written, or is not a local path.
  """
  if "://" in name:
    raise InputError(
      f"workdir {name} is a remote address: mount the bucket and give a path "
      "that all hosts share"
    )
  workdir = pathlib.Path(name).expanduser()
  if workdir.is_file():
    raise InputError(f"{workdir} is a file: give a directory")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise InputError(
      f"{workdir} is not writable ({error.strerror}): give a folder you may "
      "write to"
    ) from error
  return workdir


def steps(workdir: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints of a run directory, sorted."""
  folder = workdir / "checkpoints"
  entries = folder.iterdir() if folder.is_dir() else ()
  return sorted(int(e.name) for e in entries if e.name.isdigit())


@dataclasses.dataclass(frozen=True)
class _LatestWhole(keep.PreservationPolicy):
  """Keeps the newest checkpoint and the newest whole one before it.

  Orbax asks while the newest is still being written.
  """

  folder: pathlib.Path

  def should_preserve(
    self,
    checkpoints: Sequence[Any],
    *,
    context: keep.PreservationContext,
  ) -> Sequence[bool]:
    """One bool per checkpoint, which are sorted by step."""
    preserved = [False] * len(checkpoints)
    preserved[-1:] = [True]
    for i in reversed(range(len(checkpoints) - 1)):
      try:
        saved_items.check_whole(self.folder / str(checkpoints[i].step))
      except DamagedError as error:
        logging.warning("%s", error)
        continue
      preserved[i] = True
      break
    return preserved


class Checkpoints:
  """The checkpoints of one run directory: last two, best and every N steps.

  Attributes:
    latest: step of the newest complete checkpoint, or None.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    keep_steps: Sequence[int] = (),
    best: str = "",
    alone: bool = False,
  ) -> None:
    """Opens or creates `workdir/checkpoints`.

    Args:
      workdir: run directory.
      keep_steps: keep every checkpoint at a multiple of one of these.
      best: name of the metric whose maximum is kept, "" = none.
      alone: whether no other process writes here, see `RunLock.alone`: deletes
        what half-written saves have left.
    """
    self.folder = workdir / "checkpoints"
    policies: list[keep.PreservationPolicy] = [_LatestWhole(self.folder)]
    value = lambda metrics: metrics.get(best, -np.inf)
    if best:
      # Earlier checkpoints may have no metrics, if k-NN was off then.
      policies.append(
        keep.BestN(
          get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
        )
      )
    policies += [keep.EveryNSteps(period) for period in keep_steps]
    if jax.process_index() == 0:
      saved_items.prepare(self.folder)
    meshes.barrier("checkpoints: prepared")
    self._manager = ocp.CheckpointManager(
      self.folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(policies),
        # Makes Orbax store the metrics, so that a resumed run knows its best
        # step; the policies decide which checkpoints are kept.
        best_fn=value if best else None,
        cleanup_tmp_directories=alone,
        enable_async_checkpointing=True,
      ),
      item_handlers={
        **{
          name: ocp.StandardCheckpointHandler()
          for name in saved_items.ARRAY_ITEMS
        },
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    with self._failing():
      try:
        self._manager.close()
      except (ValueError, OSError, RuntimeError) as error:
        if kind is None:
          raise
        logging.error("the last save failed: %s", _reason(error))

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def agreed_latest(self) -> int | None:
    """The `latest` of process 0, which all processes ask for together."""
    step = meshes.from_first(-1 if self.latest is None else self.latest)
    return None if step < 0 else step

  def save(
    self,
    step: int,
    items: dict[str, Params],
    progress: dict[str, Any],
    *,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts writing; the arrays may be donated once this returns.

    Args:
      step: completed steps.
      items: one tree of global arrays per name in saved_items.ARRAY_ITEMS.
      progress: values for JSON.
      metrics: `best` is one of them; a step without metrics is never the best.

    Raises:
      SaveError: no room for it; or the save before failed.
    """
    if step in self._manager.all_steps():
      return
    self._check_room(step, items)
    args = {
      name: ocp.args.StandardSave(tree)
      for name, tree in items.items()
      if jax.tree.leaves(tree)  # Orbax refuses an empty item
    }
    with self._failing():
      self._manager.save(
        step,
        args=ocp.args.Composite(**args, progress=ocp.args.JsonSave(progress)),
        metrics=metrics or {},
        force=True,
      )

  def preempted(self, step: int) -> bool:
    """Whether the cluster asked any process to stop; the same on all."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until what was saved is complete on disk.

    Raises:
      SaveError: it could not be written.
    """
    with self._failing():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _failing(self) -> Iterator[None]:
    """Turns what Orbax raises where it cannot write into one sentence."""
    try:
      yield
    except (ValueError, OSError, RuntimeError) as error:
      raise SaveError(
        f"no checkpoint could be written to {self.folder} ({_reason(error)}): "
        "make room or repair the disk; the same command continues from the "
        "last whole checkpoint"
      ) from error

  def _check_room(self, step: int, items: dict[str, Params]) -> None:
    """Refuses a save that the disk has no room for, before it begins."""
    needed = sum(x.nbytes for x in jax.tree.leaves(items))
    free = shutil.disk_usage(self.folder).free
    if not meshes.from_first(int(free >= needed)):
      raise SaveError(
        f"the checkpoint of step {step} needs {needed / 2**20:.0f} MiB, and "
        f"{free / 2**20:.0f} MiB are free in {self.folder}: make room; the "
        "same command continues from the last whole checkpoint"
      )

  def restore_latest(
    self,
    like: dict[str, Params],
    use: Callable[[dict[str, Params], dict[str, Any]], None],
  ) -> tuple[int, dict[str, Params]]:
    """Reads the newest checkpoint that every process can read.

    Those that are damaged for some process and newer are renamed to
    STEP.damaged.

    Args:
      like: trees of arrays or ShapeDtypeStructs with shardings.
      use: takes the items and the progress; what it cannot use is damaged.

    Returns:
      Its step, and trees on the shardings of `like`.

    Raises:
      InputError: a checkpoint of another architecture, with the first tensor
        that differs; or one that some process does not see.
      DamagedError: none can be read.
    """
    while True:
      step = self.agreed_latest()
      try:
        return step, meshes.together(
          lambda step=step: self._restore(step, like, use)
        )
      except DamagedError as error:
        if len(self._manager.all_steps()) == 1:
          raise DamagedError(
            f"{error}, and there is no older checkpoint: restore it from a "
            "copy, or use another --workdir"
          ) from error
        aside = self._set_aside(step)
        logging.warning(
          "%s: kept as %s, the run continues from step %d",
          error,
          aside,
          self.latest,
        )

  def _set_aside(self, step: int) -> pathlib.Path:
    """Renames a damaged checkpoint; its new path."""
    path = self.folder / str(step)
    names = (f"{step}.damaged{n or ''}" for n in itertools.count())
    aside = next(p for name in names if not (p := self.folder / name).exists())
    meshes.barrier("damaged checkpoint: named")
    if jax.process_index() == 0:
      path.rename(aside)
    meshes.barrier("damaged checkpoint: renamed")
    self._manager.reload()
    return aside

  def _restore(
    self,
    step: int,
    like: dict[str, Params],
    use: Callable[[dict[str, Params], dict[str, Any]], None],
  ) -> dict[str, Params]:
    """Reads this process's part; waits for no other process."""
    wanted = {
      name: tree for name, tree in like.items() if jax.tree.leaves(tree)
    }
    folder = self.folder / str(step)
    if not folder.is_dir():
      raise InputError(
        f"{folder} is not there for this process: --workdir must lie on a disk "
        "that all processes of the run share"
      )
    saved_items.check_whole(folder)
    with saved_items.reading(folder):
      saved = self._manager.item_metadata(step)  # of all items
      for name, tree in wanted.items():
        self._check_shapes(step, name, saved[name], tree)
      items = dict(like)
      for name, tree in wanted.items():
        items[name] = saved_items.read_item(
          folder / name, jax.tree.map(_abstract, tree)
        )
      with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        progress = reader.restore(folder / "progress")
      use(items, progress)
    logging.info("restored step %d of %s", step, self.folder)
    return items

  def _check_shapes(
    self, step: int, name: str, saved: Any, tree: Params
  ) -> None:
    there = {} if saved is None else trees.shapes(saved)
    here = trees.shapes(tree)
    for key in sorted(there.keys() | here.keys()):
      if there.get(key) != here.get(key):
        raise InputError(
          f"checkpoint {self.folder}/{step} is of another architecture: "
          f"{name}/{key} has shape {there.get(key, 'absent')} there and "
          f"{here.get(key, 'absent')} here; use the config it was made with"
        )


def _reason(error: Exception) -> str:
  """The end of the first line, where TensorStore names the cause."""
  line = saved_items.first_line(error).split(" [os_error_code")[0]
  return line[-120:].rsplit(": ", 1)[-1]


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
