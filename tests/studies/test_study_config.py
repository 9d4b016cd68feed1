"""The recipes of studies: published masks, and a probe that can be checked."""

import pytest

from attmask_jax import evaluate
from attmask_jax.methods import METHODS
from attmask_jax.methods.masking import attention_counts
from attmask_jax.studies import plan
from configs import attmask_vits16, study

MASK_KEYS = ("mask", "mask_ratio", "mask_ratio_var", "mask_prob", "show_max")


def made(config, policy):
  keys = plan.keys_of(config)
  network = plan.schema.words(keys.networks)[0]
  return plan.training_config(
    config, policy=policy, seed=0, network=network, epochs=20, eval_epochs=5
  )


@pytest.mark.parametrize("arg", study.NAMES)
def test_every_policy_can_be_built(arg):
  config = study.get_config(arg)
  evaluate.check_values(config.linear)
  assert arg in study.__doc__
  for policy in plan.schema.words(config.study.policies):
    run = made(config, policy)
    method = METHODS[run.method.name].from_config(run, steps_per_epoch=7)
    assert method.mask == run.method.mask
  generated = arg.startswith("objects")
  assert config.data.source == ("objects" if generated else "folder")


@pytest.mark.parametrize(
  "policy, published",
  [
    ("high", "high_20pct"),
    ("hint", "hint_20pct"),
    ("low", "low_20pct"),
    ("random", "random_20pct"),
    ("random_75", "random75_20pct"),
    ("block", "block_20pct"),
  ],
)
def test_masks_are_the_published_ones(policy, published):
  ours = made(study.get_config("attmask"), policy).method
  theirs = attmask_vits16.get_config(published).method
  assert [ours[k] for k in MASK_KEYS] == [theirs[k] for k in MASK_KEYS]
  assert ours.patch_weight == 1


def test_no_masks_hide_nothing_and_have_no_patch_loss():
  run = made(study.get_config("attmask"), "none")
  method = METHODS["attmask"].from_config(run, steps_per_epoch=7)
  assert not method.item_extras(0, 0)["masks"].any()
  assert not method.uses_patches


def test_hints_of_16_patches_are_revealed():
  """Of the published share there would be none."""
  run = made(study.get_config("objects"), "hint").method
  patches = (32 // run.patch_size) ** 2
  most = run.mask_ratio[0] + run.mask_ratio_var[0]
  if patches == 16:
    assert attention_counts(16, most, most, 0.1)[1] == 0
  assert attention_counts(patches, most, most, run.show_max)[1] > 0


def test_guided_masks_of_extrema_have_patches_left_to_hide():
  for arg in ("extrema", "objects_extrema"):
    run = made(study.get_config(arg), "high")
    method = METHODS["extrema"].from_config(run, steps_per_epoch=7)
    assert method.num_masks * method.kept == method.num_patches // 2
