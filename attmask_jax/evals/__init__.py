"""Evaluations: trained weights in; named numbers, tables and figures out.

Each module in NAMES is an evaluation and ends in `EVAL = Eval(run, ...)`, see
job.py. --mode=eval calls `run(job)`; online.py and accuracy.py call it during
training, with a job for the current state of the run. The other modules are
shared: `features.extract` runs a compiled function over padded batches
(`images` [B, H, W, 3] uint8, `label`, `index` int32, `valid` bool, False =
padding row) and returns the valid rows.

Counts are summed over every valid row of all batches and divided once: never a
mean of means. Result names are relative ("k10/top1"); the caller prepends the
evaluation's name when it logs them. No module here imports the training loop.
"""

import importlib
import typing

from attmask_jax.errors import InputError

if typing.TYPE_CHECKING:
  from attmask_jax.evals.job import Eval

NAMES = (
  "knn",
  "fewshot",
  "label_free",
  "linear",
  "finetune",
  "masked",
  "backgrounds",
  "clusters",
  "attention",
  "masks",
  "overlap",
  "pca",
  "reconstruct",
  "rollout",
  "tokens",
  "token_clusters",
  "compare",
)


def by_name(name: str) -> "Eval":
  """The evaluation with this name.

  Raises:
    InputError: there is none.
  """
  if name not in NAMES:
    raise InputError(f'evals.name "{name}" is unknown: use {", ".join(NAMES)}')
  return importlib.import_module(f"{__name__}.{name}").EVAL
