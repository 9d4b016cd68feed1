"""Checkpoints of a run: saved and restored with Orbax.

A checkpoint holds the items params, teacher and train (step, aux, optimiser)
as arrays on any mesh, epoch (arrays from which the epoch's scores are computed)
and progress (running sums, as JSON). Evaluation restores single items.
"""

import pathlib
import tempfile
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from attmask_jax import Params, trees
from attmask_jax.errors import InputError

ARRAY_ITEMS = ("params", "teacher", "train", "epoch")


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


class Checkpoints:
  """The checkpoints of one run directory: latest, best and every N steps.

  Attributes:
    latest: step of the newest complete checkpoint, or None.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    keep_steps: int = 0,
    best: str = "",
  ) -> None:
    """Opens or creates `workdir/checkpoints`.

    Args:
      workdir: run directory.
      keep_steps: keep every checkpoint at a multiple of this, 0 = none.
      best: name of the metric whose maximum is kept, "" = none.
    """
    policies: list[keep.PreservationPolicy] = [keep.LatestN(1)]
    value = lambda metrics: metrics.get(best, -np.inf)
    if best:
      # Earlier checkpoints may have no metrics, if k-NN was off then.
      policies.append(
        keep.BestN(
          get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
        )
      )
    if keep_steps:
      policies.append(keep.EveryNSteps(keep_steps))
    self.folder = workdir / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self.folder.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(policies),
        # Makes Orbax store the metrics, so that a resumed run knows its best
        # step; the policies decide which checkpoints are kept.
        best_fn=value if best else None,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
      item_handlers={
        **{name: ocp.StandardCheckpointHandler() for name in ARRAY_ITEMS},
        "progress": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._manager.close()

  @property
  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

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
      items: one tree of global arrays per name in ARRAY_ITEMS.
      progress: values for JSON.
      metrics: `best` is one of them; a step without metrics is never the best.
    """
    if step in self._manager.all_steps():
      return
    args = {
      name: ocp.args.StandardSave(tree)
      for name, tree in items.items()
      if jax.tree.leaves(tree)  # Orbax refuses an empty item
    }
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
    """Blocks until all saves are complete on disk."""
    self._manager.wait_until_finished()

  def restore(
    self, step: int, like: dict[str, Params]
  ) -> tuple[dict[str, Params], dict[str, Any]]:
    """Reads a checkpoint onto the shardings of `like`.

    Args:
      step: a step of this directory.
      like: trees of arrays or ShapeDtypeStructs with shardings.

    Raises:
      InputError: the checkpoint is of another architecture (names the first
        tensor that differs) or damaged.
    """
    wanted = {
      name: tree for name, tree in like.items() if jax.tree.leaves(tree)
    }
    args = {
      name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
      for name, tree in wanted.items()
    }
    try:
      for name, tree in wanted.items():
        self._check_shapes(step, name, tree)
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(**args, progress=ocp.args.JsonRestore()),
      )
    except InputError:
      raise
    except (ValueError, OSError, KeyError) as error:
      reason = str(error).strip().splitlines()[0][:200]
      raise InputError(
        f"checkpoint {self.folder}/{step} is damaged ({reason}): move it away "
        "to continue from an older one, or use another --workdir"
      ) from error
    logging.info("restored step %d of %s", step, self.folder)
    found = {name: restored[name] for name in wanted}
    return like | found, restored["progress"]

  def _check_shapes(self, step: int, name: str, tree: Params) -> None:
    saved = self._manager.item_metadata(step)[name]
    found = {} if saved is None else trees.shapes(saved)
    wanted = trees.shapes(tree)
    for key in sorted(found.keys() | wanted.keys()):
      if found.get(key) != wanted.get(key):
        raise InputError(
          f"checkpoint {self.folder}/{step} is of another architecture: "
          f"{name}/{key} has shape {found.get(key, 'absent')} there and "
          f"{wanted.get(key, 'absent')} here; use the config it was made with"
        )


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
