"""Supervised learning on a pretrained backbone: linear probe, fine-tuning.

The linear probe trains one or several linear layers on frozen features; one
forward pass of the backbone serves them all. Fine-tuning trains everything,
with mixup, cutmix, random erasing and label smoothing.

Source: eval_linear.py and the fine-tuning recipe (DeiT's) of the AttMask
release. Differs:
- the last, incomplete batch of an epoch is dropped, for the probe too;
- mixup pairs images within fixed groups, see `mixup.partners`;
- several learning rates may be tried in one pass.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from attmask_jax import Batch, Params, schema
from attmask_jax.augment import mixup
from attmask_jax.errors import InputError
from attmask_jax.methods import layer_decay
from attmask_jax.methods.base import InitialState, LossOutput, Method, Scalars
from attmask_jax.models import embedding, noise, vit
from attmask_jax.models.layers import LayerNorm, trunc_normal
from attmask_jax.models.positions import DINO_OFFSET

MIX_TAG = 5  # last entry of the seed of the host's mixup draws
BN_EPS, BN_MOMENTUM = 1e-5, 0.1


@dataclasses.dataclass(frozen=True)
class NetworkKeys:
  """The pretrained network of a classifier."""

  drop_path: float = schema.inherit(vit.BackboneKeys, "drop_path", 0.0)
  dtype: str = schema.key(
    "", 'of matrix products; "" = as pretrained', choices=("", *vit.DTYPES)
  )
  class_token: str = schema.key(
    "",
    '"" = as pretrained; none drops it',
    choices=("", "none", "input", "readout"),
  )
  positions: str = schema.key(
    "",
    '"" = as pretrained; learned makes fixed ones trainable',
    choices=("", "learned", "yx", "xy"),
  )
  lrs: tuple[float, ...] = schema.key(
    (),
    "one linear layer per rate; none = one layer at optim.lr_per_256",
    above=0,
    empty=True,
  )


@dataclasses.dataclass(frozen=True)
class Classify(Method):
  """Linear layers on a pretrained network.

  Attributes:
    backbone: ViT; its position table keeps the size it was pretrained with.
    num_classes: C.
    epochs, steps_per_epoch: length of the run; S.
    image_size, batch_size: side of training images in pixels; global B.
    rates: [J] factor on the learning rate of each linear layer.
    mixup_group: size of the groups that mixup pairs within, 0 = the batch.
  """

  num_classes: int
  epochs: int
  steps_per_epoch: int
  image_size: int
  batch_size: int
  rates: tuple[float, ...] = (1.0,)
  mixup_group: int = mixup.Keys.mixup_group
  frozen: bool = schema.key(True, "train only the linear layer")
  last_blocks: int = schema.key(
    1, "number of last blocks to take class tokens from", low=1
  )
  pool: str = schema.key(
    "cls", "tokens that the linear layer reads", choices=embedding.POOLS
  )
  final_norm: bool = schema.key(
    True, "apply the backbone's final LayerNorm; False for MAE and ExtreMA"
  )
  head_norm: str = schema.key(
    "none",
    "norm before the linear layer: trained LayerNorm, or batch norm without "
    "scale and bias",
    choices=("none", "layer", "batch"),
  )
  init_std: float = schema.key(0.01, "of the linear layer's kernel", low=0)
  smoothing: float = schema.key(0.0, "label smoothing", low=0, high=1)
  mixup: float = schema.key(0.0, "alpha of mixup, 0 = off", low=0)
  cutmix: float = schema.key(0.0, "alpha of cutmix, 0 = off", low=0)
  mix_prob: float = schema.key(1.0, "probability of mixing", low=0, high=1)
  switch_prob: float = schema.key(
    0.5, "probability of cutmix where both are on", low=0, high=1
  )
  ema: bool = schema.key(False, "keep a moving average of the parameters")
  layer_decay: float = schema.key(
    1.0, "learning rate of a block relative to the next", above=0, high=1
  )
  decay_tokens: bool = schema.key(
    True, "apply weight decay to class token and positions"
  )
  seed: int = schema.key(
    0, "of the linear layer, mixing and stochastic depth", low=0, high=2**32 - 1
  )

  config_parts = (NetworkKeys, vit.AttentionDropKeys)
  classifies = True

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Builds the method from the sections method, data, optim and run.

    Raises:
      InputError: a value out of range.
    """
    m, rate = config.method, config.optim.lr_per_256
    schema.check("method", m, *cls.config_parts)
    if m.lrs and not rate > 0:
      raise InputError(
        f"optim.lr_per_256 {rate} must be positive: the rates of method.lrs "
        "are relative to it"
      )
    if len(m.lrs) > 1 and config.optim.optimizer.startswith("lars"):
      raise InputError(
        f"method.lrs {tuple(m.lrs)} with optim.optimizer="
        f"{config.optim.optimizer} would share one trust ratio among the "
        "linear layers: give one rate, or use --config.optim.optimizer=sgd"
      )
    return cls(
      backbone=vit.from_config(config).clone(
        image_size=m.position_size,
        mlp_ratio=m.get("mlp_ratio", 4.0),  # absent from older runs
        class_token=m.class_token,
        positions=m.positions,
        # Runs older than this key were trained with DINO's.
        grid_offset=m.get("grid_offset", DINO_OFFSET),
        key_bias=m.key_bias,
        readout_layers=m.readout_layers,
      ),
      num_classes=m.num_classes,
      epochs=config.optim.epochs,
      steps_per_epoch=steps_per_epoch,
      image_size=config.data.image_size,
      batch_size=config.data.batch_size,
      rates=tuple(lr / rate for lr in m.lrs) or (1.0,),
      mixup_group=config.data.mixup_group,
      **schema.take(cls, m),
    )

  def __post_init__(self) -> None:
    schema.check("method", vars(self), type(self))
    if self.num_classes < 2:
      raise InputError(
        f"a classifier needs at least 2 classes, but the data have "
        f"{self.num_classes}: give images of several classes"
      )
    self._check_features()
    group = self.mixup_group or self.batch_size
    if self.mixes and (group % 2 or self.batch_size % group):
      raise InputError(
        f"data.mixup_group {group} must be even and divide data.batch_size "
        f"{self.batch_size}: mixup pairs the images of a group"
      )

  def _check_features(self) -> None:
    """Rejects features that the network does not have."""
    class_token, depth = self.backbone.class_token, self.backbone.depth
    if class_token == "none" and self.pool != "mean":
      raise InputError(
        f"method.pool {self.pool} reads the class token, which this network "
        "does not have: set --config.method.pool=mean"
      )
    if (
      class_token == "readout" and self.pool != "mean" and self.last_blocks > 1
    ):
      raise InputError(
        f"method.last_blocks {self.last_blocks} takes class tokens of several "
        "blocks, but ExtreMA has one only after the last block: set "
        "--config.method.last_blocks=1, or use configs/evals.py:linear_extrema"
      )
    if self.last_blocks > depth:
      raise InputError(
        f"method.last_blocks {self.last_blocks} must be between 1 and the "
        f"{depth} blocks of the weights"
      )

  @property
  def mixes(self) -> bool:
    """Whether images of a batch are mixed."""
    return bool(self.mix_prob and (self.mixup or self.cutmix))

  @property
  def batch_coupled(self) -> bool:
    """Mixup and batch norm combine the images of a batch."""
    return self.mixes or self.head_norm == "batch"

  @property
  def undecayed(self) -> str:
    """Regex of leaves without weight decay."""
    tokens = "" if self.decay_tokens else "|cls_token|pos_embed"
    return rf"(^|/)(bias|scale{tokens})$"

  @property
  def served_aux(self) -> tuple[str, ...]:
    """Parts of `aux` that a trained classifier needs."""
    return ("batch_norm",) if self.head_norm == "batch" else ()

  @property
  def feature_width(self) -> int:
    """F, the width of `embedding.pool`."""
    classes = self.last_blocks * (self.pool != "mean")
    return self.backbone.width * (classes + (self.pool != "cls"))

  def init(self, rng: jax.Array) -> InitialState:
    """Initial params, teacher (average, or {}) and aux (frozen backbone).

    The backbone is a placeholder for the pretrained one.
    """
    rng_backbone, rng_head = jax.random.split(rng)
    side = self.backbone.image_size
    backbone = self.backbone.init(rng_backbone, jnp.zeros((1, side, side, 3)))
    j, shape = len(self.rates), (self.feature_width, self.num_classes)
    # All layers start alike, so that only their rates differ.
    kernel = trunc_normal(self.init_std)(rng_head, shape)
    head = {
      "kernel": jnp.tile(kernel[None], (j, 1, 1)),
      "bias": jnp.zeros((j, self.num_classes)),
    }
    ones = jnp.ones(self.feature_width)
    if self.head_norm == "layer":
      head["norm"] = {"scale": ones, "bias": 0 * ones}
    if self.frozen:
      params, aux = {"head": head}, {"backbone": backbone["params"]}
    else:
      params, aux = {"backbone": backbone["params"], "head": head}, {}
    if self.head_norm == "batch":
      aux["batch_norm"] = {"mean": 0 * ones, "var": ones}
    teacher = jax.tree.map(jnp.copy, params) if self.ema else {}
    return InitialState(params, teacher, aux)

  def at(self, step: int) -> dict[str, np.generic]:
    """Mixup parameters of the batch, from (seed, step)."""
    if not self.mixes:
      return {}
    return mixup.draw(
      np.random.default_rng([self.seed, step, MIX_TAG]),
      mixup_alpha=self.mixup,
      cutmix_alpha=self.cutmix,
      prob=self.mix_prob,
      switch_prob=self.switch_prob,
      size=(self.image_size, self.image_size),
    )

  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> LossOutput:
    """Cross-entropy of every linear layer.

    Args:
      params: trained parameters.
      teacher: the moving average, unused.
      aux: the frozen backbone, or {}.
      batch: images [B, 1, H, W, 3], label [B], position [B]; erase [B, 4]
        where images are erased.
      rng: key of this step.
      scalars: `at(step)`.

    Returns:
      The loss, summed over independent linear layers; stats of the batch norm.
    """
    rng_erase, rng_drop = jax.random.split(rng)
    images, targets = self.mixed_batch(batch, rng_erase, scalars)
    weights = self.assemble(params, aux)
    x = self.embed(weights, images, batch, rng_drop)
    stats = {}
    if self.head_norm == "batch":
      stats = {"mean": jnp.mean(x, axis=0), "var": jnp.var(x, axis=0)}
      weights = weights | {"batch_norm": stats}
    logits = self.classify(weights, x)  # [B, J, C]
    entropy = optax.losses.softmax_cross_entropy(
      logits, targets[:, None]
    )  # [B, J]
    correct = jnp.argmax(logits[:, 0], axis=-1) == batch["label"]
    metrics = {
      "loss": jnp.mean(entropy),
      "acc": jnp.mean(correct.astype(jnp.float32)),
    }
    stats = jax.lax.stop_gradient(stats)
    return LossOutput(jnp.sum(jnp.mean(entropy, axis=0)), metrics, stats)

  def update_aux(self, aux: Params, stats: Params) -> Params:
    """Updates the running statistics of the batch norm, [F] each."""
    if not stats:
      return aux
    old, batch = aux["batch_norm"], self.batch_size
    # As in PyTorch, the running variance is the unbiased one.
    var = stats["var"] * batch / (batch - 1)
    mean = BN_MOMENTUM * stats["mean"] + (1 - BN_MOMENTUM) * old["mean"]
    var = BN_MOMENTUM * var + (1 - BN_MOMENTUM) * old["var"]
    return aux | {"batch_norm": {"mean": mean, "var": var}}

  def lr_scale(self, name: str, leaf: jax.Array) -> np.ndarray | float:
    """Factor on the learning rate of a leaf, see `optim.Optimizer.build`."""
    if name.startswith("head/"):
      rates = np.asarray(self.rates, np.float32)
      return rates.reshape(-1, *[1] * (leaf.ndim - 1))
    depth = self.backbone.depth
    return layer_decay.rate(name, leaf, depth=depth, decay=self.layer_decay)

  def assemble(self, params: Params, aux: Params) -> Params:
    """Joins backbone, head and batch_norm out of `params` and `aux`."""
    return {**aux, **params}

  def classify(self, weights: Params, x: jax.Array) -> jax.Array:
    """Features to logits of every linear layer: [B, F] -> [B, J, C]."""
    head = weights["head"]
    if self.head_norm == "layer":
      x = LayerNorm().apply({"params": head["norm"]}, x)
    if self.head_norm == "batch":
      norm = weights["batch_norm"]
      x = (x - norm["mean"][None]) * jax.lax.rsqrt(norm["var"][None] + BN_EPS)
    logits = jnp.einsum("bf,jfc->bjc", x, head["kernel"])
    return logits + head["bias"][None]

  def logits(self, weights: Params, images: jax.Array) -> jax.Array:
    """Logits of the first linear layer: [B, H, W, 3] -> [B, C]."""
    return self.all_logits(weights, images)[:, 0]

  def all_logits(self, weights: Params, images: jax.Array) -> jax.Array:
    """Logits of all layers: [B, H, W, 3], uint8 or normalised -> [B, J, C]."""
    x = embedding.embed(
      functools.partial(self.features, weights),
      images,
      last=self.last_blocks,
      pool=self.pool,
      final_norm=self.final_norm,
    )
    return self.classify(weights, x)

  def mixed_batch(
    self, batch: Batch, rng: jax.Array, scalars: Scalars
  ) -> tuple[jax.Array, jax.Array]:
    """Normalised images [B, H, W, 3] and targets [B, C] float32."""
    images = vit.normalize_images(batch["images"][:, 0])
    if "erase" in batch:
      images = mixup.erase(images, batch["erase"], rng, batch["position"])
    targets = mixup.soft_targets(
      batch["label"], self.num_classes, smoothing=self.smoothing
    )
    if self.mixes:
      lam, box = scalars["mix_lam"], scalars["mix_box"]
      group = self.mixup_group or None
      images = mixup.mix_images(images, lam, box, group=group)
      targets = mixup.mix_targets(targets, lam, group=group)
    return images, targets

  def embed(
    self, weights: Params, images: jax.Array, batch: Batch, rng: jax.Array
  ) -> jax.Array:
    """Features in training, with dropout: [B, H, W, 3] -> [B, F]."""
    drawn = {}
    if self.frozen:
      weights = jax.lax.stop_gradient(weights)
    else:
      drawn = noise.sample(self.backbone, rng, batch["position"])
    features = functools.partial(
      embedding.features,
      self.backbone,
      weights["backbone"],
      **drawn,
    )
    return embedding.embed(
      features,
      images,
      last=self.last_blocks,
      pool=self.pool,
      final_norm=self.final_norm,
    )
