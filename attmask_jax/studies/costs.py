"""What each candidate network of a study takes on this machine."""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable

import ml_collections
from absl import logging

from attmask_jax import schema
from attmask_jax.planning.flops import model_flops
from attmask_jax.runs import judgement, records
from attmask_jax.studies import plan
from attmask_jax.studies.plan import Costs, Keys
from attmask_jax.training import setup, train_step

WINDOW = 8  # steps that are timed, after as many that warm up
STEPS = 2 * WINDOW
# Trains and probes a run in a new folder: (config, folder) -> nothing.
RunOnce = Callable[[ml_collections.ConfigDict, pathlib.Path], object]


def measure(
  config: ml_collections.ConfigDict,
  keys: Keys,
  folder: pathlib.Path,
  *,
  run_once: RunOnce,
  steps_per_epoch: int,
  seconds: float,
) -> dict[str, Costs]:
  """Costs of the candidates, from the fastest on until one does not fit.

  Each is measured on a short run with the baseline's masks, which is deleted
  again. A network is left out if the time per FLOP of the one before says that
  it cannot fit.

  Args:
    config: of the study.
    keys: its section `study`.
    folder: of the study.
    run_once: trains and probes, as each run of the study will.
    steps_per_epoch: S.
    seconds: the whole budget.
  """
  measured: dict[str, Costs] = {}
  per_flop = 0.0
  began = time.perf_counter()

  def fits(costs: Costs) -> bool:
    left = seconds - (time.perf_counter() - began)
    least = plan.least_seconds(keys, costs, steps_per_epoch)
    return least <= plan.PLANNED * left

  networks = schema.words(keys.networks)
  for network in networks:
    short = _short_config(config, keys, network, steps_per_epoch)
    run = setup.build(short)
    flops = _flops(run) if len(networks) > 1 else 1.0
    if measured and not fits(Costs(0.0, per_flop * flops, 0.0)):
      break
    logging.info("measuring ViT %s", network)
    measured[network] = costs = _costs(short, run, folder, run_once)
    logging.info(
      "ViT %s: %.3f s per step, %.1f s per evaluation, %.1f s per run",
      network,
      costs.step,
      costs.evaluation,
      costs.fixed,
    )
    if not fits(costs):
      break  # the next network takes longer still
    per_flop = costs.step / flops
  return measured


def _short_config(
  config: ml_collections.ConfigDict,
  keys: Keys,
  network: str,
  steps_per_epoch: int,
) -> ml_collections.ConfigDict:
  """A run of two windows, of a seed that no run of the study has.

  So the programs that depend on the seed are compiled anew, as they will be.
  """
  short = plan.training_config(
    config,
    policy=keys.baseline,
    seed=keys.seeds[1],
    network=network,
    epochs=-(-STEPS // steps_per_epoch),
    eval_epochs=STEPS,  # at the end
  ).unlock()
  # So few steps leave no room for a warm-up.
  short.optim.update(steps=STEPS, warmup_epochs=0)
  if "temp_warmup_epochs" in short.method:
    short.method.temp_warmup_epochs = 0
  short.run.log_steps = WINDOW
  return short.lock()


def _flops(run: setup.Run) -> float:
  """FLOPs of a train step; nothing is compiled."""
  parts = (run.method, run.tx, run.mesh)
  state = train_step.abstract_state(*parts, seed=0)
  with contextlib.closing(run.pipeline.batches(0, 1)) as batches:
    return model_flops(run, state, next(batches))


def _costs(
  short: ml_collections.ConfigDict,
  run: setup.Run,
  folder: pathlib.Path,
  run_once: RunOnce,
) -> Costs:
  """Costs of a network, from its short run and one more evaluation."""
  with tempfile.TemporaryDirectory(dir=folder, prefix=".measure_") as name:
    place = pathlib.Path(name) / "run"
    start = time.perf_counter()
    run_once(short, place)
    whole = time.perf_counter() - start
    lines = records.read_metrics(place / "metrics.jsonl", [])
  rate = judgement.points(lines, "train/img_per_s")[-1][1]
  step = short.data.batch_size / rate
  return Costs(max(whole - STEPS * step, 0.0), step, _evaluation_seconds(run))


def _evaluation_seconds(run: setup.Run) -> float:
  """Seconds of one evaluation during training, once it is compiled."""
  state, _ = train_step.init_state(run.method, run.tx, run.mesh, seed=0)
  run.evaluator.scores(state)
  start = time.perf_counter()
  run.evaluator.scores(state)
  return time.perf_counter() - start
