"""Recorded state dicts: their names, their sizes and what they compute."""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
from torch_trees import back, filled, same, trees

from attmask_jax import mesh as meshes
from attmask_jax.evals import nearest
from attmask_jax.methods import classify, mae
from attmask_jax.models import embedding, heads, vit
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import (
  files,
  layouts,
  names,
  networks,
  pth,
  tables,
)


def under(file, prefix):
  return {k[len(prefix) :]: file[k] for k in file if k.startswith(prefix)}


RECORDED = {
  "attmask/vit_forward.npz sd/": "backbone",
  "mae/pretrain_forward.npz sd/gap/": "mae",
  "mae/pretrain_forward.npz sd/cls/": "mae",
  "mae/finetune_forward.npz sd/gap/": "mae_classifier",
  "mae/finetune_forward.npz sd/cls/": "mae_classifier",
  "extrema/vit_forward.npz sd/": "extrema",
  "extrema/finetune.npz sd/": "extrema_classifier",
}


def cfg_of(file):
  """Sizes by our names, whatever a code base calls them."""
  for ours, theirs in (
    ("width", ("dim", "embed_dim")), ("depth", ("depth",)),
    ("num_heads", ("heads", "num_heads")),
    ("patch_size", ("patch", "patch_size")),
    ("image_size", ("img", "img_size")), ("mlp_ratio", ("mlp_ratio",)),
    ("decoder_width", ("ddim",)), ("decoder_depth", ("ddepth",)),
    ("readout_layers", ("class_attention_layers",)),
    ("num_classes", ("ncls", "num_classes")),
    ("out_dim", ("out_dim", "proj_dim")),
    ("head_hidden", ("hidden", "mlp_dim")),
    ("head_bottleneck", ("bottleneck",)),
  ):  # fmt: skip
    for name in theirs:
      if f"cfg/{name}" in file:
        yield ours, file[f"cfg/{name}"].item()


def network(layout):
  """The backbone that a layout describes."""
  return vit.ViT(
    layout.width, layout.depth, layout.num_heads, layout.patch_size,
    layout.image_size, class_token=layout.class_token,
    positions=layout.positions, key_bias=layout.key_bias,
    readout_layers=layout.readout_layers,
  )  # fmt: skip


def decoder(layout, num_heads):
  pixels = 3 * layout.patch_size**2
  return mae.Decoder(
    layout.decoder_width, layout.decoder_depth, num_heads, pixels,
    layout.positions,
  )  # fmt: skip


def classifier_of(layout):
  """Its method."""
  return classify.Classify(
    network(layout), num_classes=layout.num_classes, epochs=1,
    steps_per_epoch=1, image_size=layout.image_size, batch_size=4,
    pool="mean" if layout.class_token == "none" else "cls", final_norm=False,
    head_norm=layout.probe_norm,
  )  # fmt: skip


def shapes_from(layout):
  """The tree that a network of this layout has."""
  images = jnp.zeros((1, layout.image_size, layout.image_size, 3))
  key, backbone = jax.random.key(0), network(layout)
  if layout.num_classes:
    params, _, aux = jax.eval_shape(classifier_of(layout).init, key)
    return {**aux, **params}
  mask = None
  if layout.mask_token:
    mask = jnp.zeros((1, backbone.grid**2), bool)
  init = lambda *x: backbone.init(key, *x)["params"]
  tree = {"backbone": jax.eval_shape(init, images, mask)}
  if layout.kind == "mae":
    n = backbone.grid**2
    make = lambda: decoder(layout, 1).init(
      key,
      jnp.zeros((1, n, layout.width)),
      jnp.arange(n)[None],
      (backbone.grid, backbone.grid),
    )["params"]
    tree["decoder"] = jax.eval_shape(make)
  return tree


@pytest.mark.parametrize("case", RECORDED)
def test_golden_names_and_sizes(golden, case):
  """Recorded state dicts pass through unchanged, name by name."""
  name, prefix = case.split()
  file = golden(name)
  cfg, tensors = dict(cfg_of(file)), under(file, prefix)
  layout = layouts.recognise(tensors, num_heads=cfg["num_heads"])
  assert layout.kind == RECORDED[case]
  for key, value in cfg.items():
    # The common cfg names parts that only some of these files hold.
    if key.startswith("decoder") and layout.kind != "mae":
      value = 0
    if key == "num_classes" and "classifier" not in layout.kind:
      value = 0
    assert getattr(layout, key) == value, key
  offset = 0.1 if layout.kind == "backbone" else 0.0  # of AttMask's backbone
  assert networks.build(layout).backbone.grid_offset == offset
  shapes = shapes_from(layout)
  got = names.to_ours(tensors, layout.table, shapes)
  assert got.missing == [] and got.unexpected == []
  side = layout.image_size // layout.patch_size
  again = names.to_theirs(got.tree, layout.table, grid=(side, side))
  assert again.keys() == tensors.keys()
  for key, want in tensors.items():
    assert again[key].shape == want.shape, key
    if key.endswith("pos_embed") and layout.positions != "learned":
      np.testing.assert_allclose(again[key], want, rtol=0, atol=2e-6)
    elif layout.kind == "extrema_classifier" and key == "cls_token":
      assert not again[key].any()  # it has no effect there
    else:
      np.testing.assert_array_equal(again[key], want, err_msg=key)


def converted(tensors, num_heads):
  layout = layouts.recognise(tensors, num_heads=num_heads)
  shapes = shapes_from(layout)
  got = names.to_ours(tensors, layout.table, shapes)
  assert got.missing == [] and got.unexpected == []
  return layout, got.tree


def test_golden_attmask_tokens(golden):
  file = golden("attmask/vit_forward.npz")
  layout, tree = converted(under(file, "sd/"), file["cfg/heads"].item())
  images = reference.nhwc(file["in/global"])
  params = {"params": tree["backbone"]}
  apply = jax.jit(network(layout).apply)
  # tests/golden/attmask/README.md gives 1e-4.
  tokens = apply(params, images).tokens
  np.testing.assert_allclose(tokens, file["out/global/tokens"], atol=1e-4)
  mask = jnp.asarray(file["in/mask"].reshape(len(images), -1))
  tokens = apply(params, images, mask).tokens
  np.testing.assert_allclose(
    tokens, file["out/global_masked/tokens"], atol=1e-4
  )
  # transformers names hold the same network.
  hf = names.to_theirs(tree, tables.hf_vit())
  same(back(hf, tables.hf_vit(), tree), tree)


@pytest.mark.parametrize("variant", ["shared", "separate"])
def test_golden_attmask_head(golden, variant):
  file = golden("attmask/head.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  tensors = {f"head.{k}": v for k, v in under(file, f"sd/{variant}/").items()}
  # A trunk beside it, as in every checkpoint.
  trunk = filled({"backbone": trees("attmask")[0]["backbone"]})
  tensors |= names.to_theirs(trunk, tables.backbone("backbone."))
  layout = layouts.recognise(tensors, num_heads=2)
  assert layout.prototypes == variant
  assert layout.out_dim == cfg("out_dim")
  assert layout.head_hidden == cfg("hidden")
  assert layout.head_bottleneck == cfg("bottleneck")
  separate = cfg("patch_out_dim") if variant == "separate" else 0
  assert layout.patch_out_dim == (separate or cfg("out_dim"))
  head = heads.Head(
    layout.out_dim, separate, layout.head_hidden, layout.head_bottleneck
  )
  tokens = jnp.asarray(file["in/tokens"])
  shapes = jax.eval_shape(head.init, jax.random.key(0), tokens)["params"]
  shapes = {"backbone": trunk["backbone"], "head": shapes}
  tree = back(tensors, layout.table, shapes)
  cls, patch = jax.jit(head.apply)({"params": tree["head"]}, tokens)
  np.testing.assert_allclose(cls, file[f"out/{variant}/cls"], atol=1e-5)
  np.testing.assert_allclose(patch, file[f"out/{variant}/patch"], atol=1e-5)
  same(names.to_theirs(tree, layout.table), tensors)


def loaded(tmp_path, tensors, num_heads, key="model", **rest):
  """What evaluations get of a file with these tensors."""
  pth.write(tmp_path / "a.pth", {key: tensors} | rest)
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  return loading.load(
    str(tmp_path / "a.pth"), network="teacher", mesh=mesh, num_heads=num_heads
  )


@pytest.mark.parametrize("variant", ["gap", "cls"])
def test_golden_mae(golden, variant, tmp_path):
  file = golden("mae/pretrain_forward.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  tensors = under(file, f"sd/{variant}/")
  heads_there = {"decoder_heads": cfg("dheads")}
  found = loaded(tmp_path, tensors, cfg("heads"), **heads_there)
  token = found.method.backbone.class_token
  assert token == ("input" if variant == "cls" else "none")
  # The file does not say which ratio; the recorded one decides who is visible.
  method = dataclasses.replace(found.method, mask_ratio=cfg("ratio"))
  pred = jax.jit(method.predict)(
    found.params,
    reference.nhwc(file[f"in/{variant}/images"]),
    jnp.asarray(file[f"in/{variant}/shuffle"], jnp.int32),
  )
  np.testing.assert_allclose(pred, file[f"out/{variant}/pred"], atol=2e-5)


def logits_of(found, images):
  return jax.jit(found.method.logits)({**found.params, **found.aux}, images)


@pytest.mark.parametrize("variant", ["gap", "cls", "lin"])
def test_golden_mae_classifier(golden, variant, tmp_path):
  file = golden("mae/finetune_forward.npz")
  tensors = under(file, f"sd/{variant}/")
  if variant == "lin":  # its trunk is that of the other file
    trunk = under(file, "sd/gap/")
    tensors |= {k: v for k, v in trunk.items() if k[:7] != "fc_norm"} | tensors
  found = loaded(tmp_path, tensors, file["cfg/heads"].item())
  logits = logits_of(found, reference.nhwc(file["in/images"]))
  name = "lin/eval_logits" if variant == "lin" else f"{variant}/logits"
  # BatchNorm and the README's forward tolerance of this family.
  np.testing.assert_allclose(logits, file[f"out/{name}"], atol=2e-5, rtol=1e-4)


def test_golden_extrema_features(golden):
  file = golden("extrema/vit_forward.npz")
  layout, tree = converted(under(file, "sd/"), file["cfg/num_heads"].item())
  tokens = jax.jit(network(layout).apply)(
    {"params": tree["backbone"]}, reference.nhwc(file["in/images"])
  )
  np.testing.assert_allclose(
    tokens.tokens[:, 0], file["out/full/feature"], rtol=1e-4, atol=2e-5
  )


@pytest.mark.parametrize("case", ["finetune", "lincls"])
def test_golden_extrema_classifiers(golden, case, tmp_path):
  file = golden(f"extrema/{case}.npz")
  tensors = under(file, "sd/")
  if case == "lincls":
    head = under(file, "head/end/")
    tensors = {k: v for k, v in tensors.items() if k[:5] != "norm."}
    tensors |= {f"head.{k}": v for k, v in head.items()}
    # As the release saves it.
    tensors = {f"module.{k}": v for k, v in tensors.items()}
  key = "state_dict" if case == "lincls" else "model"
  found = loaded(tmp_path, tensors, file["cfg/num_heads"].item(), key)
  logits = logits_of(found, reference.nhwc(file["in/images"][0]))
  want = file["out/eval_logits" if case == "lincls" else "out/logits_start"]
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def checkpoint(name):
  """A recorded checkpoint.pth and its networks."""
  root = pathlib.Path(os.environ.get("ATTMASK_GOLDEN", small.GOLDEN))
  obj = pth.read(root / name)
  return obj, dict(layouts.unwrap(obj))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_golden_attmask_checkpoint(golden, which):
  obj, networks = checkpoint("attmask/checkpoint.pth")
  file = golden("attmask/checkpoint.npz")
  cfg = dict(cfg_of(file))
  keys = [k.removeprefix("module.") for k in file[f"out/{which}_keys"].tolist()]
  tensors = networks[which]
  assert sorted(tensors) == sorted(keys)
  layout = layouts.recognise(tensors, num_heads=cfg["num_heads"])
  for key, value in cfg.items():
    assert getattr(layout, key) == value, key
  shapes = shapes_from(layout)
  head = heads.Head(
    layout.out_dim, 0, layout.head_hidden, layout.head_bottleneck
  )
  one = jnp.zeros((1, 2, layout.width))
  shapes["head"] = jax.eval_shape(head.init, jax.random.key(0), one)["params"]
  tree = back(tensors, layout.table, shapes)
  out = jax.jit(network(layout).apply)(
    {"params": tree["backbone"]}, reference.nhwc(file["in/global"])
  )
  cls, patch = jax.jit(head.apply)({"params": tree["head"]}, out.tokens)
  for got, name in ((cls, "head_cls"), (patch, "head_patch")):
    np.testing.assert_allclose(got, file[f"out/{which}/{name}"], atol=1e-4)
  aux = {k: jnp.zeros(layout.out_dim) for k in ("center", "center_patch")}
  centers = back(obj["ibot_loss"], tables.CENTERS, aux)
  np.testing.assert_array_equal(centers["center"], file["out/center"][0])
  np.testing.assert_array_equal(
    centers["center_patch"], file["out/center2"][0, 0]
  )


def test_golden_mae_checkpoint(golden, golden_root):
  _, networks = checkpoint("mae/checkpoint.pth")
  file = golden("mae/train_steps.npz")
  layout, tree = converted(networks["model"], file["cfg/heads"].item())
  want = under(file, "sd/cls/end/")
  grid = (layout.image_size // layout.patch_size,) * 2
  again = names.to_theirs(tree, layout.table, grid=grid)
  assert again.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(again[name], want[name], rtol=0, atol=2e-6)
  file = golden("mae/knn.npz")
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  found = loading.load(
    str(golden_root / "mae" / "checkpoint.pth"), network="teacher",
    mesh=mesh, num_heads=layout.num_heads,
  )  # fmt: skip
  images = reference.nhwc(file["in/images"])
  cls, _ = found.method.features(found.params, images, norm=False)
  np.testing.assert_allclose(
    cls, file["out/checkpoint_features_raw"], rtol=1e-4, atol=2e-5
  )
  assert files.read(golden_root / "mae" / "checkpoint.pth").epoch == 2


def test_golden_features_of_the_mae_checkpoint(golden):
  """What k-NN of MAE-priv compares: the class token that no norm has seen."""
  _, found = checkpoint("mae/checkpoint.pth")
  file = golden("mae/knn.npz")
  heads_of = golden("mae/train_steps.npz")["cfg/heads"].item()
  layout, tree = converted(found["model"], heads_of)
  features = functools.partial(
    embedding.features, network(layout), tree["backbone"]
  )
  images = reference.nhwc(file["in/images"])
  raw = embedding.embed(features, images, pool="cls", final_norm=False)
  want = file["out/checkpoint_features_raw"]
  np.testing.assert_allclose(raw, want, rtol=1e-4, atol=2e-5)
  unit = nearest.unit_rows(np.asarray(raw), 0, len(raw))
  want = file["out/checkpoint_features"]
  np.testing.assert_allclose(unit, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_golden_extrema_checkpoint(golden, which):
  obj, networks = checkpoint("extrema/checkpoint.pth")
  file = golden("extrema/checkpoint_forward.npz")
  cfg = dict(cfg_of(file))
  layout = layouts.recognise(networks[which], num_heads=cfg["num_heads"])
  for key, value in cfg.items():
    assert getattr(layout, key) == value, key
  assert layout.predictor == (which == "student")
  sizes = dict(hidden=layout.head_hidden, out=layout.out_dim)
  shapes, key = shapes_from(layout), jax.random.key(0)
  project = heads.Projector(layers=3, **sizes)
  for name, module, width in (
    ("head", project, layout.width),
    ("predictor", heads.Projector(layers=2, **sizes), layout.out_dim),
  ):
    init = jax.eval_shape(module.init, key, jnp.zeros((1, width)))
    if name == "head" or layout.predictor:
      shapes[name] = init["params"]
  tree = back(networks[which], layout.table, shapes)
  feature = jax.jit(network(layout).apply)(
    {"params": tree["backbone"]}, reference.nhwc(file["in/images"])
  )
  proj = jax.jit(project.apply)({"params": tree["head"]}, feature.tokens[:, 0])
  recorded = {"student": "base", "teacher": "momentum"}[which]
  np.testing.assert_allclose(
    proj, file[f"out/{recorded}/proj"], rtol=1e-4, atol=2e-5
  )
  assert layouts.wrap_extrema(networks).keys() == obj["state_dict"].keys()
