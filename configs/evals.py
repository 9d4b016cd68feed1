"""Every evaluation by name: what to measure on trained weights, and how.

Command:   python main.py --mode=eval --config=configs/evals.py:NAME \\
               --config.weights=RUN --workdir=DIR
Weights:   a run directory (its newest checkpoint) or a checkpoint inside one;
           --config.network=teacher|student|untrained.
Data:      those of the weights' own run; --config.data.source and
           --config.data.path name others.
Writes:    DIR/results.json, DIR/report.html, pictures in DIR/figures/, and a
           line in the weights' run, whose report.html then shows the result.

Names:     knn             weighted k-NN (knn_mae, knn_mae_cls: as MAE-priv does
                           it, of the mean patch or the class token)
           fewshot         k-NN on 1, 5, 10, 20 images per class, five runs
           linear, finetune and their published variants: configs/supervised.py
           masked          a probe's accuracy with patches blacked out
             masked_30, masked_70 ...  one ratio (percent) instead of a list
           backgrounds     ImageNet-9 backgrounds challenge
           clusters        prototypes against labels, without supervision
           attention       attention maps of images, a folder or a video
           masks           what each mask policy hides
           overlap         attention and masks against object masks
           pca             patch tokens as colours
           reconstruct     what a masked autoencoder paints
           rollout         attention through all blocks, or for a class
           tokens          what a single patch token knows: k-NN, linear
           token_clusters  patch tokens in clusters, as colours
           compare         curves of several runs in one plot

Paper:     arXiv:2203.12719; protocols as in the AttMask release. Published
           numbers for ViT-S/16 on ImageNet are in configs/attmask_vits16.py.
"""

import functools
from collections.abc import Callable

import ml_collections

from configs import common, supervised


def _features(**settings: object) -> dict[str, object]:
  return dict(
    last_blocks=1,  # class tokens of that many last blocks
    pool="cls",  # cls | mean | cls+mean: class token, mean patch, both
    final_norm=True,  # features behind the backbone's final norm
    cache="",  # folder that keeps features, "" = none
  ) | dict(
    knn_temp=0.07,  # 0 = the method's, see configs/common.py
    bank_chunk=65536,  # bank images on the device at a time
    query_chunk=1024,  # queries compared at a time
  ) | settings  # fmt: skip


def knn() -> ml_collections.ConfigDict:
  """Weighted k-NN, as published: k = 10, 20, 100, 200 at 0.07."""
  return common.evaluation("knn", **_features(knn_ks=(10, 20, 100, 200)))


def knn_mae(*, cls: bool = False) -> ml_collections.ConfigDict:
  """As MAE-priv evaluates: no final norm, bilinear crops.

  Args:
    cls: compare class tokens (CLS mode), not mean patches (GAP mode).
  """
  config = knn()
  config.evals.update(pool="cls" if cls else "mean", final_norm=False)
  config.data.eval_resample = "bilinear"
  return config


def fewshot() -> ml_collections.ConfigDict:
  """k-NN on few images per class: mean and spread of five runs each."""
  fives, tens, twenties = (tuple(range(0, 5 * n, n)) for n in (5, 10, 20))
  return common.evaluation(
    "fewshot",
    **_features(
      shots=(1, 5, 10, 20),  # training images per class
      knn_ks=(1, 20, 20, 20),  # one per entry of shots
      # First image of each class in each run, one list per entry of shots.
      starts=(fives, fives, tens, twenties),
    ),
  )


def _probed(name: str, **settings: object) -> ml_collections.ConfigDict:
  """Needs a trained linear probe; without config.probe trains a short one."""
  config = supervised.linear()
  config.method.lrs = (0.005, 0.02, 0.1)  # the best on the validation set
  config.optim.epochs = 3
  config.evals.update(name=name, **settings)
  return config


def masked(ratio: float | None = None) -> ml_collections.ConfigDict:
  """Masked ImageNet: black patches chosen by a network's attention."""
  return _probed(
    "masked",
    ratios=(0.1, 0.3, 0.5, 0.7, 0.9) if ratio is None else (ratio,),
    policies=("attmask_high", "random", "attmask_low"),
    guide="",  # weights whose attention chooses; "" = the evaluated ones
    seed=0,  # of random patches
  )


def backgrounds() -> ml_collections.ConfigDict:
  """ImageNet-9 backgrounds challenge."""
  # backgrounds: folder with original/, mixed_same/, mixed_rand/, ...
  return _probed("backgrounds", backgrounds="")


def clusters() -> ml_collections.ConfigDict:
  """NMI, ARI, F and Hungarian accuracy of the prototypes."""
  return common.evaluation("clusters")


def _pictures(name: str, **settings: object) -> ml_collections.ConfigDict:
  return common.evaluation(
    name,
    images="",  # image, folder or video; "" = the run's validation images
    count=8,  # pictures at most
    every=1,  # take every n-th frame or file
    **settings,
  )


def attention() -> ml_collections.ConfigDict:
  """Attention of the class token, per head and averaged."""
  # keep: outline of the patches that hold this share of the attention.
  return _pictures("attention", keep=0.6)


def masks() -> ml_collections.ConfigDict:
  """What each policy hides at these ratios."""
  return _pictures("masks", ratios=(0.1, 0.3, 0.5), show_max=0.1)


def overlap() -> ml_collections.ConfigDict:
  """Where attention and masks fall, against object masks."""
  return common.evaluation(
    "overlap",
    ratios=(0.3,),
    show_max=0.1,
    keep=0.6,  # attention is turned into a region of this share
    count=0,  # images, 0 = all
    seed=0,  # of hints, random and block-wise masks
  )


def pca() -> ml_collections.ConfigDict:
  """The three main directions of patch tokens as red, green, blue."""
  return _pictures("pca")


def reconstruct() -> ml_collections.ConfigDict:
  """What a masked autoencoder paints where patches are hidden."""
  config = _pictures(
    "reconstruct",
    mask="",  # policy, see configs/mae.py; "" = as in the run
    ratio=0.0,  # of hidden patches; 0 = as in the run
    seed=0,  # of masks
    # Files do not say: normalised is assumed ("visualize" models are raw).
    target="",  # normalised | raw pixels; "" = as in the run
  )
  config.network = "student"  # it has the decoder
  return config


def rollout() -> ml_collections.ConfigDict:
  """Attention through all blocks; or what counts for a class."""
  return _probed(
    "rollout",
    images="",  # image, folder or video; "" = the run's validation images
    count=8,  # pictures at most
    every=1,  # take every n-th frame or file
    explain="token",  # token | class (of the probe, or a fine-tuned network)
    category=-1,  # class that is explained, -1 = the most probable one
    fusions=("mean", "max", "min"),  # of the heads; "class" has its own
    discard=0.9,  # share of the weakest links of a block that is left out
    layer=-1,  # the only block, from 0; -1 = all
    # "rows" and "blocks" are right; "reference" is what the release computes.
    row_sums="rows",  # rows | reference
    pairing="blocks",  # blocks | reference
  )


def tokens() -> ml_collections.ConfigDict:
  """What a single patch token knows: k-NN and linear accuracy."""
  config = _probed(
    "tokens",
    places=8,  # tokens taken of an image, at the same random places
    seed=0,  # of the places
    final_norm=True,  # features behind the backbone's final norm
    knn_k=20,  # neighbours
    knn_temp=0.07,
    bank_chunk=65536,
    query_chunk=1024,
  )
  config.method.update(last_blocks=1, pool="mean", final_norm=False)
  return config


def token_clusters() -> ml_collections.ConfigDict:
  """Patch tokens in clusters, as colours over the pictures."""
  return _pictures("token_clusters", clusters=(3, 6, 12), seed=0)


def compare() -> ml_collections.ConfigDict:
  """k-NN and loss over epochs of several runs."""
  config = common.evaluation("compare")
  config.evals.update(
    runs="",  # run directories, e.g. --config.evals.runs=runs/a,runs/b
    labels="",  # A,B: their names in the plot; "" = the directories'
  )
  return config


NAMES: dict[str, Callable[[], ml_collections.ConfigDict]] = {
  "knn": knn,
  "knn_mae": knn_mae,
  "knn_mae_cls": functools.partial(knn_mae, cls=True),
  "fewshot": fewshot,
  **supervised.NAMES,
  "masked": masked,
  "backgrounds": backgrounds,
  "clusters": clusters,
  "attention": attention,
  "masks": masks,
  "overlap": overlap,
  "pca": pca,
  "reconstruct": reconstruct,
  "rollout": rollout,
  "tokens": tokens,
  "token_clusters": token_clusters,
  "compare": compare,
} | {
  f"masked_{percent}": functools.partial(masked, percent / 100)
  for percent in range(10, 100, 10)
}


def get_config(arg: str = "knn") -> ml_collections.ConfigDict:
  """One of NAMES."""
  return common.choose(NAMES, arg)()
