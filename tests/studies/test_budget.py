"""The budget by hand count; runs of a seed share weights and images."""

import jax
import numpy as np
import pytest
import small_study

from attmask_jax import trees
from attmask_jax.errors import InputError
from attmask_jax.studies import plan
from attmask_jax.studies.plan import Costs, Keys, choose
from attmask_jax.training import setup, train_step

KEYS = Keys(
  policies="a,b,random",
  networks="n,m",
  steps=(100, 1000),
  seeds=(2, 4),
  points=2,
)
S = 50  # steps per epoch: 2 to 20 epochs
# Of 2 epochs: 10 + 100 * 0.1 + 1 = 21 and 20 + 100 * 0.4 + 2 = 62 seconds; of
# 3 epochs, evaluated after 2 and 3, 26 and 82.
COSTS = {"n": Costs(10.0, 0.1, 1.0), "m": Costs(20.0, 0.4, 2.0)}


@pytest.mark.parametrize(
  "seconds, network, seeds, epochs, needed",
  [
    (126, "n", 2, 2, 6 * 21),  # nothing is left
    (200, "n", 3, 2, 9 * 21),  # 3 epochs would take 234
    (371, "n", 4, 3, 12 * 26),  # 4 epochs: 12 * (10 + 20 + 1) = 372
    (372, "m", 2, 2, 6 * 62),  # the larger network goes first
    (500, "m", 2, 3, 6 * 82),  # a third seed would take 558
    (600, "m", 3, 2, 9 * 62),
    # 20 epochs, evaluated twice: 20 + 400 + 2 seconds.
    (1e6, "m", 4, 20, 12 * 422),
  ],
)
def test_what_fits(seconds, network, seeds, epochs, needed):
  chosen = choose(KEYS, COSTS, steps_per_epoch=S, seconds=seconds)
  got = (chosen.network, chosen.seeds, chosen.epochs, chosen.seconds)
  assert got[:3] == (network, seeds, epochs)
  assert chosen.seconds == pytest.approx(needed)
  assert chosen.eval_epochs == {2: 1, 3: 2, 20: 10}[epochs]


def test_too_little_time():
  with pytest.raises(InputError) as caught:
    choose(KEYS, COSTS, steps_per_epoch=S, seconds=125)
  assert str(caught.value) == (
    "3 policies x 2 seeds x 2 epochs of n take about 2.1 minutes here, and 2.1 "
    "can be planned: raise --minutes, or lower study.policies, study.seeds or "
    "study.steps"
  )


def test_epochs_longer_than_the_most_steps():
  """One epoch is the least."""
  assert plan.epochs_range(KEYS, 5000) == (1, 1)
  assert plan.epochs_range(KEYS, 300) == (1, 3)


def test_runs_are_even_at_any_time():
  chosen = choose(KEYS, COSTS, steps_per_epoch=S, seconds=126)
  runs = list(chosen.runs())
  assert runs == [
    ("a", 0), ("b", 0), ("random", 0), ("a", 1), ("b", 1), ("random", 1),
  ]  # fmt: skip
  assert plan.from_json(plan.as_json(chosen)) == chosen


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"study.policies": "high,tall"}, ['"tall"', "random_75"]),
    ({"study.policies": "high"}, ["high", "baseline random"]),
    ({"study.policies": "high,low"}, ["high,low", "baseline random"]),
    ({"study.policies": "high,high,random"}, ["high,high,random"]),
    ({"study.networks": ""}, ["study.networks is empty"]),
    ({"study.steps": (16, 8)}, ["study.steps 16,8", "least"]),
    ({"study.seeds": (0, 8)}, ["study.seeds", "at least 1"]),
    ({"study.points": 0}, ["study.points 0", "at least 1"]),
  ],
)
def test_bad_limits(changes, words):
  with pytest.raises(InputError) as caught:
    plan.keys_of(small_study.config(changes))
  for word in words:
    assert word in str(caught.value), caught.value


def one(config, policy, seed):
  return plan.training_config(
    config, policy=policy, seed=seed, network="16x2x2", epochs=2, eval_epochs=1
  )


def start(config):
  """First batch and initial state of a run."""
  run = setup.build(config)
  state, _ = train_step.init_state(
    run.method, run.tx, run.mesh, seed=config.method.seed
  )
  batches = run.pipeline.batches(0, 1)
  batch = next(batches)
  batches.close()
  images = {k: batch[k] for k in batch if "image" in k or k == "index"}
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  names = {trees.path_name(path): np.asarray(x) for path, x in leaves}
  return images, names


@pytest.mark.parametrize(
  "arg, policies",
  [
    ("objects", ("high", "random", "block", "none")),
    ("objects_mae", ("random", "high")),
    ("objects_extrema", ("random", "hint")),
  ],
)
def test_runs_of_a_seed_share_weights_and_images(arg, policies):
  names = {"study.policies": ",".join({"random", *policies})}
  config = small_study.config(names, arg=arg)
  images, params = start(one(config, policies[0], 1))
  for policy in policies[1:]:
    other_images, other = start(one(config, policy, 1))
    for name, array in images.items():
      np.testing.assert_array_equal(other_images[name], array)
    assert params.keys() == other.keys()
    for name in params:
      np.testing.assert_array_equal(other[name], params[name], err_msg=name)
  other_images, other = start(one(config, policies[0], 2))
  assert (other_images["images"] != images["images"]).any()
  name = "backbone/patch_embed/kernel"
  assert (other[name] != params[name]).any()


def test_config_of_a_run_is_an_ordinary_one():
  config = small_study.config({"study.policies": "random_75,random"})
  made = one(config, "random_75", 3)
  assert not {"study", "policies", "linear"} & set(made)
  assert made.method.mask == "random"
  assert made.method.mask_ratio == (0.0, 0.75)
  assert made.method.variant == "16x2x2"
  assert (made.method.seed, made.data.seed) == (3, 3)
  assert (made.optim.epochs, made.evals.eval_epochs) == (2, 1)
  assert "study" in config  # it is left as it was
  assert config.method.mask == "attmask_high"


def test_keys_that_the_study_sets_are_refused():
  config = small_study.config()
  plan.refuse_own_keys(config, ["data.batch_size", "study.steps"])
  for key, instead in {
    "optim.epochs": "config.study.steps",
    "method.mask_ratio": "config.policies.POLICY.mask_ratio",
  }.items():
    with pytest.raises(InputError, match=instead):
      plan.refuse_own_keys(config, [key])
