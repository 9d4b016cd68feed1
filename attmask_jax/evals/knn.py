"""Weighted k-NN classification of frozen features, see nearest.py."""

import dataclasses

import ml_collections
import numpy as np

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.evals import cache, features, inputs, nearest
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.runs.metrics import percent

LARGEST_CLASS = "queries of the largest class"  # a count of the result


@dataclasses.dataclass(frozen=True)
class SearchKeys:
  """How neighbours are found and weighted."""

  knn_temp: float = schema.key(
    0.07,
    "temperature of the votes; 0 = the method's default: for AttMask the "
    "teacher's class temperature, else 0.07",
    low=0,
  )
  bank_chunk: int = schema.key(
    nearest.BANK_CHUNK, "bank images on the device at a time", low=1
  )
  query_chunk: int = schema.key(
    nearest.QUERY_CHUNK, "queries compared at a time", low=1
  )


@dataclasses.dataclass(frozen=True)
class BankKeys:
  """How many images are compared."""

  knn_bank: int = schema.key(0, "training images in the bank, 0 = all", low=0)
  knn_queries: int = schema.key(0, "validation images, 0 = all", low=0)


@dataclasses.dataclass(frozen=True)
class Keys(BankKeys, SearchKeys, cache.Keys, features.Keys):
  """Weighted k-NN."""

  knn_ks: tuple[int, ...] = schema.key(
    (10, 20, 100, 200), "numbers of neighbours that vote", low=1
  )


def run(job: Job) -> Result:
  """k-NN of the validation images on the training images.

  Reads evals.knn_ks, knn_temp, knn_bank, knn_queries, bank_chunk, query_chunk,
  last_blocks, pool, final_norm and cache.

  Raises:
    InputError: see `nearest.knn`, or the images have no labels.
  """
  evals = job.config.evals
  train, val = job.pair()
  bank_size = len(inputs.spread(len(train), evals.knn_bank))
  check(evals, max(evals.knn_ks, default=0), bank_size)
  # Features of all images have the cache key that other evaluations use.
  chosen = lambda source, limit: (
    inputs.spread(len(source), limit) if limit else None
  )
  bank = job.embed(train, chosen(train, evals.knn_bank), desc="bank")
  queries = job.embed(val, chosen(val, evals.knn_queries), desc="queries")
  values = nearest.knn(
    bank.features,
    bank.labels,
    queries.features,
    queries.labels,
    ks=tuple(evals.knn_ks),
    temp=evals.knn_temp or job.weights.method.knn_temp,
    num_classes=len(train.class_names),
    mesh=job.mesh,
    bank_chunk=evals.bank_chunk,
    query_chunk=evals.query_chunk,
  )
  rows = [
    (str(k), *(percent(values[f"k{k}/{name}"]) for name in ("top1", "top5")))
    for k in evals.knn_ks
  ]
  counts = {
    "bank images": len(bank.labels),
    "queries": len(queries.labels),
    LARGEST_CLASS: int(np.bincount(queries.labels).max()),
    "classes": len(train.class_names),
    "feature width": bank.features.shape[1],
  }
  return Result(values, counts, Table(("k", "top-1 %", "top-5 %"), tuple(rows)))


def check(evals: ml_collections.ConfigDict, k: int, bank: int) -> None:
  """Refuses settings that would fail after all features are extracted.

  Args:
    evals: knn_temp, bank_chunk and query_chunk.
    k: largest number of neighbours.
    bank: number of images in the bank.

  Raises:
    InputError: names the setting.
  """
  if not 1 <= k <= bank:
    raise InputError(
      f"evals.knn_ks asks for {k} neighbours, but the bank has {bank} images: "
      f"choose between 1 and {bank}"
    )
  if not evals.knn_temp >= 0:
    raise InputError(
      f"evals.knn_temp {evals.knn_temp} must be at least 0 (0 = the method's)"
    )
  for name in ("bank_chunk", "query_chunk"):
    value = getattr(evals, name)
    if not value > 0:
      raise InputError(f"evals.{name} {value} must be positive")


EVAL = Eval(run, keys=(Keys,))
