"""Colour steps of the host pipeline against those of Pillow, in turns.

python tests/bench/bench_colours.py [--side 224] [--images 30] [--turns 9]

Both start from and end with a Pillow image, except `one view`, which ends with
an array: jitter, grey and solarisation together. Prints medians of processor
microseconds per image, the smallest in brackets, and the median of the ratios
within a turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from attmask_jax.augment import colours, draws
from attmask_jax.data import objects

Step = Callable[[Image.Image], object]
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
FACTORS, HUE = (1.2, 0.8, 1.1), 0.05


def pillow_hue(image: Image.Image) -> Image.Image:
  """As in torchvision."""
  hsv = np.array(image.convert("HSV"))
  hsv[..., 0] += np.uint8(int(HUE * 255))
  return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")


def pillow_view(image: Image.Image) -> np.ndarray:
  """Jitter, grey, solarisation."""
  for make, factor in zip(ENHANCERS, FACTORS, strict=True):
    image = make(image).enhance(factor)
  image = pillow_hue(image).convert("L").convert("RGB")
  return np.asarray(ImageOps.solarize(image))


def ours(*order: int) -> Step:
  """Some steps of a jitter."""
  jitter = colours.Jitter(order, FACTORS, HUE)
  return lambda image: colours.apply_jitter(image, jitter)


def steps() -> dict[str, tuple[Step, Step]]:
  """Name -> Pillow's, ours."""
  view = draws.View(
    (0, 0, 1, 1),
    False,
    colours.Jitter((0, 1, 2, 3), FACTORS, HUE),
    True,
    0,
    True,
  )
  enhance = lambda i: lambda image: ENHANCERS[i](image).enhance(FACTORS[i])
  names = ("brightness", "contrast", "saturation")
  table = {name: (enhance(i), ours(i)) for i, name in enumerate(names)}
  return table | {
    "hue": (pillow_hue, ours(colours.HUE)),
    "one view": (pillow_view, lambda image: draws.recolour(image, view)),
  }


def microseconds(step: Step, images: Sequence[Image.Image]) -> float:
  """Processor time per image."""
  start = time.process_time()
  for image in images:
    step(image)
  return 1e6 * (time.process_time() - start) / len(images)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--side", type=int, default=224)
  parser.add_argument("--images", type=int, default=30)
  parser.add_argument("--turns", type=int, default=9)
  options = parser.parse_args()
  source = objects.Objects(
    options.images, size=options.side, seed=0, split="val"
  )
  images = [source.load(i) for i in range(options.images)]
  print(f"{options.side} px{'Pillow':>22}{'here':>18}")
  for name, pair in steps().items():
    times = [
      [microseconds(step, images) for step in pair]
      for _ in range(options.turns + 1)
    ][1:]
    ratio = statistics.median(pillow / own for pillow, own in times)
    cells = (
      f"{statistics.median(x):8.0f} us ({min(x):5.0f})"
      for x in zip(*times, strict=True)
    )
    print(f"{name:12}{'  '.join(cells)}  {ratio:5.2f} x")


if __name__ == "__main__":
  main()
