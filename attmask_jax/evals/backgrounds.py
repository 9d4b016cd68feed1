"""How much a classifier relies on the background: ImageNet-9 backgrounds.

The same objects on other backgrounds; the predicted class is mapped to one of
the nine. BG-gap: accuracy on backgrounds of the same class minus accuracy on
backgrounds of random classes.

Source: evaluation of the backgrounds challenge (arXiv:2006.09994) in AttMask.
differs: the variants are selected by name (the reference drops the first
folder); BG-gap is computed; base and large networks keep their final norm,
with which their probes were trained.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from attmask_jax import Params, schema
from attmask_jax.augment import transforms
from attmask_jax.data import backgrounds, imagenet
from attmask_jax.data.decoding import Reading
from attmask_jax.evals import accuracy
from attmask_jax.evals.job import Eval, Job, Result, Table


@dataclasses.dataclass(frozen=True)
class Keys:
  """Backgrounds challenge."""

  backgrounds: str = schema.key(
    "", "folder with original/, mixed_same/, mixed_rand/, ..."
  )


def check(job: Job) -> None:
  """Refuses a wrong folder before a probe is trained.

  Raises:
    InputError: the folder does not exist or has another layout.
  """
  backgrounds.variants(job.config.evals.backgrounds)


def run(job: Job) -> Result:
  """Accuracy on every variant in `evals.backgrounds`, and BG-gap.

  Raises:
    InputError: the folder does not exist or has another layout, or classes
      cannot be mapped.
  """
  classifier, size = job.classifier, job.config.data.image_size
  reading = Reading.of(job.config.data)
  variants = backgrounds.variants(job.config.evals.backgrounds, reading)
  folders = variants[0].class_names
  mapped = imagenet.in9_map(
    classifier.class_names, folders, where=classifier.where
  )

  def votes(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    logits = classifier.method.logits(params, batch["images"])
    return vote(logits, mapped, len(folders))[:, None]  # one classifier

  count = accuracy.counter(votes, job.mesh)
  values, counts, resized = {}, {}, []
  for variant in variants:
    sizes: set[tuple[int, int]] = set()

    def crop(image: Image.Image, size: int, sizes: set = sizes) -> Image.Image:
      sizes.add(image.size)
      return transforms.eval_whole(image, size)

    name = variant.variant
    with job.batches(variant, desc=name, crop=crop) as batches:
      scores = accuracy.scores(count, classifier.params, batches, mesh=job.mesh)
    values[f"{name}/top1"] = float(scores["top1"][0])
    counts[f"{name} images"] = int(scores["images"])
    resized += [name] * bool(sizes - {(size, size)})
  if {"mixed_same/top1", "mixed_rand/top1"} <= values.keys():
    gap = values["mixed_same/top1"] - values["mixed_rand/top1"]
    values["bg_gap"] = gap
  counts["mapped classes"] = int(np.sum(mapped >= 0))
  return Result(values, counts, _table(values), notes=_notes(resized, size))


def vote(logits: jax.Array, mapped: np.ndarray, folders: int) -> jax.Array:
  """One-hot vector of the folder that the predicted class is mapped to.

  Args:
    logits: [B, C].
    mapped: [C] folder of each class, -1 = none.
    folders: number of folders.

  Returns:
    [B, folders + 1]; the last is for classes without a folder, which makes
    such a prediction wrong for every label.
  """
  columns = jnp.where(mapped < 0, folders, mapped)
  return jax.nn.one_hot(columns[jnp.argmax(logits, axis=-1)], folders + 1)


def _table(values: dict[str, float]) -> Table:
  rows = [
    (key.removesuffix("/top1"), f"{value:.2f}")
    for key, value in values.items()
    if key != "bg_gap"
  ]
  if "bg_gap" in values:
    rows.append(("BG-gap", f"{values['bg_gap']:.2f}"))
  return Table(("variant", "top-1 %"), tuple(rows))


def _notes(resized: Sequence[str], size: int) -> tuple[str, ...]:
  if not resized:
    return ()
  return (
    f"Images of {', '.join(resized)} were resized to {size} pixels, the size "
    "that the classifier sees.",
  )


EVAL = Eval(run, check=check, needs="classifier", keys=(Keys,))
