"""Attention maps: per head and averaged over heads.

Source: visualize_attention.py and video_generation.py of DINO and AttMask.
Differs: the region is that of the mean over heads; pictures keep their aspect
ratio; all frames of a video share one colour scale.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from attmask_jax import atomic, schema
from attmask_jax.evals import drawing, pictures, uniform
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.evals.pictures import Picture

HEADS_PER_LINE = 6
# Title of the figure, by `ViT.class_token`.
TITLES = {
  "input": "Attention of the class token in the last block",
  "readout": "Attention of the class token, which reads the patches",
  "none": "Attention that patches receive in the last block",
}
FRAME_MS = 100  # duration of each frame of an animation


@dataclasses.dataclass(frozen=True)
class KeepKeys:
  """Which patches count as attended."""

  keep: float = schema.key(
    0.6,
    "share of the attention that the outlined patches hold",
    above=0,
    high=1,
  )


@dataclasses.dataclass(frozen=True)
class Keys(KeepKeys, pictures.Keys):
  """Attention maps."""


def run(job: Job) -> Result:
  """Draws figures/attention.png, and an animation of a video's frames.

  Reads evals.images, count, every and keep.

  Returns:
    entropy: of the attention over patches, averaged over heads, in nats; mean
      over pictures.
    entropy_uniform: the entropy of uniform attention.
    kept: share of patches that together hold `evals.keep` of the attention,
      mean over pictures.
  """
  keep = job.config.evals.keep
  params = pictures.params_on_one_device(job)
  if jax.process_index():
    return pictures.EMPTY
  selected, is_video = pictures.load(job)
  backbone = job.weights.method.backbone
  maps = pictures.attention(job, params, [p.image for p in selected])
  means = [heads.mean(axis=0) for heads in maps]
  kept = [keep_mask(mean, keep) for mean in means]
  gallery = pictures.gallery_rows(len(selected))
  figures = [job.figure("attention.png")]
  _draw(
    figures[0],
    [(selected[i], maps[i], kept[i]) for i in gallery],
    patch_size=backbone.patch_size,
    keep=keep,
    title=TITLES[getattr(backbone, "class_token", "input")],
  )
  if is_video:
    folder = job.figure("attention")
    figures += _animate(folder, selected, means, backbone.patch_size)
  return _result(selected, means, kept, keep, tuple(figures))


def keep_mask(attention: np.ndarray, keep: float) -> np.ndarray:
  """The fewest patches that together hold a share of the attention.

  Args:
    attention: [..., N], >= 0, any scale.
    keep: share in (0, 1].

  Returns:
    [..., N] bool.

  Source: the threshold of visualize_attention.py (DINO), which sums upwards
  from the least attended patch; ties go to the lowest index here.
  """
  attention = np.asarray(attention, np.float64)
  order = np.argsort(-attention, axis=-1, kind="stable")
  descending = np.take_along_axis(attention, order, axis=-1)
  before = np.cumsum(descending, axis=-1) - descending
  total = descending.sum(axis=-1, keepdims=True)
  # Rounding must not add a patch once the share is reached.
  chosen = before < (keep - 1e-9) * total
  mask = np.zeros(attention.shape, bool)
  np.put_along_axis(mask, order, chosen, axis=-1)
  return mask


def _result(
  selected: Sequence[Picture],
  means: Sequence[np.ndarray],
  kept: Sequence[np.ndarray],
  keep: float,
  figures: tuple[pathlib.Path, ...],
) -> Result:
  """Values of the first pictures, and means over all of them."""
  numbers = [
    (uniform.entropy(mean), float(np.log(mean.size)), float(mask.mean()))
    for mean, mask in zip(means, kept, strict=True)
  ]
  average = [float(np.mean(column)) for column in zip(*numbers, strict=True)]
  rows = [(p.name, *n) for p, n in zip(selected, numbers, strict=True)]
  rows = [*rows[: pictures.TABLE_ROWS], ("mean", *average)]
  table = Table(
    (
      "picture",
      "entropy (nats)",
      "if uniform",
      f"patches holding {100 * keep:g} %",
    ),
    tuple(
      (name, f"{e:.3f}", f"{u:.3f}", f"{100 * k:.1f} %")
      for name, e, u, k in rows
    ),
  )
  values = dict(
    zip(("entropy", "entropy_uniform", "kept"), average, strict=True)
  )
  return Result(
    values,
    {"pictures": len(selected)},
    table,
    figures,
    (*_uniform_note(means), *pictures.notes(len(selected))),
  )


def _uniform_note(means: Sequence[np.ndarray]) -> tuple[str, ...]:
  """A sentence if the attention of pictures is uniform."""
  count = sum(map(uniform.is_uniform, means))
  if not count:
    return ()
  return (
    f"The mean attention of {count} of {len(means)} pictures is uniform "
    f"(entropy within {uniform.TOLERANCE:g} nats of log N): their regions rest "
    "on tiny differences.",
  )


def _draw(
  path: pathlib.Path,
  rows: Sequence[tuple[Picture, np.ndarray, np.ndarray]],
  *,
  patch_size: int,
  keep: float,
  title: str,
) -> None:
  """Draws the gallery: image, mean, region, then the heads.

  Args:
    path: the PNG.
    rows: picture, attention [A, N] and region [N] bool.
    patch_size: P.
    keep: share of the attention that the region holds.
    title: of the figure.
  """
  num_heads = len(rows[0][1])
  lines = -(-num_heads // HEADS_PER_LINE)
  per_line = -(-num_heads // lines)
  first = ["Image", "Mean over\nheads", f"{100 * keep:g} % of the\nattention"]
  aspects, headings, labels = [], {}, []
  for number, (picture, _, _) in enumerate(rows):
    height, width, _ = picture.image.shape
    aspects += [height / width] * lines
    labels += [picture.name] + [""] * (lines - 1)
    for line in range(lines):
      if lines > 1 or number == 0:
        names = range(line * per_line, min(num_heads, (line + 1) * per_line))
        headings[number * lines + line] = [
          *(first if line == 0 else [""] * 3),
          *(f"Head {i + 1}" for i in names),
        ]
  maps = [m for _, heads, _ in rows for m in (*heads, heads.mean(axis=0))]
  figure, axes = drawing.grid(
    aspects,
    3 + per_line,
    headings=headings,
    labels=labels,
    title=title,
    caption="Colours run from the least to the most attended patch of each "
    f"map. Outlined: the fewest patches that hold {100 * keep:g} % of the "
    f"mean attention. {uniform.caption(*maps)}",
  )
  for number, (picture, attention, mask) in enumerate(rows):
    image = picture.image
    height, width, _ = image.shape
    grid = height // patch_size, width // patch_size
    cells = axes[number * lines : (number + 1) * lines]
    cells[0][0].imshow(image)
    mean = attention.mean(axis=0).reshape(grid)
    drawing.show_heat(cells[0][1], image, mean, patch_size)
    cells[0][2].imshow(drawing.dim(image, mask.reshape(grid), patch_size))
    drawing.outline_patches(cells[0][2], mask.reshape(grid), patch_size)
    for head, values in enumerate(attention):
      axis = cells[head // per_line][3 + head % per_line]
      drawing.show_heat(axis, image, values.reshape(grid), patch_size)
  drawing.save(figure, path)


def _animate(
  folder: pathlib.Path,
  selected: Sequence[Picture],
  means: Sequence[np.ndarray],
  patch_size: int,
) -> list[pathlib.Path]:
  """Writes FOLDER.gif and its frames FOLDER/0001.png, ...; returns [GIF].

  Args:
    folder: of the numbered frames; those of an earlier run are deleted.
    selected: pictures, each drawn beside its heat map.
    means: attention [N] of each picture; they share one colour scale, unless
      all are uniform.
    patch_size: P.
  """
  bounds = None
  if not all(map(uniform.is_uniform, means)):
    bounds = min(m.min() for m in means), max(m.max() for m in means)
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob("[0-9]*.png"):
    old.unlink()
  frames = []
  for number, (picture, mean) in enumerate(
    zip(selected, means, strict=True), start=1
  ):
    height, width, _ = picture.image.shape
    heat = mean.reshape(height // patch_size, width // patch_size)
    frame = drawing.frame(
      picture.image,
      drawing.heat(picture.image, heat, patch_size, bounds=bounds),
    )
    frame.save(folder / f"{number:04d}.png")
    frames.append(frame)
  path = folder.with_suffix(".gif")
  with atomic.replaced(path) as temporary:
    frames[0].save(
      temporary,
      format="GIF",
      save_all=True,
      append_images=frames[1:],
      duration=FRAME_MS,
      loop=0,
    )
  return [path]


EVAL = Eval(run, keys=(Keys,))
