"""Runs a study in one directory, and continues it there.

WORKDIR/study.json holds the config, the plan and, once runs are finished, all
numbers. Each run is an ordinary run directory WORKDIR/POLICY_SEED, and its
linear probe an evaluation in WORKDIR/POLICY_SEED/linear.
"""

import copy
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import logging

from attmask_jax import atomic, data, evaluate, runtime, schema, train
from attmask_jax.errors import InputError, NotFiniteError
from attmask_jax.evals import compare
from attmask_jax.methods import METHODS
from attmask_jax.runs import checkpoint, lock, records
from attmask_jax.runs import config as run_config
from attmask_jax.studies import page, plan, summary
from attmask_jax.studies.costs import measure
from attmask_jax.studies.plan import Costs, Plan
from attmask_jax.studies.summary import Outcome
from attmask_jax.training import lengths, setup

FILE = "study.json"
PROBE = "linear"  # folder of a run's linear probe
PROBE_VALUE = "last/top1"
# Keys that may change when a study continues.
FREE_KEYS = ("run.", "data.path", "linear.run.")
# Trains and probes one run: (config, config of the probe, folder).
Work = Callable[
  [ml_collections.ConfigDict, ml_collections.ConfigDict, pathlib.Path], None
]


class Study(NamedTuple):
  """What study.json holds of a study beside its results.

  Attributes:
    config: flat.
    minutes: the budget.
    plan: what is trained.
    costs: of the networks that were measured.
    failed: folder of a run -> why it has no result.
  """

  config: dict[str, Any]
  minutes: float
  plan: Plan
  costs: dict[str, Costs]
  failed: dict[str, str]

  @property
  def baseline(self) -> str:
    """The policy that the others are compared with."""
    return self.config["study.baseline"]


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  minutes: float,
  *,
  work: Work | None = None,
) -> str:
  """Plans a study, or continues the one in `workdir`, to its end.

  Args:
    config: see configs/study.py.
    workdir: directory of the study; made if missing.
    minutes: time for the whole study on this machine, measuring included.
    work: trains and probes one run; None = `train_and_probe`.

  Returns:
    The sentence that says what the data support.

  Raises:
    InputError: a bad config or directory, too little time, or another study in
      the directory; no run was begun.
    StoppedError: a signal; the same call continues.
  """
  began = time.perf_counter()
  work = work or train_and_probe
  keys = plan.keys_of(config)
  if not minutes > 0:
    raise InputError(f"--minutes {minutes:g} must be above 0")
  runtime.setup(config.run)
  if jax.process_count() > 1:
    raise InputError(
      "a study runs in one process, and run.distributed joined several: start "
      "it on one host"
    )
  known, per_epoch = read(workdir), 0
  if known is None:
    _check_foreign(workdir)
    per_epoch = _check_runs(config, keys)
  else:
    _check_same(known, config, minutes, workdir)
  folder = checkpoint.check_workdir(workdir)
  with lock.RunLock(folder, break_lock=config.run.break_lock):
    study = known or _begin(
      config, keys, folder, minutes, work, began=began, per_epoch=per_epoch
    )
    sentence = summarise(folder, study)
    names = list(study.plan.runs())
    for i, (policy, seed) in enumerate(names, start=1):
      name = f"{policy}_{seed}"
      if name in study.failed or read_outcome(folder, policy, seed):
        continue
      logging.info("run %d of %d: %s", i, len(names), folder / name)
      _one(config, study, policy, seed, folder / name, work)
      sentence = summarise(folder, study)
    return sentence


def train_and_probe(
  config: ml_collections.ConfigDict,
  probe: ml_collections.ConfigDict,
  folder: pathlib.Path,
) -> None:
  """Trains a run to its end and evaluates a linear probe, or continues both."""
  train.train(config, str(folder))
  probe = copy.deepcopy(probe).unlock()
  probe.weights = str(folder)
  evaluate.evaluate(probe.lock(), str(folder / PROBE))
  jax.clear_caches()  # or the programs of all runs stay in memory


def _check_foreign(workdir: str) -> None:
  """Refuses the directory of a run or of an evaluation."""
  folder = pathlib.Path(workdir).expanduser()
  for name in ("config.json", "results.json"):
    if (folder / name).exists():
      raise InputError(
        f"{folder} holds a run or an evaluation ({name}): give the study "
        "another --workdir"
      )


def _check_runs(config: ml_collections.ConfigDict, keys: plan.Keys) -> int:
  """Builds the least run, and the method of every other one; writes nothing.

  Returns:
    S, steps per epoch.

  Raises:
    InputError: the first that cannot be trained, or images without labels.
  """
  evaluate.check_values(config.linear)
  # 1 where an epoch has no batch, which building a run refuses.
  images = len(data.build(config.data, "train"))
  per_epoch = max(images // config.data.batch_size, 1)
  least, _ = plan.epochs_range(keys, per_epoch)
  networks = schema.words(keys.networks)
  one = lambda policy, network: plan.training_config(
    config, policy=policy, seed=0, network=network, epochs=least, eval_epochs=1
  )
  built = setup.build(one(keys.baseline, networks[0]))
  if not built.evaluator.best:
    raise InputError(
      "a study compares k-NN, which needs evals.knn=True and validation images "
      f"with labels: data.source={config.data.source} has none, or it is off"
    )
  # Without their images, which may take long to list.
  for network in networks:
    for policy in schema.words(keys.policies):
      other = lengths.resolve(one(policy, network), per_epoch)
      METHODS[other.method.name].from_config(other, steps_per_epoch=per_epoch)
  return per_epoch


def _check_same(
  known: Study,
  config: ml_collections.ConfigDict,
  minutes: float,
  workdir: str,
) -> None:
  """Refuses to continue a study with another config or budget."""
  new = _flat(config) | {"minutes": minutes}
  old = known.config | {"minutes": known.minutes}
  differing = [
    f"{key} ({old.get(key, 'absent')} there, {new.get(key, 'absent')} here)"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
  ]
  if differing:
    raise InputError(
      f"{workdir} holds a study with another config or budget: "
      f"{'; '.join(differing)}; use the same values or another --workdir"
    )


def _begin(
  config: ml_collections.ConfigDict,
  keys: plan.Keys,
  folder: pathlib.Path,
  minutes: float,
  work: Work,
  *,
  began: float,
  per_epoch: int,
) -> Study:
  """Measures, plans and writes the plan.

  Args:
    config: of the study.
    keys: its section `study`.
    folder: of the study.
    minutes: the budget.
    work: see `run`.
    began: `time.perf_counter()` at the start of the budget.
    per_epoch: S, steps per epoch.
  """
  measured = measure(
    config,
    keys,
    folder,
    run_once=lambda one, place: work(one, config.linear, place),
    steps_per_epoch=per_epoch,
    seconds=60 * minutes,
  )
  left = 60 * minutes - (time.perf_counter() - began)
  chosen = plan.choose(
    keys, measured, steps_per_epoch=per_epoch, seconds=plan.PLANNED * left
  )
  logging.info(
    "ViT %s: %d policies x %d seeds x %d epochs of %d steps, about %.0f "
    "minutes",
    chosen.network, len(chosen.policies), chosen.seeds, chosen.epochs,
    per_epoch, chosen.seconds / 60,
  )  # fmt: skip
  return Study(_flat(config), minutes, chosen, measured, {})


def _one(
  config: ml_collections.ConfigDict,
  study: Study,
  policy: str,
  seed: int,
  folder: pathlib.Path,
  work: Work,
) -> None:
  """Trains and probes one run; notes one whose loss is not finite."""
  one = plan.training_config(
    config,
    policy=policy,
    seed=seed,
    network=study.plan.network,
    epochs=study.plan.epochs,
    eval_epochs=study.plan.eval_epochs,
  )
  try:
    work(one, config.linear, folder)
  except NotFiniteError as error:
    logging.warning("%s: %s", folder, error)
    study.failed[folder.name] = str(error)


def read(workdir: str | pathlib.Path) -> Study | None:
  """The study in a directory, None if there is none.

  Raises:
    InputError: its study.json is damaged.
  """
  path = pathlib.Path(workdir).expanduser() / FILE
  if not path.exists():
    return None
  try:
    values = json.loads(path.read_text())
    known = {name: Costs(**c) for name, c in values["costs"].items()}
    return Study(
      dict(values["config"]),
      float(values["minutes"]),
      plan.from_json(values["plan"]),
      known,
      dict(values["failed"]),
    )
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{path} is damaged ({type(error).__name__}): restore it, or use another "
      "--workdir"
    ) from error


def read_outcome(
  folder: pathlib.Path, policy: str, seed: int
) -> Outcome | None:
  """What a run of a study reached, None if it is not finished."""
  place = folder / f"{policy}_{seed}"
  record = records.read_json(place / PROBE / "results.json", []) or {}
  linear = (record.get("values") or {}).get(PROBE_VALUE)
  if not isinstance(linear, int | float):
    return None
  curve = compare.read(place, place.name).accuracy
  return Outcome(policy, seed, tuple(curve), linear)


def summarise(folder: pathlib.Path, study: Study) -> str:
  """Rewrites study.json, study.md and study.png from the finished runs.

  Returns:
    The sentence that says what the data support.
  """
  found = [read_outcome(folder, *one) for one in study.plan.runs()]
  outcomes = [outcome for outcome in found if outcome]
  rows = summary.compare(
    outcomes, policies=study.plan.policies, baseline=study.baseline
  )
  sentence = summary.sentence(rows, baseline=study.baseline)
  notes = [f"{run} has no result: {why}." for run, why in study.failed.items()]
  content = {
    "minutes": study.minutes,
    "plan": plan.as_json(study.plan),
    "costs": {name: cost._asdict() for name, cost in study.costs.items()},
    "failed": study.failed,
    "sentence": sentence,
    "policies": summary.as_json(rows),
    "runs": [outcome._asdict() for outcome in outcomes],
    "config": study.config,
  }
  atomic.write_json(folder / FILE, content)
  page.write(
    folder, rows, study.plan, baseline=study.baseline, sentence=sentence,
    notes=notes,
  )  # fmt: skip
  return sentence


def redraw(workdir: str) -> str:
  """Rewrites the results of the study in a directory, see `summarise`.

  Raises:
    InputError: the directory holds no study.
  """
  study = read(workdir)
  if study is None:
    raise InputError(f"{workdir} holds no study (no {FILE}): give --minutes=N")
  return summarise(pathlib.Path(workdir).expanduser(), study)


def _flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as study.json holds it."""
  return run_config.flat_config(ml_collections.ConfigDict(config.to_dict()))
