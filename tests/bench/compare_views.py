"""Views of the device pipeline against those of Pillow, in grey levels.

python tests/bench/compare_views.py FOLDER [--images 40]

Prints the mean and the largest difference of each step on the photographs below
FOLDER at 224 px, and of whole recipes image by image, with the largest mean of
a view.
"""

import argparse
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from attmask_jax.augment import (
  TRANSFORMS,
  canvas,
  device,
  transforms,
)
from attmask_jax.data import files, pipeline

Pair = tuple[Callable[[Image.Image], Image.Image], Callable]
SIDE = 224


def _hue(steps: int) -> Callable[[Image.Image], Image.Image]:
  def turn(image: Image.Image) -> Image.Image:
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(steps)
    return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")

  return turn


def steps() -> Iterator[tuple[str, Pair]]:
  """Name of a step, and both ways to take it."""
  kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for i, kind in enumerate(kinds):
    for factor in (0.63, 0.9, 1.17, 1.39):
      yield (
        f"{kind.__name__} {factor}",
        (
          lambda x, k=kind, f=factor: k(x).enhance(f),
          lambda x, i=i, f=factor: device.enhance(x, jnp.float32(i), f),
        ),
      )
  for shift in (-25, -7, 0, 12, 25):
    turn = lambda x, n=shift: device.shift_hue(x, jnp.float32(n % 256))
    yield f"hue {shift}", (_hue(shift % 256), turn)
  grey = lambda x: jnp.broadcast_to(device.luma(x), x.shape)
  yield "grey", (lambda x: x.convert("L").convert("RGB"), grey)
  yield "solarise", (ImageOps.solarize, device.solarise)
  for sigma in (0.1, 0.3, 0.8, 1.3, 2.0):
    radius = canvas.box_radius(sigma)
    blur = lambda x, r=radius: device.blur(x, jnp.float32(r), most=int(r))
    yield (
      f"blur {sigma}",
      (lambda x, s=sigma: x.filter(ImageFilter.GaussianBlur(s)), blur),
    )


def levels(got: np.ndarray, want: np.ndarray) -> np.ndarray:
  """Differences without sign."""
  return np.abs(np.asarray(got, np.int16) - np.asarray(want, np.int16))


def recipe_levels(source: files.Flat, name: str, images: int) -> None:
  """Prints the differences of one recipe."""
  more = dict(local_crops=2) if name == "multi_crop" else {}
  recipe = TRANSFORMS[name](**more)
  batches = [
    pipeline.TrainPipeline(source, make, batch_size=1, seed=0).batches(
      0, images
    )
    for make in (recipe, canvas.OnCanvas(recipe, 512))
  ]
  augment = jax.jit(lambda batch: device.augment(batch, recipe))
  off = {key: [] for key in recipe.sides}
  for host, placed in zip(*batches, strict=True):
    got = augment(placed)
    for key, values in off.items():
      values.append(levels(got[key], host[key])[0])
  for key, values in off.items():
    x = np.concatenate(values)
    largest = x.mean((1, 2, 3)).max()
    print(
      f"{name + ' ' + key:24} {x.mean():7.4f} {x.max():5}  "
      f"(largest mean of a view {largest:.2f}, {len(x)} views)"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder")
  parser.add_argument("--images", type=int, default=40)
  options = parser.parse_args()
  source = files.Flat(options.folder)
  images = min(options.images, len(source))
  square = lambda i: source.load(i).resize((SIDE, SIDE), transforms.BICUBIC)
  pictures = [square(i) for i in range(images)]
  batch = np.stack([np.asarray(x) for x in pictures]).astype(np.float32)
  print(f"{images} images{'':15} mean   max")
  for name, (pillow, ours) in steps():
    want = np.stack([np.asarray(pillow(x)) for x in pictures])
    off = levels(jax.jit(jax.vmap(ours))(batch), want)
    print(f"{name:24} {off.mean():7.4f} {off.max():5}")
  for name in ("crop_flip", "two_colours", "multi_crop"):
    recipe_levels(source, name, images)


if __name__ == "__main__":
  main()
