"""Meaning, unit and direction of every metric of metrics.jsonl.

The table of docs/training.md is `markdown()`, and so are the tooltips of
report.html. A new metric of a method or an evaluation needs one line here.
"""

import dataclasses
import re

PHASES = ("train/", "epoch/")  # means over log_steps, and over the epoch


@dataclasses.dataclass(frozen=True)
class Metric:
  """What a metric means.

  Attributes:
    meaning: a phrase, plain text with `code`.
    unit: "%", "nats", "0-1" and the like; "" = none.
    better: "higher", "lower" or "" where neither is better.
  """

  meaning: str
  unit: str = ""
  better: str = ""

  @property
  def tooltip(self) -> str:
    """The meaning with unit and direction, as one line of plain text."""
    text = self.meaning.replace("`", "")
    if self.unit:
      text += f" [{self.unit}]"
    return text + (f"; {self.better} is better" if self.better else "")


METRICS = {
  "loss": Metric("the minimised loss", better="lower"),
  "cls": Metric("AttMask: the class-token term of the loss, weighted"),
  "patch": Metric("AttMask: the patch term of the loss, weighted"),
  "agreement": Metric(
    "AttMask: share of images for which teacher and student have the same "
    "most probable prototype; 1 also after a collapse",
    "0-1",
  ),
  "teacher_entropy": Metric(
    "AttMask: entropy of the teacher's class distribution; "
    "log(`method.out_dim`) is a uniform teacher, which carries no information",
    "nats",
  ),
  "center_norm": Metric("AttMask: length of the class centre"),
  "mask_ratio": Metric("share of masked patches", "0-1"),
  "masked_share": Metric("AttMask: share of views with a mask", "0-1"),
  "seen": Metric(
    "ExtreMA: share of patches that the subsets cover together", "0-1"
  ),
  "target_std": Metric(
    "ExtreMA: standard deviation of the unit target vectors over the batch, "
    "near 0 after a collapse"
  ),
  "acc": Metric(
    "classifiers: accuracy on the augmented training images", "0-1", "higher"
  ),
  "grad_norm": Metric("global norm of the gradient before clipping"),
  "lr": Metric("learning rate"),
  "wd": Metric("weight decay"),
  "momentum": Metric("momentum of the teacher", "0-1"),
  "frozen": Metric("1 while the prototype layer is frozen"),
  "mix_lam": Metric(
    "classifiers: share of the image itself in a mixed target", "0-1"
  ),
  "teacher_temp": Metric("AttMask: temperature of the teacher's class tokens"),
  "teacher_patch_temp": Metric("AttMask: temperature of the teacher's patches"),
  "n_mask": Metric("AttMask: masked patches per view", "patches"),
  "n_show": Metric("AttMask: revealed hints per view", "patches"),
  "img_per_s": Metric(
    "training images per second, without evaluations and saves",
    "images/s",
    "higher",
  ),
  "data_wait": Metric(
    "share of the time spent waiting for data", "0-1", "lower"
  ),
  "nmi": Metric(
    "AttMask: normalised mutual information of the teacher's prototypes and "
    "the labels over an epoch; also grows with the number of prototypes in use",
    "0-1",
    "higher",
  ),
  "ari": Metric(
    "AttMask: adjusted Rand index of the teacher's prototypes and the labels "
    "over an epoch, 0 by chance",
    "-0.5 to 1",
    "higher",
  ),
  "fscore": Metric(
    "AttMask: Fowlkes-Mallows index of the teacher's prototypes and the labels "
    "over an epoch",
    "0-1",
    "higher",
  ),
  "knn/top1": Metric(
    "accuracy of weighted k-NN on the teacher's features (the student's for a "
    "method without teacher), with the first K of `evals.knn_ks`",
    "%",
    "higher",
  ),
  "knn/top5": Metric(
    "as `knn/top1`, the class being among the five best", "%", "higher"
  ),
  "knn/kK/top1": Metric("`knn/top1` with K neighbours", "%", "higher"),
  "knn/kK/top5": Metric("`knn/top5` with K neighbours", "%", "higher"),
  "knn/chance": Metric(
    "accuracy of the best answer that ignores the image: share of the largest "
    "class among the queries; logged once, at step 0",
    "%",
  ),
  "knn/queries": Metric(
    "validation images that are classified; logged once, at step 0", "images"
  ),
  "knn/teacher": Metric(
    "1 if k-NN measures the teacher, 0 if the student; logged once, at step 0"
  ),
  "label_free/rankme": Metric(
    "RankMe: effective rank of the features of `label_free/images` images, "
    "from 1 (all alike) to the smaller of images and feature width",
    better="higher",
  ),
  "label_free/alignment": Metric(
    "mean squared distance of two views of an image, as unit vectors; 0 also "
    "after a collapse",
    "0-4",
    "lower",
  ),
  "label_free/uniformity": Metric(
    "log of the mean of exp(-2 d²) over the distances d of all pairs of "
    "images, as unit vectors; 0 = all alike, about -4 = spread evenly",
    better="lower",
  ),
  "label_free/retrieval": Metric(
    "share of images whose first view is nearest to its own second view among "
    "those of all images; chance is 100 / images",
    "%",
    "higher",
  ),
  "label_free/prototypes_used": Metric(
    "AttMask: prototypes that are the most probable one of an image, at most "
    "the smaller of images and `method.out_dim`",
    "prototypes",
  ),
  "label_free/prototypes_effective": Metric(
    "AttMask: as many prototypes in equal use have the entropy of these "
    "prototypes' shares of the images",
    "prototypes",
  ),
  "label_free/images": Metric(
    "images that are compared without labels; logged once, at step 0", "images"
  ),
  "overlap/POLICY": Metric(
    "share of the policy's mask that lies on the object (data sets with object "
    "masks); `overlap/random` is that of a random mask",
    "0-1",
    "higher",
  ),
  "overlap/object": Metric("share of the image that the object covers", "0-1"),
  "val/top1": Metric(
    "accuracy of a linear probe or fine-tuned network on the validation "
    "images, of the best layer if there are several",
    "%",
    "higher",
  ),
  "val/top5": Metric(
    "as `val/top1`, the class being among the five best", "%", "higher"
  ),
  "val/loss": Metric("cross-entropy of the validation images", "nats", "lower"),
  "val/J/top1": Metric("`val/top1` of linear layer J", "%", "higher"),
  "val/J/top5": Metric("`val/top5` of linear layer J", "%", "higher"),
  "val/J/loss": Metric("`val/loss` of linear layer J", "nats", "lower"),
  "ema/top1": Metric(
    "`val/top1` of the moving average of the weights", "%", "higher"
  ),
  "ema/top5": Metric(
    "`val/top5` of the moving average of the weights", "%", "higher"
  ),
  "ema/loss": Metric(
    "`val/loss` of the moving average of the weights", "nats", "lower"
  ),
}
# Names with a part that varies: pattern, replacement.
_FAMILIES = (
  (r"^knn/k\d+/", "knn/kK/"),
  (r"^val/\d+/", "val/J/"),
  (r"^overlap/(?!object$).+", "overlap/POLICY"),
)


def key(name: str) -> str:
  """The key of METRICS for a logged name: "train/loss" -> "loss"."""
  for phase in PHASES:
    name = name.removeprefix(phase)
  for pattern, replacement in _FAMILIES:
    name = re.sub(pattern, replacement, name)
  return name


def find(name: str) -> Metric | None:
  """The metric of a logged name, such as "knn/k20/top1"; None if unknown."""
  return METRICS.get(key(name))


def markdown() -> str:
  """The table of docs/training.md."""
  rows = [("metric", "meaning", "unit", "better"), ("---",) * 4]
  rows += [
    (f"`{name}`", m.meaning, m.unit, m.better) for name, m in METRICS.items()
  ]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


if __name__ == "__main__":
  print(markdown(), end="")
