"""What a method is: the contract between the training loop and a method.

A method is a frozen dataclass in one file. It says how parameters start, what
the loss of a batch is, and what must not move or decay. Whatever the loop, the
optimiser and the evaluations ask of a method is declared here with its default,
so a new method overrides what differs and nothing else: see CONTRIBUTING.md.
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
# (path of a leaf, leaf) -> its learning rate over that of the run; broadcasts.
LrScale = Callable[[str, jax.Array], Any]


def split_key(seed: int) -> tuple[jax.Array, jax.Array]:
  """Keys of a run: for the start values, and for the steps."""
  init, steps = jax.random.split(jax.random.key(seed))
  return init, steps


class InitialState(NamedTuple):
  """Three trees of a method before the first step.

  Attributes:
    params: what the optimiser trains.
    teacher: what follows `params` as a moving average, {} for none; the path of
      each of its leaves exists in `params`.
    aux: other state that `update_aux` changes, such as running centres; {} for
      none.
  """

  params: Params
  teacher: Params
  aux: Params


class LossOutput(NamedTuple):
  """What one forward pass of a batch returns.

  Attributes:
    loss: [] float32, differentiated with respect to `params`.
    metrics: name -> [] float32 for the log; "loss" among them. Plain means over
      images, so that means over micro-batches are means over the batch.
    stats: statistics of the batch for `Method.update_aux`.
    per_image: name -> [B] int32 for `Method.epoch_scores`; the names are those
      of `Method.per_image`.
  """

  loss: jax.Array
  metrics: dict[str, jax.Array]
  stats: Params = {}
  per_image: Batch = {}


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
  """Base class of all methods; `backbone` is the network that is evaluated.

  A batch holds label [B], position [B] (row of the global batch; every random
  draw is keyed by it), index [B] (of the image in its data set), what
  `item_extras` returns with a leading B, and what the transform that
  `data.transform` names makes of an image, all with a leading B: see augment/.

  Attributes:
    backbone: the ViT that `features` and `attention` read.
  """

  backbone: vit.ViT

  # Dataclasses that declare the other keys of the config's section `method`.
  config_parts: ClassVar[tuple[type, ...]] = ()
  # The teacher moves before the forward pass, not after the student's update.
  teacher_first: ClassVar[bool] = False
  # Images of a batch meet in the loss, so run.accumulate would change it.
  batch_coupled: ClassVar[bool] = False
  # Regex of leaves that hold still for the first `optim.freeze_epochs`.
  frozen_at_start: ClassVar[str | None] = None
  # Regex of leaves of `params` that never move.
  untrained: ClassVar[str | None] = None
  # Regex of leaves without weight decay; None = biases and LayerNorm scales.
  undecayed: ClassVar[str | None] = None
  # Learning rate of each leaf over that of the run; None = 1 for all.
  lr_scale: ClassVar[LrScale | None] = None
  # Parts of `aux` without which trained weights cannot be used.
  served_aux: ClassVar[tuple[str, ...]] = ()
  # Names of the integers per image that an epoch's scores are made of.
  per_image: ClassVar[tuple[str, ...]] = ()
  # Abilities, and what they promise:
  classifies: ClassVar[bool] = False  # class logits; evaluated by accuracy
  reconstructs: ClassVar[bool] = False  # `order`, `reconstruct`: see mae.py
  assigns_prototypes: ClassVar[bool] = False  # `assignments(weights, images)`
  # Pictures of masks: a revealed hint makes room for the next most attended
  # patch, so that every image hides the same number.
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
    """One forward pass.

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
    """The next `aux`, once per optimiser step, from `LossOutput.stats`."""
    return aux

  def epoch_scores(
    self, labels: np.ndarray, per_image: dict[str, np.ndarray]
  ) -> dict[str, float]:
    """Scores of an epoch from what `loss` returned per image.

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
    """Share of patches that pictures of masks hide, 0-1."""
    return 0.3

  @property
  def picture_show_max(self) -> float:
    """Share of most attended patches that hints in pictures come from, 0-1."""
    return 0.1

  @property
  def knn_temp(self) -> float:
    """Temperature of k-NN where `evals.knn_temp` is 0."""
    return 0.07

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
      last: class tokens of that many last blocks.
      norm: apply the final LayerNorm.

    Returns:
      cls [B, last * D], or None for a network without a class token, and
      patches [B, N, D], float32.
    """
    return embedding.features(
      self.backbone, weights["backbone"], images, last=last, norm=norm
    )

  def attention(self, weights: Params, images: jax.Array) -> jax.Array:
    """Last attention to each patch: [B, H, W, 3] -> [B, A, N] float32.

    Of the class token or, without one, what patches receive on average.
    """
    return embedding.class_attention(self.backbone, weights["backbone"], images)
