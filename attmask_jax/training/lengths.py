"""Length of a run and of its warm-ups: epochs, steps, and shares of the run.

A recipe states its warm-ups for its own number of epochs. `plan` notes that
number beside each of them for as long as nobody sets another value; `resolve`
then shortens the warm-ups of a shortened run in proportion.
"""

import copy
import dataclasses
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import ml_collections
from absl import logging

from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.runs import config as run_config


class WarmUp(NamedTuple):
  """A pair of keys: a number of epochs, or a share of the run in its place.

  Attributes:
    section: of both keys.
    epochs: key of the number of epochs.
    share: key of the share, 0 = by the number of epochs.
    whole: whether the epochs are a whole number.
  """

  section: str
  epochs: str
  share: str
  whole: bool


WARM_UPS = (
  WarmUp("optim", "warmup_epochs", "warmup_share", False),
  WarmUp("method", "temp_warmup_epochs", "temp_warmup_share", True),
)


@dataclasses.dataclass(frozen=True)
class ShareKeys:
  """Warm-up as a share of the run."""

  warmup_share: float = schema.key(
    0.0,
    "warm-up of the learning rate as a share of the run, 0 = by warmup_epochs",
    low=0,
    high=1,
  )


class Planned(ml_collections.FieldReference):
  """A value of a recipe, as long as nobody has set the key.

  Attributes:
    epochs: length of the recipe's run; 0 once the key was set.
  """

  epochs = 0

  def __init__(self, value: Any, epochs: int) -> None:
    super().__init__(value)
    self.epochs = epochs

  def set(self, value: Any, type_safe: bool = True) -> None:
    """Sets the key, as `config.section.key = value` does."""
    super().set(value, type_safe)
    self.epochs = 0

  def __setstate__(self, state: dict[str, Any]) -> None:
    super().__setstate__(state)  # which knows its own attributes only
    self.epochs = state["epochs"]


def plan(
  config: ml_collections.ConfigDict, epochs: int, given: Collection[str] = ()
) -> None:
  """Notes which lengths of a config are those of its recipe.

  Args:
    config: of a recipe; one without a section `optim` is left as it is.
    epochs: of the recipe.
    given: dotted names of keys that were set since, such as by flags.
  """
  names = [("optim", "epochs")]
  names += [(w.section, key) for w in WARM_UPS for key in (w.epochs, w.share)]
  for section, key in names:
    values = config.get(section, {})
    if "optim" in config and key in values and f"{section}.{key}" not in given:
      values[key] = Planned(values[key], epochs)


def _planned(values: ml_collections.ConfigDict, key: str) -> int:
  """Epochs of the recipe that a value is from, 0 if it was set since."""
  field = dict(values.items(preserve_field_references=True)).get(key)
  return field.epochs if isinstance(field, Planned) else 0


def resolve(
  config: ml_collections.ConfigDict, steps_per_epoch: int
) -> ml_collections.ConfigDict:
  """Replaces steps and shares by epochs, and shortens the recipe's warm-ups.

  Args:
    config: of a training run.
    steps_per_epoch: S.

  Returns:
    A copy in which optim.epochs, optim.warmup_epochs and
    method.temp_warmup_epochs hold what the run uses. Warm-ups that somebody
    set, and those of a run no shorter than its recipe, are unchanged.

  Raises:
    InputError: steps and epochs, or a share and epochs, that differ.
  """
  new = copy.deepcopy(config)
  optim = new.optim
  steps = optim.get("steps", 0)
  if steps:
    whole = -(-steps // steps_per_epoch)
    if not _planned(optim, "epochs") and optim.epochs != whole:
      raise InputError(
        f"optim.steps {steps} at {steps_per_epoch} steps per epoch end in "
        f"epoch {whole}, and optim.epochs is {optim.epochs}: set one of them, "
        f"or optim.epochs={whole}"
      )
    optim.epochs = whole
  length = steps / steps_per_epoch or optim.epochs
  notes = [_resolve(new[w.section], w, length) for w in WARM_UPS]
  if any(notes):
    logging.info(
      "the run is shorter than that of its recipe, and so are the warm-ups: %s",
      ", ".join(filter(None, notes)),
    )
  return ml_collections.ConfigDict(new.to_dict()).lock()


def _resolve(
  values: ml_collections.ConfigDict, warm_up: WarmUp, length: float
) -> str:
  """Sets the epochs of one warm-up; returns what was shortened, or ""."""
  if warm_up.epochs not in values:
    return ""
  key, name = warm_up.epochs, f"{warm_up.section}.{warm_up.epochs}"
  old, planned = values[key], _planned(values, key)
  share = values.get(warm_up.share, 0.0)
  rounded = lambda x: max(round(x), int(x > 0)) if warm_up.whole else x
  if share and not planned and _planned(values, warm_up.share):
    values[warm_up.share] = 0.0  # epochs were set, the share is the recipe's
  elif share:
    values[key] = rounded(share * length)
    if not planned and old not in (0, values[key]):
      raise InputError(
        f"{name} {old:g} and {warm_up.section}.{warm_up.share} {share:g} are "
        "both set: set one of them to 0"
      )
  elif old and planned > length:
    values[key] = rounded(old * length / planned)
    return f"{name} {old:g} -> {values[key]:g}"
  return ""


def continued(
  config: ml_collections.ConfigDict, workdir: str
) -> ml_collections.ConfigDict:
  """The warm-ups that a run in `workdir` began with, unless they are set.

  Version 0.1 and early runs of 0.2 did not shorten them.

  Args:
    config: of the run that starts or continues.
    workdir: run directory, with or without a run of the same length.
  """
  try:
    path = pathlib.Path(workdir).expanduser() / "config.json"
    old = run_config.read_flat(path)
  except (OSError, InputError):
    return config  # none, or one that the checks of the directory refuse
  same = lambda key: old.get(f"optim.{key}", 0) == config.optim.get(key, 0)
  if not same("steps") or not (config.optim.get("steps") or same("epochs")):
    return config
  new = copy.deepcopy(config)
  for section, *keys, _ in WARM_UPS:
    values = new[section]
    if all(_planned(values, key) for key in keys if key in values):
      for key in keys:
        if key in values:
          values[key] = old.get(f"{section}.{key}", 0)
  return new
