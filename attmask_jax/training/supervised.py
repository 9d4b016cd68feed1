"""Configs of linear probes and fine-tuning on pretrained weights.

Both use the training loop of pretraining with the method `classify`.
"""

import copy

import ml_collections

from attmask_jax import Params, data
from attmask_jax.weights import classifier, loading

MAX_GROUP = 150  # largest mixup group, in images


def complete(
  config: ml_collections.ConfigDict, source: loading.Weights
) -> ml_collections.ConfigDict:
  """Completes a training config with the architecture of the weights.

  Args:
    config: of an evaluation with a section `method`, data complete.
    source: pretrained weights.
  """
  config = copy.deepcopy(config).unlock()
  pretrained, backbone = source.config.method, source.method.backbone
  classes = data.build(config.data, "train").class_names
  config.method.update(
    variant=pretrained.variant,
    patch_size=pretrained.patch_size,
    position_size=backbone.image_size,
    num_classes=len(classes),
    dtype=config.method.dtype or pretrained.dtype,
    class_token=config.method.class_token or backbone.class_token,
    positions=config.method.positions or backbone.positions,
    grid_offset=backbone.grid_offset,
    mlp_ratio=backbone.mlp_ratio,
    key_bias=backbone.key_bias,
    readout_layers=backbone.readout_layers,
  )
  mixes = config.method.mixup or config.method.cutmix
  if mixes and not config.data.mixup_group:
    config.data.mixup_group = mixup_group(config.data.batch_size)
  config.digest = source.digest
  return config


def mixup_group(batch_size: int) -> int:
  """Size of mixup groups: the largest even divisor of the batch up to 150.

  The releases pair the images of a device: 150 of AttMask's 900, 128 of MAE's
  1024. Ours does not depend on the devices: a run could not continue on another
  number of them.
  """
  groups = range(2, min(batch_size, MAX_GROUP) + 1, 2)
  return max((g for g in groups if batch_size % g == 0), default=batch_size)


def start_values(
  config: ml_collections.ConfigDict, source: loading.Weights
) -> dict[str, Params]:
  """Pretrained parameters that replace initial ones, for `train.train`.

  Args:
    config: see `complete`.
    source: pretrained weights.
  """
  backbone = {"backbone": classifier.pretrained_backbone(source, config.method)}
  if config.method.frozen:
    return {"aux": backbone}
  if config.method.ema:
    return {"params": backbone, "teacher": backbone}
  return {"params": backbone}
