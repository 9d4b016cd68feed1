"""Keys of images and batches, but for those of the augmentation."""

import dataclasses

from attmask_jax import schema
from attmask_jax.augment import TRANSFORMS
from attmask_jax.augment.transforms import RESAMPLE
from attmask_jax.data.decoding import Reading

PIPELINES = ("host", "device")


@dataclasses.dataclass(frozen=True)
class SourceKeys:
  """Images of a training run, see docs/data.md."""

  source: str = schema.key(
    "folder",
    "objects, shapes, folder, flat, segmented, flowers, cifar10, cifar100, or "
    "one of tensorflow-datasets as tfds:NAME",
  )
  path: str = schema.key("", "folder of the data set")
  extensions: str = schema.inherit(Reading, "extensions", Reading.extensions)
  white: float = schema.inherit(Reading, "white", Reading.white)
  max_pixels: int = schema.inherit(Reading, "max_pixels", Reading.max_pixels)
  subset: int = schema.key(0, "training images per class, 0 = all", low=0)
  eval_resample: str = schema.key(
    "bicubic", "filter of evaluation crops", choices=tuple(RESAMPLE)
  )
  shapes_train: int = schema.key(
    4000, "training images of the generated sources", low=1
  )
  shapes_val: int = schema.key(
    800, "validation images of the generated sources", low=1
  )
  seed: int = schema.key(0, "of order, crops and generated images", low=0)


@dataclasses.dataclass(frozen=True)
class OpenKeys:
  """Images of an evaluation; each default stands for "as in the run".

  That is the run that trained the weights; where it is not known, as of weight
  files, the defaults of `SourceKeys` hold.
  """

  source: str = schema.key("", 'see above; "" = as in the run')
  path: str = schema.key("", 'folder of the data set; "" = as in the run')
  extensions: str = schema.key(
    "", 'A,B: more endings of image files; "" = as in the run'
  )
  white: float = schema.key(
    0.0, "value that is white in deep images; 0 = as in the run", low=0
  )
  max_pixels: int = schema.key(
    0, "of a picture that can be read; 0 = as in the run", low=0
  )
  subset: int = schema.key(
    -1, "training images per class; -1 = as in the run, 0 = all", low=-1
  )
  image_size: int = schema.key(
    0, "side of the images, pixels; 0 = as in the run", low=0
  )
  eval_resample: str = schema.key(
    "",
    'filter of evaluation crops; "" = as in the run',
    choices=("", *RESAMPLE),
  )
  seed: int = schema.key(
    -1,
    "of order, crops and generated images; -1 = as in the run",
    low=-1,
  )
  shapes_train: int = schema.key(
    0, "training images of the generated sources; 0 = as in the run", low=0
  )
  shapes_val: int = schema.key(
    0, "validation images of the generated sources; 0 = as in the run", low=0
  )


@dataclasses.dataclass(frozen=True)
class ReadKeys:
  """How images are read."""

  max_broken: float = schema.key(
    0.01, "a larger share of unreadable files stops the run", low=0, high=1
  )


@dataclasses.dataclass(frozen=True)
class LoadKeys:
  """How images are loaded."""

  threads: int = schema.key(
    0, "that decode and augment, 0 = one per core", low=0
  )
  prefetch: int = schema.key(4, "batches prepared ahead", low=1)


@dataclasses.dataclass(frozen=True)
class BatchKeys:
  """Training batches."""

  batch_size: int = schema.key(240, "images over all devices", low=1)
  transform: str = schema.key(
    "multi_crop",
    "augmentation, one that the method can train on",
    choices=tuple(TRANSFORMS),
  )
  pipeline: str = schema.key(
    "host",
    "where crops and colours are made: host = with Pillow, device = inside the "
    "train step, from images that the host has decoded",
    choices=PIPELINES,
  )
  canvas_size: int = schema.key(
    512,
    "side of the decoded images of the device pipeline, pixels; larger ones "
    "are reduced to it",
    low=1,
  )


@dataclasses.dataclass(frozen=True)
class RepeatKeys:
  """Supervised training."""

  repeats: int = schema.key(1, "copies of an image per epoch, in a row", low=1)
