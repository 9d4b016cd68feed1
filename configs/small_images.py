"""Pretraining on 64 px images, such as Tiny ImageNet, on one GPU or a laptop.

Papers:    none trains at this size; the values below are ours. Arguments:
             attmask  AttMask-High, arXiv:2203.12719
             hint     AttMask-Hint, the same paper
             ibot     block-wise masks, arXiv:2111.07832
             dino     no masks and no patch loss, arXiv:2104.14294
             mae      pixel reconstruction, arXiv:2111.06377
             extrema  extreme masks, arXiv:2206.04667
             attmask_laptop, mae_laptop, extrema_laptop
                      networks and lengths for a CPU
Commands:  One GPU:
             python main.py --config=configs/small_images.py:attmask \\
                 --workdir=runs/small --config.method.dtype=bfloat16 \\
                 --config.data.path=/data/tiny-imagenet-200
           A laptop, on 10,000 images:
             python main.py --config=configs/small_images.py:attmask_laptop \\
                 --workdir=runs/small \\
                 --config.data.path=/data/tiny-imagenet-200 \\
                 --config.data.subset=50
Data:      any folder with train/CLASS/ and val/CLASS/ (docs/data.md). Images
           of any size will do: crops are scaled to 64 and 32 px.
Hardware:  one GPU, or with `_laptop` a CPU. Hours: see docs/results.md; not
           measured for the others.
Expected:  knn/top1 (k = 20) rises above its value before the first step, which
           is that of random weights: `_laptop` in docs/results.md. Not measured
           for the others.

A ViT-Ti of 5.4 million parameters with patches of 8 px sees 8 x 8 patches,
and 4 x 4 of a local crop. Heads are smaller and prototypes fewer than
published, as such data sets have fewer classes. With fewer epochs, the warm-ups
of 5 epochs (rate) and 10 (temperatures of attmask, hint, ibot and dino) become
shorter in proportion. mae and extrema have no prototypes and no local crops;
mae sees 16 of the 64 patches, extrema four times 16.

The networks of `_laptop` are narrower. attmask_laptop therefore starts from
larger weights (method.init), and its patches of 16 px make 16 tokens, which
cost a quarter of 64. The momentum of the teachers is that of a short run.
"""

import ml_collections

from attmask_jax.training import setup
from configs import attmask_vits16, common
from configs import extrema as extrema_vitb16
from configs import mae as mae_imagenet

MASKS = {
  "attmask": attmask_vits16.HIGH,
  # 64 patches leave few hints: 0 to 3, out of 6 candidates.
  "hint": attmask_vits16.HINT,
  "ibot": attmask_vits16.BLOCK,
  "dino": dict(mask="none", patch_weight=0.0),
}


def get_config(arg: str = "attmask") -> ml_collections.ConfigDict:
  """The config for one of MASKS, "mae" or "extrema"."""
  choice = common.choose(MASKS | OTHERS, arg)
  return choice() if arg in OTHERS else attmask(choice)


def attmask(mask: dict[str, object]) -> ml_collections.ConfigDict:
  """The recipe of AttMask, iBOT and DINO."""
  config = setup.default_config()
  config.method.update(
    mask,
    variant="tiny",  # 192x12x3; 192x6x3 for a laptop
    patch_size=8,
    out_dim=4096,
    head_hidden=1024,
    temp_warmup_epochs=10,
  )
  config.data.update(
    source="folder",
    batch_size=256,
    image_size=64,
    local_size=32,
    # Larger crops than at 224 px: 5 % of so small an image shows too little.
    global_scale=(0.4, 1.0),
    local_crops=4,
    local_scale=(0.1, 0.4),
  )
  config.optim.update(
    epochs=100,
    warmup_epochs=5,
    teacher_momentum=0.99,  # as published for 20 % of ImageNet
  )
  config.evals.update(
    eval_epochs=10,
    knn_ks=(20, 10),  # small data sets have few images
  )
  return config


def mae() -> ml_collections.ConfigDict:
  """MAE without class token."""
  config = mae_imagenet.mae()
  config.method.update(
    variant="tiny", patch_size=8, decoder_width=128, decoder_depth=2
  )
  config.optim.update(epochs=100, lr_per_256=1e-3, warmup_epochs=5)
  return _small(config, scale=(0.2, 1.0))


def extrema() -> ml_collections.ConfigDict:
  """ExtreMA with four masks of 75 %."""
  config = extrema_vitb16.extrema()
  config.method.update(
    variant="tiny",
    patch_size=8,
    mask_ratio=0.75,
    num_masks=4,
    head_hidden=1024,
    out_dim=128,
  )
  config.optim.update(
    epochs=100, lr_per_256=5e-4, warmup_epochs=5, teacher_momentum=0.99
  )
  return _small(config, scale=(0.2, 1.0))


def _small(
  config: ml_collections.ConfigDict, **data: object
) -> ml_collections.ConfigDict:
  """Settings of data and evals that MAE and ExtreMA share."""
  config.data.update(source="folder", batch_size=256, image_size=64, **data)
  config.evals.update(eval_epochs=10, knn_ks=(20, 10))
  return config


def attmask_laptop() -> ml_collections.ConfigDict:
  """AttMask-High, 128 wide, with two small crops."""
  config = attmask(MASKS["attmask"])
  config.method.update(
    variant="128x4x4",
    patch_size=16,
    init="xavier",
    drop_path=0.0,
    out_dim=1024,
    head_hidden=512,
    head_bottleneck=128,
    teacher_temp=(0.04, 0.04),
    teacher_patch_temp=(0.04, 0.04),
    temp_warmup_epochs=1,
  )
  config.data.local_crops = 2
  config.optim.freeze_epochs = 0
  return _laptop(config, lr_per_256=3e-3)


def mae_laptop() -> ml_collections.ConfigDict:
  """MAE, 192 wide."""
  config = mae()
  config.method.update(variant="192x4x3", decoder_width=96, decoder_num_heads=3)
  return _laptop(config, lr_per_256=2e-3)


def extrema_laptop() -> ml_collections.ConfigDict:
  """ExtreMA, 192 wide, which contrasts the images of a batch."""
  config = extrema()
  config.method.update(
    variant="192x4x3",
    drop_path=0.0,
    # BYOL collapses: its teacher has to be slower than a short run allows.
    contrast="infonce",
    contrast_temp=0.2,
  )
  return _laptop(config, lr_per_256=1e-3)


def _laptop(
  config: ml_collections.ConfigDict, *, lr_per_256: float
) -> ml_collections.ConfigDict:
  """Length, batch and rate for 2 CPU cores."""
  config.data.batch_size = 64
  config.optim.update(
    epochs=20, warmup_epochs=1, lr_per_256=lr_per_256, teacher_momentum=0.99
  )
  config.evals.eval_epochs = 5
  # Networks this small compile and run faster on a CPU without a scan.
  config.run.scan = False
  return config


OTHERS = {
  "mae": mae,
  "extrema": extrema,
  "attmask_laptop": attmask_laptop,
  "mae_laptop": mae_laptop,
  "extrema_laptop": extrema_laptop,
}
