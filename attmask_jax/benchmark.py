"""How fast a config trains on this machine: --mode=bench.

Times the input pipeline, the parts of a train step and steps that are fed by
the pipeline. Parts run in turns with a large matrix product, whose rate is what
the machine can do in that precision: machines are not always equally fast.
"""

import contextlib
import importlib.metadata
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging

from attmask_jax import Batch, atomic, runtime
from attmask_jax import mesh as meshes
from attmask_jax.data.pipeline import cores
from attmask_jax.errors import InputError
from attmask_jax.planning.flops import model_flops
from attmask_jax.runs import checkpoint, progress
from attmask_jax.runs import config as run_config
from attmask_jax.training import setup, train_step
from attmask_jax.training.setup import Run

FILE = "bench.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
SIDE = {"cpu": 2048}  # of the matrix product, by platform
ACCELERATOR_SIDE = 8192


def bench(
  config: ml_collections.ConfigDict, workdir: str, *, repeats: int = 5
) -> dict[str, Any]:
  """Measures a training config; prints a table and writes workdir/bench.json.

  Nothing is saved of the training itself.

  Args:
    config: a complete training config, see configs/.
    workdir: directory without a bench.json; made if missing.
    repeats: turns that are timed, at least 1; `data` and `step with data` are
      means over as many batches and twice as many steps, all else medians.

  Returns:
    What bench.json holds, see docs/performance.md.

  Raises:
    InputError: bad config, data or directory; nothing was written.
  """
  if repeats < 1:
    raise InputError(f"--repeats {repeats} must be at least 1")
  path = checkpoint.new_file(workdir, FILE)
  runtime.setup(config.run)
  run = setup.build(config)
  checkpoint.check_workdir(workdir)
  results = measure(run, repeats)
  if jax.process_index() == 0:
    atomic.write_json(path, results)
    print(f"{_table(results)}\nwritten: {path}")
  return results


def measure(run: Run, repeats: int, *, passes: bool = True) -> dict[str, Any]:
  """What `bench` writes, of a run that is built.

  Args:
    run: built from a training config.
    repeats: see `bench`.
    passes: also time forward and backward pass, which are two programs more.
  """
  config, mesh = run.config, run.mesh
  size = config.data.batch_size
  with _host_batches(run, 1) as batches:
    host = next(batches)
  batch = meshes.shard(mesh, host)
  scalars = meshes.put(mesh, run.schedules.at(0) | run.method.at(0))
  parts = (run.method, run.tx, mesh)
  seed = config.method.seed
  state, shardings = train_step.init_state(*parts, seed=seed)
  step = train_step.make_step(
    *parts,
    shardings,
    seed=seed,
    accumulate=config.run.accumulate,
    augment=run.augment,
  )
  with runtime.compiled_anew():
    start = time.perf_counter()
    step = step.lower(state, batch, scalars).compile()
    compile_seconds = time.perf_counter() - start
  flops = model_flops(run, state, batch)
  loop = _Loop(step, state, scalars)
  product = _Product(config.method.dtype)
  timed = {
    "matrix product": product,
    "transfer": lambda: meshes.shard(mesh, host),
    **(_passes(run, loop, batch) if passes else {}),
    "step": lambda: loop.step(batch),
  }
  logging.info("timing %d turns", repeats)
  seconds = medians(timed, repeats)
  # Of one device; virtual ones of a CPU share the cores of their process.
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  devices = jax.process_count() if on_cpu else mesh.size
  peak = devices * product.flops / seconds.pop("matrix product")
  seconds["data"] = _data_seconds(run, repeats)
  rates = _fed(run, loop, repeats)
  seconds["step with data"] = size / rates["img_per_s"]
  return {
    "config": run_config.flat_config(config),
    "machine": _machine(mesh),
    "seconds": seconds,
    "images_per_s": {k: size / v for k, v in seconds.items()},
    "data_wait": rates["data_wait"],
    "compile_seconds": compile_seconds,
    "flops": flops,
    "peak_flops_per_s": peak,
    "share_of_peak": flops / seconds["step"] / peak,
    "memory_gb": _memory(step, mesh),
  }


class _Loop:
  """A compiled step with its state, which every step replaces."""

  def __init__(
    self,
    step: jax.stages.Compiled,
    state: train_step.TrainState,
    scalars: Batch,
  ) -> None:
    self._step, self.state, self.scalars = step, state, scalars

  def step(self, batch: Batch) -> dict[str, jax.Array]:
    """One step; returns its metrics."""
    result = self._step(self.state, batch, self.scalars)
    self.state = result.state
    return result.metrics


def _passes(
  run: Run, loop: _Loop, batch: Batch
) -> dict[str, Callable[[], Any]]:
  """The loss alone, with its gradient, and the views that the device makes.

  Each is compiled on its own; the first two make the views as well.
  """
  rng = jax.random.key(0)

  def loss(
    params: Any, state: train_step.TrainState, batch: Batch, scalars: Batch
  ) -> jax.Array:
    return run.method.loss(
      params, state.teacher, state.aux, run.augment(batch), rng, scalars
    ).loss

  forward, backward = jax.jit(loss), jax.jit(jax.grad(loss))
  arguments = lambda: (loop.state.params, loop.state, batch, loop.scalars)
  passes = {
    "forward": lambda: forward(*arguments()),
    "forward and backward": lambda: backward(*arguments()),
  }
  if run.config.data.pipeline == "device":
    augment = jax.jit(run.augment)
    passes = {"augmentation": lambda: augment(batch), **passes}
  return passes


class _Product:
  """A large matrix product in a precision; called, it runs once."""

  def __init__(self, dtype: str) -> None:
    side = SIDE.get(jax.default_backend(), ACCELERATOR_SIDE)
    self.flops = 2 * side**3
    # Constant values need less power, so that some devices run faster.
    self._matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    self._run = jax.jit(jnp.matmul)

  def __call__(self) -> jax.Array:
    return self._run(self._matrix, self._matrix)


def medians(
  timed: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
  """Median seconds of each program, in turns, after one turn of warm-up."""
  seconds: dict[str, list[float]] = {name: [] for name in timed}
  for turn in range(repeats + 1):
    for name, program in timed.items():
      start = time.perf_counter()
      jax.block_until_ready(program())
      if turn:
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in seconds.items()}


@contextlib.contextmanager
def _host_batches(run: Run, steps: int) -> Iterator[Iterator[Batch]]:
  batches = run.pipeline.batches(0, steps)
  with contextlib.closing(batches):
    yield batches


def _data_seconds(run: Run, repeats: int) -> float:
  """Seconds per batch of decoding and augmentation, with nothing else to do."""
  ready = run.config.run.prefetch + 1  # batches prepared while the first came
  with _host_batches(run, ready + repeats) as batches:
    for _ in range(ready):
      next(batches)
    start = time.perf_counter()
    for _ in range(repeats):
      next(batches)
    return (time.perf_counter() - start) / repeats


def _fed(run: Run, loop: _Loop, repeats: int) -> dict[str, float]:
  """Rates of steps on new batches, as in training: see `progress.Clock`."""
  warm = (
    run.config.run.prefetch + meshes.AHEAD + 1
  )  # on batches prepared before
  steps = warm + 2 * repeats
  clock = progress.Clock(run.config.data.batch_size)
  # Enough batches that the last step waits for a new one, too.
  with _host_batches(run, steps + meshes.AHEAD) as host:
    batches = meshes.ahead(run.mesh, host)
    metrics: Any = None
    for i in range(steps):
      with clock.waiting():
        batch = next(batches)
      before, metrics = metrics, loop.step(batch)
      jax.block_until_ready(before)  # read one step late, as in training
      clock.step()
      if i == warm - 1:
        jax.block_until_ready(metrics)
        clock.lap()
    jax.block_until_ready(metrics)
  return clock.lap()


def _memory(
  step: jax.stages.Compiled, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  """GB per device: state and batch, temporary arrays of a step, the peak.

  The peak is the device's, or on a CPU the process's.
  """
  planned = step.memory_analysis()
  statistics_of_device = mesh.local_devices[0].memory_stats()
  if statistics_of_device:
    peak = statistics_of_device["peak_bytes_in_use"]
  else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
  return {
    "arguments": planned.argument_size_in_bytes / 1e9,
    "temporaries": planned.temp_size_in_bytes / 1e9,
    "peak": peak / 1e9,
  }


def _machine(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {
    "devices": mesh.size,
    "device": mesh.devices.flat[0].device_kind,
    "processes": jax.process_count(),
    "cores": cores(),
    "system": platform.platform(),
    "python": platform.python_version(),
    **versions,
  }


def _table(results: dict[str, Any]) -> str:
  """The results as lines for a terminal."""
  machine, memory = results["machine"], results["memory_gb"]
  lines = [
    f"{machine['devices']} x {machine['device']}, {machine['cores']} cores, "
    f"jax {machine['jax']}, batch {results['config']['data.batch_size']}",
    f"{'':22}{'seconds':>10}{'images/s':>12}",
  ]
  for name, seconds in results["seconds"].items():
    rate = results["images_per_s"][name]
    lines.append(f"{name:22}{seconds:10.4f}{rate:12.1f}")
  lines += [
    f"waiting for data: {results['data_wait']:.0%} of the time",
    f"compilation: {results['compile_seconds']:.1f} s",
    f"FLOPs of a step: {results['flops'] / 1e9:.1f} G, "
    f"{results['share_of_peak']:.0%} of the rate of a large matrix product "
    f"({results['peak_flops_per_s'] / 1e12:.3f} TFLOP/s)",
    f"memory: {memory['arguments']:.2f} GB state and batch, "
    f"{memory['temporaries']:.2f} GB temporaries, {memory['peak']:.2f} GB peak",
  ]
  return "\n".join(lines)
