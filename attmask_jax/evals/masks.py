"""Gallery of what each mask policy hides at given ratios."""

import dataclasses

import jax
import numpy as np

from attmask_jax import schema
from attmask_jax.evals import pictures, visualize
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.methods import masking

SCORES = {"precision": "precision", "recall": "object hidden", "iou": "IoU"}


@dataclasses.dataclass(frozen=True)
class Keys(pictures.MaskKeys, pictures.Keys):
  """What each mask policy hides."""

  policies: tuple[str, ...] = schema.key(
    ("attmask_high", "attmask_hint", "attmask_low", "random", "block"),
    "policies to compare",
    choices=masking.POLICIES[:-1],
  )
  gallery: int = schema.key(
    16, "largest number of pictures in the figure, 0 = no figure", low=0
  )


def run(job: Job) -> Result:
  """Draws figures/masks_30.png for ratio 0.3, one figure per ratio.

  Reads evals.images, count, every, ratios, show_max, policies and gallery.

  Returns:
    "attmask_high_30/hidden": share of patches the policy hides; if objects are
    known, also "/precision", "/recall" and "/iou", see
    `visualize.overlap_scores`, and "object_share", their share of the pictures.
  """
  evals, method = job.config.evals, job.weights.method
  params = pictures.params_on_one_device(job)
  if jax.process_index():
    return pictures.EMPTY
  selected, _ = pictures.load(job)
  images = [picture.image for picture in selected]
  maps = pictures.attention(job, params, images)
  attention = [heads.mean(axis=0) for heads in maps]
  gallery = pictures.gallery_rows(len(selected), evals.gallery)
  patch_size = method.backbone.patch_size
  has_token = method.backbone.class_token != "none"
  whose = "of the class token" if has_token else "that patches receive"
  known = any(picture.object_mask is not None for picture in selected)
  caption = (
    "Colours run from the least to the most attended patch of each picture. "
    f"Hints are revealed among the {100 * evals.show_max:g} % most attended "
    "patches." + (" Outlined: the object." if known else "")
  )
  figures, values, rows = [], {}, []
  if known:
    values["object_share"] = float(
      np.concatenate(_covers(selected, patch_size)).mean()
    )
  for ratio in evals.ratios:
    masks = _masks(job, images, attention, ratio)
    name = pictures.percent(ratio)
    if len(gallery):
      figures.append(job.figure(f"masks_{name}.png"))
      visualize.mask_gallery(
        figures[-1],
        [images[i] for i in gallery],
        [attention[i] for i in gallery],
        {
          policy: [hidden[i] for i in gallery]
          for policy, hidden in masks.items()
        },
        patch_size=patch_size,
        object_masks=[selected[i].object_mask for i in gallery],
        labels=[selected[i].name for i in gallery],
        title=f"Attention {whose}, and what each policy hides at {name} %",
        caption=caption,
        network=job.weights.network.capitalize(),
      )
    for policy, hidden in masks.items():
      scores = _scores(selected, hidden, patch_size)
      values |= {f"{policy}_{name}/{k}": v for k, v in scores.items()}
      rows.append((visualize.READABLE_NAMES[policy], ratio, scores))
  return Result(
    values,
    {"pictures": len(selected)},
    _table(rows, SCORES if known else {}),
    tuple(figures),
    pictures.notes(len(selected), evals.gallery),
  )


def _masks(
  job: Job,
  images: list[np.ndarray],
  attention: list[np.ndarray],
  ratio: float,
) -> dict[str, list[np.ndarray]]:
  """Masks by policy, n times [N] bool, for pictures of any size."""
  evals, method = job.config.evals, job.weights.method
  patch_size = method.backbone.patch_size
  grids: dict[tuple[int, int], list[int]] = {}
  for row, image in enumerate(images):
    height, width, _ = image.shape
    grid = height // patch_size, width // patch_size
    grids.setdefault(grid, []).append(row)
  masks: dict[str, dict[int, np.ndarray]] = {}
  for grid, rows in grids.items():
    grid_masks = pictures.policy_masks(
      np.stack([attention[row] for row in rows]),
      grid,
      ratio=ratio,
      show_max=evals.show_max,
      policies=tuple(evals.policies),
      rows=np.asarray(rows),
      refill=method.refills_hints,
    )
    for policy, hidden in grid_masks.items():
      masks.setdefault(policy, {}).update(zip(rows, hidden, strict=True))
  return {
    policy: [by_picture[row] for row in range(len(images))]
    for policy, by_picture in masks.items()
  }


def _scores(
  selected: list[pictures.Picture], hidden: list[np.ndarray], patch_size: int
) -> dict[str, float]:
  """Share hidden, and overlap for the pictures with known objects."""
  scores = {"hidden": float(np.concatenate(hidden).mean())}
  masks = [
    mask
    for picture, mask in zip(selected, hidden, strict=True)
    if picture.object_mask is not None
  ]
  if masks:
    scores |= visualize.overlap_scores(
      np.concatenate(masks), np.concatenate(_covers(selected, patch_size))
    )
  return scores


def _covers(
  selected: list[pictures.Picture], patch_size: int
) -> list[np.ndarray]:
  """Share of each patch that the object covers, [N], where it is known."""
  covers = []
  for picture in selected:
    if picture.object_mask is not None:
      height, width = picture.object_mask.shape
      grid = height // patch_size, width // patch_size
      covers.append(visualize.patch_cover(picture.object_mask, grid=grid))
  return covers


def _table(
  rows: list[tuple[str, float, dict[str, float]]], scores: dict[str, str]
) -> Table:
  """One row per policy and ratio."""
  return Table(
    ("policy", "ratio", "hidden", *scores.values()),
    tuple(
      (
        policy,
        f"{ratio:g}",
        *(f"{100 * parts[k]:.1f} %" for k in ("hidden", *scores)),
      )
      for policy, ratio, parts in rows
    ),
  )


EVAL = Eval(run, keys=(Keys,))
