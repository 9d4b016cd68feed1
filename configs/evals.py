"""Every evaluation by name: what to measure on trained weights, and how.

Command:   python main.py --mode=eval --config=configs/evals.py:NAME \\
               --config.weights=RUN --workdir=DIR
Weights:   a run directory (its newest checkpoint) or a checkpoint inside one;
           --config.network=teacher|student|untrained.
Data:      that of the run of the weights; --config.data.source and
           --config.data.path select another data set.
Writes:    DIR/results.json, DIR/report.html, pictures in DIR/figures/, and a
           record in the run of the weights, whose report.html shows it, too.

Names:     knn             weighted k-NN (knn_mae, knn_mae_cls: as in MAE-priv,
                           on the mean patch or the class token)
           fewshot         k-NN on 1, 5, 10, 20 images per class, five runs
           label_free      rank, alignment, uniformity, retrieval, prototypes
           linear, finetune and their published variants: configs/supervised.py
           masked          a probe's accuracy with patches blacked out, as the
                           attention of the evaluated network selects them
             masked_10, masked_20 ... masked_90
                           the published protocol: one ratio (percent), and a
                           fixed DINO ViT-B/16 that selects the patches for
                           every network; needs its file, see `GUIDE`
           backgrounds     ImageNet-9 backgrounds challenge
           clusters        prototypes compared with labels
           attention       attention maps of images, a folder or a video
           masks           what each mask policy hides
           overlap         attention and masks compared with object masks
           pca             principal components of patch tokens
           reconstruct     reconstructions of a masked autoencoder
           rollout         attention rollout through all blocks, or for a class
           tokens          accuracy of single patch tokens: k-NN, linear
           token_clusters  clusters of patch tokens, as colours
           compare         curves of several runs in one plot

Paper:     arXiv:2203.12719; protocols as in the AttMask release. Published
           numbers for ViT-S/16 on ImageNet are in configs/attmask_vits16.py.
"""

import functools
from collections.abc import Callable

import ml_collections

from attmask_jax import evals
from attmask_jax.training import setup
from configs import common, supervised

# Of https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/, in the
# current directory.
GUIDE = "dino_vitbase16_pretrain.pth"


def _evaluation(name: str) -> ml_collections.ConfigDict:
  return setup.evaluation_config(name, *evals.by_name(name).keys)


def knn() -> ml_collections.ConfigDict:
  """Weighted k-NN, as published: k = 10, 20, 100, 200, temperature 0.07."""
  return _evaluation("knn")


def knn_mae(*, cls: bool = False) -> ml_collections.ConfigDict:
  """k-NN as in MAE-priv: no final norm, bilinear crops.

  Args:
    cls: use class tokens (CLS mode), not mean patches (GAP mode).
  """
  config = knn()
  config.evals.update(pool="cls" if cls else "mean", final_norm=False)
  config.data.eval_resample = "bilinear"
  return config


def fewshot() -> ml_collections.ConfigDict:
  """k-NN on few images per class: mean and spread of five runs each."""
  return _evaluation("fewshot")


def label_free() -> ml_collections.ConfigDict:
  """What the features are like, without labels."""
  return _evaluation("label_free")


def _probed(name: str, **settings: object) -> ml_collections.ConfigDict:
  """Uses the probe config.probe, or trains a short one if it is empty."""
  config = supervised.probe(name, *evals.by_name(name).keys, **settings)
  config.method.last_blocks = 4
  config.method.lrs = (0.005, 0.02, 0.1)  # the best is kept
  config.optim.epochs = 3
  return config


def masked() -> ml_collections.ConfigDict:
  """Masked images: blacked-out patches, selected by the network itself."""
  return _probed("masked")


def masked_imagenet(ratio: float) -> ml_collections.ConfigDict:
  """Masked ImageNet as published: DINO's ViT-B/16 selects the patches.

  The published numbers are the column attmask_high; give the published probe,
  --config.probe=DIR of linear_vits16. --config.evals.guide=FILE says where the
  guide is.
  """
  return _probed("masked", ratios=(ratio,), guide=GUIDE)


def backgrounds() -> ml_collections.ConfigDict:
  """ImageNet-9 backgrounds challenge."""
  return _probed("backgrounds")


def clusters() -> ml_collections.ConfigDict:
  """NMI, ARI, F and Hungarian accuracy of the prototypes."""
  return _evaluation("clusters")


def attention() -> ml_collections.ConfigDict:
  """Attention of the class token, per head and averaged."""
  return _evaluation("attention")


def masks() -> ml_collections.ConfigDict:
  """What each policy hides at these ratios."""
  return _evaluation("masks")


def overlap() -> ml_collections.ConfigDict:
  """Overlap of attention and masks with object masks."""
  return _evaluation("overlap")


def pca() -> ml_collections.ConfigDict:
  """Three principal components of patch tokens as red, green, blue."""
  return _evaluation("pca")


def reconstruct() -> ml_collections.ConfigDict:
  """Reconstructions of a masked autoencoder."""
  config = _evaluation("reconstruct")
  config.network = "student"  # it has the decoder
  return config


def rollout() -> ml_collections.ConfigDict:
  """Attention rollout through all blocks, or gradient rollout of a class."""
  return _probed("rollout")


def tokens() -> ml_collections.ConfigDict:
  """Accuracy of single patch tokens: k-NN and linear probe."""
  config = _probed("tokens")
  config.method.update(last_blocks=1, pool="mean", final_norm=False)
  return config


def token_clusters() -> ml_collections.ConfigDict:
  """Clusters of patch tokens, drawn as colours."""
  return _evaluation("token_clusters")


def compare() -> ml_collections.ConfigDict:
  """Accuracy and loss of several runs over epochs."""
  return _evaluation("compare")


NAMES: dict[str, Callable[[], ml_collections.ConfigDict]] = {
  "knn": knn,
  "knn_mae": knn_mae,
  "knn_mae_cls": functools.partial(knn_mae, cls=True),
  "fewshot": fewshot,
  "label_free": label_free,
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
  f"masked_{percent}": functools.partial(masked_imagenet, percent / 100)
  for percent in range(10, 100, 10)
}


def get_config(arg: str = "knn") -> ml_collections.ConfigDict:
  """The config of one of NAMES."""
  return common.choose(NAMES, arg)()
