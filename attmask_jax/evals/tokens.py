"""Accuracy of single patch tokens: k-NN and linear probe.

ExtreMA learns tokens that represent the whole image. This measures it for any
network: k-NN among single tokens, and a linear probe of the mean patch that is
applied to each token. The class token and the mean patch are for comparison.

Source: the idea of distributed representations in ExtreMA (arXiv:2206.04667);
no published protocol.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax import Params, data, schema
from attmask_jax.errors import InputError
from attmask_jax.evals import accuracy, features, knn, nearest
from attmask_jax.evals.job import Eval, Job, Result, Table


@dataclasses.dataclass(frozen=True)
class Keys(knn.SearchKeys):
  """Accuracy of single patch tokens."""

  places: int = schema.key(
    8, "tokens per image, at the same random places", low=1
  )
  seed: int = schema.key(0, "seed of the places", low=0)
  final_norm: bool = schema.inherit(features.Keys, "final_norm", True)
  knn_k: int = schema.key(20, "number of neighbours that vote", low=1)


def check(job: Job) -> None:
  """Refuses settings before a probe is trained.

  Raises:
    InputError: there are more places than patches.
  """
  places = job.config.evals.places
  p = job.weights.method.backbone.patch_size
  patches = (job.config.data.image_size // p) ** 2
  if not 1 <= places <= patches:
    raise InputError(
      f"evals.places {places} must be 1 to {patches}, the patches of an image"
    )


def run(job: Job) -> Result:
  """k-NN of class token, mean patch and single tokens; the probe's accuracy.

  Tokens are taken at the same `evals.places` random places of every image: of
  training images for the bank, of validation images for the queries.

  Raises:
    InputError: the probe was not trained on the mean patch.
  """
  evals, method = job.config.evals, job.weights.method
  probe = job.classifier.method
  if probe.pool != "mean":
    raise InputError(
      f"the probe {job.classifier.where} was trained with pool="
      f"{probe.pool}, but single tokens need one trained on the mean patch: "
      "train it with --config.method.pool=mean"
    )
  grid = job.config.data.image_size // method.backbone.patch_size
  train, val = job.pair()
  places = np.random.default_rng([evals.seed, 7]).permutation(grid**2)
  places = np.sort(places[: evals.places])
  bank = _extract(job, train, places, desc="bank")
  queries = _extract(job, val, places, desc="queries")
  values = {}
  for name in bank:
    scores = nearest.knn(
      bank[name].features,
      bank[name].labels,
      queries[name].features,
      queries[name].labels,
      ks=(evals.knn_k,),
      temp=evals.knn_temp or method.knn_temp,
      num_classes=len(train.class_names),
      mesh=job.mesh,
      bank_chunk=evals.bank_chunk,
      query_chunk=evals.query_chunk,
    )
    values[f"{name}/knn"] = scores[f"k{evals.knn_k}/top1"]
  values |= _linear(job, val, places)
  counts = {
    "bank tokens": len(bank["token"].labels),
    "query tokens": len(queries["token"].labels),
    "classes": len(train.class_names),
  }
  return Result(values, counts, _table(values, evals.knn_k))


def _extract(
  job: Job, source: data.Source, places: np.ndarray, *, desc: str
) -> dict[str, features.Features]:
  """Features by name, from one pass: class (if there is one), mean, token.

  Each token is a row: T rows per image, with its label.
  """
  weights, norm = job.weights, job.config.evals.final_norm

  @jax.jit
  def compiled(params: Params, images: jax.Array) -> jax.Array:
    cls, patches = weights.method.features(params, images, norm=norm)
    chosen = patches[:, places].reshape(len(images), -1)
    parts = [jnp.mean(patches, axis=1), chosen]
    return jnp.concatenate(parts if cls is None else [cls, *parts], axis=1)

  with job.batches(source, desc=desc) as batches:
    extracted = features.extract(
      functools.partial(compiled, weights.params), batches, mesh=job.mesh
    )
  d, names = weights.method.backbone.width, ["class", "mean"]
  if weights.method.backbone.class_token == "none":
    names.remove("class")
  parts = {
    name: extracted._replace(
      features=extracted.features[:, i * d : (i + 1) * d]
    )
    for i, name in enumerate(names)
  }
  tokens = extracted.features[:, len(names) * d :].reshape(-1, d)
  repeat = functools.partial(np.repeat, repeats=len(places))
  parts["token"] = features.Features(
    tokens, repeat(extracted.labels), repeat(extracted.index)
  )
  return parts


def _linear(
  job: Job, source: data.Source, places: np.ndarray
) -> dict[str, float]:
  """Accuracy of the probe on the mean patch, and on each token alone."""
  method = job.classifier.method

  def logits(weights: Params, batch: dict[str, jax.Array]) -> jax.Array:
    _, patches = method.features(
      weights, batch["images"], norm=method.final_norm
    )
    chosen = patches[:, places]
    x = jnp.concatenate([jnp.mean(patches, axis=1)[:, None], chosen], axis=1)
    outputs = method.classify(weights, x.reshape(-1, x.shape[-1]))[:, 0]
    return outputs.reshape(*x.shape[:2], -1)  # [B, 1 + T, C]

  count = accuracy.counter(logits, job.mesh)
  with job.batches(source, desc="linear") as batches:
    scores = accuracy.scores(
      count, job.classifier.params, batches, mesh=job.mesh
    )
  top1 = scores["top1"]
  return {"mean/linear": float(top1[0]), "token/linear": float(top1[1:].mean())}


def _table(values: dict[str, float], k: int) -> Table:
  cell = lambda key: f"{values[key]:.2f}" if key in values else "-"
  names = {"class": "class token", "mean": "mean patch", "token": "one token"}
  rows = [
    (text, cell(f"{name}/knn"), cell(f"{name}/linear"))
    for name, text in names.items()
    if f"{name}/knn" in values
  ]
  return Table(("features", f"k-NN ({k}), %", "linear, %"), tuple(rows))


EVAL = Eval(run, check=check, needs="classifier", keys=(Keys,))
