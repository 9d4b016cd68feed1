"""Builds the network of a recognised state dict."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import ml_collections

from attmask_jax import Batch, Params
from attmask_jax.errors import InputError
from attmask_jax.methods import mae
from attmask_jax.methods.attmask import AttMask
from attmask_jax.methods.base import InitialState, LossOutput, Method, Scalars
from attmask_jax.methods.classify import Classify
from attmask_jax.methods.extrema import ExtreMA
from attmask_jax.methods.mae import Mae
from attmask_jax.models import heads, vit
from attmask_jax.models.decoder import Decoder
from attmask_jax.models.positions import DINO_OFFSET
from attmask_jax.weights.torch_io.layouts import Layout

NAME = "imported"  # of the method, in the config of such weights
# Input of a classifier: class token or mean patch, with the final norm or not.
_READS = {
  "classifier": dict(pool="cls", final_norm=True),
  "hf_classifier": dict(pool="cls", final_norm=True),
  "official_probe": dict(pool="cls", final_norm=True),
  "classifier_fc_norm": dict(pool="mean", final_norm=False),
  "extrema_classifier": dict(pool="mean", final_norm=False),
  "extrema_probe": dict(pool="cls", final_norm=False),
}
# Code bases that resample positions without DINO's offset.
_PLAIN = (
  *("mae", "mae_classifier", "facebook_mae", "hf_mae", "classifier_fc_norm"),
  *("extrema", "extrema_probe", "extrema_classifier"),
)


@dataclasses.dataclass(frozen=True)
class Backbone(Method):
  """A bare ViT: features and attention, no loss."""

  def pool_warning(self, pool: str) -> str:
    """That of MAE, whose encoders alone have fixed positions."""
    if self.backbone.positions == "learned":
      return ""
    return mae.pool_warning(self.backbone, pool)

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Not supported: the layout decides the method, see `from_config`."""
    raise TypeError("a bare backbone is built from its layout, see `build`")

  def init(self, rng: jax.Array) -> InitialState:
    """Initial params; no teacher or aux."""
    side = self.backbone.image_size
    images = jnp.zeros((1, side, side, 3))
    params = {"backbone": self.backbone.init(rng, images)["params"]}
    return InitialState(params, {}, {})

  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> LossOutput:
    """Not supported: a bare backbone cannot be trained."""
    raise TypeError("a bare backbone has no loss: fine-tune it instead")


def config_of(layout: Layout) -> ml_collections.ConfigDict:
  """What is known of these weights, in the form of a run's config."""
  fields = dataclasses.asdict(dataclasses.replace(layout, table=()))
  del fields["table"]
  return ml_collections.ConfigDict(
    dict(
      method=dict(name=NAME, variant=layout.variant, dtype="float32", **fields),
      data=dict(image_size=layout.image_size),
    )
  )


def from_config(config: ml_collections.ConfigDict) -> Method:
  """Builds the network of a config by `config_of`."""
  known = {f.name for f in dataclasses.fields(Layout)}
  section = {k: v for k, v in config.method.items() if k in known}
  return build(Layout(table=(), **section))


def build(layout: Layout) -> Method:
  """Builds the network of a layout, as a method for evaluations.

  Raises:
    InputError: a linear layer without a network.
  """
  if layout.kind == "linear":
    raise InputError(
      "these weights are a linear layer without a network: give the network "
      "with --config.weights, and the layer with --config.probe"
    )
  backbone = vit.ViT(
    layout.width,
    layout.depth,
    layout.num_heads,
    layout.patch_size,
    layout.image_size,
    mlp_ratio=layout.mlp_ratio,
    class_token=layout.class_token,
    positions=layout.positions,
    grid_offset=0.0 if layout.kind in _PLAIN else DINO_OFFSET,
    key_bias=layout.key_bias,
    readout_layers=layout.readout_layers or 2,
  )
  if layout.num_classes:
    return _classifier(layout, backbone)
  if layout.kind == "attmask":
    return _attmask(layout, backbone)
  if layout.decoder_width:
    return _mae(layout, backbone)
  if layout.kind == "extrema" and layout.head_hidden:
    head = dict(hidden=layout.head_hidden, out=layout.out_dim)
    return ExtreMA(
      backbone,
      projector=heads.Projector(layers=3, **head),
      predictor=heads.Projector(layers=2, **head),
    )
  return Backbone(backbone)


def _attmask(layout: Layout, backbone: vit.ViT) -> AttMask:
  own = layout.patch_out_dim if layout.prototypes == "separate" else 0
  head = heads.Head(
    layout.out_dim,
    own,
    layout.head_hidden,
    layout.head_bottleneck,
    layout.head_layers,
    norm=layout.head_norm,
  )
  return AttMask(
    backbone,
    head,
    head,
    epochs=1,
    steps_per_epoch=1,
    temp_warmup_epochs=0,
    mask="attmask_high" if layout.mask_token else "none",
  )


def _mae(layout: Layout, backbone: vit.ViT) -> Mae:
  """MAE-priv and the official release order a patch's values differently."""
  order, official = layout.positions, layout.decoder_class_token
  decoder = Decoder(
    width=layout.decoder_width,
    depth=layout.decoder_depth,
    num_heads=layout.decoder_num_heads,
    pixels=3 * layout.patch_size**2,
    positions={"learned": "xy" if official else "yx"}.get(order, order),
    class_token=official,
  )
  return Mae(
    backbone,
    decoder,
    target_layout="hwc" if official else "chw",
    target_variance="unbiased" if official else "biased",
  )


def _classifier(layout: Layout, backbone: vit.ViT) -> Classify:
  """A network with a linear layer, whose input is that of its code base."""
  if layout.kind == "mae_classifier":
    pool = "mean" if layout.class_token == "none" else "cls"
    reads = dict(pool=pool, final_norm=False)
  elif layout.kind == "classifier" and layout.class_token == "none":
    reads = dict(pool="mean", final_norm=True)
  elif layout.kind in _READS:
    reads = _READS[layout.kind]
  else:
    return probe_of(backbone, layout.features, layout.num_classes)
  return Classify(
    backbone,
    layout.num_classes,
    epochs=1,
    steps_per_epoch=1,
    image_size=layout.image_size,
    batch_size=1,
    frozen=False,
    head_norm=layout.probe_norm,
    **reads,
  )


def probe_of(backbone: vit.ViT, features: int, classes: int) -> Classify:
  """A network with a linear probe of AttMask, iBOT or DINO.

  It reads n class tokens or, as published for base and large networks, one and
  the mean patch, depending on the number of features.

  Raises:
    InputError: no number of tokens gives so many features.
  """
  blocks, rest = divmod(features, backbone.width)
  if rest or not 1 <= blocks <= max(backbone.depth, 2):
    raise InputError(
      f"the probe reads {features} features, and tokens of these weights have "
      f"{backbone.width}: give the weights it was trained on"
    )
  pooled = blocks == 2
  return Classify(
    backbone,
    classes,
    epochs=1,
    steps_per_epoch=1,
    image_size=backbone.image_size,
    batch_size=1,
    frozen=False,
    last_blocks=1 if pooled else blocks,
    pool="cls+mean" if pooled else "cls",
  )


def shapes_of(
  method: Method, layout: Layout, network: str
) -> Mapping[str, Any]:
  """Shapes of the tree of a network's tensors: leaves with `.shape`.

  Args:
    method: of `build`.
    layout: of the same.
    network: "student", "teacher" or "model".
  """
  params, teacher, aux = jax.eval_shape(method.init, jax.random.key(0))
  if layout.kind == "extrema":
    tree = dict(params if layout.predictor else teacher)
  else:
    tree = dict(params)
  if layout.probe_norm == "batch":
    tree["batch_norm"] = aux["batch_norm"]
  backbone = dict(tree["backbone"])
  if not layout.mask_token:
    backbone.pop("mask_token", None)
  elif "mask_token" not in backbone:
    width = (1, 1, layout.width)
    backbone["mask_token"] = jax.ShapeDtypeStruct(width, jnp.float32)
  return tree | {"backbone": backbone}
