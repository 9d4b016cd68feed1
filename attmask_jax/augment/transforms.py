"""Image augmentation with Pillow: one pure function per step.

Every step takes an RGB image and a NumPy generator and returns a new image; the
recipes at the end combine the steps. A recipe is a frozen dataclass called on
`(image, rng)` that returns a dict of uint8 arrays, so a new method adds a
recipe without changing the input pipeline. Normalisation happens on the device.

Source: the steps behave like torchvision's on Pillow images.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from attmask_jax import schema
from attmask_jax.augment import enlarge
from attmask_jax.errors import InputError

BICUBIC = Image.Resampling.BICUBIC
BILINEAR = Image.Resampling.BILINEAR
RESAMPLE = {"bilinear": BILINEAR, "bicubic": BICUBIC}
LONG = 8  # long side over short side of pictures that are cropped first


# --- geometry ---------------------------------------------------------------


def crop_box(
  width: int,
  height: int,
  rng: np.random.Generator,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
  """Draws the box of a random resized crop.

  Ten attempts with a uniform share of the area and a log-uniform aspect; if
  none fits, the largest central crop whose aspect is within `ratio`.

  Args:
    width, height: of the image, in pixels.
    rng: advanced by two draws per attempt and two for the position.
    scale: smallest and largest share of the area, 0-1.
    ratio: smallest and largest width / height.

  Returns:
    (left, upper, right, lower) in pixels, inside the image.

  Source: torchvision.transforms.RandomResizedCrop.get_params.
  """
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(low, high))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(0, height - h + 1))
      left = int(rng.integers(0, width - w + 1))
      return left, top, left + w, top + h
  w, h = width, height
  if width / height < ratio[0]:
    h = min(round(width / ratio[0]), height)
  elif width / height > ratio[1]:
    w = min(round(height * ratio[1]), width)
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def random_resized_crop(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  size: int,
  scale: tuple[float, float],
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  resample: Image.Resampling = BICUBIC,
) -> Image.Image:
  """Random crop, resized to `size` x `size`.

  Crops before resizing, so that the filter does not use pixels outside the box
  (as `Image.resize(box=...)` would).
  """
  box = crop_box(*image.size, rng, scale=scale, ratio=ratio)
  return image.crop(box).resize((size, size), resample)


def random_flip(
  image: Image.Image, rng: np.random.Generator, *, prob: float = 0.5
) -> Image.Image:
  """Flips horizontally with probability `prob`."""
  if rng.random() < prob:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return image


def eval_crop(
  image: Image.Image, size: int, *, resample: str = "bicubic"
) -> Image.Image:
  """Resizes the shorter side to floor(256/224 * size), then crops the centre.

  Args:
    image: any size.
    size: side of the square in pixels.
    resample: one of RESAMPLE.

  Source: torchvision Resize(256) + CenterCrop(224), for any size. Of long
  pictures only the square is computed, with the same pixels.
  """
  shorter = 256 * size // 224
  width, height = image.size
  if width <= height:
    target = shorter, int(shorter * height / width)
  else:
    target = int(shorter * width / height), shorter
  left, top = (round((side - size) / 2) for side in target)
  box = left, top, left + size, top + size
  if max(target) > LONG * shorter and max(target) > max(width, height):
    return enlarge.part(image, target, box, RESAMPLE[resample])
  return image.resize(target, RESAMPLE[resample]).crop(box)


def eval_whole(image: Image.Image, size: int) -> Image.Image:
  """The whole image, resized (bicubic) unless it is `size` x `size` already.

  Source: DeiT, for images of up to 32 pixels (which it does not resize).
  """
  if image.size == (size, size):
    return image
  return image.resize((size, size), BICUBIC)


# --- colour -----------------------------------------------------------------


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
  """Rotates the hue by `shift` of a full circle, in [-0.5, 0.5].

  The shift in Pillow's 8-bit hue is `shift * 255` truncated towards zero; hue
  wraps around at 256.
  """
  hsv = np.array(image.convert("HSV"))
  hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # uint8 wraps around
  return Image.frombytes("HSV", image.size, hsv.tobytes()).convert("RGB")


def color_jitter(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.2,
  hue: float = 0.1,
) -> Image.Image:
  """Brightness, contrast, saturation and hue in random order.

  The first three are blended with factors from U(1 - x, 1 + x), bounded below
  by 0; hue is rotated by U(-hue, hue) of a circle. A strength of 0 skips the
  step.

  Source: torchvision.transforms.ColorJitter on Pillow images.
  """
  order = rng.permutation(4)
  strengths = (brightness, contrast, saturation, hue)
  factors = [rng.uniform(max(0.0, 1 - x), 1 + x) for x in strengths[:3]]
  shift = rng.uniform(-hue, hue)
  steps: list[Callable[[Image.Image], Image.Image]] = [
    lambda x: ImageEnhance.Brightness(x).enhance(factors[0]),
    lambda x: ImageEnhance.Contrast(x).enhance(factors[1]),
    lambda x: ImageEnhance.Color(x).enhance(factors[2]),
    lambda x: shift_hue(x, shift),
  ]
  for i in order:
    if strengths[i]:
      image = steps[i](image)
  return image


def to_grey(image: Image.Image) -> Image.Image:
  """Luma (ITU-R 601) in all three channels."""
  return image.convert("L").convert("RGB")


def gaussian_blur(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  radius: tuple[float, float] = (0.1, 2.0),
) -> Image.Image:
  """Pillow's Gaussian blur with a radius (standard deviation) in pixels."""
  return image.filter(ImageFilter.GaussianBlur(rng.uniform(*radius)))


def solarise(image: Image.Image, *, threshold: int = 128) -> Image.Image:
  """Inverts every channel value at or above `threshold`."""
  return ImageOps.solarize(image, threshold)


# --- recipes ----------------------------------------------------------------


def check_scale(name: str, scale: tuple[float, float]) -> None:
  """Rejects shares of an image's area that no crop can have.

  Args:
    name: of the key.
    scale: its value.

  Raises:
    InputError: not ascending, or outside of (0, 1].
  """
  low, high = scale
  if not 0 < low <= high <= 1:
    raise InputError(
      f"{name} {(low, high)} must be two shares of the image's area, the "
      "smaller first, above 0 and at most 1"
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Base class of the recipes for `data.transform`."""

  image_size: int = schema.key(
    224, "side of global crops and of evaluated images, pixels", low=1
  )

  def __post_init__(self) -> None:
    """Rejects invalid settings before the first image is read."""
    schema.check("data", vars(self), type(self))

  def pair(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Two views of one RGB image: [2, image_size, image_size, 3] uint8.

    The first two that the recipe makes together or, if it makes one, two draws.
    """
    views = self(image, rng)["images"]
    if len(views) < 2:
      views = np.concatenate([views, self(image, rng)["images"]])
    return views[:2]


@dataclasses.dataclass(frozen=True)
class MultiCrop(Recipe):
  """Global and local crops, as in DINO, iBOT and AttMask.

  Source: AttMask main_attmask.py, DataAugmentationiBOT.
  """

  global_crops: int = schema.key(2, "global views per image")
  global_scale: tuple[float, float] = schema.key(
    (0.25, 1.0), "area of global crops as a share of the image"
  )
  local_size: int = schema.key(96, "side of local crops, pixels", low=1)
  local_crops: int = schema.key(10, "local views per image")
  local_scale: tuple[float, float] = schema.key(
    (0.05, 0.25), "area of local crops as a share of the image"
  )
  jitter: float = schema.key(0.8, "probability of colour jitter", low=0, high=1)
  grey: float = schema.key(0.2, "probability of a grey view", low=0, high=1)
  blur_radius: float = schema.key(
    2.0, "largest, in pixels; published for 224 px", low=0.1
  )

  def __post_init__(self) -> None:
    """Rejects invalid settings before the first image is read."""
    super().__post_init__()
    check_scale("data.global_scale", self.global_scale)
    check_scale("data.local_scale", self.local_scale)

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Augments one RGB image.

    Args:
      image: RGB.
      rng: the image's own generator.

    Returns:
      "images" [G, image_size, image_size, 3] uint8 and, unless there are no
      local crops, "local_images" [local_crops, local_size, local_size, 3].
    """
    names = ("jitter", "grey", "blur_radius")
    strength = {name: getattr(self, name) for name in names}
    first, other, local = (
      dataclasses.replace(colour, **strength)
      for colour in (FIRST_GLOBAL, OTHER_GLOBAL, LOCAL)
    )
    views = lambda colours, size, scale: np.stack(
      [
        random_view(image, rng, colour, size=size, scale=scale)
        for colour in colours
      ]
    )
    colours = [first] + [other] * (self.global_crops - 1)
    crops = {"images": views(colours, self.image_size, self.global_scale)}
    if self.local_crops:
      colours = [local] * self.local_crops
      crops["local_images"] = views(colours, self.local_size, self.local_scale)
    return crops

  def pair(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """The two global views of a training step, see `Recipe.pair`."""
    both = dataclasses.replace(self, global_crops=2, local_crops=0)
    return both(image, rng)["images"]


@dataclasses.dataclass(frozen=True)
class Photometric:
  """The colour steps of one kind of crop.

  Attributes:
    blur, solarise, jitter, grey: probabilities, 0-1.
    blur_radius: largest radius of the blur in pixels, at least 0.1.
  """

  blur: float
  solarise: float = 0.0
  jitter: float = MultiCrop.jitter
  grey: float = MultiCrop.grey
  blur_radius: float = MultiCrop.blur_radius

  def __call__(
    self, image: Image.Image, rng: np.random.Generator
  ) -> Image.Image:
    """Jitter, grey, blur, solarise: in this order, drawn independently."""
    if rng.random() < self.jitter:
      image = color_jitter(image, rng)
    if rng.random() < self.grey:
      image = to_grey(image)
    if rng.random() < self.blur:
      image = gaussian_blur(image, rng, radius=(0.1, self.blur_radius))
    if rng.random() < self.solarise:
      image = solarise(image)
    return image


FIRST_GLOBAL = Photometric(blur=1.0)
OTHER_GLOBAL = Photometric(blur=0.1, solarise=0.2)
LOCAL = Photometric(blur=0.5)


def random_view(
  image: Image.Image,
  rng: np.random.Generator,
  colour: Photometric,
  *,
  size: int,
  scale: tuple[float, float],
) -> np.ndarray:
  """One crop, flipped and coloured at random: [size, size, 3] uint8."""
  image = random_resized_crop(image, rng, size=size, scale=scale)
  image = random_flip(image, rng)
  return np.asarray(colour(image, rng))
