"""Generated pictures of objects on clutter, easier to tell apart than shapes.

As in photographs, a class goes with outline, material and hue, none of which
decides alone: two classes share each material, hues of neighbours are close,
and each of the three is drawn from all possible ones in a part of the pictures.
Materials are patterns that have an up and a down, like those of photographs;
contrast and period are drawn alike for all. The background is blotches of all
hues, drawn alike for all classes, and so is the object under its pattern and
the tint of its hue. What two crops of a picture share is mostly the object.
Rotation and place are drawn as in `shapes`, where the outline alone makes the
class.
"""

import math

import numpy as np

from attmask_jax.data import shapes

# Probability that a picture has the outline, material or hue of its class; the
# others draw one of all.
OUTLINE, MATERIAL, HUE = 0.7, 0.95, 0.7
MATERIALS = 4  # gradient, upright stripes, level stripes, checks
HUES = 8  # one for each class, next to those of two others
TILT = 0.15  # standard deviation of a pattern's direction, radians
HUE_SPREAD = 0.03  # standard deviation of a hue, in turns of the colour circle
LIGHT_SPREAD = 0.02  # standard deviation of the log of the light's R, G and B

# Orthonormal directions of colour; both leave the mean of R, G and B alone, so
# that brightness tells nothing about the hue.
_COLOUR = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]]) / 6**0.5


class Objects(shapes.Shapes):
  """The generated source; see `sources.Source` for the members.

  A class has mostly the outline of its name, `material(label)` and
  `hue(label)`.
  """

  area = (0.1, 0.3)

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
    label = _mostly(rng, self.labels[index], len(shapes.CLASSES), OUTLINE)
    return shapes.CLASSES[label]

  def _layers(
    self, index: int, rng: np.random.Generator
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cover = self._cover(index, rng)
    label = int(self.labels[index])
    kind = _mostly(rng, material(label), MATERIALS, MATERIAL)
    turn = _mostly(rng, label, HUES, HUE) / HUES
    turn += rng.normal(0, HUE_SPREAD)
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
    """[size, size, 3], about 0-255, of a material and a hue in turns.

    Blotches as in the background, tinted, under the pattern of the material:
    were it of one colour, that colour would be all that two crops share.
    """
    angle = 2 * math.pi * turn
    direction = np.array([math.cos(angle), math.sin(angle)]) @ _COLOUR
    blotches = 127 + 0.6 * (self._clutter(rng) - 127)
    contrast = rng.choice((-1, 1)) * rng.uniform(40, 70)
    pattern = contrast * (2 * self._pattern(rng, kind) - 1)
    return blotches + rng.uniform(25, 50) * direction + pattern[..., None]

  def _pattern(self, rng: np.random.Generator, kind: int) -> np.ndarray:
    """One of MATERIALS, a little mottled: [size, size] in [0, 1]."""
    clouds = self._clouds(rng, int(rng.integers(2, 5)))
    turn = rng.normal(0, TILT)
    u = math.cos(turn) * self._x + math.sin(turn) * self._y
    v = math.cos(turn) * self._y - math.sin(turn) * self._x
    waves = 2 * math.pi * rng.uniform(5.5, 8.5)  # per side
    sharp, phases = rng.uniform(1, 3), rng.uniform(0, 2 * math.pi, 2)
    across, along = np.sin(waves * u + phases[0]), np.sin(waves * v + phases[1])
    value = (
      3 * (u - u.mean()), sharp * across, sharp * along,
      2 * sharp * across * along,
    )[kind]  # fmt: skip
    return 0.85 * np.clip(0.5 + 0.5 * value, 0, 1) + 0.15 * clouds


def material(label: int) -> int:
  """The usual one of MATERIALS: two classes share each."""
  return label % MATERIALS


def _mostly(
  rng: np.random.Generator, usual: int, count: int, probability: float
) -> int:
  """`usual` with this probability, else any of `count`."""
  other = int(rng.integers(count))
  return int(usual) if rng.random() < probability else other
