"""Pretraining on a folder of your own pictures, with settings chosen for them.

Paper:     arXiv:2203.12719 (AttMask-High); the choices are ours.
Command:   python main.py --config=configs/own_images.py:/data/mine \\
               --workdir=runs/mine
Data:      the argument is a folder of 30 to 30,000 pictures of any size:
             train/CLASS/ and val/CLASS/   k-NN is measured during training
             train/CLASS/ alone            no k-NN
             anything else                 every picture in it, without labels
Hardware:  a GPU or TPU if there is one (about 20,000 steps), else a CPU (about
           1,000). Hours: not measured.
Expected:  with labels, knn/top1 above its value before the first step. Few
           pictures teach little: thousands are better than hundreds.

The number of pictures, the median of their shorter sides and the machine
determine the size of crops, the network, batch, epochs, momentum and
prototypes. What was chosen is printed with the reason; any key can be set on
the command line after the config, such as --config.optim.epochs=50. A choice
does not follow another key that is set, but for warm-ups, which are shares of
the run.
"""

import importlib.metadata
import importlib.util
import math
import os
import pathlib
import statistics
from typing import Any, NamedTuple

import jax
import ml_collections
from PIL import Image

from attmask_jax.data import files
from attmask_jax.errors import InputError
from attmask_jax.training import setup
from configs import attmask_vits16

LEAST_IMAGES = 16
SAMPLE = 500  # files whose size is read
# Side of the global crops: patch size, side of the local crops.
SIZES = {32: (4, 16), 64: (8, 32), 128: (16, 64), 224: (16, 96)}
# For networks narrower than those whose initialisation is published.
NARROW = {"method.init": "xavier"}
DEVICES = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


class Pictures(NamedTuple):
  """What a folder holds.

  Attributes:
    source: "folder" or "flat", see docs/data.md.
    path: for this source.
    labelled: whether there are validation images with the same classes.
    count: training images.
    side: median of their shorter sides, in pixels.
  """

  source: str
  path: str
  labelled: bool
  count: int
  side: int


class Choice(NamedTuple):
  """Values of config keys and the reason for them."""

  values: dict[str, Any]
  why: str


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for the pictures in a folder; prints what was chosen.

  Args:
    arg: the folder.

  Raises:
    InputError: there is no such folder, or it holds too few images.
  """
  if not arg:
    raise InputError(
      "own_images needs a folder of pictures, as in "
      "--config=own_images:/data/mine"
    )
  pictures = measure(arg)
  config = setup.default_config()
  config.method.update(attmask_vits16.HIGH)
  # Both are shares of the run, so that they follow its length.
  config.method.update(temp_warmup_epochs=0, temp_warmup_share=0.3)
  config.optim.update(warmup_epochs=0, warmup_share=0.1)
  choices = choose(pictures, accelerated=accelerated())
  for choice in choices:
    config.update_from_flattened_dict(choice.values)
  print(description(pictures, choices), flush=True)
  return config


def measure(folder: str) -> Pictures:
  """Counts and measures the pictures of a folder.

  Raises:
    InputError: see `get_config`.
  """
  path = pathlib.Path(folder).expanduser()
  if not path.is_dir():
    raise InputError(f"{path} is not an existing folder: give one of pictures")
  source, root = "flat", path
  if (path / "train").is_dir():
    root = path / "train"
    if files.class_folders(str(root)):
      source = "folder"
  names = files.scan(str(root))
  if len(names) < LEAST_IMAGES:
    raise InputError(
      f"{root} holds {len(names)} images: at least {LEAST_IMAGES} are needed"
    )
  sides = []
  for name in names[:: -(-len(names) // SAMPLE)]:
    try:
      with Image.open(root / name) as image:  # the header alone
        sides.append(min(image.size))
    except (OSError, ValueError, Image.DecompressionBombError):
      continue  # training says which files are broken
  labelled = source == "folder" and any(
    (path / split).is_dir() for split in ("val", "test")
  )
  if not sides:
    raise InputError(f"no picture in {root} can be opened: give another folder")
  given = path if source == "folder" else root
  side = int(statistics.median(sides))
  return Pictures(source, str(given), labelled, len(names), side)


def accelerated() -> bool:
  """Whether JAX will find a GPU or TPU.

  It is not asked: that would start its devices, and a cluster must be joined
  before (run.distributed).
  """
  if (jax.config.jax_platforms or "").startswith("cpu"):
    return False
  plugins = importlib.metadata.entry_points(group="jax_plugins")
  if not plugins and not importlib.util.find_spec("libtpu"):
    return False
  return any(os.path.exists(name) for name in DEVICES)


def choose(pictures: Pictures, *, accelerated: bool) -> list[Choice]:
  """Settings for these pictures on this machine."""
  n, where = pictures.count, "an accelerator" if accelerated else "a CPU"
  size = _size(pictures.side, 224 if accelerated else 64)
  # A quarter of the pictures, so that an epoch has four steps or more.
  most = (128 if size == 224 else 256) if accelerated else 64
  batch = min(max(_power(n // 4), 8), most)
  per_epoch = n // batch
  steps, least = (20_000, 10) if accelerated else (1_000, 3)
  epochs = min(max(round(steps / per_epoch), least), 300)
  total = epochs * per_epoch
  network = ("small" if n >= 10_000 else "tiny") if accelerated else "128x4x4"
  rate = (5e-4 if accelerated else 1.5e-3) * math.sqrt(256 / batch)
  momentum = round(min(max(1 - 10 / total, 0.96), 0.996), 4)
  prototypes = min(max(_power(n), 128), 4096 if accelerated else 1024)
  return [
    Choice(
      {"data.source": pictures.source, "data.path": pictures.path}
      | _evaluation(pictures, epochs),
      "k-NN on the validation images"
      if pictures.labelled
      else "no validation images with labels, so no k-NN",
    ),
    _crops(pictures, size, accelerated=accelerated),
    Choice(
      {"method.variant": network, "run.scan": accelerated}
      | ({"method.dtype": "bfloat16"} if accelerated else NARROW),
      f"{n:,} pictures on {where}",
    ),
    Choice(
      {"data.batch_size": batch},
      f"a quarter of the pictures, at most {most} on {where}",
    ),
    Choice(
      {"optim.epochs": epochs, "optim.freeze_epochs": int(epochs >= 20)},
      f"{total:,} steps of {per_epoch} per epoch: about {steps:,} on {where}, "
      f"but {least} to 300 epochs",
    ),
    Choice(
      {"optim.lr_per_256": float(f"{rate:.2g}")},
      "grows with the root of the batch: small batches need more",
    ),
    Choice(
      {"optim.teacher_momentum": momentum},
      "the teacher averages over a tenth of the run",
    ),
    Choice(
      {"method.out_dim": prototypes} | _temperatures(prototypes),
      "about as many prototypes as pictures",
    ),
  ]


def _crops(pictures: Pictures, size: int, *, accelerated: bool) -> Choice:
  """Sizes of crops and patches."""
  patch, local = SIZES[size]
  why = f"shorter sides are {pictures.side} px at the median"
  if size < _size(pictures.side, 224):
    why += f"; a CPU would be slow above {size} px"
  scales = {}
  if size <= 64:  # a small part of so few pixels has too little in it
    scales = {"data.global_scale": (0.4, 1.0), "data.local_scale": (0.1, 0.4)}
  sizes = {"data.image_size": size, "data.local_size": local}
  sizes |= {"method.patch_size": patch}
  crops = {"data.local_crops": 6 if accelerated else 2}
  return Choice(sizes | crops | scales, why)


def _evaluation(pictures: Pictures, epochs: int) -> dict[str, Any]:
  """What is measured during training, five times."""
  return {
    "evals.knn": pictures.labelled,
    "evals.eval_epochs": max(epochs // 5, 1),
    "evals.knn_ks": (20, 10) if pictures.count >= 200 else (5,),
  }


def _temperatures(prototypes: int) -> dict[str, Any]:
  """Few prototypes need a sharper teacher, or all get the same share."""
  temp = (0.04, 0.04) if prototypes <= 1024 else (0.04, 0.07)
  return {
    "method.teacher_temp": temp,
    "method.teacher_patch_temp": temp,
    "method.head_hidden": 1024,
  }


def _size(side: int, most: int) -> int:
  """The largest crop that does not enlarge most pictures."""
  fits = [size for size in SIZES if size <= min(side, most)]
  return max(fits, default=min(SIZES))


def _power(n: int) -> int:
  """The largest power of two up to n."""
  return 1 << (max(n, 1).bit_length() - 1)


def description(pictures: Pictures, choices: list[Choice]) -> str:
  """What was chosen and why, for people."""
  lines = [f"{pictures.path}: {pictures.count:,} pictures; chosen for them:"]
  for values, why in choices:
    lines.append(f"  {why}:")
    for key, value in values.items():
      text = ",".join(map(str, value)) if isinstance(value, tuple) else value
      lines.append(f"    --config.{key}={text}")
  lines.append("Any of these flags can be given with another value.")
  return "\n".join(lines)
