"""Methods by name.

base.py defines the interface of a method; attmask.py, extrema.py, mae.py and
classify.py implement it, each readable from top to bottom. masking.py and
losses.py are shared. CONTRIBUTING.md shows how to add a method.
"""

import dataclasses

from attmask_jax import schema
from attmask_jax.methods import attmask, classify, extrema, mae
from attmask_jax.methods.base import Method

METHODS: dict[str, type[Method]] = {
  "attmask": attmask.AttMask,
  "extrema": extrema.ExtreMA,
  "mae": mae.Mae,
  "classify": classify.Classify,
}


@dataclasses.dataclass(frozen=True)
class Keys:
  """Choice of the method."""

  name: str = schema.key(
    "attmask", "training method", choices=lambda: tuple(METHODS)
  )
