"""What a study trains: its config keys, its budget, the config of each run.

A study's config is that of a training run with three more sections: `study`,
the keys below; `policies`, the keys of section `method` that make each policy;
and `linear`, the config of the linear probe.
"""

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

from attmask_jax import schema
from attmask_jax.errors import InputError

# Share of the time that is planned: saves, reports and slower hours need some.
PLANNED = 0.85
# What the study sets in each run, and the key that says it.
OWN_KEYS = {
  "method.variant": "study.networks",
  "method.mask": "study.policies",
  "method.seed": "study.seeds",
  "data.seed": "study.seeds",
  "optim.epochs": "study.steps",
  "optim.steps": "study.steps",
  "evals.eval_epochs": "study.points",
  "linear.weights": "study.policies",
}


@dataclasses.dataclass(frozen=True)
class Keys:
  """Limits of a study, between which the time there is decides."""

  policies: str = schema.key(
    "", "A,B: names of the section policies, trained in this order"
  )
  baseline: str = schema.key(
    "random", "the policy that all others are compared with"
  )
  networks: str = schema.key(
    "", "A,B: candidates for method.variant, the fastest first"
  )
  steps: tuple[int, int] = schema.key(
    (1000, 20000), "least and most steps of a run, in whole epochs", low=1
  )
  seeds: tuple[int, int] = schema.key((3, 5), "least and most seeds", low=1)
  points: int = schema.key(
    6, "evaluations of a run after its first step, at most", low=1
  )


class Costs(NamedTuple):
  """Seconds that a network takes on this machine.

  Attributes:
    fixed: of a run of no steps: start, compilation, k-NN before and after,
      linear probe.
    step: of a training step.
    evaluation: of one more k-NN.
  """

  fixed: float
  step: float
  evaluation: float


class Plan(NamedTuple):
  """What a study trains.

  Attributes:
    policies: their names, in the order of training.
    network: value of method.variant.
    epochs: of each run.
    steps_per_epoch: S.
    seeds: their number; they are 0, 1, ...
    eval_epochs: epochs between two evaluations.
    seconds: that all runs are expected to take.
  """

  policies: tuple[str, ...]
  network: str
  epochs: int
  steps_per_epoch: int
  seeds: int
  eval_epochs: int
  seconds: float

  def runs(self) -> Iterator[tuple[str, int]]:
    """(policy, seed) of all runs; seed by seed, so that any part is even."""
    for seed in range(self.seeds):
      for policy in self.policies:
        yield policy, seed


def keys_of(config: ml_collections.ConfigDict) -> Keys:
  """The section `study` of a config.

  Raises:
    InputError: it is missing, or a value cannot be.
  """
  if "study" not in config:
    raise InputError(
      "this config describes a single run: give one of a study, such as "
      "--config=study"
    )
  schema.check("study", config.study, Keys)
  keys = Keys(**schema.take(Keys, config.study))
  for name in ("steps", "seeds"):
    least, most = getattr(keys, name)
    if least > most:
      raise InputError(
        f"study.{name} {least},{most} must be the least and the most, in this "
        "order"
      )
  names, known = schema.words(keys.policies), tuple(config.policies)
  for name in names:
    if name not in known:
      raise InputError(
        f'study.policies "{name}" is unknown: use {", ".join(known)}'
      )
  if keys.baseline not in names or len(set(names)) < max(len(names), 2):
    raise InputError(
      f"study.policies {keys.policies} must be two names or more, all "
      f"different, with study.baseline {keys.baseline} among them"
    )
  if not schema.words(keys.networks):
    raise InputError(
      "study.networks is empty: name networks, as "
      "--config.study.networks=192x6x3,tiny"
    )
  return keys


def refuse_own_keys(
  config: ml_collections.ConfigDict, given: Collection[str]
) -> None:
  """Refuses values of keys that the study sets in each run.

  Args:
    config: of a study.
    given: dotted names of keys that the user has set.

  Raises:
    InputError: names the key that takes its place.
  """
  policies = config.get("policies", {})
  instead = OWN_KEYS | {
    f"method.{key}": f"policies.POLICY.{key}"
    for name in policies
    for key in policies[name]
    if f"method.{key}" not in OWN_KEYS
  }
  for key in given:
    if key in instead:
      raise InputError(
        f"config.{key} differs between the runs of a study: set "
        f"config.{instead[key]} in its place"
      )


def epochs_range(keys: Keys, steps_per_epoch: int) -> tuple[int, int]:
  """Least and most epochs of a run: study.steps, at least one epoch."""
  least = math.ceil(keys.steps[0] / steps_per_epoch)
  return least, max(keys.steps[1] // steps_per_epoch, least)


def eval_period(keys: Keys, epochs: int) -> int:
  """Epochs between two evaluations, so that there are at most study.points."""
  return math.ceil(epochs / keys.points)


def run_seconds(
  keys: Keys, costs: Costs, *, epochs: int, steps_per_epoch: int
) -> float:
  """Expected seconds of one run."""
  evaluations = math.ceil(epochs / eval_period(keys, epochs))
  steps = epochs * steps_per_epoch
  # The last evaluation is part of the fixed costs.
  return costs.fixed + steps * costs.step + (evaluations - 1) * costs.evaluation


def least_seconds(keys: Keys, costs: Costs, steps_per_epoch: int) -> float:
  """Expected seconds of the least study with a network."""
  epochs, _ = epochs_range(keys, steps_per_epoch)
  runs = keys.seeds[0] * len(schema.words(keys.policies))
  return runs * run_seconds(
    keys, costs, epochs=epochs, steps_per_epoch=steps_per_epoch
  )


def choose(
  keys: Keys,
  costs: Mapping[str, Costs],
  *,
  steps_per_epoch: int,
  seconds: float,
) -> Plan:
  """The largest study that fits: first the network, then seeds, then epochs.

  That is the last network whose least number of epochs fits with the least
  number of seeds; as many seeds of these epochs as fit; and as many epochs as
  then fit. Every run gets the same.

  Args:
    keys: limits of all three.
    costs: by network, the fastest first; not all need be there.
    steps_per_epoch: S.
    seconds: time for all runs.

  Raises:
    InputError: there is too little time for the least study.
  """
  policies = schema.words(keys.policies)
  least, most = epochs_range(keys, steps_per_epoch)

  def fits(network: str, seeds: int, epochs: int) -> bool:
    return needed(network, seeds, epochs) <= seconds

  def needed(network: str, seeds: int, epochs: int) -> float:
    one = run_seconds(
      keys, costs[network], epochs=epochs, steps_per_epoch=steps_per_epoch
    )
    return one * seeds * len(policies)

  networks = [name for name in costs if fits(name, keys.seeds[0], least)]
  if not networks:
    name = next(iter(costs))
    raise InputError(
      f"{len(policies)} policies x {keys.seeds[0]} seeds x {least} epochs of "
      f"{name} take about {needed(name, keys.seeds[0], least) / 60:.1f} "
      f"minutes here, and {max(seconds, 0) / 60:.1f} can be planned: raise "
      "--minutes, or lower study.policies, study.seeds or study.steps"
    )
  network = networks[-1]
  seeds = max(
    n
    for n in range(keys.seeds[0], keys.seeds[1] + 1)
    if fits(network, n, least)
  )
  epochs = max(n for n in range(least, most + 1) if fits(network, seeds, n))
  return Plan(
    policies,
    network,
    epochs,
    steps_per_epoch,
    seeds,
    eval_period(keys, epochs),
    needed(network, seeds, epochs),
  )


def training_config(
  config: ml_collections.ConfigDict,
  *,
  policy: str,
  seed: int,
  network: str,
  epochs: int,
  eval_epochs: int,
) -> ml_collections.ConfigDict:
  """The config of one run: an ordinary one, without the sections of a study.

  Runs of one seed have the same initial weights and the same images in the
  same order, whatever their policy.

  Args:
    config: of the study.
    policy: one of its section `policies`.
    seed: of weights, masks, order, crops and generated images.
    network: value of method.variant.
    epochs: of the run; warm-ups of a longer recipe become shorter.
    eval_epochs: see `Plan`.
  """
  new = copy.deepcopy(config).unlock()
  for section in ("study", "policies", "linear"):
    del new[section]
  new.method.update(config.policies[policy].to_dict())
  new.method.update(variant=network, seed=seed)
  new.data.seed = seed
  new.optim.update(epochs=epochs, steps=0)
  new.evals.eval_epochs = eval_epochs
  return new.lock()


def as_json(plan: Plan) -> dict[str, Any]:
  """The plan for study.json."""
  return plan._asdict() | {"policies": list(plan.policies)}


def from_json(values: Mapping[str, Any]) -> Plan:
  """The inverse of `as_json`; raises TypeError for other values."""
  return Plan(**dict(values) | {"policies": tuple(values["policies"])})
