"""What several masks per image cost: ExtreMA's step against a whole image.

python tests/bench_extrema.py [--variant small] [--batch 8] [--steps 5]

One step of training (student, teacher, gradient, optimiser) with five disjoint
masks of 80 %, whose visible patches make up one image, against a step whose
student sees the whole image once. FLOPs are the compiler's count; the time is
the median of steps that alternate between the two programs.
"""

import argparse
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import jax
import numpy as np

from attmask_jax import mesh as meshes
from attmask_jax.methods import METHODS
from attmask_jax.training import optim, schedules, train_step
from configs import extrema

CASES = {
  "whole image": dict(mask_ratio=0.0, num_masks=1),
  "5 masks of 80 %": dict(mask_ratio=0.8, num_masks=5),
}


def program(variant: str, batch: int, case: dict[str, float]):
  """Compiled step, state, batch and scalars."""
  config = extrema.get_config("80x5")
  config.method.update(variant=variant, drop_path=0.0, **case)
  config.data.batch_size = batch
  config.run.scan = False  # the compiler counts a loop's body once
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  method = METHODS["extrema"].from_config(config, steps_per_epoch=10)
  tx = optim.Optimizer.from_config(config).build(
    frozen_at_start=method.frozen_at_start,
    untrained=method.untrained,
    undecayed=method.undecayed,
    lr_scale=method.lr_scale,
  )
  state, shardings = train_step.init_state(method, tx, mesh, seed=0)
  step = train_step.make_step(method, tx, mesh, shardings, seed=0)
  size = config.data.image_size
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch, 1, size, size, 3), dtype=np.uint8)
  rows = np.arange(batch, dtype=np.int32)
  data = {"images": images, "index": rows, "position": rows, "label": rows}
  rates = schedules.Schedules.from_config(config, steps_per_epoch=10)
  scalars = meshes.put(mesh, rates.at(1) | method.at(1))
  data = meshes.shard(mesh, data)
  compiled = step.lower(state, data, scalars).compile()
  return compiled, state, data, scalars


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variant", default="small")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--steps", type=int, default=5)
  options = parser.parse_args()
  programs, times, flops = {}, {name: [] for name in CASES}, {}
  for name, case in CASES.items():
    programs[name] = program(options.variant, options.batch, case)
    flops[name] = programs[name][0].cost_analysis()["flops"]
  for turn in range(options.steps + 1):
    for name, (step, state, data, scalars) in programs.items():
      start = time.perf_counter()
      state, values, extra = step(state, data, scalars)
      jax.block_until_ready(values)
      if turn:  # the first one warms up
        times[name].append(time.perf_counter() - start)
      programs[name] = step, state, data, scalars
  whole = next(iter(CASES))
  print(f"ViT {options.variant}, 224 px, batch {options.batch}, float32, "
        f"{jax.devices()[0].device_kind}")  # fmt: skip
  for name in CASES:
    seconds = statistics.median(times[name])
    print(
      f"{name:18} {flops[name] / 1e9:9.1f} GFLOP  {seconds:7.2f} s   "
      f"{flops[name] / flops[whole]:.3f} x FLOPs  "
      f"{seconds / statistics.median(times[whole]):.3f} x time"
    )


if __name__ == "__main__":
  main()
