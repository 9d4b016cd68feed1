"""Generated pictures of textured shapes: a data set that needs no download.

One object per picture, on a textured background. Its class is its outline and
nothing else: object and background draw texture and colours from the same
distribution whatever the class, and area and rotation are drawn alike for all
(the place as well, within the room that the outline leaves). A picture is a
pure function of (seed, split, index, size) and is drawn when asked for.
"""

import math

import numpy as np
from PIL import Image

from attmask_jax.data.decoding import Reduction

CLASSES = (
  "bar", "crescent", "cross", "disc", "ring", "square", "star", "triangle",
)  # fmt: skip
KEPT = 128 * 2**20  # bytes: a larger set is drawn anew in every epoch
MATERIALS = 5  # gradient, stripes, checks, dots, mottled

_SPLITS = {"train": 0, "val": 1}
_TAG = 3  # keeps these draws apart from those of the input pipeline
_STAR_INNER = 0.45  # inner radius of the star, its outer radius being 1
_RING_HOLE = 0.55  # radius of the hole, the ring's own radius being 1

# Of each outline at its own scale: the area, and the distance of the farthest
# point from the origin. The crescent is the unit disc less its overlap with a
# disc of radius 0.8 centred 0.5 away (the area of a circular lens).
_CRESCENT_AREA = 1.529468
_EXTENT = {
  "bar": (4 * 0.36, math.hypot(1, 0.36)),
  "crescent": (_CRESCENT_AREA, 1.0),
  "cross": (4 * 2 * 0.36 - 4 * 0.36**2, math.hypot(1, 0.36)),
  "disc": (math.pi, 1.0),
  "ring": (math.pi * (1 - _RING_HOLE**2), 1.0),
  "square": (4.0, math.sqrt(2)),
  "star": (5 * _STAR_INNER * math.sin(math.pi / 5), 1.0),
  "triangle": (3 * math.sqrt(3) / 4, 1.0),
}


def outline(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Signed distance to a shape, negative inside (a bound on it near corners).

  Args:
    name: one of `CLASSES`.
    x, y: [H, W] coordinates in the shape's own frame.

  Returns:
    [H, W] of the dtype of x.
  """
  if name == "bar":
    return np.maximum(np.abs(x) - 1, np.abs(y) - 0.36)
  if name == "crescent":
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))
  if name == "cross":
    ax, ay = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(ax, ay) - 1, np.minimum(ax, ay) - 0.36)
  if name == "disc":
    return np.hypot(x, y) - 1
  if name == "ring":
    middle, half = (1 + _RING_HOLE) / 2, (1 - _RING_HOLE) / 2
    return np.abs(np.hypot(x, y) - middle) - half
  if name == "square":
    return np.maximum(np.abs(x), np.abs(y)) - 1
  if name == "star":
    return _star(x, y)
  side = np.maximum(0.5 * x + math.sqrt(3) / 2 * np.abs(y), -x)
  return side - 0.5


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Five points: fold the plane into half a sector, measure to its edge."""
  sector = 2 * math.pi / 5
  radius, angle = np.hypot(x, y), np.arctan2(y, x)
  angle = np.abs((angle + sector / 2) % sector - sector / 2)
  # The edge runs from the tip (1, 0) to the inner corner.
  corner = _STAR_INNER * np.exp(0.5j * sector)
  normal = -1j * (corner - 1) / abs(corner - 1)
  along_x, along_y = radius * np.cos(angle), radius * np.sin(angle)
  return (along_x - 1) * normal.real + along_y * normal.imag


class Shapes:
  """The generated source; see `sources.Source` for the members.

  Attributes:
    size: side of the pictures in pixels.
    labels: [n] int32; picture i has class i mod 8, so the set is balanced.
  """

  class_names = list(CLASSES)
  area = (0.08, 0.35)  # share of the picture an object covers

  def __init__(self, count: int, *, size: int, seed: int, split: str) -> None:
    self.name = f"{count} generated shapes ({split})"
    self.size = size
    self.labels = (np.arange(count) % len(CLASSES)).astype(np.int32)
    self._key = (seed, _SPLITS[split])
    self._drawn: dict[int, np.ndarray] = {}
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    # Rows are y, columns x; both in units of the side.
    self._x, self._y = np.meshgrid(centres, centres)

  def __len__(self) -> int:
    return len(self.labels)

  def label(self, index: int) -> int:
    """Class of one picture."""
    return int(self.labels[index])

  def describe(self, index: int) -> str:
    """Name of a picture for logs."""
    return f"shapes[{index}]"

  def fingerprint(self) -> str:
    """All that a picture depends on."""
    return f"shapes {self._key} {len(self)} {self.size}"

  def layers(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Background and object's surface [size, size, 3], 0-255; cover 0-1.

    Without light and noise; cover [size, size, 1] is the object's share.
    """
    return self._layers(index, self._rng(index))

  def _layers(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cover = self._cover(index, rng)
    palettes = _palettes(rng)
    back, front = (self._texture(rng, palette) for palette in palettes)
    return back, front, cover

  def _cover(self, index: int, rng: np.random.Generator) -> np.ndarray:
    """The object's share of each pixel: [size, size, 1]."""
    distance = self._distance(index, rng)
    # One pixel of slope around the edge; half of it is covered.
    return np.clip(0.5 - distance * self.size, 0, 1)[..., None]

  def load(self, index: int, reduction: Reduction | None = None) -> Image.Image:
    """Picture `index`: RGB, `size` x `size`; drawn once if all fit in KEPT."""
    del reduction
    pixels = self._drawn.get(index)
    if pixels is None:
      pixels = self._draw(index)
      if pixels.nbytes * len(self) <= KEPT:
        self._drawn[index] = pixels
    return Image.fromarray(pixels)

  def _draw(self, index: int) -> np.ndarray:
    """[size, size, 3] uint8."""
    rng = self._rng(index)
    back, front, cover = self._layers(index, rng)
    picture = back + (front - back) * cover
    picture *= self._light(rng)[..., None]
    picture += rng.normal(0, 5, size=(self.size, self.size, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)

  def outline_name(self, index: int, rng: np.random.Generator) -> str:
    """The outline of picture `index`."""
    del rng  # not random
    return CLASSES[self.labels[index]]

  def object_mask(self, index: int) -> np.ndarray:
    """Where the object is: [size, size] bool, True inside its outline."""
    return self._distance(index, self._rng(index)) < 0

  def _rng(self, index: int) -> np.random.Generator:
    return np.random.default_rng([*self._key, int(index), _TAG])

  def _distance(self, index: int, rng: np.random.Generator) -> np.ndarray:
    """Signed distance to the object in units of the side: [size, size]."""
    name = self.outline_name(index, rng)
    area, reach = _EXTENT[name]
    scale = math.sqrt(rng.uniform(*self.area) / area)
    turn = rng.uniform(0, 2 * math.pi)
    stretch = math.exp(rng.uniform(-0.15, 0.15))  # keeps the area
    # Inside the picture where it fits, else in the middle.
    room = max(0.5 - reach * scale, 0.02)
    x = self._x - (0.5 + rng.uniform(-room, room))
    y = self._y - (0.5 + rng.uniform(-room, room))
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    along, across = cos * x + sin * y, cos * y - sin * x
    return scale * outline(name, along * stretch, across / stretch)

  def _light(self, rng: np.random.Generator) -> np.ndarray:
    """Brightness falling off across the picture: [size, size], about 1."""
    turn, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.5)
    slope = math.cos(turn) * (self._x - 0.5) + math.sin(turn) * (self._y - 0.5)
    return 1 + np.float32(strength) * slope

  def _texture(
    self,
    rng: np.random.Generator,
    palette: np.ndarray,
    kind: int | None = None,
  ) -> np.ndarray:
    """A patterned surface: [size, size, 3] float32 in 0-255.

    A pattern value in [0, 1] blends the two colours of the palette [2, 3].
    The material `kind` is one of MATERIALS; None draws it.
    """
    clouds = self._clouds(rng, int(rng.integers(2, 6)))
    if kind is None:
      kind = rng.integers(MATERIALS)
    turn = rng.uniform(0, 2 * math.pi)
    waves = 2 * math.pi * math.exp(rng.uniform(math.log(3), math.log(11)))
    sharp = math.exp(rng.uniform(0, 2))
    phase = rng.uniform(0, 2 * math.pi)
    # Bent by the clouds, so that lines are not ruler-straight.
    bend = rng.uniform(0, 0.12) * clouds
    u = math.cos(turn) * self._x + math.sin(turn) * self._y + bend
    v = math.cos(turn) * self._y - math.sin(turn) * self._x + bend
    if kind == 0:
      value = u - u.mean() + 0.3 * (clouds - 0.5)  # a gradient
    elif kind == 1:
      value = sharp * np.sin(waves * u + phase)  # stripes
    elif kind == 2:
      value = 2 * sharp * np.sin(waves * u + phase)  # checks
      value = value * np.sin(waves * v)
    elif kind == 3:
      value = np.sin(waves * u) + np.sin(waves * v)  # dots
      value = sharp * (value - phase / 4)
    else:
      fine = self._clouds(rng, int(rng.integers(8, 24)))
      value = 2 * sharp * (0.5 * clouds + 0.5 * fine - 0.5)  # mottled
    value = np.clip(0.5 + 0.5 * value, 0, 1) * 0.8 + 0.2 * clouds
    return palette[0] + (palette[1] - palette[0]) * value[..., None]

  def _clouds(self, rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise with `cells` bumps per side: [size, size] in [0, 1]."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    fine = coarse.resize((self.size, self.size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(fine), 0, 1)


def _palettes(rng: np.random.Generator) -> np.ndarray:
  """Colours of background and object: [2, 2, 3] float32 in 0-255.

  Both pairs come from one distribution; they are drawn again while their means
  are so close that the object could not be seen.
  """
  for _ in range(8):
    # Brightness and tint apart, or nearly every colour would be garish.
    middle = rng.uniform(40, 215, (2, 1, 1)) + rng.normal(0, 36, (2, 1, 3))
    spread = rng.normal(0, 28, (2, 1, 1)) + rng.normal(0, 14, (2, 1, 3))
    gap = np.linalg.norm(middle[0] - middle[1])
    if gap > 50:
      break
  colours = np.concatenate([middle - spread, middle + spread], axis=1)
  return colours.astype(np.float32)
