"""Self-supervised pretraining of Vision Transformers by masked image modelling.

Notation, used in every docstring and variable name of the package:

  B  images in a batch (the global batch, unless a comment says otherwise)
  V  views (crops) of an image; G global views, V - G local ones
  R  rows of a flattened batch, image-major: R = B * V or B * G
  H, W  image height and width in pixels; P patch side in pixels
  N  patches of an image;  L tokens: N, or N + 1 with the class token first
  M  patches kept, or an upper bound on patches hidden, where a shape must be
     static;  T subsets of kept patches of an image
  D  token width;  A attention heads
  E  width of a head's embedding: bottleneck of a projection head, output of a
     projector
  K  prototypes of a head, the width of its logits
  C  classes;  J linear layers trained side by side;  F features that they read
  S  optimiser steps per epoch

`mask` is True where a patch is hidden from the student; `rank` 0 is the
largest score. `params` is what is trained, `teacher` its moving average, `aux`
other state, such as running centres. Scalars that change per step
(temperatures, counts, rates) are computed on the host in float64 and enter
compiled code as traced arguments, so no new value ever compiles a new program.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a wrong flag is answered without them
  import jax
  import ml_collections

  from attmask_jax.weights.loading import Weights

__version__ = "0.2.0"

Params = Any  # a nested dict of arrays
Batch = dict[str, "jax.Array"]


def load(
  path: str,
  network: str = "",
  *,
  num_heads: int = 0,
  allow_missing: str = "",
  tensor_prefix: str = "",
) -> "Weights":
  """Loads trained weights onto one device.

    w = attmask_jax.load("runs/tiny", network="teacher")
    cls, patches = w.features(images)  # [B, D], [B, N, D]
    attention = w.attention(images)  # [B, A, N]

  Args:
    path: a run directory (its newest checkpoint), a checkpoint of one, a .pth
      or a .safetensors file.
    network: "teacher", "student" or "untrained"; "" = the student of a
      fine-tuned network, else the teacher.
    num_heads: attention heads of a file, 0 = by convention.
    allow_missing: "A,B": names of a file's tensors, or prefixes of names, that
      may be missing.
    tensor_prefix: prefix of the network's tensors in a file with several
      networks.

  Raises:
    InputError: see `weights.loading.load`.
  """
  import jax

  from attmask_jax import mesh
  from attmask_jax.weights import loading

  return loading.load(
    path,
    network=network,
    mesh=mesh.make_mesh(devices=jax.local_devices()[:1]),
    num_heads=num_heads,
    allow_missing=allow_missing,
    tensor_prefix=tensor_prefix,
  )


def get_config(name: str) -> "ml_collections.ConfigDict":
  """Loads a config of configs/, for `train.train` and `evaluate.evaluate`.

    config = attmask_jax.get_config("tiny:mae")
    config.data.batch_size = 32
    train.train(config, "runs/tiny")

  Args:
    name: NAME or path of a config file, an argument for it after a colon.

  Raises:
    InputError: there is no such config.
  """
  from attmask_jax import recipes

  return recipes.get(name)
