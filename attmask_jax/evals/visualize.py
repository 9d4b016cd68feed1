"""Galleries of masks, and their overlap with objects."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from attmask_jax.errors import InputError
from attmask_jax.evals import drawing, uniform

READABLE_NAMES = {
  "attmask_high": "AttMask-High",
  "attmask_hint": "AttMask-Hint",
  "attmask_low": "AttMask-Low",
  "random": "Random",
  "block": "Block-wise",
}


def mask_gallery(
  path: str | os.PathLike[str],
  images: Sequence[np.ndarray],
  attention: Sequence[np.ndarray],
  masks: Mapping[str, Sequence[np.ndarray]],
  *,
  patch_size: int,
  object_masks: Sequence[np.ndarray | None] | None = None,
  labels: Sequence[str] = (),
  title: str = "",
  caption: str = "",
  network: str = "Teacher",
) -> None:
  """Writes one PNG: a row per image, a column per mask policy.

  Columns: the image (with the object's outline), the attention as a heat map,
  then the image with the patches each policy hides in grey, below the policy's
  name and the share that it hides over all these images.

  Args:
    path: the PNG; replaced atomically, its folder is created.
    images: n times [H, W, 3] uint8; sizes may differ.
    attention: n times [N] float32, >= 0, any scale: each image has its own
      colour scale, whose ends are given as multiples of uniform attention.
      N = (H // P) * (W // P).
    masks: policy name -> n times [N] bool, True = hidden.
    patch_size: P.
    object_masks: n times [H, W] bool, True = object.
    labels: names of the images, to their left.
    title: above the gallery.
    caption: below the gallery.
    network: name of the network that attends.
  """
  n = len(images)
  grids = [(i.shape[0] // patch_size, i.shape[1] // patch_size) for i in images]
  for name, arrays in {"attention": attention, **masks}.items():
    for array, (h, w) in zip(arrays, grids, strict=True):
      if np.shape(array) != (h * w,):
        raise InputError(
          f"Mask gallery: {name} has shape {(n, *np.shape(array))}, but {n} "
          f"images with a {h} x {w} grid of patches need {(n, h * w)}."
        )
  headings = ["Image", f"{network}\nattention"]
  headings += [_heading(name, arrays) for name, arrays in masks.items()]
  figure, axes = drawing.grid(
    [image.shape[0] / image.shape[1] for image in images],
    len(headings),
    headings={0: headings},
    labels=labels,
    title=title,
    caption=f"{caption} {uniform.caption(*attention)}".strip(),
  )
  for row, (image, grid) in enumerate(zip(images, grids, strict=True)):
    axes[row][0].imshow(image)
    if object_masks is not None and object_masks[row] is not None:
      drawing.outline(axes[row][0], object_masks[row])
    scores = attention[row].reshape(grid)
    drawing.show_heat(axes[row][1], image, scores, patch_size)
    for axis, arrays in zip(axes[row][2:], masks.values(), strict=True):
      mask = arrays[row].reshape(grid)
      axis.imshow(drawing.grey_out(image, mask, patch_size))
  drawing.save(figure, path)


def mask_overlap(
  masks: np.ndarray, objects: np.ndarray, *, grid: tuple[int, int]
) -> dict[str, float]:
  """Overlap of the hidden area with the objects, see `overlap_scores`.

  Args:
    masks: [n, N] bool, True = hidden.
    objects: [n, H, W] bool, True = object.
    grid: (h, w) with h * w = N; they divide H and W.
  """
  n, height, width = objects.shape
  h, w = grid
  if masks.shape != (n, h * w) or height % h or width % w:
    raise InputError(
      f"Mask overlap: masks {masks.shape} and objects {objects.shape} do not"
      f" fit a {h} x {w} grid of patches."
    )
  return overlap_scores(masks, patch_cover(objects, grid=grid))


def patch_cover(objects: np.ndarray, *, grid: tuple[int, int]) -> np.ndarray:
  """Share of each patch that an object covers.

  Args:
    objects: [..., H, W] bool, True = object.
    grid: (h, w); they divide H and W.

  Returns:
    [..., h * w] float64 in [0, 1].
  """
  *rest, height, width = objects.shape
  h, w = grid
  cells = objects.reshape(*rest, h, height // h, w, width // w)
  return cells.mean(axis=(-3, -1), dtype=np.float64).reshape(*rest, h * w)


def overlap_scores(masks: np.ndarray, cover: np.ndarray) -> dict[str, float]:
  """Overlap of regions with objects; areas are summed, then divided once.

  Args:
    masks: bool, True = in the region (hidden), of any shape.
    cover: float64 of that shape: share of each patch that an object covers.

  Returns:
    precision: share of the region that lies on an object.
    recall: share of the objects that lies in the region.
    iou: area in both over area in either. All 0 to 1, nan for 0 / 0.
  """
  overlap = float(cover[masks.astype(bool)].sum())
  hidden, objects_area = float(masks.sum()), float(cover.sum())
  parts = {
    "precision": hidden,
    "recall": objects_area,
    "iou": hidden + objects_area - overlap,
  }
  return {
    name: overlap / whole if whole else float("nan")
    for name, whole in parts.items()
  }


def _heading(name: str, masks: Sequence[np.ndarray]) -> str:
  """A policy's readable name and the share its masks hide, on two lines."""
  share = sum(m.sum() for m in masks) / sum(m.size for m in masks)
  return f"{READABLE_NAMES.get(name, name)}\n{100 * share:.0f} % hidden"
