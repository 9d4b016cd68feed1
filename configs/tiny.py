"""Each method on generated shapes, in minutes: the first run on any machine.

Command:   python main.py --config=configs/tiny.py --workdir=runs/tiny
Hardware:  2 CPU cores, 2 to 6 minutes.
Paper:     arXiv:2203.12719; images and sizes are ours.
Expected:  k-NN at chance (12.5 %) before and after, see docs/results.md: the
           run demonstrates the program and is too short to learn shapes.

A ViT of width 64 and depth 4 learns from 32 px images of eight shape classes
whose textures and colours say nothing about the class. The arguments `hint`,
`low`, `random`, `ibot` and `dino` change the mask policy of `attmask`, the
default. `random` and `ibot` leave half of the views unmasked, as the attention
policies do. `mae` and `extrema` run the other two methods (arXiv:2111.06377,
arXiv:2206.04667).

`objects` trains AttMask-High on other images, whose classes go with outline,
material and hue, as docs/data.md describes, and `objects_mae` MAE. There k-NN
rises, and the mask moves onto the object: see docs/results.md.
"""

import ml_collections

from attmask_jax.training import setup
from configs import common
from configs import extrema as extrema_vitb16
from configs import mae as mae_imagenet

MASKS = {
  "attmask": {},
  "hint": dict(mask="attmask_hint"),
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
    patch_size=4,
    drop_path=0.0,
    out_dim=512,
    head_hidden=256,
    head_bottleneck=64,
    # With few prototypes the published 0.07 leads to a uniform teacher.
    teacher_temp=(0.025, 0.025),
    teacher_patch_temp=(0.03, 0.03),
    temp_warmup_epochs=1,
  )
  config.method.update(mask)
  config.data.update(
    source="shapes",
    batch_size=64,
    image_size=32,
    global_scale=(0.4, 1.0),
    local_size=16,
    local_crops=2,
    local_scale=(0.25, 0.6),
    grey=0.5,  # colours say nothing about the class
    shapes_train=4000,
    shapes_val=800,
  )
  config.optim.update(
    epochs=6,
    lr_per_256=2e-3,
    warmup_epochs=2,
    teacher_momentum=0.99,
    weight_decay=(0.04, 0.04),
  )
  config.evals.update(eval_epochs=6, knn_ks=(20, 10))
  # A network this small compiles and runs faster on a CPU without a scan.
  config.run.update(scan=False)
  return config


def objects() -> ml_collections.ConfigDict:
  """AttMask-High on images whose classes differ in more than outline."""
  config = attmask(MASKS["attmask"])
  # 16 tokens cost a quarter of 64, which pays for twice the steps.
  config.method.update(
    patch_size=8,
    out_dim=256,
    teacher_temp=(0.03, 0.03),
    teacher_patch_temp=(0.04, 0.04),
  )
  config.data.update(
    source="objects",
    global_scale=(0.35, 0.8),
    local_scale=(0.2, 0.5),
    blur_radius=0.3,  # 2 pixels of 224
    # Hues are part of the classes: what is augmented away is not learned.
    jitter=0.2,
    grey=0.0,
  )
  config.optim.update(
    epochs=12, lr_per_256=6e-3, teacher_momentum=0.98, freeze_epochs=0
  )
  config.evals.eval_epochs = 4
  return config


def mae() -> ml_collections.ConfigDict:
  """MAE without class token."""
  config = mae_imagenet.mae()
  config.method.update(
    variant="64x4x2",
    patch_size=4,
    decoder_width=64,
    decoder_depth=2,
    decoder_num_heads=2,
  )
  config.optim.update(epochs=10, lr_per_256=4e-3, warmup_epochs=1)
  return _shapes(config, scale=(0.4, 1.0))


def objects_mae() -> ml_collections.ConfigDict:
  """MAE on the images of `objects`."""
  config = mae()
  config.method.patch_size = 8
  config.data.source = "objects"
  config.optim.epochs = 12
  config.evals.eval_epochs = 4
  return config


def extrema() -> ml_collections.ConfigDict:
  """ExtreMA with three masks of 75 %."""
  config = extrema_vitb16.extrema()
  config.method.update(
    variant="64x4x2",
    patch_size=4,
    drop_path=0.0,
    mask_ratio=0.75,
    num_masks=3,
    head_hidden=256,
    out_dim=64,
  )
  config.optim.update(
    epochs=8,
    lr_per_256=2e-3,
    warmup_epochs=1,
    weight_decay=(0.04, 0.04),
    teacher_momentum=0.99,
  )
  config.data.grey = 0.5  # colours say nothing about the class
  return _shapes(config, scale=(0.4, 1.0))


def _shapes(
  config: ml_collections.ConfigDict, **data: object
) -> ml_collections.ConfigDict:
  """Settings of data, evals and run that MAE and ExtreMA share."""
  config.data.update(source="shapes", batch_size=64, image_size=32, **data)
  config.evals.update(eval_epochs=10, knn_ks=(20, 10))
  config.run.update(scan=False)
  return config


OTHERS = {
  "objects": objects,
  "objects_mae": objects_mae,
  "mae": mae,
  "extrema": extrema,
}
