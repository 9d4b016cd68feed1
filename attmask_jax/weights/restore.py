"""Reads parts of a checkpoint onto the devices, for evaluation and loading."""

import contextlib
import pathlib
from collections.abc import Sequence

import jax
import orbax.checkpoint as ocp

from attmask_jax import Params, trees
from attmask_jax import mesh as meshes
from attmask_jax.errors import DamagedError, InputError
from attmask_jax.methods.base import Method
from attmask_jax.runs import saved_items


def network(
  run_dir: pathlib.Path,
  step: int,
  name: str,
  shapes: Params,
  mesh: jax.sharding.Mesh,
) -> Params:
  """Parameters of one network, whole on every device.

  Args:
    run_dir: run directory.
    step: of the checkpoint.
    name: "student", or "teacher" where the method has one.
    shapes: ShapeDtypeStructs, see `Method.init`.
    mesh: devices that get a copy.

  Raises:
    DamagedError: the checkpoint is not there or cannot be read.
    InputError: other shapes.
  """
  item = "params" if name == "student" else "teacher"
  folder = run_dir / "checkpoints" / str(step) / item
  if item == "teacher" and not folder.is_dir():
    folder = folder.with_name("params")  # a method without a teacher
  if not folder.is_dir():
    raise DamagedError(
      f"{folder} is missing: {folder.parent} is not a complete checkpoint"
    )
  with saved_items.reading(folder):
    # The checkpointer's own method warns about a file that we do not write.
    metadata = ocp.StandardCheckpointHandler().metadata(folder)
    saved, expected = trees.shapes(metadata.tree), trees.shapes(shapes)
    for path in sorted(saved.keys() | expected.keys()):
      if saved.get(path) != expected.get(path):
        raise InputError(
          f"{folder} does not fit its config: {path} has shape "
          f"{saved.get(path, 'absent')} there, and "
          f"{expected.get(path, 'absent')} by {run_dir}/config.json"
        )
    place = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=meshes.replicated(mesh)
    )
    return saved_items.read_item(folder, jax.tree.map(place, shapes))


def aux(
  run_dir: pathlib.Path,
  step: int,
  method: Method,
  mesh: jax.sharding.Mesh,
  names: Sequence[str],
) -> Params:
  """Some parts of a checkpoint's `aux`, whole on every device.

  Args:
    run_dir: run directory.
    step: of the checkpoint.
    method: of the run.
    mesh: devices that get a copy.
    names: of the parts.

  Raises:
    DamagedError: they cannot be read.
  """
  if not names:
    return {}
  shapes = jax.eval_shape(method.init, jax.random.key(0)).aux
  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=meshes.replicated(mesh)
  )
  target = {"aux": jax.tree.map(place, {name: shapes[name] for name in names})}
  folder = run_dir / "checkpoints" / str(step) / "train"
  # A checkpointer would wait for the other processes.
  handler = ocp.PyTreeCheckpointHandler()
  with saved_items.reading(folder), contextlib.closing(handler) as reader:
    restored = reader.restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
      ),
    )
  return restored["aux"]
