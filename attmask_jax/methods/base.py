"""The interface between the training loop and a method.

A method is a frozen dataclass in one file. It defines the initial parameters,
the loss of a batch, and which parameters are frozen or not decayed. Everything
that the loop, the optimiser and the evaluations use is declared here with its
default, so a new method overrides only what differs: see CONTRIBUTING.md.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import ml_collections
import numpy as np

from attmask_jax import Batch, Params
from attmask_jax.models import embedding, vit

Scalars = dict[str, jax.Array]
# (path, leaf) -> factor on the learning rate that broadcasts against the leaf.
LrScale = Callable[[str, jax.Array], Any]


def split_key(seed: int) -> tuple[jax.Array, jax.Array]:
  """Random keys of a run: for the initial values, and for the steps."""
  init, steps = jax.random.split(jax.random.key(seed))
  return init, steps


class InitialState(NamedTuple):
  """State of a method before the first step.

  Attributes:
    params: what the optimiser trains.
    teacher: moving average of `params`, {} for none; each of its leaf paths
      exists in `params`.
    aux: other state that `update_aux` changes, such as running centres; {} for
      none.
  """

  params: Params
  teacher: Params
  aux: Params


class LossOutput(NamedTuple):
  """Result of `Method.loss`.

  Attributes:
    loss: [] float32, differentiated with respect to `params`.
    metrics: name -> [] float32 for the log, including "loss". Plain means over
      images, so that means over micro-batches are means over the batch.
    stats: statistics of the batch for `Method.update_aux`.
    per_image: name -> [B] int32 for `Method.epoch_scores`, with the names of
      `Method.per_image`.
  """

  loss: jax.Array
  metrics: dict[str, jax.Array]
  stats: Params = {}
  per_image: Batch = {}


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
  """Base class of all methods.

  A batch holds label [B], position [B] (row of the global batch; keys every
  random draw), index [B] (of the image in its data set), and the arrays of
  `item_extras` and of the transform `data.transform` (see augment/), with a
  leading B.

  Attributes:
    backbone: the ViT that is evaluated.
  """

  backbone: vit.ViT

  # Dataclasses that declare further keys of the config section `method`.
  config_parts: ClassVar[tuple[type, ...]] = ()
  # The teacher is updated before the forward pass, not after the student.
  teacher_first: ClassVar[bool] = False
  # The loss combines the images of a batch, so run.accumulate would change it.
  batch_coupled: ClassVar[bool] = False
  # Regex of leaves that are frozen for the first `optim.freeze_epochs`.
  frozen_at_start: ClassVar[str | None] = None
  # Regex of leaves of `params` that are never updated.
  untrained: ClassVar[str | None] = None
  # Regex of leaves without weight decay; None = biases and LayerNorm scales.
  undecayed: ClassVar[str | None] = None
  # Factor on the learning rate of each leaf; None = 1 for all.
  lr_scale: ClassVar[LrScale | None] = None
  # Parts of `aux` that trained weights need.
  served_aux: ClassVar[tuple[str, ...]] = ()
  # Names of `LossOutput.per_image`, the input of `epoch_scores`.
  per_image: ClassVar[tuple[str, ...]] = ()
  # Capabilities, and the methods they require:
  classifies: ClassVar[bool] = False  # class logits; evaluated by accuracy
  reconstructs: ClassVar[bool] = False  # `order`, `reconstruct`: see mae.py
  assigns_prototypes: ClassVar[bool] = False  # `assignments(weights, images)`
  # In mask figures, the next most attended patch is masked instead of a
  # revealed hint, so that every image has the same number of masked patches.
  refills_hints: ClassVar[bool] = False

  @classmethod
  @abc.abstractmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Builds the method from the sections method, data, optim and run.

    Raises:
      InputError: values that do not fit together.
    """

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> InitialState:
    """Parameters before the first step."""

  @abc.abstractmethod
  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> LossOutput:
    """Loss of one batch.

    Args:
      params: see `InitialState`.
      teacher: see `InitialState`; no gradient flows into it.
      aux: see `InitialState`.
      batch: see the class.
      rng: key of this step.
      scalars: `at(step)`, traced.
    """

  def at(self, step: int) -> dict[str, np.generic]:
    """Scalars that change per step, a pure function of (seed, step).

    Computed on the host in float64; they enter the compiled step as traced
    arguments.
    """
    return {}

  def item_extras(self, epoch: int, index: int) -> dict[str, np.ndarray]:
    """Arrays that the host draws for one image, such as block-wise masks."""
    return {}

  def update_aux(self, aux: Params, stats: Params) -> Params:
    """Next `aux` from `LossOutput.stats`; called once per optimiser step."""
    return aux

  def epoch_scores(
    self, labels: np.ndarray, per_image: dict[str, np.ndarray]
  ) -> dict[str, float]:
    """Scores of an epoch from `LossOutput.per_image`.

    Args:
      labels: [n] int32 of the images seen, -1 = none.
      per_image: name -> [n] int32.
    """
    return {}

  @property
  def num_patches(self) -> int:
    """N of a training image."""
    return self.backbone.grid**2

  @property
  def picture_mask_ratio(self) -> float:
    """Mask ratio of mask figures, 0-1."""
    return 0.3

  @property
  def picture_show_max(self) -> float:
    """Share of most attended patches that hints in figures come from, 0-1."""
    return 0.1

  @property
  def knn_temp(self) -> float:
    """Temperature of k-NN if `evals.knn_temp` is 0."""
    return 0.07

  def pool_warning(self, pool: str) -> str:
    """One sentence if the method's releases evaluate other tokens, else "".

    Args:
      pool: one of `embedding.POOLS`, of a k-NN, linear probe or fine-tuning.
    """
    return ""

  def features(
    self,
    weights: Params,
    images: jax.Array,
    *,
    last: int = 1,
    norm: bool = True,
  ) -> tuple[jax.Array | None, jax.Array]:
    """Features of whole images, see `embedding.features`.

    Args:
      weights: `params` or `teacher`.
      images: [B, H, W, 3], uint8 or normalised.
      last: number of last blocks to take class tokens from.
      norm: apply the final LayerNorm.

    Returns:
      cls [B, last * D], or None for a network without a class token, and
      patches [B, N, D], float32.
    """
    return embedding.features(
      self.backbone, weights["backbone"], images, last=last, norm=norm
    )

  def attention(self, weights: Params, images: jax.Array) -> jax.Array:
    """Attention of the last block: [B, H, W, 3] -> [B, A, N] float32.

    From the class token to each patch or, without one, the mean over patches.
    """
    return embedding.class_attention(self.backbone, weights["backbone"], images)
