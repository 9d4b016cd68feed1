"""Methods by name.

base.py says what a method is; attmask.py, extrema.py, mae.py and classify.py
are the four, each readable top to bottom. masking.py and losses.py hold what
they share. CONTRIBUTING.md shows how to add one.
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
  """Which method."""

  name: str = schema.key(
    "attmask", "what is trained", choices=lambda: tuple(METHODS)
  )
