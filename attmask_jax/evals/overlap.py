"""Overlap of attention and masks with the objects in the images."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax import data, schema
from attmask_jax.evals import (
  attention,
  drawing,
  features,
  inputs,
  pictures,
  visualize,
)
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.runs import progress

if TYPE_CHECKING:
  from matplotlib.artist import Artist
  from matplotlib.axes import Axes

BARS = {
  "iou": ("IoU", "#4477aa"),
  "precision": ("on the object (precision)", "#ee9944"),
  "recall": ("share of the object (recall)", "#448855"),
}


@dataclasses.dataclass(frozen=True)
class Keys(attention.KeepKeys, pictures.MaskKeys):
  """Attention and masks against object masks."""

  ratios: tuple[float, ...] = schema.inherit(
    pictures.MaskKeys, "ratios", (0.3,)
  )
  count: int = schema.key(0, "number of images, 0 = all", low=0)
  seed: int = schema.key(0, "seed of hints, random and block-wise masks", low=0)


def run(job: Job) -> Result:
  """Overlap of regions with object masks, all areas summed and divided once.

  Reads evals.count, ratios, show_max, keep, seed and batch_size; draws
  figures/overlap.png.

  Returns:
    "attention/..." for the fewest patches that hold `evals.keep` of the
    attention, "attmask_high_30/..." for each policy and ratio; of each
    "share" of the patches, "precision" (share of the region on the object),
    "recall" (share of the object in the region) and "iou". "object_share":
    the object's share of the images, which is the expected precision of a
    random region.

  Raises:
    InputError: images without object masks, or a setting out of range.
  """
  evals = job.config.evals
  side = _side(job)
  source = pictures.object_source(job)
  extracted = _attention(job, source)
  if jax.process_index():
    return pictures.EMPTY
  cover = _cover(source, extracted.index, job.config.data.image_size, side)
  regions = {"attention": attention.keep_mask(extracted.features, evals.keep)}
  panels = {}
  for ratio in evals.ratios:
    masks = pictures.policy_masks(
      extracted.features,
      (side, side),
      ratio=ratio,
      show_max=evals.show_max,
      rows=extracted.index,
      seed=evals.seed,
      refill=job.weights.method.refills_hints,
    )
    name = pictures.percent(ratio)
    masks = {f"{policy}_{name}": mask for policy, mask in masks.items()}
    panels[f"mask ratio {name} %"] = ("attention", *masks)
    regions |= masks
  scores = {
    name: {"share": float(region.mean())}
    | visualize.overlap_scores(region, cover)
    for name, region in regions.items()
  }
  share, path = float(cover.mean()), job.figure("overlap.png")
  readable = {name: _readable(name, evals.keep) for name in regions}
  _draw(path, panels, scores, readable, share, len(cover))
  values = {"object_share": share}
  for name, parts in scores.items():
    values |= {f"{name}/{key}": value for key, value in parts.items()}
  table = _table(scores, readable, share)
  return Result(values, {"images": len(cover)}, table, (path,))


def _side(job: Job) -> int:
  """Patches along one side of an image."""
  patch_size = job.weights.method.backbone.patch_size
  return job.config.data.image_size // patch_size


def _attention(job: Job, source: data.Source) -> features.Features:
  """Mean over heads, [n, N], of the readable images, on every process."""
  attend = job.weights.method.attention
  mean = jax.jit(lambda params, x: jnp.mean(attend(params, x), axis=1))
  chosen = np.sort(inputs.spread(len(source), job.config.evals.count))
  with job.batches(source, chosen, desc="attention") as batches:
    return features.extract(
      functools.partial(mean, job.weights.params), batches, mesh=job.mesh
    )


def _cover(
  source: data.Source, indices: np.ndarray, size: int, side: int
) -> np.ndarray:
  """Share of each patch that the object covers: [n, N] float64."""
  return np.stack(
    [
      visualize.patch_cover(
        pictures.object_crop(source, int(index), size), grid=(side, side)
      )
      for index in progress.track(indices, len(indices), "object masks")
    ]
  )


def _readable(name: str, keep: float) -> str:
  """attmask_high_30 -> "AttMask-High 30 %"."""
  if name == "attention":
    return f"Attention {100 * keep:g} %"
  policy, percent = name.rsplit("_", 1)
  return f"{visualize.READABLE_NAMES[policy]} {percent} %"


def _table(
  scores: Mapping[str, dict[str, float]],
  readable: Mapping[str, str],
  share: float,
) -> Table:
  """One row per region, and the chance level."""
  headings = ("region", "patches", "IoU", "precision", "object covered")
  rows = [
    (readable[name], *(f"{100 * s[k]:.1f} %" for k in ("share", *BARS)))
    for name, s in scores.items()
  ]
  rows.append(("chance level", "", "", f"{100 * share:.1f} %", "= patches"))
  return Table(headings, tuple(rows))


def _draw(
  path: pathlib.Path,
  panels: Mapping[str, Sequence[str]],
  scores: Mapping[str, dict[str, float]],
  readable: Mapping[str, str],
  share: float,
  images: int,
) -> None:
  """Draws three bars per region, in percent.

  Args:
    path: the PNG.
    panels: title -> its regions; one panel below the other.
    scores: of each region, 0 to 1.
    readable: region -> displayed name.
    share: of the images that the object covers, drawn as a line.
    images: number of images.
  """
  from matplotlib.figure import Figure

  size = 7.0, 1.0 + 2.4 * len(panels)
  figure = Figure(figsize=size, dpi=drawing.DPI, layout="constrained")
  figure.suptitle(
    f"Attention and masks against objects, {images} images",
    fontsize=11,
    fontweight="bold",
  )
  tallest = np.nanmax([share, *(s[k] for s in scores.values() for k in BARS)])
  axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
  for axis, (title, names) in zip(axes, panels.items(), strict=True):
    handles = _bars(axis, [scores[name] for name in names])
    handles[f"object's share of the images ({100 * share:.0f} %)"] = (
      axis.axhline(100 * share, color="0.3", ls="--", lw=1, zorder=0)
    )
    ticks = [readable[name].replace(" ", "\n", 1) for name in names]
    axis.set_xticks(np.arange(len(names)), ticks, fontsize=8)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_ylim(0, 100 * max(1.14 * tallest, 0.1))
    axis.set_ylabel("percent", fontsize=9)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(title, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
  figure.legend(
    list(handles.values()),
    list(handles),
    loc="outside lower center",
    ncols=2,
    fontsize=8,
    frameon=False,
  )
  drawing.save(figure, path)


def _bars(
  axis: "Axes", scores: Sequence[dict[str, float]]
) -> "dict[str, Artist]":
  """Draws three bars per region; returns the legend's label -> handle."""
  places, handles = np.arange(len(scores)), {}
  for number, (key, (label, colour)) in enumerate(BARS.items()):
    heights = [100 * s[key] for s in scores]
    x = places + 0.27 * (number - 1)
    handles[label] = axis.bar(x, heights, 0.25, color=colour)
    texts = axis.bar_label(handles[label], fmt="%.0f", fontsize=7, padding=2)
    for text in texts:  # stays readable on the dashed line
      text.set_bbox(dict(facecolor="white", edgecolor="none", pad=0.4))
  return handles


EVAL = Eval(run, keys=(Keys,))
