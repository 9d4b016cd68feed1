"""Each method on generated pictures, in minutes: the first run on any machine.

Command:   python main.py --config=configs/tiny.py --workdir=runs/tiny
Hardware:  2 CPU cores, 2 to 4 minutes.
Papers:    arXiv:2203.12719 (AttMask), arXiv:2111.06377 (MAE),
           arXiv:2206.04667 (ExtreMA); images and sizes are ours.
Expected:  docs/results.md#first-run

A ViT of width 64 and depth 4 learns from pictures of 32 px, whose eight classes
go with outline, material and hue (docs/data.md). The arguments `hint`, `low`,
`random`, `ibot` and `dino` change the mask policy of `attmask`, the default.
`random` and `ibot` leave half of the views unmasked, as the attention policies
do. `mae` and `extrema` run the other two methods.

What a network this small and a run this short need, besides 16 tokens instead
of 196: weights that start larger than the published ones, which are for widths
of 384 and more; a teacher that follows within the run; few prototypes and low
temperatures; and colours that are hardly augmented, since hues are part of the
classes and what is augmented away is not learned.
"""

import ml_collections

from attmask_jax.training import setup
from configs import common
from configs import extrema as extrema_vitb16
from configs import mae as mae_imagenet

MASKS = {
  "attmask": {},
  # A share of 16 patches that holds at least one.
  "hint": dict(mask="attmask_hint", show_max=0.25),
  "low": dict(mask="attmask_low"),
  "random": dict(
    mask="random", mask_ratio=(0.0, 0.3), mask_ratio_var=(0.0, 0.2)
  ),
  "ibot": dict(mask="block", mask_ratio=(0.0, 0.3), mask_ratio_var=(0.0, 0.2)),
  "dino": dict(mask="none", patch_weight=0.0),
}


def get_config(arg: str = "attmask") -> ml_collections.ConfigDict:
  """The config for one of MASKS or OTHERS."""
  choice = common.choose(MASKS | OTHERS, arg)
  return choice() if arg in OTHERS else attmask(choice)


def attmask(mask: dict[str, object]) -> ml_collections.ConfigDict:
  """The recipe of AttMask, iBOT and DINO."""
  config = setup.default_config()
  config.method.update(
    variant="64x4x2",
    patch_size=8,
    init="xavier",
    drop_path=0.0,
    out_dim=256,
    head_hidden=256,
    head_bottleneck=64,
    # With few prototypes the published 0.07 leads to a uniform teacher.
    teacher_temp=(0.03, 0.03),
    teacher_patch_temp=(0.04, 0.04),
    temp_warmup_epochs=1,
  )
  config.method.update(mask)
  config.data.update(
    global_scale=(0.35, 0.8),
    local_size=16,
    local_crops=2,
    local_scale=(0.2, 0.5),
    blur_radius=0.3,  # 2 pixels of 224
    jitter=0.2,
    grey=0.0,
  )
  config.optim.update(
    epochs=12,
    lr_per_256=6e-3,
    warmup_epochs=2,
    teacher_momentum=0.98,
    weight_decay=(0.04, 0.04),
    freeze_epochs=0,
  )
  return _generated(config)


def mae() -> ml_collections.ConfigDict:
  """MAE without class token."""
  config = mae_imagenet.mae()
  config.method.update(
    variant="64x4x2",
    patch_size=8,
    decoder_width=64,
    decoder_depth=2,
    decoder_num_heads=2,
  )
  config.data.scale = (0.4, 1.0)
  config.optim.update(epochs=12, lr_per_256=4e-3, warmup_epochs=1)
  return _generated(config)


def extrema() -> ml_collections.ConfigDict:
  """ExtreMA with three masks of 75 %."""
  config = extrema_vitb16.extrema()
  config.method.update(
    variant="64x4x2",
    patch_size=8,
    drop_path=0.0,
    mask_ratio=0.75,
    num_masks=3,
    head_hidden=256,
    out_dim=64,
    # BYOL collapses within 100 steps: its teacher has to be slower than a
    # short run allows.
    contrast="infonce",
    contrast_temp=0.2,
  )
  config.data.update(scale=(0.4, 1.0), jitter=0.2, grey=0.0)
  config.optim.update(
    epochs=12,
    lr_per_256=2e-3,
    warmup_epochs=1,
    weight_decay=(0.04, 0.04),
    teacher_momentum=0.98,
  )
  return _generated(config)


def _generated(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Settings of data, evals and run that all methods share."""
  config.data.update(
    source="objects",
    batch_size=64,
    image_size=32,
    shapes_train=4000,
    shapes_val=800,
  )
  config.evals.update(eval_epochs=6, knn_ks=(20, 10))
  # A network this small compiles and runs faster on a CPU without a scan.
  config.run.update(scan=False)
  return config


OTHERS = {"mae": mae, "extrema": extrema}
