"""Which networks are measured, and what is computed from their short run."""

import contextlib
import json

import pytest
import small_study

from attmask_jax import mesh as meshes
from attmask_jax.planning import flops
from attmask_jax.studies import costs, plan
from attmask_jax.studies.plan import Costs
from attmask_jax.training import setup, train_step

NETWORKS = "16x2x2,32x2x2,48x2x2"
# 2 policies x 2 seeds x 1 epoch of 8 steps: 4 * (fixed + 8 * step) seconds.
STEP = {"16x2x2": 0.1, "32x2x2": 0.4, "48x2x2": 0.8}


@pytest.fixture
def measured(monkeypatch):
  """measured(seconds, flops) -> networks that were measured."""
  calls = []

  def fake(short, run, folder, run_once):
    del run, folder, run_once
    calls.append(short.method.variant)
    return Costs(2.0, STEP[short.method.variant], 0.0)

  def measured(seconds, flops):
    monkeypatch.setattr(costs, "_costs", fake)
    width = lambda run: f"{run.method.backbone.width}x2x2"
    monkeypatch.setattr(costs, "_flops", lambda run: flops[width(run)])
    config = small_study.config({"study.networks": NETWORKS})
    found = costs.measure(
      config,
      plan.keys_of(config),
      None,
      run_once=None,
      steps_per_epoch=8,
      seconds=seconds,
    )
    assert list(found) == calls
    return calls

  return measured


def test_all_fit(measured):
  # The largest takes 4 * (2 + 6.4) = 33.6 of 0.85 * 1000 seconds.
  assert measured(1000, {n: 1.0 for n in STEP}) == list(STEP)


def test_the_first_that_does_not_fit_is_the_last(measured):
  """4 * (2 + 3.2) = 20.8 seconds; by its FLOPs it would have fitted."""
  assert measured(24, {n: 1.0 for n in STEP}) == ["16x2x2", "32x2x2"]


def test_what_cannot_fit_by_its_flops_is_not_measured(measured):
  """1000 times the FLOPs: 4 * 8 * 100 seconds."""
  flops = {"16x2x2": 1.0, "32x2x2": 1000.0, "48x2x2": 1.0}
  assert measured(1000, flops) == ["16x2x2"]


def test_the_fastest_is_always_measured(measured):
  assert measured(1, {n: 1.0 for n in STEP}) == ["16x2x2"]


def test_short_run(tmp_path, monkeypatch):
  changes = {"optim.warmup_epochs": 30, "method.temp_warmup_epochs": 30}
  config = small_study.config(changes)
  keys = plan.keys_of(config)
  short = costs._short_config(config, keys, "16x2x2", 8)
  run = setup.build(short)
  assert run.schedules.total_steps == 16
  assert short.method.seed == 2 and short.method.mask == "random"

  def run_once(config, folder):
    folder.mkdir()
    lines = [
      {"step": 8, "train/img_per_s": 2.0},  # with the compilation
      {"step": 16, "train/img_per_s": 16.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)

  clock = iter([100.0, 120.0])
  monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
  monkeypatch.setattr(costs, "_evaluation_seconds", lambda run: 3.0)
  # 8 images per step at 16 per second; 20 seconds less 16 steps of these.
  got = costs._costs(short, run, tmp_path, run_once)
  assert got == Costs(20 - 16 * 0.5, 0.5, 3.0)
  assert not list(tmp_path.iterdir())


def test_flops_need_no_state():
  """Those of test_benchmark.py, from shapes alone."""
  config = small_study.config()
  short = costs._short_config(config, plan.keys_of(config), "16x2x2", 8)
  run = setup.build(short)
  state, _ = train_step.init_state(run.method, run.tx, run.mesh, seed=0)
  with contextlib.closing(run.pipeline.batches(0, 1)) as batches:
    batch = meshes.shard(run.mesh, next(batches))
  assert costs._flops(run) == flops.model_flops(run, state, batch) > 0
