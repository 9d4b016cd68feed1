"""Pictures of attention rollout and gradient rollout.

The contribution of each patch, through all blocks, to the token that is read,
or to one class of a classifier. Source: the explanation tools of MAE-priv, see
models/rollout.py. Differs: any number of pictures in their own aspect ratio,
normalised as in training; networks without class token.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from attmask_jax import Params, schema
from attmask_jax.errors import InputError
from attmask_jax.evals import drawing, pictures, uniform
from attmask_jax.evals.job import Eval, Job, Needs, Result, Table
from attmask_jax.evals.pictures import Picture
from attmask_jax.models import rollout

EXPLAINED = ("token", "class")


@dataclasses.dataclass(frozen=True)
class Keys(pictures.Keys):
  """Attention rollout and gradient rollout."""

  explain: str = schema.key(
    "token",
    "what is explained: the class token, or a class of the probe or of a "
    "fine-tuned network",
    choices=EXPLAINED,
  )
  category: int = schema.key(
    -1, "class to explain, -1 = the most probable one", low=-1
  )
  fusions: tuple[str, ...] = schema.key(
    ("mean", "max", "min"),
    "how heads are fused; not used with explain=class",
    choices=rollout.FUSIONS,
  )
  discard: float = schema.key(
    0.9, "share of the weakest links of each block to discard", low=0
  )
  layer: int = schema.key(
    -1, "index of the only block to use, from 0; -1 = all blocks", low=-1
  )
  row_sums: str = schema.key(
    "rows",
    "how rows are normalised; reference = as in the release",
    choices=rollout.ROW_SUMS,
  )
  pairing: str = schema.key(
    "blocks",
    "how gradients are paired with blocks; reference = as in the release",
    choices=rollout.PAIRINGS,
  )


def run(job: Job) -> Result:
  """Draws figures/rollout.png: image, then one map per head fusion.

  Reads evals.images, count, every, explain, category, fusions, discard, layer,
  row_sums and pairing.

  Returns:
    entropy/FUSION: entropy of the map over patches, in nats, mean over
      pictures.

  Raises:
    InputError: a setting is out of range.
  """
  evals = job.config.evals
  depth = job.weights.method.backbone.depth
  _check(evals, depth)
  by_class = evals.explain == "class"
  if by_class and evals.category >= len(job.classifier.class_names):
    raise InputError(
      f"evals.category {evals.category} is not a class of the classifier: it "
      f"has {len(job.classifier.class_names)}, counted from 0 (-1 = the most "
      "probable one)"
    )
  params = pictures.params_on_one_device(job)
  if jax.process_index():
    return pictures.EMPTY
  selected, _ = pictures.load(job)
  images = [picture.image for picture in selected]
  if by_class:
    maps = {"gradient": _by_class(job, images)}
  else:
    maps = {f: _by_token(job, params, images, f) for f in evals.fusions}
  empty = _fill_empty(maps)
  path = job.figure("rollout.png")
  gallery = pictures.gallery_rows(len(selected))
  _draw(
    path,
    [selected[i] for i in gallery],
    {name: [values[i] for i in gallery] for name, values in maps.items()},
    patch_size=job.weights.method.backbone.patch_size,
    title=_title(job),
  )
  result = _result(selected, maps, path)
  if not empty:
    return result
  note = (
    f"{empty} maps are empty, as evals.discard {evals.discard} leaves no link "
    "to any patch: choose a smaller value, such as 0.5."
  )
  return result._replace(notes=(*result.notes, note))


def _by_token(
  job: Job, params: Params, images: Sequence[np.ndarray], fusion: str
) -> list[np.ndarray]:
  """Attention rollout of every picture: n times [N]."""
  evals, backbone = job.config.evals, job.weights.method.backbone
  return pictures.forward(
    lambda weights, batch: rollout.attention_rollout(
      backbone,
      weights["backbone"],
      batch,
      fusion=fusion,
      discard=evals.discard,
      layer=evals.layer,
      row_sums=evals.row_sums,
    ),
    params,
    images,
  )


def _by_class(job: Job, images: Sequence[np.ndarray]) -> list[np.ndarray]:
  """Gradient rollout of every picture: n times [N]."""
  evals, classifier = job.config.evals, job.classifier
  params = jax.device_put(
    jax.device_get(classifier.params), jax.local_devices()[0]
  )

  def explain(weights: Params, batch: jax.Array) -> jax.Array:
    return rollout.gradient_rollout(
      classifier.method,
      weights,
      batch,
      category=evals.category,
      discard=evals.discard,
      layer=evals.layer,
      pairing=evals.pairing,
      row_sums=evals.row_sums,
    )

  return pictures.forward(explain, params, images)


def _check(evals: object, depth: int) -> None:
  """Refuses settings that are out of range."""
  if not 0 <= evals.discard < 1:
    raise InputError(
      f"evals.discard {evals.discard} must be at least 0 and below 1: it is "
      "the share of links that are left out"
    )
  if not -1 <= evals.layer < depth:
    raise InputError(
      f"evals.layer {evals.layer} is not a block: use 0 to {depth - 1}, or -1 "
      "for all"
    )
  if evals.category < -1:
    raise InputError(
      f"evals.category {evals.category} must be at least -1 (the most probable "
      "class)"
    )


def _fill_empty(maps: dict[str, list[np.ndarray]]) -> int:
  """Replaces maps that have no link left, and are NaN, by 0; their number."""
  count = 0
  for values in maps.values():
    for i, value in enumerate(values):
      if not np.isfinite(value).all():
        values[i] = np.zeros_like(value)
        count += 1
  return count


def _title(job: Job) -> str:
  evals = job.config.evals
  where = "all blocks" if evals.layer < 0 else f"block {evals.layer + 1}"
  if evals.explain == "token":
    return f"Attention rollout, {where}, {100 * evals.discard:g} % discarded"
  named = "the most probable class"
  if evals.category >= 0:
    named = f"class {job.classifier.class_names[evals.category]}"
  return f"Gradient rollout of {named}, {where}"


def _draw(
  path: pathlib.Path,
  selected: Sequence[Picture],
  maps: dict[str, list[np.ndarray]],
  *,
  patch_size: int,
  title: str,
) -> None:
  figure, axes = drawing.grid(
    [p.image.shape[0] / p.image.shape[1] for p in selected],
    1 + len(maps),
    headings={0: ("Image", *(name.capitalize() for name in maps))},
    labels=[p.name for p in selected],
    title=title,
    caption="Colours run from the patch that contributes least to the one that "
    "contributes most. "
    + uniform.caption(*(m for values in maps.values() for m in values)),
  )
  for row, picture in enumerate(selected):
    height, width, _ = picture.image.shape
    grid = height // patch_size, width // patch_size
    axes[row][0].imshow(picture.image)
    for axis, values in zip(axes[row][1:], maps.values(), strict=True):
      scores = values[row].reshape(grid)
      drawing.show_heat(axis, picture.image, scores, patch_size)
  drawing.save(figure, path)


def _result(
  selected: Sequence[Picture],
  maps: dict[str, list[np.ndarray]],
  path: pathlib.Path,
) -> Result:
  numbers = {
    # An empty map has no entropy.
    f: [uniform.entropy(v) if v.any() else np.nan for v in values]
    for f, values in maps.items()
  }
  means = {
    f: float(np.nanmean(n)) if np.isfinite(n).any() else math.nan
    for f, n in numbers.items()
  }
  values = {f"entropy/{f}": mean for f, mean in means.items()}
  cell = lambda x: f"{x:.3f}" if np.isfinite(x) else "-"
  rows = [
    (picture.name, *(cell(numbers[f][i]) for f in maps))
    for i, picture in enumerate(selected)
  ][: pictures.TABLE_ROWS]
  rows.append(("mean", *map(cell, values.values())))
  headings = ("entropy in nats", *maps)
  return Result(
    values,
    {"pictures": len(selected)},
    Table(headings, tuple(rows)),
    (path,),
    pictures.notes(len(selected)),
  )


def _needs(evals: ml_collections.ConfigDict) -> Needs:
  """Explaining a class needs a classifier."""
  return "classifier" if evals.explain == "class" else "weights"


EVAL = Eval(run, needs=_needs, keys=(Keys,))
