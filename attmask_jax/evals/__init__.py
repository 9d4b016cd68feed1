"""Evaluations: from trained weights to named numbers, tables and figures.

A module of NAMES is an evaluation: its last line, `EVAL = Eval(run, ...)`,
describes it, see job.py. `run(job)` measures in --mode=eval and, on a job of
the run, while a run trains (online.py, accuracy.py). The other modules are
what evaluations share: `features.extract` runs a compiled function over padded
batches (`images` [B, H, W, 3] uint8, `label`, `index` int32, `valid` bool,
False = padding row) and returns the valid rows.

Counts are summed over every valid row of all batches and divided once: never a
mean of means. Names of results are relative ("k10/top1"); the caller puts the
evaluation's name in front when it logs them. No module here imports the
training loop.
"""

import importlib
import typing

from attmask_jax.errors import InputError

if typing.TYPE_CHECKING:
  from attmask_jax.evals.job import Eval

NAMES = (
  "knn",
  "fewshot",
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
  """The evaluation of a module.

  Raises:
    InputError: there is none of this name.
  """
  if name not in NAMES:
    raise InputError(f'evals.name "{name}" is unknown: use {", ".join(NAMES)}')
  return importlib.import_module(f"{__name__}.{name}").EVAL
