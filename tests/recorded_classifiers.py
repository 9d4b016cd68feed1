"""Recorded classifiers of MAE-priv as our methods and parameters."""

import numpy as np
import reference

from attmask_jax.augment import mixup
from attmask_jax.methods.classify import Classify
from attmask_jax.models import vit


class Given(Classify):
  """Normalised images and soft targets from the batch, where it has them."""

  def mixed_batch(self, batch, rng, scalars):
    targets = batch.get("targets")
    if targets is None:
      targets = mixup.soft_targets(
        batch["label"], self.num_classes, smoothing=self.smoothing
      )
    return batch["images"][:, 0], targets


def weights_of(tensors, *, fixed):
  """A recorded classifier: backbone and head, our layout."""
  tree = reference.tree(
    {k: v for k, v in tensors.items() if "running" not in k and "num" not in k}
  )
  head = {k: v[None] for k, v in tree.pop("head").items()}
  if "fc_norm" in tree:
    head["norm"] = tree.pop("fc_norm")
  if fixed:
    tree.pop("pos_embed", None)
  # Downstream nothing uses the encoder's final norm; ours keeps it, untouched.
  width = tree["patch_embed"]["bias"].shape
  tree.setdefault("norm", {"scale": np.ones(width), "bias": np.zeros(width)})
  return {"backbone": tree, "head": head}


def under(file, prefix):
  return {k[len(prefix) :]: file[k] for k in file if k.startswith(prefix)}


def mae_method(file, cls_token=False, **changes):
  cfg = lambda name: file[f"cfg/{name}"].item()
  backbone = vit.ViT(
    cfg("dim"), cfg("depth"), cfg("heads"), cfg("patch"), cfg("img"),
    class_token="input" if cls_token else "none", positions="yx",
    key_bias=False,
  )  # fmt: skip
  fields = dict(
    num_classes=cfg("ncls"), epochs=3, steps_per_epoch=1,
    image_size=cfg("img"), batch_size=4, final_norm=False, frozen=False,
    pool="cls" if cls_token else "mean", decay_tokens=False,
  )  # fmt: skip
  return Given(backbone, **fields | changes)
