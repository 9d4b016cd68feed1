"""The study of the paper: mask policies with the same steps, seed by seed.

Papers:    arXiv:2203.12719 (AttMask, whose ablation this repeats at a small
           size), arXiv:2111.06377 (MAE), arXiv:2206.04667 (ExtreMA).
Command:   python -m attmask_jax.study --config=configs/study.py \\
               --workdir=studies/objects --minutes=120
           python -m attmask_jax.study --config=configs/study.py:attmask \\
               --workdir=studies/mine --minutes=600 --config.data.path=FOLDER
           The same command continues a study that was stopped.
Data:      objects, objects_mae, objects_extrema: generated, no download.
           attmask, mae, extrema: FOLDER with train/CLASS/ and val/CLASS/
           (docs/data.md); crops are scaled to 64 px.
Hardware:  any; --minutes decides network, steps and seeds.
Expected:  WORKDIR/study.md, study.png and study.json, see docs/training.md;
           measured on generated objects in docs/results.md.

  argument         policies
  objects          high hint low random random_75 block none; the default
  attmask          the same
  objects_mae      random high hint, as method.mask of MAE
  mae              the same
  objects_extrema  random high hint, as method.mask of ExtreMA
  extrema          the same

Fewer policies leave more steps to each: --config.study.policies=high,random.
random is as published at 10 to 50 % in half of the views, and so are the other
policies of AttMask, but for random_75 (75 % in half of the views) and none
(DINO, without patch loss).
"""

import ml_collections

from attmask_jax import schema
from attmask_jax.studies import plan
from configs import attmask_vits16, common, small_images, supervised, tiny

ATTMASK = {
  "high": attmask_vits16.HIGH,
  "hint": attmask_vits16.HINT,
  "low": attmask_vits16.LOW,
  "random": attmask_vits16.RANDOM,
  "random_75": attmask_vits16.RANDOM_75,
  "block": attmask_vits16.BLOCK,
  # DINO. mask="none" would have no mask token, without which flax draws other
  # initial values for the class token: random masks of 0 % hide nothing either.
  "none": dict(
    mask="random",
    mask_ratio=(0.0,),
    mask_ratio_var=(0.0,),
    patch_weight=0.0,
  ),
}
# Hides patches at the same ratio; only their choice differs.
GUIDED = {
  "random": dict(mask="random"),
  "high": dict(mask="attmask_high"),
  "hint": dict(mask="attmask_hint"),
}
# Of 16 patches the published 10 % would leave no hint at all.
FEW_PATCHES = dict(show_max=0.25)


def get_config(arg: str = "objects") -> ml_collections.ConfigDict:
  """The config of one of NAMES."""
  return common.choose(NAMES, arg)()


def objects() -> ml_collections.ConfigDict:
  """AttMask's policies on generated objects."""
  policies = ATTMASK | {"hint": ATTMASK["hint"] | FEW_PATCHES}
  return _generated(tiny.get_config(), policies, _probe(supervised.linear()))


def objects_mae() -> ml_collections.ConfigDict:
  """MAE's masks on generated objects."""
  linear = _probe(supervised.linear_mae("sgd", cls=False))
  return _generated(tiny.mae(), GUIDED, linear)


def objects_extrema() -> ml_collections.ConfigDict:
  """ExtreMA's masks on generated objects."""
  config = _two_masks(tiny.extrema())
  return _generated(config, GUIDED, _probe(supervised.linear_extrema()))


def attmask() -> ml_collections.ConfigDict:
  """AttMask's policies on an image folder."""
  recipe = small_images.attmask(small_images.MASKS["attmask"])
  recipe.method.init = "xavier"  # most networks are narrow
  return _folder(recipe, ATTMASK, _probe(supervised.linear()))


def mae() -> ml_collections.ConfigDict:
  """MAE's masks on an image folder."""
  linear = _probe(supervised.linear_mae("sgd", cls=False))
  return _folder(small_images.mae(), GUIDED, linear)


def extrema() -> ml_collections.ConfigDict:
  """ExtreMA's masks on an image folder."""
  config = _two_masks(small_images.extrema())
  # A short run with the BYOL loss collapses, see docs/results.md.
  config.method.update(contrast="infonce", contrast_temp=0.2)
  return _folder(config, GUIDED, _probe(supervised.linear_extrema()))


def _probe(linear: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A published linear probe, shorter and with several rates, the best kept."""
  linear.method.lrs = (0.01, 0.03, 0.1, 0.3)
  linear.data.batch_size = 256
  linear.optim.update(epochs=10, warmup_epochs=0)
  linear.evals.eval_epochs = 10  # the last epoch counts
  linear.run.tensorboard = False
  return linear


def _two_masks(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Two subsets of a quarter: half of the patches are left to be hidden."""
  config.method.update(mask_ratio=0.75, num_masks=2)
  return config


def _generated(
  config: ml_collections.ConfigDict,
  policies: dict[str, dict[str, object]],
  linear: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """A study on generated objects: network and least length of the recipe."""
  config.evals.overlap_images = 0
  # Drawing the images takes longer than the network.
  linear.method.lrs = (0.03, 0.1, 0.3, 1.0)
  linear.data.batch_size = 128
  linear.optim.epochs = 3
  epoch = config.data.shapes_train // config.data.batch_size
  least = config.optim.epochs * epoch
  return _study(
    config,
    policies,
    linear,
    networks=config.method.variant,
    steps=(least, 4 * least),
    seeds=(3, 8),
    points=4,
  )


def _folder(
  config: ml_collections.ConfigDict,
  policies: dict[str, dict[str, object]],
  linear: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """A study on an image folder, of ViTs up to small."""
  return _study(
    config,
    policies,
    linear,
    networks="128x4x4,192x6x3,tiny,small",
    steps=(1000, 50_000),
    seeds=(3, 5),
  )


def _study(
  config: ml_collections.ConfigDict,
  policies: dict[str, dict[str, object]],
  linear: ml_collections.ConfigDict,
  **limits: object,
) -> ml_collections.ConfigDict:
  """The recipe of a run with the sections of a study."""
  # Every second of an evaluation is paid in each run.
  config.evals.update(label_free=False, mask_images=0)
  config.run.tensorboard = False
  names = ",".join(policies)
  config.study = schema.section(plan.Keys, policies=names, **limits)
  config.policies = ml_collections.ConfigDict(policies)
  config.linear = linear
  return config


NAMES = {
  "objects": objects,
  "attmask": attmask,
  "objects_mae": objects_mae,
  "mae": mae,
  "objects_extrema": objects_extrema,
  "extrema": extrema,
}
