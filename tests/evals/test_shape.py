"""The shape that evaluations share, in --mode=eval and while a run trains."""

import dataclasses
import importlib
import json
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from attmask_jax import evals, evaluate, train
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import pictures
from attmask_jax.evals.job import Eval, Result, Table
from attmask_jax.methods import METHODS, masking
from attmask_jax.models import embedding
from attmask_jax.rows import row_ids
from attmask_jax.training import setup, supervised, train_step
from attmask_jax.weights import loading
from configs import evals as recipes

# As no recipe has it, so that each setting must get from the run to k-NN.
ONLINE = {
  "evals.mask_images": 2,
  "evals.knn_bank": 40,
  "evals.knn_queries": 20,
  "evals.knn_temp": 0.0,
  "evals.pool": "cls+mean",
  "evals.final_norm": False,
}
SHORT = {
  "optim.epochs": 1,
  "data.batch_size": 16,
  "method.lrs": (0.1, 0.3),
  "method.last_blocks": 1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Run directory of a small AttMask run."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  train.train(small.config(ONLINE), str(folder))
  return folder


def recipe(name, where, **changes):
  config = recipes.get_config(name)
  config.weights = str(where)
  config.evals.batch_size = small.SIZES["evals.batch_size"]
  config.run.tensorboard = False
  config.update_from_flattened_dict(changes)
  return config.lock()


def last_line(run, key):
  """The last line of the run's log that holds a key."""
  lines = (run / "metrics.jsonl").read_text().splitlines()
  return [line for line in map(json.loads, lines) if key in line][-1]


# The registry ---------------------------------------------------------------


def test_every_module_with_an_evaluation_is_listed_and_no_other():
  modules = [module.name for module in pkgutil.iter_modules(evals.__path__)]
  described = [
    name
    for name in modules
    if hasattr(importlib.import_module(f"attmask_jax.evals.{name}"), "EVAL")
  ]
  assert sorted(evals.NAMES) == described
  for name in evals.NAMES:
    evaluation = evals.by_name(name)
    module = importlib.import_module(f"attmask_jax.evals.{name}")
    assert evaluation is module.EVAL and isinstance(evaluation, Eval)
    # A recipe of this name exists; its settings decide what is needed.
    needs = evaluation.needed(recipes.get_config(name).evals)
    assert needs in ("none", "weights", "classifier")
  with pytest.raises(InputError, match='"k" is unknown: use knn, fewshot'):
    evals.by_name("k")


@pytest.mark.parametrize(
  "name, needs", [("compare", "none"), ("pca", "weights"),
                  ("masked", "classifier")],
)  # fmt: skip
def test_a_job_holds_what_is_needed(
  trained, tmp_path, monkeypatch, name, needs
):
  steps = []

  def run(job):
    steps.append("run")
    assert (job.weights is None) == (needs == "none")
    assert (job.classifier is None) == (needs != "classifier")
    if job.classifier:
      assert job.classifier.trained_here == 1
    return Result({"a": 1.0}, {}, Table(("a",), (("1",),)))

  def check(job):
    steps.append("check")
    assert job.classifier is None  # before a probe is trained

  assert evals.by_name(name).needs == needs
  monkeypatch.setattr(
    evals, "by_name", lambda name: Eval(run, check=check, needs=needs)
  )
  changes = SHORT if needs == "classifier" else {}
  result = evaluate.evaluate(recipe(name, trained, **changes), str(tmp_path))
  assert steps == ["check", "run"] and result.values == {"a": 1.0}


@pytest.mark.parametrize("explain", ["token", "class"])
def test_only_the_rollout_of_a_class_needs_a_classifier(explain):
  settings = recipes.get_config("rollout").evals
  settings.explain = explain
  needs = {"token": "weights", "class": "classifier"}[explain]
  assert evals.by_name("rollout").needed(settings) == needs


@pytest.mark.parametrize(
  "name, changes", [("linear", SHORT), ("tokens", SHORT),
                    ("masks", {"evals.count": 3}),
                    ("compare", {})],
)  # fmt: skip
def test_evaluate_returns_what_it_writes(trained, tmp_path, name, changes):
  if name == "compare":
    changes = {"evals.runs": str(trained)}
  if name == "tokens":
    changes = changes | {"evals.places": 2, "evals.knn_k": 3}
  config = recipe(name, trained, **changes)
  result = evaluate.evaluate(config, str(tmp_path))
  record = json.loads((tmp_path / "results.json").read_text())
  assert result.values and result.values == record["values"]
  assert result.counts == record["counts"]
  assert list(result.notes) == record["notes"]
  assert ("No probe was given" in str(result.notes)) == (name == "tokens")
  assert list(result.table.headings) == record["table"]["headings"]
  assert [list(row) for row in result.table.rows] == record["table"]["rows"]
  written = [str(path.relative_to(tmp_path)) for path in result.figures]
  assert written == record["figures"]
  assert all((tmp_path / figure).exists() for figure in written)


# While a run trains ---------------------------------------------------------


def test_knn_of_a_run_is_the_evaluation_of_its_checkpoint(trained, tmp_path):
  logged = last_line(trained, "knn/top1")
  assert logged["step"] == small.TOTAL_STEPS
  config = recipe("knn", trained, **ONLINE, **{"evals.knn_ks": (3, 5, 10)})
  result = evaluate.evaluate(config, str(tmp_path))
  assert result.counts["bank images"] == 40
  assert result.counts["queries"] == 20
  assert len(result.values) == 6
  for name, value in result.values.items():
    assert logged[f"knn/{name}"] == value
  assert logged["knn/top1"] == result.values["k3/top1"]
  assert logged["knn/top5"] == result.values["k3/top5"]


def test_overlap_of_a_run_is_the_evaluation_masks(trained, tmp_path):
  logged = last_line(trained, "overlap/object")
  method = METHODS["attmask"].from_config(small.config(), steps_per_epoch=8)
  settings = {
    "evals.count": small.SIZES["evals.overlap_images"],
    "evals.ratios": (method.picture_mask_ratio,),
    "evals.show_max": method.picture_show_max,
  }
  result = evaluate.evaluate(
    recipe("masks", trained, **settings), str(tmp_path)
  )
  percent = pictures.percent(method.picture_mask_ratio)
  policies = {k.split("/")[1] for k in logged if k.startswith("overlap/")}
  assert policies == {*masking.ATTENTION_POLICIES, "random", "object"}
  assert logged["overlap/object"] == result.values["object_share"]
  for policy in policies - {"object"}:
    value = result.values[f"{policy}_{percent}/precision"]
    assert logged[f"overlap/{policy}"] == value
  assert (trained / "figures" / "masks.png").exists()
  assert not list((trained / "figures").glob("masks_*"))


def compiled(function):
  """How many programs a call compiles (or reads from a cache)."""
  events = []

  def note(name, duration, **more):
    events.append(name)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    function()
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  return sum("backend_compile" in name for name in events)


@pytest.mark.parametrize("family", ["attmask", "mae", "linear"])
def test_the_next_evaluation_of_a_run_compiles_nothing(
  trained, tmp_path, family
):
  seed = {"method.seed": 77}  # so that no other test has compiled it
  if family == "linear":
    source = loading.load(str(trained), network="", mesh=meshes.make_mesh())
    config = evaluate.complete(
      recipe("linear", trained, **SHORT, **seed), source
    )
    config = supervised.complete(config, source)
  else:
    config = small.config(seed, arg=family)
  run = setup.build(config)
  states = [
    train_step.init_state(run.method, run.tx, run.mesh, seed=seed)[0]
    for seed in (0, 1)
  ]

  def measure(state):
    scores.append(run.evaluator.scores(state))
    scores[-1] |= run.evaluator.figures(state, tmp_path / "figures")

  scores = []
  assert compiled(lambda: measure(states[0])) > 0
  assert compiled(lambda: measure(states[1])) == 0
  assert run.evaluator.best in scores[1] and scores[0] != scores[1]


# Masks in figures and in training -------------------------------------------


@pytest.mark.parametrize("policy", pictures.POLICIES)
def test_masks_of_figures_are_those_of_training(policy):
  """AttMask hides in training what figures show, key for key."""
  method = METHODS["attmask"].from_config(small.config(), steps_per_epoch=8)
  method = dataclasses.replace(
    method,
    mask=policy,
    mask_ratio=(0.5,),
    mask_ratio_var=(0.0,),
    mask_prob=1.0,
    show_max=0.5,
    global_crops=1,
    seed=5,
  )
  n, position = 7, np.array([3, 1, 4, 15, 9, 2, 6])
  scores = np.random.default_rng(0).random((n, 16)).astype(np.float32)
  extras = [method.item_extras(0, int(index)) for index in position]
  batch = {"position": jnp.asarray(position)}
  if extras[0]:
    batch["masks"] = jnp.stack([jnp.asarray(e["masks"]) for e in extras])
  n_mask, n_show = masking.attention_counts(16, 0.5, 0.5, 0.5)
  hidden = method.select_masks(
    jnp.asarray(scores),
    batch,
    jax.random.key(5),
    {"n_mask": n_mask, "n_show": n_show},
  )
  got = pictures.policy_masks(
    scores,
    (4, 4),
    ratio=0.5,
    show_max=0.5,
    policies=(policy,),
    rows=np.asarray(row_ids(batch["position"], 1)),
    seed=5,
  )[policy]
  np.testing.assert_array_equal(got, hidden.mask)
  assert 0 < got.mean() < 1


@pytest.mark.parametrize("policy", masking.ATTENTION_POLICIES)
def test_refilled_masks_of_figures_are_those_of_mae(policy):
  method = METHODS["mae"].from_config(
    small.config({"method.mask": policy, "method.show_max": 0.5}, arg="mae"),
    steps_per_epoch=8,
  )
  params, teacher, _ = method.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  images = rng.normal(size=(5, 16, 16, 3)).astype(np.float32)
  position = jnp.asarray([2, 7, 1, 8, 0])
  order = np.asarray(
    method.order(teacher, images, {"position": position}, jax.random.key(3))
  )
  want = np.zeros((5, 16), bool)
  for row in range(5):
    want[row, order[row, 16 - method.n_hidden :]] = True
  attention = embedding.class_attention(
    method.backbone, teacher["backbone"], images
  )
  got = pictures.policy_masks(
    np.asarray(attention.mean(axis=1)),
    (4, 4),
    ratio=method.mask_ratio,
    show_max=0.5,
    policies=(policy,),
    rows=np.asarray(position),
    seed=3,
    refill=method.refills_hints,
  )[policy]
  np.testing.assert_array_equal(got, want)


def test_a_run_that_hides_nothing_still_draws_its_masks(monkeypatch, tmp_path):
  """ExtreMA with a ratio of 0 shows all patches: no share of nothing."""
  small.use_devices(monkeypatch, 1)
  changes = {
    "method.mask_ratio": 0.0, "method.num_masks": 1, "evals.mask_images": 2
  }  # fmt: skip
  built, state, _ = small.parts(small.config(changes, arg="extrema"))
  values = built.evaluator.figures(state, tmp_path)
  assert np.isnan(values["overlap/attmask_high"])
  assert 0 < values["overlap/object"] < 1
  assert (tmp_path / "masks.png").is_file()
