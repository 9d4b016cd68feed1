"""Our exports in timm and transformers, and theirs in ours: the same numbers.

Runs where torch, timm and transformers are installed.
"""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from attmask_jax import mesh as meshes
from attmask_jax.methods.classify import Classify
from attmask_jax.methods.mae import Decoder, Mae
from attmask_jax.models import positions, vit
from attmask_jax.weights import export
from attmask_jax.weights.loading import Weights, load
from attmask_jax.weights.torch_io import networks

NEEDED = ("torch", "timm", "transformers")
pytestmark = pytest.mark.skipif(
  not all(map(importlib.util.find_spec, NEEDED)),
  reason=f"needs {', '.join(NEEDED)}",
)
CLOSE = dict(rtol=0, atol=1e-4)
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def torch():
  """torch, with what torchvision lacks on a machine without a GPU."""
  import torch

  library = torch.library.Library("torchvision", "FRAGMENT")
  for name in ("nms", "qnms"):
    library.define(
      f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
  torch.set_grad_enabled(False)
  yield torch
  del library


def source(method, params, name="attmask"):
  config = ml_collections.ConfigDict(dict(method=dict(name=name)))
  known = dict(
    method=method, params=params, aux={}, config=config, where="runs/x",
    network="teacher", step=0,
  )  # fmt: skip
  return Weights(**dict.fromkeys(Weights._fields) | known)


def network(variant, size=32, **options):
  """A ViT with random weights."""
  sizes = vit.VARIANTS[variant]
  backbone = vit.ViT(**sizes, patch_size=16, image_size=size, **options)
  method = networks.Backbone(backbone)
  return method, drawn(jax.eval_shape(method.init, jax.random.key(0))[0])


def drawn(shapes):
  """Random weights everywhere, biases and norms included."""
  draw = lambda path, leaf: (
    RNG.normal(
      size=leaf.shape, scale=0.3 if "scale" in str(path) else 0.05
    ).astype("f4")
    + ("scale" in str(path))
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


def images(size=32):
  pixels = RNG.normal(size=(2, size, size, 3)).astype("f4")
  return jnp.asarray(pixels), np.moveaxis(pixels, -1, 1)


def tokens(method, params, x):
  out = method.backbone.apply({"params": params["backbone"]}, x)
  return np.asarray(out.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_our_export(torch, tmp_path, variant, suffix):
  import timm

  method, params = network(variant)
  path = tmp_path / f"a{suffix}"
  ours = source(method, params)
  export.export(str(path), ours, ours, format="timm")
  model = timm.create_model(
    f"vit_{variant}_patch16_224", img_size=32, num_classes=0,
    checkpoint_path=str(path),
  ).eval()  # fmt: skip
  x, theirs = images()
  want = model.forward_features(torch.from_numpy(theirs)).numpy()
  np.testing.assert_allclose(tokens(method, params, x), want, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_we_load_timm(torch, tmp_path, variant):
  import timm

  model = timm.create_model(
    f"vit_{variant}_patch16_224", img_size=48, num_classes=7
  ).eval()
  for value in model.parameters():
    value.add_(0.05 * torch.randn(value.shape))
  torch.save(model.state_dict(), tmp_path / "a.pth")
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  found = load(str(tmp_path / "a.pth"), network="teacher", mesh=mesh)
  assert isinstance(found.method, Classify)
  assert found.config.method.variant == variant
  x, theirs = images(48)
  want = model(torch.from_numpy(theirs)).numpy()
  got = found.method.logits(found.params, x)
  np.testing.assert_allclose(got, want, **CLOSE)


def test_we_load_a_mean_of_normed_patches(torch, tmp_path):
  import timm

  model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, num_classes=7, class_token=False,
    global_pool="avg", fc_norm=False,
  ).eval()  # fmt: skip
  for value in model.parameters():
    value.add_(0.05 * torch.randn(value.shape))
  torch.save(model.state_dict(), tmp_path / "a.pth")
  found = load(str(tmp_path / "a.pth"), network="teacher", mesh=one_device())
  x, theirs = images()
  want = model(torch.from_numpy(theirs)).numpy()
  np.testing.assert_allclose(
    found.method.logits(found.params, x), want, **CLOSE
  )
  export.export(str(tmp_path / "b.pth"), found, found, format="timm")
  model.load_state_dict(torch.load(tmp_path / "b.pth"))


def test_we_load_an_official_linear_probe(torch, tmp_path):
  """Of MAE: a batch norm and a linear layer on the normed class token."""
  import timm

  model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
  norm = torch.nn.BatchNorm1d(192, affine=False, eps=1e-6)
  model.head = torch.nn.Sequential(norm, model.head)
  for value in model.parameters():
    value.add_(0.05 * torch.randn(value.shape))
  norm.running_mean.normal_()
  norm.running_var.uniform_(0, 1e-4)  # the small number counts
  table = positions.sin_cos((2, 2), 192, "xy")
  model.pos_embed[:] = torch.from_numpy(np.pad(table, [(0, 0), (1, 0), (0, 0)]))
  torch.save({"model": model.eval().state_dict()}, tmp_path / "a.pth")
  found = load(str(tmp_path / "a.pth"), network="teacher", mesh=one_device())
  x, theirs = images()
  want = model(torch.from_numpy(theirs)).numpy()
  got = found.method.logits({**found.params, **found.aux}, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_transformers_load_our_export(torch, tmp_path, variant):
  from transformers import ViTModel

  method, params = network(variant)
  ours = source(method, params)
  path = tmp_path / "model.safetensors"
  export.export(str(path), ours, ours, format="hf")
  model = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
  x, theirs = images()
  want = model(torch.from_numpy(theirs)).last_hidden_state.numpy()
  np.testing.assert_allclose(tokens(method, params, x), want, **CLOSE)


def test_classifiers_in_timm_and_transformers(torch, tmp_path):
  import timm
  from transformers import ViTForImageClassification

  bare, params = network("tiny")
  method = Classify(
    bare.backbone, 7, epochs=1, steps_per_epoch=1, image_size=32, batch_size=2,
    frozen=False,
  )  # fmt: skip
  params = params | {
    "head": {
      "kernel": RNG.normal(size=(1, 192, 7)).astype("f4"),
      "bias": RNG.normal(size=(1, 7)).astype("f4"),
    }
  }
  ours = source(method, params, "classify")
  export.export(str(tmp_path / "a.pth"), ours, ours, format="timm")
  x, theirs = images()
  got = np.asarray(method.logits(params, x))
  model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, num_classes=7,
    checkpoint_path=str(tmp_path / "a.pth"),
  ).eval()  # fmt: skip
  want = model(torch.from_numpy(theirs)).numpy()
  np.testing.assert_allclose(got, want, **CLOSE)
  file = tmp_path / "hf" / "model.safetensors"
  export.export(str(file), ours, ours, format="hf")
  model = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
  want = model(torch.from_numpy(theirs)).logits.numpy()
  np.testing.assert_allclose(got, want, **CLOSE)


FIXED = {  # of the recipes finetune_mae_* and a probe on normed class tokens
  "mean patch": (
    dict(class_token="none", positions="yx"),
    dict(pool="mean", final_norm=False, head_norm="layer"),
    dict(class_token=False, global_pool="avg", fc_norm=True),
  ),
  "mean patch with class token": (
    dict(positions="xy"),
    dict(pool="mean", final_norm=False, head_norm="layer"),
    dict(global_pool="avg"),
  ),
  "class token": (
    dict(positions="yx"), dict(final_norm=False, head_norm="layer"), {},
  ),
  "batch norm": (dict(positions="learned"), dict(head_norm="batch"), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", FIXED)
def test_other_classifiers(torch, tmp_path, case):
  import timm
  from transformers import ViTForImageClassification

  options, reads, there = FIXED[case]
  bare, _ = network("tiny", **options)
  method = Classify(
    bare.backbone, 7, epochs=1, steps_per_epoch=1, image_size=32, batch_size=2,
    frozen=False, **reads,
  )  # fmt: skip
  shapes, _, aux = jax.eval_shape(method.init, KEY)
  params, aux = drawn(shapes), drawn(aux)
  if aux:
    # So small that the small number added to it counts.
    aux["batch_norm"]["var"] = 1e-3 * np.exp(aux["batch_norm"]["var"])
  ours = source(method, params, "classify")._replace(aux=aux)
  file = tmp_path / "model.safetensors"
  export.export(str(file), ours, ours, format="timm")
  model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, num_classes=7,
    checkpoint_path=str(file), **there,
  ).eval()  # fmt: skip
  x, theirs = images()
  got = np.asarray(method.logits(params | aux, x))
  want = model(torch.from_numpy(theirs)).numpy()
  np.testing.assert_allclose(got, want, **CLOSE)
  found = load(str(file), network="teacher", mesh=one_device())
  np.testing.assert_allclose(
    found.method.logits(found.params, x), want, **CLOSE
  )
  if method.pool == "cls":
    file = tmp_path / "hf" / "model.safetensors"
    export.export(str(file), ours, ours, format="hf")
    model = ViTForImageClassification.from_pretrained(tmp_path / "hf").eval()
    want = model(torch.from_numpy(theirs)).logits.numpy()
    np.testing.assert_allclose(got, want, **CLOSE)


def one_device():
  return meshes.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("token", ["none", "readout"])
def test_encoders_without_class_token_in_transformers(torch, tmp_path, token):
  from transformers import SiglipVisionModel

  method, params = network("tiny", positions="xy", class_token=token)
  ours = source(method, params, "extrema")
  file = tmp_path / "model.safetensors"
  export.export(str(file), ours, ours, format="hf")
  model, report = SiglipVisionModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  x, theirs = images()
  want = model.eval()(torch.from_numpy(theirs)).last_hidden_state.numpy()
  patches = tokens(method, params, x)[:, int(token == "readout") :]
  np.testing.assert_allclose(patches, want, **CLOSE)
  found = load(str(file), network="teacher", mesh=one_device())
  assert found.method.backbone.class_token == "none"
  patches = tokens(found.method, found.params, x)
  np.testing.assert_allclose(patches, want, **CLOSE)


def test_mae_encoder_in_transformers(torch, tmp_path):
  from transformers import ViTMAEModel

  method, params = network("tiny", positions="xy")
  ours = source(method, params, "mae")
  export.export(str(tmp_path / "model.safetensors"), ours, ours, format="hf")
  model = ViTMAEModel.from_pretrained(tmp_path, mask_ratio=0.0).eval()
  x, theirs = images()
  order = torch.arange(4).repeat(2, 1).float()  # nothing is shuffled
  want = model(torch.from_numpy(theirs), noise=order).last_hidden_state
  np.testing.assert_allclose(tokens(method, params, x), want.numpy(), **CLOSE)


def official_mae():
  """An MAE as the official release has it, with random weights."""
  backbone = network("tiny", 64, positions="xy")[0].backbone
  decoder = Decoder(64, 2, 16, 768, positions="xy", class_token=True)
  options = dict(target_layout="hwc", target_variance="unbiased")
  method = Mae(backbone, decoder, **options)
  return method, drawn(jax.eval_shape(method.init, jax.random.key(0))[0])


def reconstructed(torch, model):
  """A picture's loss and pixels by transformers, and the order of patches."""
  x, theirs = images(64)
  order = np.stack([RNG.permutation(16) for _ in range(2)])
  noise = torch.from_numpy(np.argsort(order, axis=1)).float()
  out = model(torch.from_numpy(theirs), noise=noise)
  return x, jnp.asarray(order), out.loss.item(), out.logits.numpy()


class GivenOrder(Mae):
  """Takes the order of patches from the batch."""

  def order(self, teacher, images, batch, rng):
    return batch["order"]


def same_reconstruction(method, params, x, order, loss, pixels):
  pred = method.predict(params, x, order)
  np.testing.assert_allclose(pred, pixels, **CLOSE)
  batch = {"images": x[:, None], "order": order}
  fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
  got = GivenOrder(**fields).loss(params, {}, {}, batch, KEY, {}).loss
  np.testing.assert_allclose(got, loss, **CLOSE)


def test_whole_mae_in_transformers(torch, tmp_path):
  from transformers import ViTMAEForPreTraining

  method, params = official_mae()
  ours = source(method, params, "mae")
  export.export(str(tmp_path / "model.safetensors"), ours, ours, format="hf")
  model, report = ViTMAEForPreTraining.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  assert model.config.norm_pix_loss and model.config.mask_ratio == 0.75
  same_reconstruction(method, params, *reconstructed(torch, model.eval()))


@pytest.mark.parametrize("names", ["saved", "in memory", "official"])
def test_we_load_a_whole_mae(torch, tmp_path, names):
  from transformers import ViTMAEConfig, ViTMAEForPreTraining

  model = ViTMAEForPreTraining(
    ViTMAEConfig(
      hidden_size=192, num_hidden_layers=3, num_attention_heads=3,
      intermediate_size=768, image_size=64, decoder_hidden_size=64,
      decoder_num_hidden_layers=2, decoder_num_attention_heads=16,
      decoder_intermediate_size=256, layer_norm_eps=1e-6, norm_pix_loss=True,
    )
  ).eval()  # fmt: skip
  model.vit.embeddings.initialize_weights()  # positions are left at 0 else
  model.decoder.initialize_weights(16)
  for name, value in model.named_parameters():
    if "pos" not in name:
      value.add_(0.05 * torch.randn(value.shape))
  path = tmp_path / "mae.pth"
  if names == "saved":
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
  elif names == "in memory":
    torch.save(model.state_dict(), path)
  else:
    torch.save({"model": official_names(torch, model)}, path)
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  found = load(str(path), network="student", mesh=mesh)
  assert isinstance(found.method, Mae)
  order = reconstructed(torch, model)
  same_reconstruction(found.method, found.params, *order)


def official_names(torch, model):
  """The state dict of ViTMAEForPreTraining under the official names."""
  pairs = (
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.encoder.layer.", "blocks."),
    ("vit.layers.", "blocks."), ("vit.layernorm.", "norm."),
    ("vit.embeddings.", ""),
    ("decoder.decoder_layers.", "decoder_blocks."), ("decoder.", ""),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"),
    ("attention.output.dense", "attn.proj"),
    ("attention.o_proj", "attn.proj"),
    ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
  )  # fmt: skip
  found, split = {}, {}
  for name, value in model.state_dict().items():
    for old, new in pairs:
      name = name.replace(old, new)
    part = re.fullmatch(
      r"(.*)\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.(\w+)",
      name,
    )
    if part:
      split.setdefault(f"{part[1]}.attn.qkv.{part[3]}", {})[part[2][0]] = value
    else:
      found[name] = value
  return found | {
    name: torch.cat([parts[x] for x in "qkv"]) for name, parts in split.items()
  }


@pytest.mark.parametrize("token", ["none", "readout"])
def test_encoders_without_class_token_in_timm(torch, tmp_path, token):
  import timm

  method, params = network("tiny", positions="xy", class_token=token)
  ours = source(method, params, "extrema")
  export.export(str(tmp_path / "a.pth"), ours, ours, format="timm")
  model = timm.create_model(
    "vit_tiny_patch16_224", img_size=32, num_classes=0, class_token=False,
    global_pool="avg", fc_norm=False, checkpoint_path=str(tmp_path / "a.pth"),
  ).eval()  # fmt: skip
  x, theirs = images()
  want = model.forward_features(torch.from_numpy(theirs)).numpy()
  got = tokens(method, params, x)[:, int(token == "readout") :]
  np.testing.assert_allclose(got, want, **CLOSE)
