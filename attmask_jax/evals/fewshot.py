"""k-NN on few images per class: mean and spread over several choices.

Source: the few-shot protocol of AttMask eval_knn.py (--subset,
--subset_starts).
"""

import dataclasses

import numpy as np

from attmask_jax import data, schema
from attmask_jax.errors import InputError
from attmask_jax.evals import cache, features, knn, nearest
from attmask_jax.evals.job import Eval, Job, Result, Table


@dataclasses.dataclass(frozen=True)
class Keys(knn.SearchKeys, cache.Keys, features.Keys):
  """k-NN on few images per class."""

  shots: tuple[int, ...] = schema.key(
    (1, 5, 10, 20), "training images per class", low=1
  )
  knn_ks: tuple[int, ...] = schema.key(
    (1, 20, 20, 20), "number of neighbours, one per entry of shots", low=1
  )
  starts: tuple[tuple[int, ...], ...] = schema.key(
    tuple(tuple(range(0, 5 * n, n)) for n in (5, 5, 10, 20)),
    "first image of each class in each run, one list per entry of shots",
  )


def run(job: Job) -> Result:
  """k-NN for every entry of `evals.shots`, once per start.

  A run of n shots with start s uses images s, ..., s + n - 1 of every class, in
  the order of the data set. Features are extracted once.

  Raises:
    InputError: the lists differ in length, or a class has too few images.
  """
  evals = job.config.evals
  plan = _plan(evals)
  train, val = job.pair()
  for shots, k, _ in plan:
    knn.check(evals, k, shots * len(train.class_names))
  images = _per_class(
    train, max(s + n for n, _, starts in plan for s in starts)
  )
  indices = np.unique(
    np.concatenate(
      [images[:, s : s + n].ravel() for n, _, starts in plan for s in starts]
    )
  )
  bank = job.embed(train, indices, desc="bank")
  queries = job.embed(val, desc="queries")
  row_of = {int(index): row for row, index in enumerate(bank.index)}
  values, rows = {}, []
  for shots, k, starts in plan:
    tops = {"top1": [], "top5": []}
    for start in starts:
      chosen = images[:, start : start + shots].ravel()
      # Unreadable images are missing in the bank.
      picks = [row_of[int(i)] for i in chosen if int(i) in row_of]
      scores = nearest.knn(
        bank.features[picks],
        bank.labels[picks],
        queries.features,
        queries.labels,
        ks=(k,),
        temp=evals.knn_temp or job.weights.method.knn_temp,
        num_classes=len(train.class_names),
        mesh=job.mesh,
        bank_chunk=evals.bank_chunk,
        query_chunk=evals.query_chunk,
      )
      for name, top in tops.items():
        top.append(scores[f"k{k}/{name}"])
        values[f"shots{shots}/start{start}/{name}"] = top[-1]
    spread = lambda x: float(np.std(x, ddof=1)) if len(x) > 1 else 0.0
    values[f"shots{shots}/top1"] = float(np.mean(tops["top1"]))
    values[f"shots{shots}/spread"] = spread(tops["top1"])
    values[f"shots{shots}/top5"] = float(np.mean(tops["top5"]))
    rows.append(
      (
        str(shots),
        str(k),
        str(len(starts)),
        f"{values[f'shots{shots}/top1']:.2f}",
        f"{values[f'shots{shots}/spread']:.2f}",
        f"{values[f'shots{shots}/top5']:.2f}",
      )
    )
  headings = ("images per class", "k", "runs", "top-1 %", "spread", "top-5 %")
  counts = {
    "training images": len(bank.labels),
    "queries": len(queries.labels),
    "classes": len(train.class_names),
  }
  return Result(values, counts, Table(headings, tuple(rows)))


def _plan(evals: object) -> list[tuple[int, int, tuple[int, ...]]]:
  """(shots, k, starts) for each row of the table."""
  shots, ks, starts = evals.shots, evals.knn_ks, evals.starts
  if not shots or not len(shots) == len(ks) == len(starts):
    raise InputError(
      f"evals.shots {tuple(shots)}, evals.knn_ks {tuple(ks)} and evals.starts "
      f"must have equally many entries, and evals.starts has {len(starts)}"
    )
  if min(shots) < 1 or not all(s and min(s) >= 0 for s in starts):
    raise InputError(
      f"evals.shots {tuple(shots)} must be at least 1, and every entry of "
      "evals.starts a list of whole numbers from 0"
    )
  return [
    (int(n), int(k), tuple(int(i) for i in s))
    for n, k, s in zip(shots, ks, starts, strict=True)
  ]


def _per_class(source: data.Source, needed: int) -> np.ndarray:
  """Indices of the first `needed` images of every class: [C, needed]."""
  labels = np.asarray(source.labels)
  counts = np.bincount(labels, minlength=len(source.class_names))
  scarce = int(np.argmin(counts))
  if counts[scarce] < needed:
    raise InputError(
      f"class {source.class_names[scarce]} of {source.name} has "
      f"{counts[scarce]} images, but evals.starts and evals.shots go up to "
      f"image {needed}: lower them, or use a larger data set"
    )
  order = np.argsort(labels, kind="stable")
  first = np.cumsum(counts) - counts
  return order[first[:, None] + np.arange(needed)]


EVAL = Eval(run, keys=(Keys,))
