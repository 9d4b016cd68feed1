"""Pictures of masks: what the teacher attends to and what each policy hides."""

import os
import pathlib
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from attmask_jax.errors import InputError

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

READABLE_NAMES = {
  "attmask_high": "AttMask-High",
  "attmask_hint": "AttMask-Hint",
  "attmask_low": "AttMask-Low",
  "random": "Random",
  "block": "Block-wise",
}
HIDDEN_GREY = 0.62  # not black: black is a colour many photographs have
CELL_INCHES, GAP_INCHES, DPI = 1.5, 0.06, 200


def mask_gallery(
  path: str | os.PathLike[str],
  images: np.ndarray,
  attention: np.ndarray,
  masks: Mapping[str, np.ndarray],
  *,
  patch_size: int,
  grid: tuple[int, int] | None = None,
  object_masks: np.ndarray | None = None,
  title: str = "",
) -> None:
  """Writes one PNG: a row per image, a column per mask policy.

  Columns: the image (with the object's outline), the teacher's attention as a
  heat map, then the image with the patches each policy hides in grey, under
  the policy's name and the share it hides over all images shown.

  Args:
    path: the PNG; replaced in one move, its folder is created.
    images: [n, H, W, 3] uint8.
    attention: [n, N] float32, >= 0, any scale: each image has its own colours.
    masks: policy name -> [n, N] bool, True = hidden.
    patch_size: P; the grid covers the first h * P by w * P pixels.
    grid: (h, w) with h * w = N; None = (H // P, W // P).
    object_masks: [n, H, W] bool, True = object.
    title: one line above everything.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  n, height, width, _ = images.shape
  h, w = grid or (height // patch_size, width // patch_size)
  for name, array in {"attention": attention, **masks}.items():
    if array.shape != (n, h * w):
      raise InputError(
        f"Mask gallery: {name} has shape {array.shape}, but {n} images with a"
        f" {h} x {w} grid of patches need {(n, h * w)}."
      )
  figure, axes = _layout(n, 2 + len(masks), height / width, title)
  headings = ["Image", "Teacher\nattention"]
  headings += [_heading(name, mask) for name, mask in masks.items()]
  for axis, heading in zip(axes[0], headings, strict=True):
    axis.set_title(heading, fontsize=9, pad=4, linespacing=1.15)
  for row, image in enumerate(images):
    axes[row][0].imshow(image)
    if object_masks is not None:
      _outline(axes[row][0], object_masks[row])
    _heat(axes[row][1], image, attention[row].reshape(h, w), patch_size)
    for axis, mask in zip(axes[row][2:], masks.values(), strict=True):
      axis.imshow(_hide(image, mask[row].reshape(h, w), patch_size))
  FigureCanvasAgg(figure)
  _save(figure, pathlib.Path(path))


def mask_overlap(
  masks: np.ndarray, objects: np.ndarray, *, grid: tuple[int, int]
) -> dict[str, float]:
  """How well the hidden area meets the objects.

  Areas are in patches (an object counts with the share of the patch that it
  covers), summed over all images and divided once.

  Args:
    masks: [n, N] bool, True = hidden.
    objects: [n, H, W] bool, True = object.
    grid: (h, w) with h * w = N; they divide H and W.

  Returns:
    precision: share of the hidden area that lies on an object.
    recall: share of the objects that is hidden.
    iou: area in both over area in either. All 0 to 1, nan for 0 / 0.
  """
  n, height, width = objects.shape
  h, w = grid
  if masks.shape != (n, h * w) or height % h or width % w:
    raise InputError(
      f"Mask overlap: masks {masks.shape} and objects {objects.shape} do not"
      f" fit a {h} x {w} grid of patches."
    )
  cells = objects.reshape(n, h, height // h, w, width // w)
  covered = cells.mean(axis=(2, 4), dtype=np.float64).reshape(n, h * w)
  both = float(covered[masks.astype(bool)].sum())
  hidden, objects_area = float(masks.sum()), float(covered.sum())
  parts = {
    "precision": hidden,
    "recall": objects_area,
    "iou": hidden + objects_area - both,
  }
  return {
    name: both / whole if whole else float("nan")
    for name, whole in parts.items()
  }


def _layout(
  rows: int, columns: int, aspect: float, title: str
) -> "tuple[Figure, list[list[Axes]]]":
  """An empty grid of pictures, H / W = aspect, with room for the text."""
  from matplotlib.figure import Figure

  cell_w, cell_h = CELL_INCHES, CELL_INCHES * aspect
  gap, heading = GAP_INCHES, 0.4
  width = columns * (cell_w + gap) + gap
  lines = textwrap.wrap(title, width=max(20, int(width * 11)))
  top = heading + 0.24 * len(lines) + (0.04 if lines else 0)
  height = rows * (cell_h + gap) + gap + top
  figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
  if lines:
    figure.text(
      0.5,
      1 - 0.07 / height,
      "\n".join(lines),
      ha="center",
      va="top",
      fontsize=11,
      fontweight="bold",
    )
  axes = []
  for row in range(rows):
    bottom = height - top - (row + 1) * (cell_h + gap) + gap
    axes.append([])
    for column in range(columns):
      left = gap + column * (cell_w + gap)
      box = left / width, bottom / height, cell_w / width, cell_h / height
      axis = figure.add_axes(box)
      axis.set_xticks([])
      axis.set_yticks([])
      axis.spines[:].set_visible(False)
      axes[-1].append(axis)
  return figure, axes


def _heading(name: str, mask: np.ndarray) -> str:
  """A policy's readable name and the share [n, N] hides, on two lines."""
  return f"{READABLE_NAMES.get(name, name)}\n{100 * mask.mean():.0f} % hidden"


def _heat(
  axis: "Axes", image: np.ndarray, attention: np.ndarray, patch_size: int
) -> None:
  """Attention [h, w] as colours over the grey image [H, W, 3]."""
  low, high = float(attention.min()), float(attention.max())
  heat = (attention - low) / max(high - low, 1e-12)
  h, w = attention.shape
  # A pale image, and colour only where attention is: both stay readable.
  axis.imshow(127 + image.mean(axis=2) / 2, cmap="gray", vmin=0, vmax=255)
  axis.imshow(
    heat,
    cmap="YlOrRd",
    vmin=0,
    vmax=1,
    alpha=0.1 + 0.8 * np.sqrt(heat),
    interpolation="nearest",
    extent=(-0.5, w * patch_size - 0.5, h * patch_size - 0.5, -0.5),
  )
  axis.set_xlim(-0.5, image.shape[1] - 0.5)
  axis.set_ylim(image.shape[0] - 0.5, -0.5)


def _outline(axis: "Axes", mask: np.ndarray) -> None:
  """The edge of an object [H, W], readable on light and dark."""
  if mask.any() and not mask.all():
    for colour, width in (("black", 2.0), ("white", 1.0)):
      axis.contour(mask, levels=[0.5], colors=colour, linewidths=width)


def _hide(image: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
  """Image [H, W, 3] uint8 with the patches of mask [h, w] in grey."""
  pixels = mask.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
  shown = image.copy()
  area = shown[: pixels.shape[0], : pixels.shape[1]]
  area[pixels] = round(255 * HIDDEN_GREY)
  return shown


def _save(figure: "Figure", path: pathlib.Path) -> None:
  """Writes a PNG that is never half there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
