"""Generated pictures of objects on clutter, easier to tell apart than shapes.

As in photographs, a class goes with outline, material and hue, none of which
decides alone: two classes share each material, two others each hue, and every
one of the three is drawn from all possible ones in a part of the pictures. The
background is blotches of all hues, drawn alike for all classes, so what two
crops of a picture share is mostly the object. Rotation and place are drawn as
in `shapes`, where the outline alone makes the class.
"""

import math

import numpy as np

from attmask_jax.data import shapes

TYPICAL = 0.85  # probability of the outline, material or hue of the class
HUES = 4
HUE_SPREAD = 0.05  # standard deviation of a hue, in turns of the colour circle
LIGHT_SPREAD = 0.02  # standard deviation of the log of the light's R, G and B

# Orthonormal directions of colour; both leave the mean of R, G and B alone, so
# that brightness tells nothing about the hue.
_COLOUR = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]]) / 6**0.5


class Objects(shapes.Shapes):
  """The generated source; see `sources.Source` for the members.

  A class has mostly the outline of its name, `material(label)` and
  `hue(label)`.
  """

  area = (0.08, 0.3)

  def __init__(self, count: int, *, size: int, seed: int, split: str) -> None:
    super().__init__(count, size=size, seed=seed, split=split)
    self.name = f"{count} generated objects ({split})"

  def describe(self, index: int) -> str:
    """Name of a picture for logs."""
    return f"objects[{index}]"

  def fingerprint(self) -> str:
    """All that a picture depends on."""
    return f"objects {self._key} {len(self)} {self.size}"

  def outline_name(self, index: int, rng: np.random.Generator) -> str:
    """The outline of picture `index`, mostly that of its class."""
    label = _mostly(rng, self.labels[index], len(shapes.CLASSES))
    return shapes.CLASSES[label]

  def _layers(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cover = self._cover(index, rng)
    label = int(self.labels[index])
    kind = _mostly(rng, material(label), shapes.MATERIALS)
    turn = _mostly(rng, hue(label), HUES) / HUES + rng.normal(0, HUE_SPREAD)
    front = self._surface(rng, kind, turn)
    light = np.exp(rng.normal(0, LIGHT_SPREAD, 3))
    return self._clutter(rng) * light, front * light, cover

  def _clutter(self, rng: np.random.Generator) -> np.ndarray:
    """Blotches of all hues and brightnesses: [size, size, 3], about 0-255."""
    turn, level, chroma = (
      self._blotches(rng, int(rng.integers(3, 6))) for _ in range(3)
    )
    contrast, colour = rng.uniform(80, 160), rng.uniform(70, 120)
    angle = 4 * math.pi * turn
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1) @ _COLOUR
    grey = 127 + contrast * (level - 0.5)
    return grey[..., None] + colour * chroma[..., None] * direction

  def _blotches(self, rng: np.random.Generator, cells: int) -> np.ndarray:
    """`_clouds` whose values are spread evenly over [0, 1]: [size, size]."""
    clouds = self._clouds(rng, cells)
    ranks = np.argsort(np.argsort(clouds, axis=None))
    return ranks.reshape(clouds.shape) / ranks.size

  def _surface(
    self, rng: np.random.Generator, kind: int, turn: float
  ) -> np.ndarray:
    """[size, size, 3], about 0-255, of a material and a hue in turns."""
    angle = 2 * math.pi * turn
    direction = np.array([math.cos(angle), math.sin(angle)]) @ _COLOUR
    middle = rng.uniform(60, 195) + rng.uniform(30, 80) * direction
    spread = rng.choice((-1, 1)) * rng.uniform(15, 45)
    palette = np.stack([middle - spread, middle + spread]).astype(np.float32)
    return self._texture(rng, palette, kind)


def material(label: int) -> int:
  """The usual one of shapes.MATERIALS, 0 to 3: two classes share each."""
  return label % 4


def hue(label: int) -> int:
  """The usual one of HUES: two classes share each."""
  return label // 2


def _mostly(rng: np.random.Generator, usual: int, count: int) -> int:
  """`usual` with probability TYPICAL, else any of `count`."""
  other = int(rng.integers(count))
  return int(usual) if rng.random() < TYPICAL else other
