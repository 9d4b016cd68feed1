"""MAE on ImageNet-1k: one argument per published pretraining recipe.

Papers:    "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377;
           the recipes are those of MAE-priv, an unofficial release, which also
           trains without a class token (GAP), and three of the official one.
Command:   python main.py --config=configs/mae.py:small_100e_gap \\
               --workdir=runs/mae --config.data.path=/data/imagenet
Hardware:  published on 8 devices x 512 images in float16; here a batch of 4096
           over any number of devices that divides it, in bfloat16 with
           --config.method.dtype=bfloat16. Hours: not measured.
Expected:  top-1 in percent, of the release; not repeated by us. Fine-tuned for
           50 epochs (base: 100), linear probe, k-NN with k = 10. For 100
           and 150 epochs of fine-tuning see configs/supervised.py.

  argument          network      fine-tuned  linear  k-NN
  small_100e_gap    ViT-S/16       76.58      34.65  19.7
  small_100e_cls    ViT-S/16       75.77      38.95  23.7
  small_200e_gap    ViT-S/16       76.86      36.46  19.8
  small_400e_gap    ViT-S/16       77.56      36.98  20.8
  small_800e_gap    ViT-S/16       77.93      36.88  20.7
  small_1600e_gap   ViT-S/16         -          -     -
  base_400e_gap     ViT-B/16       83.08        -    28.9
  large_100e_gap    ViT-L/16       83.51      58.90  33.08
  large_100e_raw    ViT-L/16         -          -     -    raw pixels as target
  huge_100e_gap     ViT-H/14         -          -     -
  giant_100e_gap    ViT-G/14         -          -     -
  official_base     ViT-B/16       83.66      67.8    -    1600 epochs
  official_large    ViT-L/16       85.95      76.0    -    1600 epochs
  official_huge     ViT-H/14       86.93      77.2    -    1600 epochs

The release has small_100e_gap twice (12 files, 11 recipes). The official
recipes have a class token in the encoder and the decoder. Remaining differences
from that release:
- initialisation: the patch convolution and the layer between encoder and
  decoder keep PyTorch's default (official: Xavier, and bias 0 for the latter);
  class and mask token are normal, truncated at one standard deviation
  (official: not truncated);
- the mask token has no weight decay (official: it has);
- visible patches are N - int(N * ratio) (official: int(N * (1 - ratio)), the
  same at 0.75);
- fine-tuning and linear probes are MAE-priv's: configs/supervised.py.

All mask policies are available:
--config.method.mask=random|block|grid|attmask_high|attmask_hint|attmask_low;
the last three use the attention of a moving average of the encoder.
"""

import ml_collections

from attmask_jax.training import setup
from configs import common


def _decoder(width: int, depth: int, num_heads: int = 0) -> dict[str, int]:
  """Keys of the decoder; num_heads 0 = width / 64."""
  return dict(
    decoder_width=width, decoder_depth=depth, decoder_num_heads=num_heads
  )


_SMALL = dict(variant="small", **_decoder(192, 4))
_LARGE = dict(variant="large", **_decoder(512, 8))
_OFFICIAL = dict(
  class_token=True,
  position_order="xy",
  target_layout="hwc",
  target_variance="unbiased",
  decoder_class_token=True,
  **_decoder(512, 8, 16),
)
# Argument: epochs, warm-up epochs, method.
RUNS = {
  "small_100e_gap": (100, 10, _SMALL),
  "small_100e_cls": (100, 10, dict(class_token=True, **_SMALL)),
  "small_200e_gap": (200, 20, _SMALL),
  "small_400e_gap": (400, 40, _SMALL),
  "small_800e_gap": (800, 40, _SMALL),
  "small_1600e_gap": (1600, 40, _SMALL),
  "base_400e_gap": (400, 40, dict(variant="base", **_decoder(384, 4))),
  "large_100e_gap": (100, 10, _LARGE),
  "large_100e_raw": (100, 10, dict(norm_target=False, **_LARGE)),
  "huge_100e_gap": (
    100, 10, dict(variant="huge", patch_size=14, **_decoder(512, 8)),
  ),
  "giant_100e_gap": (
    100, 10, dict(variant="giant", patch_size=14, **_decoder(512, 8)),
  ),
  "official_base": (1600, 40, dict(variant="base", **_OFFICIAL)),
  "official_large": (1600, 40, dict(variant="large", **_OFFICIAL)),
  "official_huge": (
    1600, 40, dict(variant="huge", patch_size=14, **_OFFICIAL),
  ),
}  # fmt: skip


def mae() -> ml_collections.ConfigDict:
  """MAE on ViT-S/16 without class token, as published for 100 epochs."""
  config = setup.default_config("mae", "crop_flip")
  config.method.drop_path = 0.0
  # get_config sets scale and resample of the official recipes.
  config.data.update(batch_size=4096, eval_resample="bilinear")
  config.optim.update(
    lr_per_256=1.5e-4,
    min_lr=0.0,
    weight_decay=(0.05, 0.05),
    betas=(0.9, 0.95),
    clip=0.0,
    freeze_epochs=0,
  )
  # Features as published: the mean patch or class token, without final norm.
  config.evals.update(pool="mean", final_norm=False)
  return config


def get_config(arg: str = "small_100e_gap") -> ml_collections.ConfigDict:
  """The config of one of RUNS."""
  epochs, warmup, method = common.choose(RUNS, arg)
  config = mae()
  config.method.update(method)
  config.optim.update(epochs=epochs, warmup_epochs=warmup)
  if config.method.class_token:
    config.evals.pool = "cls"
  if arg.startswith("official"):
    config.data.update(scale=(0.2, 1.0), resample="bicubic")
    config.optim.schedule = "smooth_cosine"
  return config
