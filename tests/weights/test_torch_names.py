"""Name tables in both directions, and what does not fit them."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from torch_trees import (
  GRID,
  back,
  classifier,
  filled,
  same,
  shapes_of,
  trees,
  without_key_bias,
)

from attmask_jax.errors import InputError
from attmask_jax.models import positions
from attmask_jax.weights.torch_io import layouts, names, tables

SEPARATE = dict(shared_head=False, shared_head_teacher=False)
TREES = {
  "attmask": lambda: (trees("attmask")[0], {}),
  "attmask teacher": lambda: (trees("attmask")[1], {}),
  "attmask separate": lambda: (
    trees("attmask", patch_out_dim=48, **SEPARATE)[0],
    dict(prototypes="separate"),
  ),
  "attmask ln": lambda: (
    trees("attmask", head_norm="ln")[0], dict(head_norm="ln")
  ),
  "mae": lambda: (
    trees("mae")[0], dict(class_token="none", positions="yx")
  ),
  "mae cls": lambda: (
    trees("mae", class_token=True)[0], dict(positions="yx")
  ),
  "facebook_mae": lambda: (official_trees(), dict(positions="xy")),
  "hf_mae": lambda: (official_trees(), dict(positions="xy")),
  "extrema": lambda: (
    trees("extrema")[0], dict(predictor=True, positions="xy")
  ),
  "extrema teacher": lambda: (
    trees("extrema")[1], dict(predictor=False, positions="xy")
  ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", TREES)
def test_there_and_back(name, dtype):
  shapes, facts = TREES[name]()
  tree = filled(shapes, dtype)
  code_base = name.split()[0]
  if code_base == "mae":
    tree = without_key_bias(tree)
  table = {
    "attmask": lambda: tables.attmask(
      facts.get("prototypes", "shared"), norm="head_norm" in facts
    ),
    "mae": tables.mae,
    "facebook_mae": tables.facebook_mae,
    "hf_mae": tables.hf_mae,
    "extrema": tables.extrema,
  }[code_base]()
  tensors = names.to_theirs(tree, table, grid=GRID)
  for tensor in tensors.values():
    assert tensor.flags["C_CONTIGUOUS"] and tensor.dtype == dtype
  same(back(tensors, table, tree), tree)
  layout = layouts.recognise(tensors, num_heads=2)
  assert layout.kind == code_base
  assert layout.variant == "64x4x2" and layout.image_size == 32
  for key, value in facts.items():
    assert getattr(layout, key) == value
  assert layout.mask_token == (
    name in ("attmask", "attmask separate", "attmask ln")
  )
  # What is recognised is the table that was used.
  same(back(tensors, layout.table, tree), tree)


CLASSIFIERS = {
  "classifier": (tables.classifier, {}),
  "combined": (tables.combined, {}),
  "hf_classifier": (tables.hf_classifier, {}),
  "classifier_fc_norm": (
    tables.classifier_fc_norm, dict(head_norm="layer", unused_norm=True)
  ),
  "extrema_classifier": (
    tables.extrema_classifier,
    dict(head_norm="layer", unused_norm=True, class_token="none"),
  ),
  "mae_classifier": (
    tables.mae_classifier,
    dict(head_norm="layer", unused_norm=True, key_bias=False, positions="yx"),
  ),
  "mae_classifier gap probe": (
    tables.mae_classifier,
    dict(head_norm="batch", unused_norm=True, key_bias=False, positions="yx",
         class_token="none"),
  ),
  "extrema_probe": (
    tables.extrema_probe,
    dict(head_norm="batch", unused_norm=True, positions="xy",
         class_token="readout"),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_there_and_back(name):
  make, options = CLASSIFIERS[name]
  tree = classifier(**options)
  if options.get("unused_norm"):
    norm = tree["backbone"]["norm"]
    tree["backbone"]["norm"] = jax.tree.map(np.float32, norm)
  if not options.get("key_bias", True):
    tree = without_key_bias(tree)
  tensors = names.to_theirs(tree, make(), grid=(4, 4))
  assert "norm.weight" not in tensors or not options.get("unused_norm")
  same(back(tensors, make(), tree), tree)
  layout = layouts.recognise(tensors, num_heads=2)
  assert layout.kind == name.split()[0] and layout.num_classes == 5
  for ours, theirs in (
    ("head_norm", "probe_norm"), ("class_token", "class_token"),
    ("positions", "positions"), ("key_bias", "key_bias"),
  ):  # fmt: skip
    if ours in options:
      assert getattr(layout, theirs) == options[ours]
  same(back(tensors, layout.table, tree), tree)


def test_probe_and_centers_there_and_back():
  head = {"head": classifier()["head"]}
  tensors = names.to_theirs(head, tables.linear())
  assert {k: v.shape for k, v in tensors.items()} == {
    "linear.weight": (5, 16), "linear.bias": (5,),
  }  # fmt: skip
  same(back(tensors, tables.linear(), head), head)
  layout = layouts.recognise(tensors)
  assert (layout.kind, layout.features) == ("linear", 16)
  several = {"head": jax.tree.map(lambda x: np.repeat(x, 3, 0), head["head"])}
  with pytest.raises(InputError, match="holds 3 linear layers"):
    names.to_theirs(several, tables.linear())
  aux = filled(trees("attmask", out_dim=48)[2])
  tensors = names.to_theirs(aux, tables.CENTERS)
  assert tensors["center"].shape == (1, 48)
  assert tensors["center2"].shape == (1, 1, 48)
  same(back(tensors, tables.CENTERS, aux), aux)


def hf_names(prefix, depth):
  """As transformers 4 prints them."""
  out = [
    "embeddings.cls_token", "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.bias",
    "layernorm.weight", "layernorm.bias",
  ]  # fmt: skip
  for i in range(depth):
    for layer in (
      "attention.attention.query", "attention.attention.key",
      "attention.attention.value", "attention.output.dense",
      "intermediate.dense", "output.dense", "layernorm_before",
      "layernorm_after",
    ):  # fmt: skip
      out += [f"encoder.layer.{i}.{layer}.{x}" for x in ("weight", "bias")]
  return {prefix + name for name in out}


def test_transformers_names_split_the_projection():
  tree = classifier()
  tensors = names.to_theirs(tree, tables.hf_classifier())
  extra = {"classifier.weight", "classifier.bias"}
  assert tensors.keys() == hf_names("vit.", 2) | extra
  timm = names.to_theirs(tree, tables.classifier())
  for part, name in enumerate(("query", "key", "value")):
    for leaf in ("weight", "bias"):
      np.testing.assert_array_equal(
        tensors[f"vit.encoder.layer.1.attention.attention.{name}.{leaf}"],
        timm[f"blocks.1.attn.qkv.{leaf}"][16 * part : 16 * part + 16],
      )


def official_trees():
  return trees("mae", class_token=True, decoder_class_token=True)[0]


def official_mae():
  """Encoder of an official MAE under its names."""
  tree = {"backbone": classifier(positions="xy")["backbone"]}
  with pytest.raises(ValueError, match="grid is not given"):
    names.to_theirs(tree, tables.facebook_mae())
  tensors = names.to_theirs(tree, tables.facebook_mae(), grid=(4, 4))
  width = tensors["pos_embed"].shape[2]
  table = positions.sin_cos((4, 4), width, "xy")
  np.testing.assert_array_equal(tensors["pos_embed"][:, 1:], table)
  assert not tensors["pos_embed"][:, 0].any()
  return tree, tensors


def test_official_mae_with_and_without_decoder():
  tree, tensors = official_mae()
  layout = layouts.recognise(tensors, num_heads=2)
  assert (layout.kind, layout.positions) == ("facebook_mae", "xy")
  assert layout.decoder_width == 0 and not layout.decoder_class_token
  whole = filled(official_trees())
  tensors = names.to_theirs(whole, tables.facebook_mae(), grid=GRID)
  assert {n for n in tensors if n.startswith(("decoder_", "mask_token"))} == {
    "mask_token", "decoder_pos_embed",
    *(
      f"{name}.{leaf}"
      for leaf in ("weight", "bias")
      for name in (
        "decoder_embed", "decoder_norm", "decoder_pred",
        *(
          f"decoder_blocks.{i}.{x}"
          for i in (0, 1)
          for x in (
            "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
          )
        ),
      )
    ),
  }  # fmt: skip
  # A place for the class token, whose position is zero.
  assert tensors["decoder_pos_embed"].shape[1] == GRID[0] * GRID[1] + 1
  assert not tensors["decoder_pos_embed"][:, 0].any()
  layout = layouts.recognise(tensors, num_heads=2)
  assert layout.decoder_class_token and layout.decoder_num_heads == 16
  got = names.to_ours(tensors, layout.table, shapes_of(whole))
  assert got.missing == [] and got.unexpected == []
  same(got.tree, whole)
  # Its separate key bias is kept; a network that has none ignores it.
  hf = names.to_theirs(tree, tables.hf_mae(), grid=(4, 4))
  assert hf.keys() == hf_names("vit.", 2)
  assert layouts.recognise(hf, num_heads=2).kind == "hf_mae"


def test_fixed_positions_are_compared():
  tree, tensors = official_mae()
  wrong = dict(tensors, pos_embed=tensors["pos_embed"] + 0.01)
  with pytest.raises(InputError, match="pos_embed is not the fixed position"):
    names.to_ours(wrong, tables.facebook_mae(), shapes_of(tree))
  # The axes the other way round are the other code base.
  assert layouts.recognise(tensors, num_heads=2).positions == "xy"
  turned = names.to_theirs(tree, tables.facebook_mae("yx"), grid=(4, 4))
  assert layouts.recognise(turned, num_heads=2).positions == "yx"
  # A network with learned positions takes any table.
  learned = {"backbone": classifier()["backbone"]}
  got = names.to_ours(wrong, tables.facebook_mae(), shapes_of(learned))
  np.testing.assert_array_equal(
    got.tree["backbone"]["pos_embed"], wrong["pos_embed"]
  )


def test_what_does_not_fit_is_named():
  tree = filled({"backbone": trees("attmask")[0]["backbone"]})
  table, shapes = tables.backbone(), shapes_of(tree)
  tensors = names.to_theirs(tree, table)
  block = "blocks.2.attn.proj.bias"
  siblings = [f"blocks.{i}.attn.proj.bias" for i in (0, 1, 3)]
  cut = {k: v for k, v in tensors.items() if k not in (block, "cls_token")}
  got = names.to_ours(cut | {"odd": tensors["cls_token"]}, table, shapes)
  assert got.missing == [block, "cls_token"]
  # The other blocks of an incomplete leaf are not silently lost.
  assert got.unexpected == sorted([*siblings, "odd"])
  assert sorted([*got.matched, *got.unexpected]) == sorted([*cut, "odd"])
  assert "cls_token" not in got.tree["backbone"]
  assert "bias" not in got.tree["backbone"]["blocks"]["attn"]["proj"]
  wrong = tensors | {"norm.bias": np.zeros(63, np.float32)}
  with pytest.raises(
    InputError, match=r"norm.bias has shape \(63,\).* needs \(64,\)"
  ):
    names.to_ours(wrong, table, shapes)
  wrong = tensors | {"blocks.1.mlp.fc1.weight": np.zeros((64, 256))}
  with pytest.raises(InputError, match=r"blocks.1.mlp.fc1.weight has shape"):
    names.to_ours(wrong, table, shapes)
  extra = tree | {"predictor": {"bias": np.zeros(3)}}
  with pytest.raises(InputError, match="predictor/bias has no name"):
    names.to_theirs(extra, table)
  shapes["head"] = {"other": jax.ShapeDtypeStruct((3,), np.float32)}
  assert names.to_ours(tensors, table, shapes).missing == ["head/other"]


def test_head_with_norms_has_one_under_two_names():
  tree = {"head": filled(trees("attmask", head_norm="ln")[0]["head"])}
  tensors = names.to_theirs(tree, tables.head(norm=True))
  mlp = {name.split(".")[2] for name in tensors if ".mlp." in name}
  assert mlp == set("01346")  # linear, norm, GELU; linear, norm, GELU; linear
  for leaf in ("weight", "bias"):
    np.testing.assert_array_equal(
      tensors[f"head.mlp.1.{leaf}"], tensors[f"head.mlp.4.{leaf}"]
    )
  assert tensors["head.mlp.3.weight"].shape == (256, 256)


def test_shared_prototypes_must_agree():
  tree = filled(trees("attmask")[0])
  tensors = names.to_theirs(tree, tables.attmask())
  name = "head.last_layer2.weight_g"
  tensors[name] = tensors[name] + 1
  with pytest.raises(InputError, match=f"{name} differs from head.last_layer"):
    names.to_ours(tensors, tables.attmask(), shapes_of(tree))
  assert layouts.recognise(tensors, num_heads=2).prototypes == "separate"
  del tensors[name], tensors["head.last_layer2.weight_v"]
  assert layouts.recognise(tensors, num_heads=2).prototypes == "class_only"


def test_unwrap_finds_networks():
  one, two = np.ones(1), np.zeros(1)
  both = {"student": {"module.head.x": one}, "teacher": {"head.x": two}}
  got = layouts.unwrap(both | {"epoch": 3, "args": object()})
  assert got == [("student", {"head.x": one}), ("teacher", {"head.x": two})]
  for obj in (
    {"state_dict": {"module.linear.bias": one}, "best_acc": 1.0},
    {"model": {"linear.bias": one}, "optimizer": {"state": {}}},
    {"module._orig_mod.linear.bias": one, "epoch": 3},
  ):
    assert layouts.unwrap(obj) == [("model", {"linear.bias": one})]
  assert [n for n, _ in layouts.unwrap({"teacher": {"x": one}})] == ["teacher"]
  averaged = {"model": {"x": one}, "model_ema": {"x": two}}
  assert layouts.unwrap(averaged) == [
    ("student", {"x": one}), ("teacher", {"x": two}),
  ]  # fmt: skip
  extrema = {
    "state_dict": {
      "module.base_encoder.norm.bias": one,
      "module.momentum_encoder.norm.bias": two,
      "module.predictor.0.bias": one,
    }
  }
  assert layouts.unwrap(extrema) == [
    ("student", {"norm.bias": one, "predictor.0.bias": one}),
    ("teacher", {"norm.bias": two}),
  ]
  joined = layouts.wrap_extrema(dict(layouts.unwrap(extrema)))
  assert joined == extrema["state_dict"]
  with pytest.raises(InputError, match="holds epoch, model"):
    layouts.unwrap({"epoch": 3, "model": {}})


def test_unknown_or_damaged_files_are_refused():
  with pytest.raises(InputError, match="names conv1.weight, fc.bias"):
    layouts.recognise({"fc.bias": np.ones(1), "conv1.weight": np.ones(1)})
  tree = filled({"backbone": trees("attmask")[1]["backbone"]})
  tensors = names.to_theirs(tree, tables.backbone())
  assert layouts.recognise(tensors).num_heads == 1  # of 64 values each
  with pytest.raises(InputError, match="is not a multiple of 3 heads"):
    layouts.recognise(tensors, num_heads=3)
  for change, message in (
    ({"patch_embed.proj.weight": np.ones((64, 48))}, "and not 4 axes"),
    ({"pos_embed": np.ones((1, 67, 64))}, "pos_embed has 67 positions"),
  ):
    with pytest.raises(InputError, match=message):
      layouts.recognise(tensors | change)
  cut = {k: v for k, v in tensors.items() if k != "blocks.0.norm1.weight"}
  with pytest.raises(InputError, match="blocks.0.norm1.weight is missing"):
    layouts.recognise(cut)
  del tensors["pos_embed"]
  with pytest.raises(InputError, match="pos_embed is missing"):
    layouts.recognise(tensors)
  narrow = classifier()
  with pytest.raises(InputError, match="width 16 do not say how many"):
    layouts.recognise(names.to_theirs(narrow, tables.classifier()))


@pytest.mark.parametrize(
  ("width", "hidden"), [(1664, 8192), (1664, 6848), (1408, 6144), (100, 113)]
)
def test_widths_of_the_mlp_come_back(width, hidden):
  thin = {
    "patch_embed.proj.weight": np.empty((width, 3, 16, 16), np.float16),
    "pos_embed": np.ones((1, 5, width), np.float16),
    "blocks.0.norm1.weight": np.ones(width),
    "blocks.0.mlp.fc1.weight": np.empty((hidden, 1)),
  }
  layout = layouts.recognise(thin, num_heads=2)
  assert int(layout.mlp_ratio * width) == hidden  # as `layers.Mlp` has it


def test_types_without_a_common_one_become_float32():
  tree = {"backbone": classifier()["backbone"]}
  table = tables.backbone()
  tensors = names.to_theirs(tree, table)
  rounded = {"blocks.0.norm1.bias": np.float16,
             "blocks.1.norm1.bias": ml_dtypes.bfloat16}  # fmt: skip
  for name, dtype in rounded.items():
    tensors[name] = tensors[name].astype(dtype)
  got = names.to_ours(tensors, table, shapes_of(tree)).tree["backbone"]
  bias = got["blocks"]["norm1"]["bias"]
  assert bias.dtype == np.float32
  for i, name in enumerate(rounded):
    np.testing.assert_array_equal(bias[i], tensors[name].astype("f4"))


def test_names_of_a_file_reach_the_terminal_tame():
  name = "conv\x1b[31m" + 500 * "x"
  for call in (
    lambda: layouts.recognise({name: np.ones(1)}),
    lambda: layouts.unwrap({name: 1}),
  ):
    with pytest.raises(InputError) as error:
      call()
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 400


def test_damage_is_our_own_error():
  """Any tensor gone, or of odd shape and values: an InputError or a report."""
  rng = np.random.default_rng(1)
  files = [
    (filled(trees("mae", class_token=True)[0]), tables.mae()),
    (filled(trees("extrema")[0]), tables.extrema()),
    (filled(trees("attmask")[0]), tables.attmask()),
    (classifier(), tables.hf_classifier()),
  ]
  shapes = [(), (0,), (7,), (3, 5), (1, 4, 4), (1, 2, 3, 4), (1, 65, 64)]
  refused = 0
  for tree, table in files:
    tensors = names.to_theirs(tree, table, grid=GRID)
    for name in rng.permutation(sorted(tensors))[:40].tolist():
      damaged = dict(tensors)
      damaged[name] = np.full(shapes[rng.integers(7)], np.nan, np.float32)
      if rng.random() < 0.3:
        del damaged[name]
      try:
        layout = layouts.recognise(damaged, num_heads=2)
        got = names.to_ours(damaged, layout.table, shapes_of(tree))
        assert got.missing or got.unexpected or name.endswith("pos_embed")
      except InputError:
        refused += 1
  assert refused > 60


@pytest.mark.parametrize(
  ("width", "depth", "num_heads", "variant"),
  [(192, 12, 3, "tiny"), (384, 12, 6, "small"), (768, 12, 12, "base"),
   (1024, 24, 16, "large"), (1280, 32, 16, "huge"), (128, 1, 2, "128x1x2")],
)  # fmt: skip
def test_published_sizes(width, depth, num_heads, variant):
  layout = layouts.Layout(
    "backbone", (), width=width, depth=depth, num_heads=num_heads
  )
  assert layout.variant == variant
  thin = {
    "patch_embed.proj.weight": np.empty((width, 3, 16, 16), np.float16),
    "pos_embed": np.ones((1, 197, width), np.float16),
    "blocks.0.norm1.weight": np.ones(width),
    "blocks.0.mlp.fc1.weight": np.empty((4 * width, 1)),
  }
  found = layouts.recognise(thin)
  assert dataclasses.astuple(found)[2:7] == (width, 1, num_heads, 16, 224)
