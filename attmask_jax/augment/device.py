"""Views of images made on the device: crops and colours inside a compiled step.

The host draws what is random (`transforms.Drawn`) and decodes (`canvas`); here
the same draws are carried out on a whole batch. The steps follow Pillow's
formulas, with its 8-bit values between them: float32 arrays that hold whole
numbers from 0 to 255. What remains is rounding, see docs/data.md. Each row is
computed alone, so nothing moves between devices.

Source: Resample.c, Blend.c, Convert.c, BoxBlur.c of Pillow (MIT-CMU);
torchvision's transforms of the same names (BSD-3).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from attmask_jax import Batch
from attmask_jax.augment import canvas, colours, transforms

PASSES = 3  # of the box blur that approximates a Gaussian


class Draws(NamedTuple):
  """One row of `canvas.pack`, or with a leading axis many of them.

  Attributes:
    box: [4] left, upper, right, lower in pixels of the canvas.
    flip, grey, solarise: [] 0 or 1.
    order: [4] steps of the jitter, see `colours.Jitter`; NOTHING fills up.
    factors: [3] of brightness, contrast, saturation.
    hue: [] 0-255, added to the 8-bit hue.
    blur: [] radius of the box blur in pixels, see `canvas.box_radius`.
  """

  box: jax.Array
  flip: jax.Array
  grey: jax.Array
  solarise: jax.Array
  order: jax.Array
  factors: jax.Array
  hue: jax.Array
  blur: jax.Array


def unpack(rows: jax.Array) -> Draws:
  """[..., canvas.WIDTH] float32 -> the draws."""
  return Draws(
    box=rows[..., 0:4],
    flip=rows[..., 4],
    grey=rows[..., 5],
    solarise=rows[..., 6],
    order=rows[..., 7:11],
    factors=rows[..., 11:14],
    hue=rows[..., 14],
    blur=rows[..., 15],
  )


def augment(batch: Batch, recipe: transforms.Drawn) -> Batch:
  """Replaces canvases and draws by the views of a recipe.

  Args:
    batch: `canvas.CANVAS` [B, C, C, 3] uint8 and, for each kind of view, its
      draws [B, V, canvas.WIDTH] float32, see `canvas.views_name`.
    recipe: that drew them.

  Returns:
    The batch with each kind of view [B, V, H, W, 3] uint8 instead.
  """
  batch = dict(batch)
  canvases = batch.pop(canvas.CANVAS)
  for name, side in recipe.sides.items():
    rows = unpack(batch.pop(canvas.views_name(name)))
    one = functools.partial(view, recipe=recipe, side=side)
    views = jax.vmap(jax.vmap(one, in_axes=(None, 0)))(canvases, rows)
    batch[name] = views.astype(jnp.uint8)
  return batch


def view(
  image: jax.Array, draws: Draws, *, recipe: transforms.Drawn, side: int
) -> jax.Array:
  """One view: [C, C, 3] uint8 -> [side, side, 3] float32."""
  x = crop(image, draws.box, draws.flip, side=side, resample=recipe.resample)
  if not recipe.recolours:
    return x
  x = jitter(x, draws.order, draws.factors, draws.hue)
  x = jnp.where(draws.grey > 0, luma(x), x)
  if recipe.max_blur:
    most = int(canvas.box_radius(recipe.max_blur))
    x = blur(x, draws.blur, most=most)
  return jnp.where(draws.solarise > 0, solarise(x), x)


# --- geometry ---------------------------------------------------------------


def crop(
  image: jax.Array,
  box: jax.Array,
  flip: jax.Array,
  *,
  side: int,
  resample: str,
) -> jax.Array:
  """Crops, resizes with antialiasing, and mirrors: -> [side, side, 3].

  Pixels outside the box have no weight, as if cropped before
  (`jax.image.scale_and_translate` would see them). First along the rows, with
  8-bit values in between.

  differs: Pillow 13 starts along the columns where that is less work. Sharp
  edges then differ by up to a dozen levels, in few pixels.

  Args:
    image: [H, W, 3], uint8 or whole numbers.
    box: [4] left, upper, right, lower; may be fractions, then pixels that are
      partly inside count.
    flip: [] > 0 mirrors horizontally.
    side: of the crop in pixels.
    resample: one of transforms.RESAMPLE.
  """
  height, width, _ = image.shape
  left, upper, right, lower = box
  weights = functools.partial(resize_weights, side=side, resample=resample)
  across = weights(left, right, length=width)
  across = jnp.where(flip > 0, across[::-1], across)
  down = weights(upper, lower, length=height)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  x = _8_bits(product("hwc,xw->hxc", image.astype(jnp.float32), across))
  return _8_bits(product("hxc,yh->yxc", x, down))


def resize_weights(
  low: jax.Array, high: jax.Array, *, side: int, length: int, resample: str
) -> jax.Array:
  """Weights that resize [low, high) of an axis: [side, length].

  The filter is as wide as the larger of the two pixel sizes; the weights of
  each output add up to 1.

  Source: precompute_coeffs in Resample.c of Pillow.
  """
  scale = (high - low) / side
  wide = jnp.maximum(scale, 1.0)
  centres = low + (jnp.arange(side, dtype=jnp.float32)[:, None] + 0.5) * scale
  pixels = jnp.arange(length, dtype=jnp.float32)[None]
  x = jnp.abs((pixels + 0.5 - centres) / wide)
  if resample == "bilinear":
    weights = jnp.maximum(1 - x, 0.0)
  else:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
  inside = (pixels >= jnp.floor(low)) & (pixels < jnp.ceil(high))
  weights = jnp.where(inside, weights, 0.0)
  return weights / jnp.sum(weights, axis=1, keepdims=True)


# --- colours ----------------------------------------------------------------


def luma(x: jax.Array) -> jax.Array:
  """(19595 R + 38470 G + 7471 B + 32768) >> 16: [..., 3] -> [..., 1].

  Exact: all sums are below 2**24.
  """
  red, green, blue = x[..., :1], x[..., 1:2], x[..., 2:]
  total = 19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0
  return jnp.floor(total / 65536.0)


def blend(degenerate: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
  """degenerate + factor * (x - degenerate), cut to 0-255, truncated.

  Source: ImagingBlend, ImageEnhance of Pillow.
  """
  mixed = degenerate + factor * (x - degenerate)
  return jnp.floor(jnp.clip(mixed, 0.0, 255.0))


def mean_luma(x: jax.Array) -> jax.Array:
  """Mean over all pixels, rounded half up: [H, W, 3] -> [] float32."""
  grey = luma(x).astype(jnp.int32)
  twice = 2 * jnp.sum(grey) + grey.size
  return (twice // (2 * grey.size)).astype(jnp.float32)


def enhance(x: jax.Array, step: jax.Array, factor: jax.Array) -> jax.Array:
  """One blend of a jitter: [H, W, 3].

  With black for brightness, with the mean luma for contrast, and with the luma
  for saturation. A factor of 1 changes nothing.

  Source: ImageEnhance of Pillow.
  """
  degenerate = jnp.where(step == colours.CONTRAST, mean_luma(x), 0.0)
  degenerate = jnp.where(step == colours.SATURATION, luma(x), degenerate)
  return blend(degenerate, x, factor)


def shift_hue(x: jax.Array, steps: jax.Array) -> jax.Array:
  """Adds `steps` to the 8-bit hue, which wraps around at 256: [..., 3].

  With V the largest and C the range of R, G, B: S = trunc(255 C / V), H =
  trunc(255 h) with h in [0, 1) from the usual six sectors; back, each channel
  is round(V (1 - S w / 255)) with w in [0, 1] from its distance on the circle.

  Source: rgb2hsv_row and hsv2rgb in Convert.c of Pillow.
  """
  red, green = x[..., 0], x[..., 1]
  value, low = jnp.max(x, axis=-1), jnp.min(x, axis=-1)
  chroma = value - low
  below = (value[..., None] - x) / jnp.maximum(chroma, 1.0)[..., None]
  r, g, b = below[..., 0], below[..., 1], below[..., 2]
  other = jnp.where(green == value, 2.0 + (r - b), 4.0 + (g - r))
  sixths = jnp.where(red == value, b - g, other)
  sixths = jnp.where(sixths < 0, sixths + 6.0, sixths)
  hue = _times_255(sixths / 6.0) + steps
  hue = jnp.where(hue >= 256, hue - 256, hue) * (6.0 / 255.0)
  saturation = _times_255(chroma / jnp.maximum(value, 1.0)) / 255.0

  def channel(offset: float) -> jax.Array:
    place = hue + offset
    place = jnp.where(place >= 6, place - 6, place)
    weight = jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)
    return jnp.floor(value * (1 - saturation * weight) + 0.5)

  return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


def _times_255(share: jax.Array) -> jax.Array:
  """trunc(255 * share) of the exact product, for float32 shares from 0 to 1.

  Rounding first would reach the next whole number too early: in two parts,
  both products are exact.
  """
  head = jnp.floor(share * 4096.0) / 4096.0
  whole = jnp.floor(head * 255.0)
  missing = 1.0 - (head * 255.0 - whole)
  return whole + ((share - head) * 255.0 >= missing)


def jitter(
  x: jax.Array, order: jax.Array, factors: jax.Array, hue: jax.Array
) -> jax.Array:
  """Brightness, contrast, saturation and hue in the drawn order.

  The hue, by far the dearest, is computed once: the other three have a place
  before and one after it, and where they are not due a factor of 1.

  Args:
    x: [H, W, 3].
    order, factors, hue: see `Draws`.
  """
  is_hue = order == colours.HUE
  place = jnp.where(jnp.any(is_hue), jnp.argmax(is_hue), order.size)

  def step(x: jax.Array, i: int, due: jax.Array) -> jax.Array:
    of_step = jnp.arange(3) == order[i]
    factor = jnp.sum(jnp.where(of_step, factors, 0.0))
    factor = jnp.where(due & jnp.any(of_step), factor, 1.0)
    return enhance(x, order[i], factor)

  for i in range(3):
    x = step(x, i, i < place)
  x = jnp.where(place < order.size, shift_hue(x, hue), x)
  for i in range(1, 4):
    x = step(x, i, i > place)
  return x


def blur(x: jax.Array, radius: jax.Array, *, most: int) -> jax.Array:
  """Gaussian blur as PASSES box blurs per axis: [H, W, 3].

  A box of radius r gives 1 / (2 r + 1) to each of the 2 trunc(r) + 1 pixels in
  the middle and halves of what is left to the two beyond; the edge is repeated.

  Args:
    x: [H, W, 3].
    radius: [] of the box, 0 = no blur.
    most: its largest whole part.

  Source: ImagingGaussianBlur in BoxBlur.c of Pillow.
  """
  whole = jnp.floor(radius)
  inner = 1 / (2 * radius + 1)
  outer = (1 - (2 * whole + 1) * inner) / 2
  distance = jnp.abs(jnp.arange(-most - 1, most + 2, dtype=jnp.float32))
  weights = jnp.where(distance <= whole, inner, 0.0)
  weights = jnp.where(distance == whole + 1, outer, weights)
  for axis in (1, 0):
    for _ in range(PASSES):
      x = _8_bits(_along(x, weights, axis))
  return x


def _along(x: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
  """Weighted sum of neighbours along an axis, the edge repeated."""
  size, reach = x.shape[axis], weights.size // 2
  pads = [(0, 0)] * x.ndim
  pads[axis] = (reach, reach)
  padded = jnp.pad(x, pads, mode="edge")
  parts = [
    weights[i] * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
    for i in range(weights.size)
  ]
  return functools.reduce(jnp.add, parts)


def solarise(x: jax.Array) -> jax.Array:
  """255 - x at or above the threshold. Source: ImageOps.solarize of Pillow."""
  return jnp.where(x >= colours.THRESHOLD, 255.0 - x, x)


def _8_bits(x: jax.Array) -> jax.Array:
  """Rounded half up and cut to 0-255."""
  return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)
