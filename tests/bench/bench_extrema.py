"""What several masks per image cost: ExtreMA's step against a whole image.

python tests/bench/bench_extrema.py [--variant small] [--batch 8] [--steps 5]

One step of training (student, teacher, gradient, optimiser) with five disjoint
masks of 80 %, whose visible patches make up one image, against a step whose
student sees the whole image once. FLOPs are the compiler's count; the time is
the median of steps that alternate between the two programs.
"""

import argparse

import jax
import steps

from configs import extrema

CASES = {
  "whole image": dict(mask_ratio=0.0, num_masks=1),
  "5 masks of 80 %": dict(mask_ratio=0.8, num_masks=5),
}


def program(variant: str, batch: int, case: dict[str, float]) -> steps.Program:
  """The train step of one case."""
  config = extrema.get_config("80x5")
  config.method.update(variant=variant, drop_path=0.0, **case)
  config.data.batch_size = batch
  config.run.scan = False  # the compiler counts a loop's body once
  return steps.build(config)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variant", default="small")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--steps", type=int, default=5)
  options = parser.parse_args()
  programs = {
    name: program(options.variant, options.batch, case)
    for name, case in CASES.items()
  }
  print(
    f"ViT {options.variant}, 224 px, batch {options.batch}, float32, "
    f"{jax.devices()[0].device_kind}"
  )
  print(steps.table(programs, options.steps))


if __name__ == "__main__":
  main()
