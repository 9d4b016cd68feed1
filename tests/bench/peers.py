"""One training step of the PyTorch releases, in float32 on a CPU.

They need torch, torchvision, timm and munkres, and a checkout of each release:
github.com/gkakogeorgiou/attmask, github.com/facebookresearch/mae.
"""

import os
import sys
from collections.abc import Callable

import numpy as np
import torch

try:
  import torchvision  # noqa: F401
except RuntimeError:  # a build for GPUs, which lacks these on other machines
  LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
  for _name in ("nms", "qnms"):
    LIBRARY.define(
      f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )

PROTOTYPES = 8192
LOCAL_CROPS = 10


def attmask(folder: str, batch: int) -> Callable[[], None]:
  """AttMask-High of a ViT-S/16 with 2 global and 10 local crops.

  The loop's body in main_attmask.py: without its logging, and in one process,
  so without wrappers for several.
  """
  sys.path[:0] = [folder]
  import main_attmask
  import models
  import utils
  from attmask import AttMask
  from models.head import iBOTHead

  torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
  )

  def network(masked: bool, drop_path: float) -> torch.nn.Module:
    backbone = models.vit_small(
      16,
      drop_path_rate=drop_path,
      return_all_tokens=True,
      masked_im_modeling=masked,
    )
    head = iBOTHead(
      backbone.embed_dim,
      PROTOTYPES,
      patch_out_dim=PROTOTYPES,
      norm_last_layer=False,
      shared_head=True,
    )
    return utils.MultiCropWrapper(backbone, head)

  student, teacher = network(True, 0.1), network(False, 0.0)
  teacher.load_state_dict(student.state_dict(), strict=False)
  teacher.requires_grad_(False)
  optimizer = torch.optim.AdamW(utils.get_params_groups(student), lr=1e-4)
  loss_of = main_attmask.iBOTLoss(
    PROTOTYPES, PROTOTYPES, 2, LOCAL_CROPS, 0.04, 0.07, 0.04, 0.07, 30, 100
  )
  images = [torch.randn(batch, 3, 224, 224) for _ in range(2)]
  local = [torch.randn(batch, 3, 96, 96) for _ in range(LOCAL_CROPS)]

  def step() -> None:
    target, weights = teacher(images, return_attention=True)
    rows = weights[:, :, 0, 1:].mean(1).detach().clone()
    masks = AttMask(rows, 0.5, "attmask_high", 0.3, 0.0, 0.1)
    masks = [m.reshape(-1, 14, 14) for m in masks.chunk(2)]
    output = student(images, mask=masks)
    student.backbone.masked_im_modeling = False
    local_output = student(local)[0]
    student.backbone.masked_im_modeling = True
    loss = loss_of(output, target, local_output, masks, 0)["loss"]
    optimizer.zero_grad()
    loss.backward()
    utils.clip_gradients(student, 3.0)
    utils.cancel_gradients_last_layer(0, student, 1)
    optimizer.step()
    with torch.no_grad():
      current = dict(student.named_parameters())
      for name, p in teacher.named_parameters():
        p.mul_(0.996).add_(current[name].detach(), alpha=0.004)

  return step


def mae(folder: str, batch: int) -> Callable[[], None]:
  """MAE of a ViT-B/16 at 224 px with 75 % masks."""
  sys.path[:0] = [folder]
  from timm.models import vision_transformer

  # The release is for NumPy with `float` and for timm with `qk_scale`.
  np.float = float
  block = vision_transformer.Block
  vision_transformer.Block = lambda *args, qk_scale, **kwargs: block(
    *args, **kwargs
  )
  import models_mae

  model = models_mae.mae_vit_base_patch16(norm_pix_loss=True)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
  )
  images = torch.randn(batch, 3, 224, 224)

  def step() -> None:
    loss, _, _ = model(images, mask_ratio=0.75)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  return step


torch.set_num_threads(len(os.sched_getaffinity(0)))
STEPS = {"attmask": attmask, "mae": mae}
