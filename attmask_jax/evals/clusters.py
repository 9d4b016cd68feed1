"""Clusters against labels: do prototypes agree with the classes?

Source: the per-epoch scores of train_one_epoch in AttMask main_attmask.py, and
its stand-alone evaluation of unsupervised classification.
"""

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax.errors import InputError
from attmask_jax.evals import features
from attmask_jax.evals.job import Eval, Job, Result, Table
from attmask_jax.methods import clustering


def run(job: Job) -> Result:
  """Compares the prototype of each validation image with its class.

  Raises:
    InputError: the network has no prototypes, or the images no labels.
  """
  method, params = job.weights.method, job.weights.params
  if not method.assigns_prototypes:
    raise InputError(
      f"method {job.weights.config.method.name} has no prototypes to compare "
      "with labels: give weights of attmask, iBOT or DINO"
    )
  source = job.source("val")
  assign = jax.jit(method.assignments)

  def prototypes(images: jax.Array) -> jax.Array:
    # float32 is exact for whole numbers below 2^24.
    return assign(params, images)[:, None].astype(jnp.float32)

  with job.batches(source, desc="prototypes") as batches:
    extracted = features.extract(prototypes, batches, mesh=job.mesh)
  clusters = extracted.features[:, 0].astype(np.int64)
  values = clustering.cluster_scores(extracted.labels, clusters)
  values["accuracy"] = clustering.hungarian_accuracy(extracted.labels, clusters)
  names = {
    "nmi": "NMI",
    "ari": "ARI",
    "fscore": "F (Fowlkes-Mallows)",
    "accuracy": "accuracy, best one-to-one map",
  }
  counts = {
    "images": len(clusters),
    "classes": len(source.class_names),
    "prototypes used": len(np.unique(clusters)),
  }
  rows = tuple((names[k], f"{v:.4f}") for k, v in values.items())
  return Result(values, counts, Table(("score", "value"), rows))


EVAL = Eval(run)
