"""What every method promises the loop, see attmask_jax/methods/__init__.py."""

import inspect

import jax
import numpy as np
import pytest
import small

from attmask_jax import trees
from attmask_jax.methods import METHODS

PRETRAINING = sorted(set(METHODS) - {"classify"})
DECLARED = (
  "teacher_first", "batch_coupled", "frozen_at_start", "untrained",
  "undecayed", "lr_scale", "classifies",
)  # fmt: skip
CALLED = {
  "from_config": ["config", "steps_per_epoch"],
  "init": ["rng"],
  "at": ["step"],
  "item_extras": ["epoch", "index"],
  "loss": ["params", "teacher", "aux", "batch", "rng", "scalars"],
  "update_aux": ["aux", "stats"],
}


@pytest.mark.parametrize("name", METHODS)
def test_members_of_the_contract(name):
  method = METHODS[name]
  for member, wanted in CALLED.items():
    found = list(inspect.signature(getattr(method, member)).parameters)
    assert [x for x in found if x != "self"] == wanted, member
  for member in DECLARED:
    assert hasattr(method, member), member


def paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {trees.path_name(path): np.shape(leaf) for path, leaf in leaves}


def tiny(name):
  """A run of a method on generated images, as small as it goes."""
  from configs import tiny

  config = tiny.get_config(name)
  known = config.to_dict()
  changes = {
    key: value
    for key, value in small.SIZES.items()
    if key.split(".")[1] in known[key.split(".")[0]]
  }
  changes |= {"data.batch_size": 8, "data.shapes_train": 16}
  config.update_from_flattened_dict(changes)
  return config.lock()


@pytest.mark.parametrize("name", PRETRAINING)
def test_trees_and_one_loss(name):
  built, state, _ = small.parts(tiny(name))
  params, teacher, aux = jax.eval_shape(built.method.init, jax.random.key(0))
  # The moving average walks the teacher's paths.
  assert paths(teacher).items() <= paths(params).items()
  (batch, _), *_ = small.arguments(built, 1)
  loss, metrics, stats, per_image = jax.jit(built.method.loss)(
    state.params,
    state.teacher,
    state.aux,
    batch,
    jax.random.key(1),
    built.method.at(0),
  )
  assert loss.shape == () and np.isfinite(loss)
  assert np.isfinite(metrics["loss"])
  assert set(per_image) == set(built.method.per_image)
  moved = jax.eval_shape(built.method.update_aux, state.aux, stats)
  assert paths(moved) == paths(aux)
