"""How much accuracy depends on the attended patches.

Patches are blacked out before the classifier sees the images. They are selected
by the attention of a network to the clean image.

Source: eval_linear_acc_drop.py of AttMask, "masked ImageNet". The release
selects by a fixed network, the DINO ViT-B/16 of DINO_URL, for every network
that it evaluates. differs: the guide may be any network, and the size of the
patches is that of the guide (16 px in the reference); several ratios and
policies in one pass over the data.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax import Params, schema
from attmask_jax.errors import InputError
from attmask_jax.evals import accuracy, drawing, inputs, pictures, visualize
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.methods import masking
from attmask_jax.rows import row_keys
from attmask_jax.weights import loading

POLICIES = ("attmask_high", "attmask_low", "random")
DINO_URL = (
  "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/"
  "dino_vitbase16_pretrain.pth"
)


@dataclasses.dataclass(frozen=True)
class Keys:
  """Masked images."""

  ratios: tuple[float, ...] = schema.key(
    (0.1, 0.3, 0.5, 0.7, 0.9),
    "shares of patches that are blacked out",
    low=0,
    empty=True,
  )
  policies: tuple[str, ...] = schema.key(
    ("attmask_high", "random", "attmask_low"),
    "which patches are blacked out",
    choices=POLICIES,
  )
  guide: str = schema.key(
    "",
    "weights whose attention selects them, the same for all compared networks; "
    '"" = the evaluated ones',
  )
  seed: int = schema.key(0, "seed of random patches", low=0)


def run(job: Job) -> Result:
  """Accuracy for every policy and ratio; draws figures/masked.png.

  Raises:
    InputError: the classes of images and classifier differ.
  """
  evals, classifier = job.config.evals, job.classifier
  source = job.source("val")
  names, known = tuple(source.class_names), tuple(classifier.class_names)
  # Imported classifiers only number their classes.
  if known not in (names, tuple(map(str, range(len(names))))):
    raise InputError(
      f"the classifier {classifier.where} has "
      f"{len(classifier.class_names)} classes, but {source.name} has "
      f"{len(source.class_names)}, or different ones: evaluate on the classes "
      "it was trained on"
    )
  inputs.every_class(source)
  guide, notes = job.weights, ()
  if evals.guide:
    guide = loading.load(evals.guide, network="teacher", mesh=job.mesh)
    notes = (f"The attention of {guide.where} selected the patches.",)
  cells = [(None, 0.0)]
  cells += [(p, r) for p in evals.policies for r in evals.ratios if r > 0]
  backbone = guide.method.backbone
  p = backbone.patch_size
  grid = job.config.data.image_size // p
  # Products in double precision, truncated, as in training.
  counts = np.array([int(grid**2 * r) for _, r in cells], np.int32)

  def logits(trees: Params, batch: dict[str, jax.Array]) -> jax.Array:
    images = batch["images"]
    attention = guide.method.attention(trees["guide"], images)
    select = functools.partial(
      hidden_patches,
      jnp.mean(attention, axis=1),
      batch["index"],
      seed=evals.seed,
    )
    outputs = [
      classifier.method.logits(
        trees["classifier"],
        blacken(images, select(policy, int(n)), p) if policy else images,
      )
      for (policy, _), n in zip(cells, counts, strict=True)
    ]
    return jnp.stack(outputs, axis=1)  # [B, J, C]

  trees = {"guide": guide.params, "classifier": classifier.params}
  count = accuracy.counter(logits, job.mesh)
  with job.batches(source, desc="masked", crop=classifier.crop) as batches:
    scores = accuracy.scores(count, trees, batches, mesh=job.mesh)
  result = _result(job, cells, counts / grid**2, scores)
  return result._replace(notes=notes)


def blacken(images: jax.Array, mask: jax.Array, p: int) -> jax.Array:
  """Blacks out hidden patches: [B, H, W, 3] uint8, [B, N] bool -> uint8.

  Patches are p pixels wide; pixels beyond the last whole patch are kept.
  """
  b, height, width, _ = images.shape
  h, w = height // p, width // p
  cells = mask.reshape(b, h, w)
  pixels = jnp.repeat(jnp.repeat(cells, p, axis=1), p, axis=2)
  rest = ((0, 0), (0, height - h * p), (0, width - w * p))
  return jnp.where(jnp.pad(pixels, rest)[..., None], 0, images)


def hidden_patches(
  attention: jax.Array,
  index: jax.Array,
  policy: str,
  n_mask: int,
  *,
  seed: int,
) -> jax.Array:
  """Masks [B, N] bool; random ones depend only on the image and the seed."""
  if policy != "random":
    return masking.attention_mask(attention, policy=policy, n_mask=n_mask)
  keys = row_keys(jax.random.key(seed), index)
  return masking.random_patches(keys, attention.shape[1], n_mask)


def check(job: Job) -> None:
  """Refuses settings before a probe is trained.

  Raises:
    InputError: a ratio of 1 or more, or no such guide.
  """
  evals = job.config.evals
  if evals.guide and not pathlib.Path(evals.guide).expanduser().exists():
    raise InputError(
      f"evals.guide {evals.guide} does not exist: the published protocol "
      "selects patches by the attention of DINO's ViT-B/16; download it from "
      f"{DINO_URL} and give --config.evals.guide=FILE, or "
      '--config.evals.guide="" for the attention of the evaluated network'
    )
  for ratio in evals.ratios:
    if not 0 <= ratio < 1:
      raise InputError(
        f"evals.ratios {ratio} must be at least 0 and below 1: it is the share "
        "of patches that are blacked out"
      )


def _result(
  job: Job,
  cells: list[tuple[str | None, float]],
  shares: np.ndarray,
  scores: dict[str, np.ndarray],
) -> Result:
  """Values, a table of policies by ratios, and the plot."""
  kinds = [k for k in ("top1", "top5") if k in scores]
  values, by_policy = {}, {}
  for j, (policy, ratio) in enumerate(cells):
    name = f"{policy}_{pictures.percent(ratio)}" if policy else "clean"
    values |= {f"{name}/{k}": float(scores[k][j]) for k in kinds}
    if policy is not None:
      point = (100 * shares[j], values[f"{name}/top1"])
      by_policy.setdefault(policy, []).append(point)
  path = job.figure("masked.png")
  figures = ()
  if by_policy and jax.process_index() == 0:
    _draw(path, by_policy, values["clean/top1"])
    figures = (path,)
  ratios = [r for r in job.config.evals.ratios if r > 0]
  rows = [("none", *[f"{values['clean/top1']:.2f}"] * len(ratios))]
  for policy in by_policy:
    names = [f"{policy}_{pictures.percent(r)}" for r in ratios]
    rows.append((policy, *(f"{values[f'{n}/top1']:.2f}" for n in names)))
  headings = ("hidden, top-1 %", *(f"{pictures.percent(r)} %" for r in ratios))
  counts = {"images": int(scores["images"])}
  return Result(values, counts, Table(headings, tuple(rows)), figures)


def _draw(
  path: pathlib.Path, curves: dict[str, list[tuple[float, float]]], clean: float
) -> None:
  """Plots accuracy over the share of black patches, a line per policy."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.6, 4.0), dpi=drawing.DPI, layout="constrained")
  axis = figure.subplots()
  axis.axhline(clean, linestyle=":", color="gray", label="clean images")
  for policy, points in curves.items():
    name = visualize.READABLE_NAMES.get(policy, policy)
    axis.plot(*zip(*points, strict=True), marker="o", label=f"{name} hidden")
  axis.set_xlabel("Patches blacked out, %")
  axis.set_ylabel("Top-1 accuracy, %")
  axis.set_ylim(bottom=0)
  axis.grid(alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
  axis.legend(frameon=False)
  drawing.save(figure, path)


EVAL = Eval(run, check=check, needs="classifier", keys=(Keys,))
