"""The device mesh, sharding rules, and transfers from and to the host.

Mesh axes: "data" splits the batch; "fsdp" splits it further and also splits
large parameters. Arrays carry NamedShardings; the compiler adds the
all-reduces.
"""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attmask_jax import Batch, Params
from attmask_jax.errors import DamagedError, InputError

BATCH_AXES = ("data", "fsdp")  # mesh axes that together split a batch
AHEAD = 2  # batches on the devices before they are needed
# Smaller tensors stay whole on every device: splitting them saves little and
# costs a message each.
FSDP_MIN_SIZE = 2**16
T = TypeVar("T")


def init_distributed(detect: bool) -> None:
  """Joins the other processes of a run, if there are any; once per process.

  `detect` lets JAX detect the cluster (Cloud TPU, Slurm, Open MPI, GKE).
  Elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.

  Raises:
    InputError: only some of the three variables are set, or no cluster.
  """
  if jax.distributed.is_initialized():
    return
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  values = [os.environ.get(name) for name in names]
  if all(values):
    address, count, mine = values
    if not (count.isdigit() and mine.isdigit()):
      raise InputError(
        f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={mine} must be whole "
        "numbers"
      )
    jax.distributed.initialize(
      address, num_processes=int(count), process_id=int(mine)
    )
  elif any(values):
    missing = [n for n, v in zip(names, values, strict=True) if not v]
    raise InputError(
      f"of the variables for several processes {', '.join(missing)} is not "
      f"set: set all of {', '.join(names)}, or none"
    )
  elif detect:
    try:
      jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
      raise InputError(
        f"run.distributed=True detects no cluster ({error}): set "
        f"{', '.join(names)} on every process"
      ) from error


def make_mesh(
  *, fsdp: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
  """Mesh of all devices (or the given ones), shape [devices / fsdp, fsdp].

  Raises:
    InputError: `fsdp` does not divide the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  if fsdp < 1 or len(devices) % fsdp:
    raise InputError(
      f"run.fsdp {fsdp} does not divide the {len(devices)} devices: "
      "choose a divisor"
    )
  return jax.make_mesh(
    (len(devices) // fsdp, fsdp),
    BATCH_AXES,
    axis_types=(AxisType.Auto,) * 2,
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays that are whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose leading axis is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def param_shardings(mesh: Mesh, shapes: Params) -> Params:
  """Size rule: large tensors split over "fsdp" along their longest axis.

  Args:
    mesh: device mesh; with an fsdp axis of 1 everything is replicated.
    shapes: tree of arrays or ShapeDtypeStructs.
  """
  fsdp = mesh.shape["fsdp"]

  def rule(x: Any) -> NamedSharding:
    divisible = [i for i, n in enumerate(x.shape) if n % fsdp == 0]
    if fsdp == 1 or x.size < FSDP_MIN_SIZE or not divisible:
      return replicated(mesh)
    axis = max(divisible, key=lambda i: x.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

  return jax.tree.map(rule, shapes)


def gathered(mesh: Mesh, tree: Params) -> Params:
  """The same values, whole on every device; within a compiled program."""
  if mesh.shape["fsdp"] == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def check_batch(batch_size: int, *, mesh: Mesh, accumulate: int) -> None:
  """Checks that the global batch splits over devices and micro-batches.

  Raises:
    InputError: it does not; names the nearest batch sizes that do.
  """
  if accumulate < 1:
    raise InputError(f"run.accumulate {accumulate} must be at least 1")
  unit = mesh.size * accumulate
  if batch_size < 1 or batch_size % unit:
    down = max(batch_size // unit, 1) * unit
    raise InputError(
      f"data.batch_size {batch_size} does not divide over {mesh.size} devices "
      f"x run.accumulate {accumulate}: use {down} or {down + unit}"
    )


def local_positions(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Rows of the global batch that this process's devices hold: [b] int32."""
  sharding = batch_sharding(mesh)
  indices = sharding.addressable_devices_indices_map((batch_size,))
  rows = {r for (s,) in indices.values() for r in range(*s.indices(batch_size))}
  return np.array(sorted(rows), np.int32)


def shard(mesh: Mesh, batch: dict[str, np.ndarray]) -> Batch:
  """This process's rows [b, ...] -> arrays [B, ...] split over all devices."""
  sharding = batch_sharding(mesh)
  return {
    k: jax.make_array_from_process_local_data(sharding, v)
    for k, v in batch.items()
  }


def put(mesh: Mesh, tree: Params) -> Params:
  """The same host values on every process -> replicated arrays.

  Not `device_put`, which makes all processes compare each value and wait for
  the current step.
  """
  sharding = replicated(mesh)

  def replicate(value: Any) -> jax.Array:
    value = np.asarray(value)
    return jax.make_array_from_callback(
      value.shape, sharding, lambda index: value[index]
    )

  return jax.tree.map(replicate, tree)


def to_host(mesh: Mesh, tree: Params) -> Params:
  """Whole numpy arrays on every process, regardless of their sharding."""
  return jax.device_get(_whole(mesh)(tree))


@functools.cache
def _whole(mesh: Mesh) -> Callable[[Params], Params]:
  """Copies a tree whole to every device; compiles once per kind of tree."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def local_rows(x: jax.Array) -> np.ndarray:
  """This process's rows of a batch, in its order: [B, ...] -> [b, ...]."""
  shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([np.asarray(shards[k]) for k in sorted(shards)])


def barrier(name: str) -> None:
  """Waits until every process has reached the barrier of that name."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def from_first(code: int) -> int:
  """The number that process 0 has, on every process."""
  if jax.process_count() == 1:
    return code
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.int32(code)))


def union(mine: dict[int, str]) -> dict[int, str]:
  """The dictionaries of all processes in one, on every process."""
  if jax.process_count() == 1:
    return mine
  from jax.experimental import multihost_utils

  text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(text)))
  padded = np.pad(text, (0, int(sizes.max()) - len(text)))
  texts = multihost_utils.process_allgather(padded)
  merged: dict[int, str] = {}
  for size, row in zip(sizes, texts, strict=True):
    part = json.loads(row[: int(size)].tobytes())
    merged |= {int(k): v for k, v in part.items()}
  return merged


def together(read: Callable[[], T]) -> T:
  """The result of `read`, if it succeeds on every process.

  Otherwise all processes raise errors of one kind: none goes on and waits for
  one that has failed, and all can try something else.

  Args:
    read: waits for no other process.

  Raises:
    DamagedError: some processes raised it, and none raised anything else.
    InputError: the same of it and DamagedError.
    Exception: any other; RuntimeError where only another process raised it.
  """
  kinds = (DamagedError, InputError, RuntimeError)  # the gravest last
  error: Exception | None = None
  mine: dict[int, str] = {}
  try:
    result = read()
  except Exception as raised:
    error = raised
    own = [i for i, kind in enumerate(kinds) if isinstance(raised, kind)]
    mine[jax.process_index()] = f"{own[0] if own else 2}{raised}"
  failed = union(mine)
  if not failed:
    return result
  gravest = max(text[0] for text in failed.values())
  number = min(i for i, text in failed.items() if text[0] == gravest)
  if error is not None and mine[jax.process_index()][0] == gravest:
    raise error
  raise kinds[int(gravest)](f"process {number}: {failed[number][1:]}")


def ahead(
  mesh: Mesh, batches: Iterable[dict[str, np.ndarray]]
) -> Iterator[Batch]:
  """Puts the next AHEAD batches on the devices before they are needed.

  Transfers are asynchronous, so they overlap with the current step.
  """
  queue: list[Batch] = []
  for batch in batches:
    queue.append(shard(mesh, batch))
    if len(queue) > AHEAD:
      yield queue.pop(0)
  yield from queue
