"""The name tables of the code bases, see `names`.

If files of one code base differ (a head with or without norms, positions in
another order), a function makes the table. A position table has a `Row`, which
a network with learned positions reads, and a `Constant`, which one with fixed
positions compares.
"""

import dataclasses

from attmask_jax.weights.torch_io.names import Constant, Row, Table

Rows = tuple[Row, ...]
PROTOTYPES = ("shared", "separate", "class_only")


def _linear(ours: str, theirs: str) -> Rows:
  return (
    Row(f"{ours}/kernel", f"{theirs}.weight", "linear"),
    Row(f"{ours}/bias", f"{theirs}.bias"),
  )


def _norm(ours: str, theirs: str) -> Rows:
  return (
    Row(f"{ours}/scale", f"{theirs}.weight"),
    Row(f"{ours}/bias", f"{theirs}.bias"),
  )


def _conv(ours: str, theirs: str) -> Rows:
  return (
    Row(f"{ours}/kernel", f"{theirs}.weight", "conv"),
    Row(f"{ours}/bias", f"{theirs}.bias"),
  )


def _under(rows: Rows, ours: str, theirs: str) -> Rows:
  """Rows with prefixes before both names; "" stays as the name of none."""
  return tuple(
    dataclasses.replace(
      r, ours=ours + r.ours, theirs=r.theirs and theirs + r.theirs
    )
    for r in rows
  )


def _stacked(rows: Rows, ours: str, theirs: str) -> Rows:
  """Rows of one block as rows of stacked blocks."""
  rows = _under(rows, f"{ours}/", f"{theirs}.{{i}}.")
  return tuple(dataclasses.replace(r, ours=f"{r.ours}[i]") for r in rows)


_MLP: Rows = _linear("mlp/fc1", "mlp.fc1") + _linear("mlp/fc2", "mlp.fc2")
_FUSED: Rows = _linear("attn/qkv", "attn.qkv")
# A key bias adds the same to all logits of a query, so none is needed.
_NO_KEY_BIAS: Rows = (
  Row("attn/qkv/kernel", "attn.qkv.weight", "linear"),
  Row("attn/qkv/bias", "attn.q_bias", part=0),
  Row("attn/qkv/bias", "attn.v_bias", part=2),
)


def _block(attention: Rows) -> Rows:
  return (
    *_norm("norm1", "norm1"),
    *attention,
    *_linear("attn/proj", "attn.proj"),
    *_norm("norm2", "norm2"),
    *_MLP,
  )


def _split(*names: str) -> Rows:
  """Queries, keys and values as three linear layers."""
  return tuple(
    Row(f"attn/qkv/{ours}", f"{name}.{theirs}", kind, part)
    for part, name in enumerate(names)
    for ours, theirs, kind in (
      ("kernel", "weight", "linear"),
      ("bias", "bias", "same"),
    )
  )


_HF_BLOCK: Rows = (
  *_norm("norm1", "layernorm_before"),
  *_split(*(f"attention.attention.{x}" for x in ("query", "key", "value"))),
  *_linear("attn/proj", "attention.output.dense"),
  *_norm("norm2", "layernorm_after"),
  *_linear("mlp/fc1", "intermediate.dense"),
  *_linear("mlp/fc2", "output.dense"),
)
_HF_PATCHES_BLOCK: Rows = (
  *_norm("norm1", "layer_norm1"),
  *_split(*(f"self_attn.{x}_proj" for x in "qkv")),
  *_linear("attn/proj", "self_attn.out_proj"),
  *_norm("norm2", "layer_norm2"),
  *_MLP,
)
_READOUT: Rows = (
  Row("gamma_1", "gamma_1"),
  Row("gamma_2", "gamma_2"),
  *_norm("norm1", "norm1"),
  *(
    r
    for x in ("q", "k", "v", "proj")
    for r in _linear(f"attn/{x}", f"attn.{x}")
  ),
  *_norm("norm2", "norm2"),
  *_MLP,
)
_EMBED: Rows = (
  Row("cls_token", "cls_token"),
  Row("pos_embed", "pos_embed"),
  *_conv("patch_embed", "patch_embed.proj"),
)
_FUSED_TRUNK: Rows = _EMBED + _stacked(_block(_FUSED), "blocks", "blocks")
_MAE_TRUNK: Rows = _EMBED + _stacked(_block(_NO_KEY_BIAS), "blocks", "blocks")
_READOUTS: Rows = _under(_READOUT, "readout_{j}/", "blocks_token.{j}.")
_MASK: Rows = (Row("mask_token", "masked_embed", "row"),)
_FINAL: Rows = _norm("norm", "norm")
# Classifiers that read features before the final norm do not store it.
_NO_FINAL: Rows = (
  Row("norm/scale", "", "unused_ones"),
  Row("norm/bias", "", "unused_zeros"),
)
_EMBED_BIAS = "backbone/patch_embed/bias"  # in every trunk


def _positions(
  theirs: str, order: str, *, class_token: bool = True
) -> Constant:
  """The encoder's fixed table."""
  return Constant(
    theirs, order, _EMBED_BIAS, "backbone/cls_token" if class_token else ""
  )


def _decoder_positions(theirs: str, order: str) -> Constant:
  """The fixed table of a decoder with class token."""
  return Constant(theirs, order, "decoder/mask_token", "decoder/mask_token")


def backbone(prefix: str = "") -> Table:
  """Trunk with learned positions: timm, DeiT, DINO, iBOT, AttMask."""
  return _under(_FUSED_TRUNK + _MASK + _FINAL, "backbone/", prefix)


def head(
  prototypes: str = "shared", *, layers: int = 3, norm: bool = False
) -> Table:
  """Head of DINO, iBOT and AttMask.

  Args:
    prototypes: "shared" (one layer under two names), "separate" ones for
      patches, or "class_only" (DINO).
    layers: linear layers of its MLP.
    norm: LayerNorm between linear layers and activations.
  """
  rows: list[Row] = []
  for i in range(layers):
    at = i * (3 if norm else 2)  # linear, (norm,) activation
    rows += _linear(f"head/mlp/layer_{i}", f"head.mlp.{at}")
    if norm and i < layers - 1:
      rows += _norm("head/mlp/norm", f"head.mlp.{at + 1}")  # one for all
  ours = {"shared": "last_layer", "separate": "last_layer2"}
  pairs = [("last_layer", "last_layer")]
  if prototypes != "class_only":
    pairs.append((ours[prototypes], "last_layer2"))
  for leaf, name in pairs:
    rows += [
      Row(f"head/{leaf}/weight_g", f"head.{name}.weight_g", "gain"),
      Row(f"head/{leaf}/weight_v", f"head.{name}.weight_v", "linear"),
    ]
  return tuple(rows)


def attmask(
  prototypes: str = "shared",
  *,
  layers: int = 3,
  norm: bool = False,
  prefix: str = "backbone.",
) -> Table:
  """Student or teacher of an AttMask, iBOT or DINO checkpoint, see `head`."""
  return backbone(prefix) + head(prototypes, layers=layers, norm=norm)


def mae(order: str = "yx") -> Table:
  """Encoder and decoder of MAE-priv; `order` of the fixed positions."""
  return (
    Row("decoder/mask_token", "mask_token"),
    Constant("decoder_pos_embed", order, "decoder/mask_token"),
    _positions("encoder.pos_embed", order),
    *_under(_MAE_TRUNK + _FINAL, "backbone/", "encoder."),
    *_stacked(_block(_NO_KEY_BIAS), "decoder/blocks", "decoder.blocks"),
    *_norm("decoder/norm", "decoder.norm"),
    *_linear("decoder/head", "decoder.head"),
    *_linear("decoder/embed", "encoder_to_decoder"),
  )


def facebook_mae(order: str = "xy") -> Table:
  """Encoder and decoder of the official MAE."""
  return (
    Row("decoder/mask_token", "mask_token"),
    _decoder_positions("decoder_pos_embed", order),
    *backbone(),
    _positions("pos_embed", order),
    *_linear("decoder/embed", "decoder_embed"),
    *_stacked(_block(_FUSED), "decoder/blocks", "decoder_blocks"),
    *_norm("decoder/norm", "decoder_norm"),
    *_linear("decoder/head", "decoder_pred"),
  )


def _encoder_with_readout(order: str, final: Rows) -> Table:
  return (
    *_under(_FUSED_TRUNK + _READOUTS + final, "backbone/", ""),
    _positions("pos_embed", order, class_token=False),
  )


def extrema(order: str = "xy") -> Table:
  """One encoder of ExtreMA with its projector; the student's predictor."""
  return (
    *_encoder_with_readout(order, _FINAL),
    *_linear("head/layer_0", "head.0"),
    *_norm("head/norm_0", "head.1"),
    *_linear("head/layer_1", "head.3"),
    *_norm("head/norm_1", "head.4"),
    *_linear("head/layer_2", "head.6"),
    *_linear("predictor/layer_0", "predictor.0"),
    *_norm("predictor/norm_0", "predictor.1"),
    *_linear("predictor/layer_1", "predictor.3"),
  )


def _probe(theirs: str) -> Rows:
  """The linear layer of a classifier."""
  return (
    Row("head/kernel", f"{theirs}.weight", "probe"),
    Row("head/bias", f"{theirs}.bias", "row"),
  )


def _batch_norm(theirs: str) -> Table:
  """A batch norm without scale and bias."""
  return (
    Row("batch_norm/mean", f"{theirs}.running_mean"),
    Row("batch_norm/var", f"{theirs}.running_var"),
    Constant(f"{theirs}.num_batches_tracked", "counter", "batch_norm/mean"),
  )


_FC_NORM = _norm("head/norm", "fc_norm")
_NO_FINAL_NORM = _under(_NO_FINAL, "backbone/", "")


def extrema_probe(order: str = "xy") -> Table:
  """ExtreMA's linear classifier, trunk included: no final norm."""
  return (
    *_encoder_with_readout(order, _NO_FINAL),
    *_batch_norm("head.0"),
    *_probe("head.1"),
  )


def extrema_classifier() -> Table:
  """ExtreMA, fine-tuned: mean patch, learned positions, unused class token."""
  return (
    *_under(_FUSED_TRUNK, "backbone/", ""),
    Constant("cls_token", "zero_token", _EMBED_BIAS),
    *_NO_FINAL_NORM,
    *_FC_NORM,
    *_probe("head"),
  )


def mae_classifier(order: str = "yx") -> Table:
  """MAE-priv, fine-tuned or with a linear classifier: no final norm."""
  return (
    *_under(_MAE_TRUNK, "backbone/", ""),
    _positions("pos_embed", order),
    *_NO_FINAL_NORM,
    *_FC_NORM,
    *_batch_norm("fc_norm"),
    *_probe("head"),
  )


def classifier(prefix: str = "") -> Table:
  """timm and DeiT names, AttMask's fine-tuning: a linear layer after `norm`."""
  return backbone(prefix) + _probe("head")


def classifier_fc_norm() -> Table:
  """timm names, the official MAE's fine-tuning: a norm of the mean patch."""
  return (
    *_under(_FUSED_TRUNK, "backbone/", ""),
    *_NO_FINAL_NORM,
    *_FC_NORM,
    *_probe("head"),
  )


def official_probe() -> Table:
  """The official MAE's linear classifier on the normed class token."""
  return (
    *backbone(),
    Row("batch_norm/mean", "head.0.running_mean"),
    Row("batch_norm/var", "head.0.running_var", "small_eps"),
    Constant("head.0.num_batches_tracked", "counter", "batch_norm/mean"),
    *_probe("head.1"),
  )


def linear() -> Table:
  """AttMask's linear probe without a network."""
  return _probe("linear")


def combined() -> Table:
  """AttMask's trunk and linear probe in one file, perhaps with unused heads."""
  return (
    *backbone(),
    *linear(),
    Constant("head.mlp.{j}.weight", "dropped"),
    Constant("head.mlp.{j}.bias", "dropped"),
    Constant("head.last_layer{j}.weight_g", "dropped"),
    Constant("head.last_layer{j}.weight_v", "dropped"),
    Constant("head.last_layer.weight_g", "dropped"),
    Constant("head.last_layer.weight_v", "dropped"),
  )


def _hf_trunk(prefix: str) -> Rows:
  rows = (
    Row("cls_token", "embeddings.cls_token"),
    Row("pos_embed", "embeddings.position_embeddings"),
    Row("mask_token", "embeddings.mask_token"),
    *_conv("patch_embed", "embeddings.patch_embeddings.projection"),
    *_stacked(_HF_BLOCK, "blocks", "encoder.layer"),
    *_norm("norm", "layernorm"),
  )
  return _under(rows, "backbone/", prefix)


def hf_vit(prefix: str = "") -> Table:
  """ViTModel of transformers 4 (version 5 renames these when it reads)."""
  return _hf_trunk(prefix)


def hf_classifier() -> Table:
  """ViTForImageClassification: a linear layer on the normed class token."""
  return _hf_trunk("vit.") + _probe("classifier")


def hf_patches(prefix: str = "vision_model.") -> Table:
  """SiglipVisionModel without head: a plain ViT that has no class token."""
  rows = (
    Row("pos_embed", "embeddings.position_embedding.weight", "row"),
    *_conv("patch_embed", "embeddings.patch_embedding"),
    *_stacked(_HF_PATCHES_BLOCK, "blocks", "encoder.layers"),
    *_norm("norm", "post_layernorm"),
  )
  return _under(rows, "backbone/", prefix)


def hf_mae(prefix: str = "vit.", order: str = "xy") -> Table:
  """ViTMAEForPreTraining, or with prefix "" the encoder ViTMAEModel."""
  return (
    *_hf_trunk(prefix),
    _positions(f"{prefix}embeddings.position_embeddings", order),
    Row("decoder/mask_token", "decoder.mask_token"),
    _decoder_positions("decoder.decoder_pos_embed", order),
    *_linear("decoder/embed", "decoder.decoder_embed"),
    *_stacked(_HF_BLOCK, "decoder/blocks", "decoder.decoder_layers"),
    *_norm("decoder/norm", "decoder.decoder_norm"),
    *_linear("decoder/head", "decoder.decoder_pred"),
  )


# The loss centres of an AttMask or iBOT checkpoint, of our `aux`.
CENTERS: Table = (
  Row("center", "center", "center"),
  Row("center_patch", "center2", "center2"),
)
