"""Drawing helpers of all figures: the grid of cells, heat maps, outlines.

matplotlib is imported where it is used, so that training does not load it.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from attmask_jax import atomic
from attmask_jax.evals import uniform

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

HIDDEN_GREY = 0.62  # not black, which is common in photographs
CELL_INCHES, GAP_INCHES, DPI = 1.5, 0.06, 200
LABEL_INCHES = 0.2
# Largest height over width of a cell; taller pictures are scaled to fit.
MAX_ASPECT = 1.6
FRAME_SIDE = 256  # least height of animation frames, pixels


def grid(
  aspects: Sequence[float],
  columns: int,
  *,
  headings: Mapping[int, Sequence[str]],
  labels: Sequence[str] = (),
  title: str = "",
  caption: str = "",
) -> "tuple[Figure, list[list[Axes]]]":
  """A figure with a grid of empty cells, and the text around them.

  Args:
    aspects: height over width of the pictures of each row.
    columns: cells per row.
    headings: row -> headings of its cells, one per column, of at most two
      lines.
    labels: one per row, to its left; () = none.
    title: above the grid.
    caption: below the grid.

  Returns:
    The figure and [rows][columns] axes without ticks and frames.
  """
  from matplotlib.figure import Figure

  heights = [CELL_INCHES * min(a, MAX_ASPECT) for a in aspects]
  over = [_heading_inches(headings.get(row, ())) for row in range(len(heights))]
  gap, left = GAP_INCHES, LABEL_INCHES * bool(labels)
  width = left + columns * (CELL_INCHES + gap) + gap
  above = textwrap.wrap(title, width=max(20, int(width * 11)))
  below = textwrap.wrap(caption, width=max(20, int(width * 15.5)))
  top = 0.24 * len(above) + (0.04 if above else 0)
  bottom = 0.16 * len(below) + (0.1 if below else 0)
  height = top + sum(heights) + sum(over) + gap * (len(heights) + 1) + bottom
  figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
  texts = (
    (1 - 0.07 / height, above, dict(va="top", fontsize=11, weight="bold")),
    (0.08 / height, below, dict(va="bottom", fontsize=8, color="0.25")),
  )
  for y, lines, style in texts:
    if lines:
      # No file or class name is a formula, whatever dollars it has.
      text = "\n".join(lines)
      figure.text(0.5, y, text, ha="center", parse_math=False, **style)
  axes, y = [], height - top
  for row, cell in enumerate(heights):
    y -= over[row] + cell + (gap if row else 0)
    x = [left + gap + i * (CELL_INCHES + gap) for i in range(columns)]
    size = CELL_INCHES / width, cell / height
    boxes = [(a / width, y / height, *size) for a in x]
    axes.append([_cell(figure, box) for box in boxes])
    for axis, text in zip(axes[-1], headings.get(row, ()), strict=False):
      axis.set_title(
        text, fontsize=9, pad=4, linespacing=1.15, parse_math=False
      )
    if labels:
      figure.text(
        (left / 2 + gap / 2) / width,
        (y + cell / 2) / height,
        shorten(labels[row], int(cell * 18)),
        ha="center",
        va="center",
        rotation=90,
        fontsize=7,
        parse_math=False,
      )
  return figure, axes


def _heading_inches(texts: Sequence[str]) -> float:
  """Height of the headings above a row."""
  if not texts:
    return 0.0
  return 0.11 + 0.145 * (1 + max(text.count("\n") for text in texts))


def _cell(figure: "Figure", box: tuple[float, ...]) -> "Axes":
  """Axes without ticks and frame."""
  axis = figure.add_axes(box)
  axis.set_xticks([])
  axis.set_yticks([])
  axis.spines[:].set_visible(False)
  return axis


def shorten(text: str, length: int) -> str:
  """The end of a long name, which holds its number."""
  return text if len(text) <= length else "…" + text[1 - length :]


def heat(
  image: np.ndarray,
  attention: np.ndarray,
  patch_size: int,
  *,
  bounds: tuple[float, float] | None = None,
) -> np.ndarray:
  """Attention as colours over the grey image.

  Args:
    image: [H, W, 3] uint8.
    attention: [h, w], >= 0, any scale.
    patch_size: P; attention covers the first h * P by w * P pixels.
    bounds: attention at which colour starts and is full; None = minimum and
      maximum, and no colour at all for attention that is uniform.

  Returns:
    [H, W, 3] uint8.
  """
  import matplotlib

  low, high = bounds or (float(attention.min()), float(attention.max()))
  if bounds is None and uniform.is_uniform(attention):
    low = high
  share = np.clip((attention - low) / max(high - low, 1e-12), 0, 1)
  # A pale image, coloured only where it is attended: both stay readable.
  pale = np.repeat(127 + image.mean(axis=2, keepdims=True) / 2, 3, axis=2)
  share = _enlarge(share, patch_size)[..., None]
  colours = 255 * matplotlib.colormaps["YlOrRd"](share[..., 0])[..., :3]
  opacity = 0.1 + 0.8 * np.sqrt(share)
  area = pale[: share.shape[0], : share.shape[1]]
  area += opacity * (colours - area)
  return np.clip(pale.round(), 0, 255).astype(np.uint8)


def show_heat(
  axis: "Axes", image: np.ndarray, attention: np.ndarray, patch_size: int
) -> None:
  """Draws `heat` with the ends of its own colour scale, see uniform.ends."""
  axis.imshow(heat(image, attention, patch_size))
  axis.text(
    0.03,
    0.03,
    uniform.ends(attention),
    transform=axis.transAxes,
    fontsize=6,
    bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=0.8),
  )


def grey_out(
  image: np.ndarray, mask: np.ndarray, patch_size: int
) -> np.ndarray:
  """Image [H, W, 3] uint8 with the patches of mask [h, w] in grey."""
  pixels = _enlarge(mask, patch_size)
  output = image.copy()
  area = output[: pixels.shape[0], : pixels.shape[1]]
  area[pixels] = round(255 * HIDDEN_GREY)
  return output


def dim(image: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
  """Image [H, W, 3] uint8, darker outside the patches of mask [h, w]."""
  output = 0.45 * image
  pixels = _enlarge(mask, patch_size)
  height, width = pixels.shape
  output[:height, :width][pixels] = image[:height, :width][pixels]
  return output.round().astype(np.uint8)


def outline(axis: "Axes", mask: np.ndarray) -> None:
  """Outlines an object [H, W], visible on light and dark images."""
  if mask.any() and not mask.all():
    for colour, width in (("black", 2.0), ("white", 1.0)):
      axis.contour(mask, levels=[0.5], colors=colour, linewidths=width)


def outline_patches(axis: "Axes", mask: np.ndarray, patch_size: int) -> None:
  """Outlines the patches of mask [h, w], also at the border of the image."""
  from matplotlib.collections import LineCollection

  framed = np.pad(mask.astype(bool), 1)
  edges = []
  for y, x in np.argwhere(framed[1:] != framed[:-1]):
    edges.append([(x - 1, y), (x, y)])
  for y, x in np.argwhere(framed[:, 1:] != framed[:, :-1]):
    edges.append([(x, y - 1), (x, y)])
  lines = patch_size * np.asarray(edges, float).reshape(-1, 2, 2) - 0.5
  for colour, width in (("black", 2.2), ("white", 1.0)):
    axis.add_collection(
      LineCollection(
        lines,
        colors=colour,
        linewidths=width,
        capstyle="round",
        clip_on=False,
      )
    )


def frame(*parts: np.ndarray) -> Image.Image:
  """Pictures [H, W, 3] uint8 side by side, small ones enlarged."""
  height = parts[0].shape[0]
  factor = -(-FRAME_SIDE // height)
  gap = np.full((height * factor, 4, 3), 255, np.uint8)
  row = []
  for part in parts:
    row += [gap] if row else []
    row.append(_enlarge(part, factor))
  return Image.fromarray(np.concatenate(row, axis=1))


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
  """[h, w, ...] -> [h * factor, w * factor, ...]."""
  return array.repeat(factor, axis=0).repeat(factor, axis=1)


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
  """Writes a PNG atomically; creates its folder."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  FigureCanvasAgg(figure)
  with atomic.replaced(path) as temporary:
    figure.savefig(temporary, format="png")
