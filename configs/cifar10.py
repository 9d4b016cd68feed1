"""Pretraining on CIFAR-10 at 32 px, on one GPU or a laptop.

Papers:    none trains at this size; the values below are ours. Arguments:
             attmask  AttMask-High, arXiv:2203.12719
             hint     AttMask-Hint, the same paper
             ibot     block-wise masks, arXiv:2111.07832
             dino     no masks and no patch loss, arXiv:2104.14294
             mae      pixel reconstruction, arXiv:2111.06377
             extrema  extreme masks, arXiv:2206.04667
Commands:  One GPU:
             python main.py --config=configs/cifar10.py:attmask \\
                 --workdir=runs/cifar10 --config.data.path=/data/cifar \\
                 --config.method.dtype=bfloat16
           A laptop: half the depth, a tenth of the images, fewer epochs:
             python main.py --config=configs/cifar10.py:attmask \\
                 --workdir=runs/cifar10 --config.data.path=/data/cifar \\
                 --config.method.variant=192x6x3 --config.data.subset=500 \\
                 --config.data.batch_size=128 --config.optim.epochs=30
Data:      the binary version (docs/data.md). CIFAR-100 likewise with
           --config.data.source=cifar100; 32 px images in train/CLASS/ and
           val/CLASS/ with --config.data.source=folder.
Hardware:  one GPU, or more slowly a CPU. Hours: not measured yet.
Expected:  not measured yet. knn/top1 in the log (k = 20) should end well above
           its value before the first step, which is that of random weights.

The recipe is that of configs/small_images.py with patches of 4 px, so that an
image again has 8 x 8 patches, and a local crop of 16 px has 4 x 4 (mae and
extrema have none). As there, a shorter run has shorter warm-ups.
"""

import ml_collections

from configs import small_images


def get_config(arg: str = "attmask") -> ml_collections.ConfigDict:
  """The config for one of small_images.MASKS, "mae" or "extrema"."""
  config = small_images.get_config(arg)
  config.method.update(patch_size=4)
  config.data.update(source="cifar10", image_size=32)
  if "local_size" in config.data:
    config.data.local_size = 16
  return config
