"""AttMask on ImageNet-1k, ViT-S/16: one argument per published run.

Paper:     "What to Hide from Your Students: Attention-Guided Masked Image
           Modeling", ECCV 2022, arXiv:2203.12719.
Command:   python main.py --config=configs/attmask_vits16.py:high_100 \\
               --workdir=runs/high_100 --config.data.path=/data/imagenet
           (docs/data.md describes the layout of the folder; the argument
           after the colon selects a row of the table).
Hardware:  published on 4 devices x 60 images, high_300 on 8 x 100, in float16
           with loss scaling; here data.batch_size=240 (800) over any number of
           devices that divides it, in bfloat16. Hours: not measured.
Expected:  top-1 in percent on the validation set, of the frozen teacher. All
           numbers are the authors'; we have not repeated any of these runs.

  argument       images per class  epochs  masks                 k-NN  linear
  hint_100       all               100     AttMask-Hint          72.8  76.1  a
  high_100       all               100     AttMask-High          72.5  75.7  a
  high_300       all               300     AttMask-High          75.0  77.5  a
  hint_20pct     260               100     AttMask-Hint          49.5  57.5  a
  high_20pct     260               100     AttMask-High          49.7  57.9  a
  low_20pct      260               100     AttMask-Low           44.0  53.4  b
  random_20pct   260               100     random, 10-50 %       47.8  56.7  b
  random75_20pct 260               100     random, 75 %          47.3  55.5  b
  block_20pct    260               100     block-wise (iBOT)     46.7  56.4  b
  high_10pct     130               100     AttMask-High          -     -     c
  block_10pct    130               100     block-wise (iBOT)     -     -     c
  high_5pct      65                100     AttMask-High          -     -     c
  block_5pct     65                100     block-wise (iBOT)     -     -     c

  a  README of the release; the settings are those of its commands.
  b  slides of the ECCV talk, which give share, epochs and ratio. All other
     settings are those of the release's 20 % runs.
  c  the slides plot k-NN over 5, 10, 20 and 100 % of ImageNet, without readable
     numbers. The settings, also unpublished, are those for 20 %.

20 % as in the release: the first 260 of about 1281 images per class. The run
logs k-NN on the same share of the training set as knn/top1, for k = 10; we do
not know the k of the published numbers.

To try 5 epochs set --config.optim.epochs=5: the warm-ups of 10 epochs and of 30
(of the temperatures) become shorter in proportion.
"""

import ml_collections

from attmask_jax.training import setup
from configs import common

# Attention masks: one ratio of 0.3 +- 0.2 per step; each view is masked with
# probability 0.5. These are also the defaults.
_ATTENTION = dict(mask_ratio=(0.3,), mask_ratio_var=(0.2,), mask_prob=0.5)
HIGH = dict(mask="attmask_high", **_ATTENTION)
HINT = dict(mask="attmask_hint", show_max=0.1, **_ATTENTION)
LOW = dict(mask="attmask_low", **_ATTENTION)

# Other masks ignore mask_prob. To leave half of the views unmasked, iBOT draws
# the ratio from two values, one of which is 0.
_HALF = dict(mask_ratio=(0.0, 0.3), mask_ratio_var=(0.0, 0.2))
BLOCK = dict(mask="block", **_HALF)
RANDOM = dict(mask="random", **_HALF)
# Our reading: the slides give "75 %" where the rows above have "10-50 %", which
# is the ratio in masked views. So only this ratio changes, to a fixed one as in
# MAE, and half of the views stay unmasked. Masking every view
# (mask_ratio=(0.75,), mask_ratio_var=(0.0,)) would also agree with the slides.
RANDOM_75 = dict(
  mask="random", mask_ratio=(0.0, 0.75), mask_ratio_var=(0.0, 0.0)
)

FULL = dict(
  data=dict(
    batch_size=240,
    local_crops=10,
    global_scale=(0.25, 1.0),
    local_scale=(0.05, 0.25),
  ),
  optim=dict(epochs=100, teacher_momentum=0.996),
)
LONG = dict(
  data=dict(
    batch_size=800,
    local_crops=10,
    global_scale=(0.32, 1.0),
    local_scale=(0.05, 0.32),
  ),
  optim=dict(epochs=300, teacher_momentum=0.996),
)
PART = dict(
  data=dict(
    batch_size=240,
    local_crops=6,
    global_scale=(0.25, 1.0),
    local_scale=(0.05, 0.25),
  ),
  optim=dict(epochs=100, teacher_momentum=0.99),
)

# Argument: masks, schedule, images per class (0 = all).
RUNS = {
  "hint_100": (HINT, FULL, 0),
  "high_100": (HIGH, FULL, 0),
  "high_300": (HIGH, LONG, 0),
  "hint_20pct": (HINT, PART, 260),
  "high_20pct": (HIGH, PART, 260),
  "low_20pct": (LOW, PART, 260),
  "random_20pct": (RANDOM, PART, 260),
  "random75_20pct": (RANDOM_75, PART, 260),
  "block_20pct": (BLOCK, PART, 260),
  "high_10pct": (HIGH, PART, 130),
  "block_10pct": (BLOCK, PART, 130),
  "high_5pct": (HIGH, PART, 65),
  "block_5pct": (BLOCK, PART, 65),
}


def get_config(arg: str = "high_100") -> ml_collections.ConfigDict:
  """The config of one of RUNS; keys not set here have their defaults."""
  masks, length, subset = common.choose(RUNS, arg)
  config = setup.default_config()
  config.method.update(
    masks,
    variant="small",
    patch_size=16,
    dtype="bfloat16",  # published: float16 with loss scaling
    out_dim=8192,
    shared_head=True,
    norm_last_layer=False,
    teacher_temp=(0.04, 0.07),
    teacher_patch_temp=(0.04, 0.07),
    temp_warmup_epochs=30,
  )
  config.update(length)
  config.data.update(source="folder", subset=subset)
  config.evals.update(eval_epochs=20)
  return config
