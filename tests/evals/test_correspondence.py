"""Pretraining and evaluation of MAE must use the same tokens.

A class token that was pretrained is evaluated by recipes for it, a network
without one by its mean patch.
"""

import json
import logging

import jax
import numpy as np
import pytest
import small

from attmask_jax import evaluate
from attmask_jax.errors import InputError
from attmask_jax.training import setup
from attmask_jax.weights.torch_io import names, pth, tables
from configs import evals

# Of each recipe of MAE: the mode that it is for.
RECIPES = {
  "knn_mae": "gap",
  "knn_mae_cls": "cls",
  "linear_mae_sgd_gap": "gap",
  "linear_mae_sgd_cls": "cls",
  "linear_mae_lars_gap": "gap",
  "linear_mae_lars_cls": "cls",
  "finetune_mae_50e_gap": "gap",
  "finetune_mae_50e_gap_erasing": "gap",
  "finetune_mae_50e_cls": "cls",
  "finetune_mae_100e_gap": "gap",
  "finetune_mae_150e_gap": "gap",
}
# Pretrained with, recipe for -> what happens.
OUTCOMES = {
  ("gap", "gap"): "runs",
  ("cls", "cls"): "runs",
  ("gap", "cls"): "refused",  # there is no such token
  ("cls", "gap"): "warns",  # as the official fine-tuning does
}
WARNING = "was pretrained with a class token and is evaluated by its mean patch"


class TrainingBegins(Exception):
  """The network of a probe or fine-tuning has been built."""


def test_every_recipe_of_mae_is_in_the_table():
  assert {name for name in evals.NAMES if "mae" in name} == set(RECIPES)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """{"gap" | "cls" | "encoder": file of a small MAE}; "encoder" is official."""
  folder = tmp_path_factory.mktemp("mae")
  rng, written = np.random.default_rng(0), {}
  for mode in ("gap", "cls"):
    changes = {"method.class_token": mode == "cls"}
    method, (params, *_), _ = small.example(changes, arg="mae")
    params = jax.tree.map(
      lambda x: rng.normal(0, 0.2, x.shape).astype("f4"), dict(params)
    )
    grid = (method.backbone.grid,) * 2
    model = names.to_theirs(params, tables.mae("yx"), grid=grid)
    written[mode] = {"model": model, "heads": 2, "decoder_heads": 2}
    encoder = {"backbone": params["backbone"]}
  bare = names.to_theirs(encoder, tables.facebook_mae("xy"), grid=grid)
  written["encoder"] = {"model": bare, "heads": 2}
  for name, content in written.items():
    pth.write(folder / f"{name}.pth", content)
  return {name: str(folder / f"{name}.pth") for name in written}


def run(name, weights, folder, monkeypatch, **changes):
  """results.json of a recipe on generated images, or TrainingBegins."""
  config = evals.get_config(name)
  config.weights = weights
  config.evals.batch_size = 16
  config.run.tensorboard = False
  config.data.update(
    source="shapes", image_size=16, shapes_train=16, shapes_val=16
  )
  if "optim" in config:
    config.data.batch_size = 8
  else:
    config.evals.knn_ks = (3,)
  config.update_from_flattened_dict(changes)

  def train(config, *_, **__):
    setup.build(config)
    raise TrainingBegins

  monkeypatch.setattr(evaluate.train, "train", train)
  evaluate.evaluate(config.lock(), str(folder))
  return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["gap", "cls"])
def test_recipe(pretrained, mode, recipe, tmp_path, monkeypatch, caplog):
  caplog.set_level(logging.WARNING)
  outcome, notes = OUTCOMES[mode, RECIPES[recipe]], None
  call = lambda: run(recipe, pretrained[mode], tmp_path, monkeypatch)
  if outcome == "refused":
    with pytest.raises(InputError, match="does not have: set .*pool=mean"):
      call()
  elif recipe.startswith("knn"):
    notes = call()["notes"]
  else:
    with pytest.raises(TrainingBegins):
      call()
  warns = outcome == "warns"
  assert (WARNING in caplog.text) == warns
  if notes is not None:
    assert [WARNING in note for note in notes] == [True] * warns


@pytest.mark.parametrize(
  "recipe, changes, warns",
  [
    ("knn_mae", {}, True),  # an encoder without its decoder
    ("knn_mae", {"evals.pool": "cls+mean"}, False),
    ("finetune_extrema", {}, True),  # drops the class token
    ("finetune", {}, False),
    ("clusters", None, False),
  ],
)
def test_other_uses(
  pretrained, recipe, changes, warns, tmp_path, monkeypatch, caplog
):
  caplog.set_level(logging.WARNING)
  if changes is None:  # refused for another reason, with no pooling to check
    with pytest.raises(InputError):
      run(recipe, pretrained["encoder"], tmp_path, monkeypatch)
  elif recipe.startswith("knn"):
    run(recipe, pretrained["encoder"], tmp_path, monkeypatch, **changes)
  else:
    with pytest.raises(TrainingBegins):
      run(recipe, pretrained["encoder"], tmp_path, monkeypatch, **changes)
  assert (WARNING in caplog.text) == warns
