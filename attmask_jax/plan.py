"""What a config needs on devices that are not here: --mode=plan.

Compiles the train step for a topology, counts memory, operations and messages
in the program, and estimates the time of a run.
"""

import dataclasses
import importlib.metadata
from typing import Any

import jax
import ml_collections
from absl import logging

from attmask_jax import atomic, runtime
from attmask_jax.errors import InputError
from attmask_jax.planning import (
  collectives,
  estimate,
  memory,
  program,
  step,
  table,
  topologies,
)  # fmt: skip
from attmask_jax.runs import checkpoint
from attmask_jax.runs import config as run_config

FILE = "plan.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")


def plan(
  config: ml_collections.ConfigDict, workdir: str, *, compilations: int = 4
) -> dict[str, Any]:
  """Plans a training config; prints tables and writes workdir/plan.json.

  JAX uses the CPU from then on, unless it has chosen its devices before.

  Args:
    config: a complete training config with run.topology, see configs/. Its
      images need not be here: without data.path their number is assumed.
    workdir: directory without a plan.json; made if missing.
    compilations: at most so many, at least 1; those after the first look for
      the largest batch that fits.

  Returns:
    What plan.json holds, see docs/tpu.md.

  Raises:
    InputError: bad config, topology or directory; nothing was written.
  """
  if compilations < 1:
    raise InputError(f"--compilations {compilations} must be at least 1")
  path = checkpoint.new_file(workdir, FILE)
  topologies.use_cpu(config.run.topology)
  runtime.setup(config.run)
  topology = topologies.find(config.run.topology)
  planned = step.build(config, topology)
  checkpoint.check_workdir(workdir)
  results = _results(planned, topology, compilations)
  atomic.write_json(path, results)
  print(f"{table.text(results)}\nwritten: {path}")
  return results


class _Compiler:
  """Compiles batches of different sizes, and keeps what it learns.

  Attributes:
    seconds: of each compilation.
    texts: of the programs, by batch size, if they fit.
  """

  def __init__(self, planned: step.Planned, capacity: float) -> None:
    self._planned, self._capacity = planned, capacity
    self.seconds: list[float] = []
    self.texts: dict[int, str] = {}

  def at(self, size: int) -> memory.Memory:
    """Memory of a batch."""
    logging.info("compiling for a batch of %d", size)
    try:
      compiled, seconds = self._planned.compile(size)
    except jax.errors.JaxRuntimeError as error:
      return memory.too_large(self._planned, size, error)
    self.seconds.append(seconds)
    self.texts[size] = compiled.as_text()
    return memory.measure(self._planned, size, compiled, self._capacity)


def _results(
  planned: step.Planned, topology: topologies.Topology, compilations: int
) -> dict[str, Any]:
  run, size = planned.run, planned.run.config.data.batch_size
  flops = planned.flops(size)
  compiler = _Compiler(planned, topology.memory)
  first = compiler.at(size)
  tried = memory.largest_batch(
    first,
    topology.memory,
    planned.unit,
    compiler.at,
    most=len(run.train_source),
    compilations=compilations - 1,
  )
  largest = memory.largest(tried)
  results = {
    "estimate": None,
    "config": run_config.flat_config(run.config),
    "topology": _topology(topology),
    "versions": _versions(),
    "memory": [dataclasses.asdict(x) for x in tried],
    "fits": first.fits,
    "largest_batch": largest,
    "flops_per_image": flops / size,
    "flops": flops,
    "compile_seconds": compiler.seconds,
    "assumed": planned.assumed,
  }
  # Messages do not depend on the batch, so those of another one will do.
  known = size if size in compiler.texts else largest
  if not known:
    return results | {"collectives": None}
  compiled = program.parse(compiler.texts[known])
  cycles = program.cycles(compiled)
  found = collectives.collectives(compiled, devices=run.mesh.size)
  fsdp = run.config.run.fsdp
  unexpected = collectives.unexpected(
    found, fsdp=fsdp, batch_coupled=run.method.batch_coupled
  )
  results |= {
    "collectives": [dataclasses.asdict(x) | {"sent": x.sent} for x in found],
    "collectives_of_batch": known,
    "cycles": cycles,
    "unexpected_collectives": unexpected,
  }
  if topology.chip is not None:
    failing = [x.batch_size for x in tried if not x.fits]
    load = estimate.Workload(
      topology.chip,
      size,
      run.schedules.total_steps,
      flops,
      tuple(found),
      run.mesh.size,
      fsdp,
      largest // run.mesh.size,
      min(failing, default=0) // run.mesh.size,
      cycles * run.mesh.size / known,
    )
    results["estimate"] = _estimate(load, planned, topology)
  return results


def _estimate(
  load: estimate.Workload,
  planned: step.Planned,
  topology: topologies.Topology,
) -> dict[str, Any]:
  here = estimate.estimate(load, load.chips)
  row_bytes = sum(x.nbytes for x in planned.row.values())
  rate = here.images_per_s / topology.hosts
  return {
    "is": "an estimate, not a measurement",
    "assumptions": estimate.assumptions(load),
    "steps": load.steps,
    "by_chips": [dataclasses.asdict(x) for x in estimate.estimates(load)],
    "hosts": topology.hosts,
    "images_per_s_and_host": rate,
    "bytes_per_image": row_bytes,
    "bytes_per_s_and_host": rate * row_bytes,
  }


def _topology(topology: topologies.Topology) -> dict[str, Any]:
  chip = topology.chip
  return {
    "name": topology.name,
    "devices": len(topology.devices),
    "device": topology.devices[0].device_kind,
    "hosts": topology.hosts,
    "memory": topology.memory,
    "chip": None if chip is None else dataclasses.asdict(chip),
  }


def _versions() -> dict[str, str]:
  found = {}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass  # libtpu, which plans for a CPU do not need
  return found
