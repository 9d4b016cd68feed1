"""What AttMask's masks cost: its train step against other mask policies.

python tests/bench/bench_masks.py [--config attmask_vits16] [--variant 192x4x3]
    [--batch 4] [--image_size 224] [--local_crops 2] [--dtype float32]
    [--turns 7]

One config, of which only the mask policy changes, and the same images for all.
Ratios are relative to random masks; "no masks" is DINO, which has no patch loss
either. FLOPs are the compiler's count; the time is the median of steps that
alternate between the programs. Random masks are drawn by the data pipeline on
the host, which the times do not include.
"""

import argparse
import importlib

import jax
import steps

from configs import attmask_vits16 as published

CASES = {
  "random": published.RANDOM,
  "attmask_high": published.HIGH,
  "attmask_hint": published.HINT,
  "no masks": dict(mask="none", patch_weight=0.0),
}


def program(options: argparse.Namespace, masks: dict) -> steps.Program:
  """The train step of the config with these masks."""
  recipe = importlib.import_module(f"configs.{options.config}")
  config = recipe.get_config()
  config.method.update(masks, variant=options.variant, dtype=options.dtype)
  config.data.update(
    batch_size=options.batch,
    image_size=options.image_size,
    local_crops=options.local_crops,
  )
  config.run.scan = False  # the compiler counts a loop's body once
  return steps.build(config)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="attmask_vits16")
  parser.add_argument("--variant", default="192x4x3")
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--local_crops", type=int, default=2)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--turns", type=int, default=7)
  options = parser.parse_args()
  programs = {name: program(options, masks) for name, masks in CASES.items()}
  print(
    f"configs/{options.config}.py, ViT {options.variant}, "
    f"{options.image_size} px, batch {options.batch}, {options.local_crops} "
    f"local crops, {options.dtype}, {jax.devices()[0].device_kind}"
  )
  print(steps.table(programs, options.turns))


if __name__ == "__main__":
  main()
