"""Every config key of a pretraining run, with its default and meaning.

Recipes start from `attmask()` and change what differs. Sections:
`method`, `data` and `optim` decide the result; `evals` what is measured on the
way; `run` how it is computed, and changes results by rounding at most.
"""

from typing import Any

import ml_collections


def choose(options: dict[str, Any], arg: str) -> Any:
  """The option that a recipe's argument names.

  Raises:
    ValueError: there is no such option; the message names all.
  """
  if arg not in options:
    raise ValueError(
      f'unknown config argument "{arg}": use one of {", ".join(options)}'
    )
  return options[arg]


def attmask() -> ml_collections.ConfigDict:
  """AttMask-High on ViT-S/16 as published for 100 epochs, but for the data."""
  config = ml_collections.ConfigDict()
  config.init_from = ""  # weights to start from, see docs/pytorch.md
  config.init_epoch = True  # go on after their epoch: whole AttMask runs alone
  config.init_resample = False  # give their positions the size of our images
  config.num_heads = 0  # of attention, where a weight file is of no known size
  config.allow_missing = ""  # A,B: tensors of a weight file, or how they begin
  config.method = method()
  config.data = data()
  config.optim = optim()
  config.evals = evals()
  config.run = run()
  return config


def method() -> ml_collections.ConfigDict:
  """AttMask, iBOT and DINO."""
  return ml_collections.ConfigDict(
    dict(
      name="attmask",
      variant="small",  # tiny | small | base | large | WIDTHxDEPTHxHEADS
      patch_size=16,  # pixels
      dtype="float32",  # of matrix products: float32 | bfloat16
      drop_path=0.1,  # stochastic depth of the student's last block
      # attmask_high | attmask_hint | attmask_low | random | block | none
      mask="attmask_high",
      mask_ratio=(0.3,),  # one ratio, or several to choose from per draw
      mask_ratio_var=(0.2,),  # uniform jitter, +-; one value or one per ratio
      mask_prob=0.5,  # a view is masked at all (attmask_* only)
      show_max=0.1,  # hints come from this share of most attended patches
      mask_start_epoch=0,  # no masks before
      mask_input=True,  # False: the student sees everything
      shared_head=True,  # one prototype layer for class and patch tokens
      shared_head_teacher=True,
      out_dim=8192,  # prototypes of the class token
      patch_out_dim=8192,  # of patches, where the heads are separate
      head_hidden=2048,
      head_bottleneck=256,
      head_act="gelu",  # gelu | relu
      head_norm="none",  # none | ln
      norm_last_layer=False,  # keep the student's prototype gains at 1
      cls_weight=1.0,
      patch_weight=1.0,  # 0 leaves the patch loss out
      student_temp=0.1,
      teacher_temp=(0.04, 0.07),  # at the start, after warm-up
      teacher_patch_temp=(0.04, 0.07),
      temp_warmup_epochs=30,
      center_momentum=0.9,
      seed=0,  # of weights, masks and stochastic depth
    )
  )


def data() -> ml_collections.ConfigDict:
  """Images, order and augmentation."""
  return ml_collections.ConfigDict(
    dict(
      # shapes | folder | flat | segmented | flowers | cifar10 | cifar100, or
      # one of tensorflow-datasets as tfds:NAME
      source="folder",
      path="",  # see docs/data.md
      subset=0,  # training images per class, 0 = all
      batch_size=240,  # over all devices
      image_size=224,  # global crops and evaluation, pixels
      global_crops=2,
      global_scale=(0.25, 1.0),  # share of the image's area
      local_size=96,
      local_crops=10,
      local_scale=(0.05, 0.25),
      jitter=0.8,  # probability of colour jitter
      grey=0.2,  # probability of a grey crop
      blur_radius=2.0,  # largest, in pixels; as published for 224 px
      eval_resample="bicubic",  # bicubic | bilinear, of evaluation crops
      max_broken=0.01,  # a larger share of unreadable files stops the run
      shapes_train=4000,  # images of source "shapes"
      shapes_val=800,
      seed=0,  # of order, augmentation and "shapes"
    )
  )


def optim() -> ml_collections.ConfigDict:
  """Optimiser and schedules."""
  return ml_collections.ConfigDict(
    dict(
      # adamw | sgd | lars | lars_mae (MAE-priv's, see configs/supervised.py)
      optimizer="adamw",
      epochs=100,
      lr_per_256=5e-4,  # peak, for a batch of 256; scaled linearly
      min_lr=1e-6,  # at the end, not scaled
      warmup_epochs=10,
      # cosine, smooth_cosine (per step) | epoch_cosine, late_epoch_cosine: see
      # rates.py
      schedule="cosine",
      warmup_lr=0.0,  # start of late_epoch_cosine, not scaled
      weight_decay=(0.04, 0.4),  # cosine from, to
      teacher_momentum=0.996,  # cosine from here
      teacher_momentum_end=1.0,  # to here
      clip=3.0,  # gradient norm limit, 0 = none
      clip_by="tensor",  # tensor | global
      freeze_epochs=1,  # the prototype layer holds
      betas=(0.9, 0.999),  # adamw
      eps=1e-8,  # adamw
      sgd_momentum=0.9,  # sgd, lars, lars_mae
      nesterov=False,  # sgd, lars, lars_mae
    )
  )


def evals() -> ml_collections.ConfigDict:
  """What is measured on the teacher during the run."""
  return ml_collections.ConfigDict(
    dict(
      knn=True,  # needs labels
      eval_epochs=20,  # k-NN period; also before the first step and at the end
      knn_ks=(10, 20, 100, 200),  # knn/top1 is that of the first
      knn_temp=0.0,  # 0 = the method's: AttMask the teacher's, others 0.07
      knn_bank=0,  # training images in the bank, 0 = all
      knn_queries=0,  # validation images, 0 = all
      last_blocks=1,  # class tokens of that many last blocks
      pool="cls",  # cls | mean | cls+mean: class token, mean patch, both
      final_norm=True,  # features behind the final norm
      batch_size=256,
      mask_images=8,  # rows of figures/masks.png, 0 = no picture
      overlap_images=200,  # images for overlap/*, where objects are known
    )
  )


def run() -> ml_collections.ConfigDict:
  """How it is computed and logged."""
  return ml_collections.ConfigDict(
    dict(
      fsdp=1,  # devices that share one copy of large parameters
      accumulate=1,  # micro-batches per step
      scan=True,  # one compiled block for all layers
      remat="none",  # none | full | dots: recompute in the backward pass
      attention="auto",  # auto | xla | cudnn
      patch_loss_chunks=1,  # parts of the patch loss, to save memory
      matmul_precision="highest",  # of float32 products: see jax.lax.Precision
      compilation_cache="",  # folder that keeps compiled programs
      distributed=False,  # call jax.distributed.initialize()
      threads=0,  # for decoding, 0 = one per core
      prefetch=4,  # batches prepared ahead
      log_steps=10,
      save_steps=0,  # besides every epoch's end, 0 = none
      keep_steps=0,  # keep checkpoints at multiples of this for good
      tensorboard=True,
      wandb=dict(project="", name=""),  # empty project = off
    )
  )


def evaluation(name: str, **settings: object) -> ml_collections.ConfigDict:
  """What all evaluations have, see configs/evals.py."""
  config = ml_collections.ConfigDict()
  config.weights = ""  # run directory, checkpoint, .pth or .safetensors
  # teacher | student | untrained; "" = teacher, of a fine-tuning the student.
  # reconstruct and finetune_extrema take the student.
  config.network = ""
  config.num_heads = 0  # of attention, where a weight file is of no known size
  config.allow_missing = ""  # A,B: tensors of a weight file, or how they begin
  # Of a linear probe: masked, backgrounds, tokens, rollout with
  # evals.explain=class, and export.
  config.probe = ""
  config.evals = dict(name=name, batch_size=256, **settings)
  config.data = dict(
    source="",  # "" = those of the weights' own run
    path="",
    subset=-1,  # training images per class; -1 = as in the run, 0 = all
    image_size=0,  # pixels; 0 = as in the run
    eval_resample="",  # bicubic | bilinear; "" = as in the run
    seed=-1,  # of order, augmentation and "shapes"; -1 = as in the run
    shapes_train=0,  # images of source "shapes"; 0 = as in the run
    shapes_val=0,
    max_broken=0.01,
  )
  config.run = run()
  return config
