"""Compiled train steps that run in turns, for the benches of step times."""

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2])]

import jax
import ml_collections
import numpy as np

from attmask_jax import Batch
from attmask_jax import mesh as meshes
from attmask_jax.methods import METHODS
from attmask_jax.training import optim, schedules, train_step

STEPS_PER_EPOCH = 10


class Program:
  """A compiled step with its arguments; a step replaces the state."""

  def __init__(
    self,
    step: jax.stages.Compiled,
    state: train_step.TrainState,
    data: Batch,
    scalars: dict[str, jax.Array],
  ) -> None:
    self._step, self._state = step, state
    self._rest = data, scalars

  @property
  def flops(self) -> float:
    """The compiler's count; the body of a loop counts once."""
    return self._step.cost_analysis()["flops"]

  def __call__(self) -> None:
    """One step."""
    result = self._step(self._state, *self._rest)
    jax.block_until_ready(result)
    self._state = result.state


def build(config: ml_collections.ConfigDict) -> Program:
  """Compiles the train step of a training config, for one device."""
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  method = METHODS[config.method.name].from_config(
    config, steps_per_epoch=STEPS_PER_EPOCH
  )
  tx = optim.Optimizer.from_config(config).build(
    frozen_at_start=method.frozen_at_start,
    untrained=method.untrained,
    undecayed=method.undecayed,
    lr_scale=method.lr_scale,
  )
  state, shardings = train_step.init_state(method, tx, mesh, seed=0)
  step = train_step.make_step(method, tx, mesh, shardings, seed=0)
  images = pictures(config)
  rows = np.arange(config.data.batch_size, dtype=np.int32)
  extras = [method.item_extras(0, int(row)) for row in rows]
  data = images | {"index": rows, "position": rows, "label": rows}
  data |= {name: np.stack([e[name] for e in extras]) for name in extras[0]}
  data = meshes.shard(mesh, data)
  rates = schedules.Schedules.from_config(
    config, steps_per_epoch=STEPS_PER_EPOCH
  )
  scalars = meshes.put(mesh, rates.at(1) | method.at(1))
  compiled = step.lower(state, data, scalars).compile()
  return Program(compiled, state, data, scalars)


def pictures(config: ml_collections.ConfigDict) -> Batch:
  """Random images in the shapes of a batch of this config."""
  data = config.data
  rng = np.random.default_rng(0)
  draw = lambda views, side: rng.integers(
    0, 256, (data.batch_size, views, side, side, 3), dtype=np.uint8
  )
  images = {"images": draw(data.get("global_crops", 1), data.image_size)}
  if data.get("local_crops", 0):
    images["local_images"] = draw(data.local_crops, data.local_size)
  return images


def table(programs: dict[str, Program], turns: int) -> str:
  """FLOPs and seconds of each program, and both relative to the first."""
  from attmask_jax import benchmark  # which older checkouts do not have

  seconds, lines = benchmark.medians(programs, turns), []
  first = next(iter(programs))
  for name, program in programs.items():
    lines.append(
      f"{name:18} {program.flops / 1e9:9.1f} GFLOP  {seconds[name]:8.3f} s   "
      f"{program.flops / programs[first].flops:.4f} x FLOPs  "
      f"{seconds[name] / seconds[first]:.3f} x time"
    )
  return "\n".join(lines)
