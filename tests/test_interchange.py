"""Weights from and to other code bases, end to end, and what is refused."""

import dataclasses
import json
import logging
import os
import shutil
import tracemalloc
import types

import jax
import numpy as np
import pytest
import small

import attmask_jax
from attmask_jax import evaluate, interchange, train
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.methods import METHODS, classify
from attmask_jax.models import vit
from attmask_jax.weights import classifier as classifiers
from attmask_jax.weights import export as exporting
from attmask_jax.weights import init_from as starts
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import (
  files,
  names,
  networks,
  pth,
  tables,
  tensors,
)
from configs import evals, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Run directory of a small AttMask run."""
  folder = tmp_path_factory.mktemp("trained")
  train.train(small.config(), str(folder / "run"))
  return folder / "run"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  """Its full checkpoint as PyTorch's."""
  path = tmp_path_factory.mktemp("exported") / "checkpoint.pth"
  export(trained, path, format="attmask")
  return path


def export(where, path, *, format, network="teacher", probe="", **options):
  config = evals.get_config("knn")
  config.weights, config.network = str(where), network
  config.probe = probe
  settings = dict(dtype="float32", backbone_only=False) | options
  interchange.export_weights(config, str(path), format=format, **settings)
  return path


def load(where, network="teacher", **options):
  return loading.load(
    str(where), network=network, mesh=meshes.make_mesh(), **options
  )


def same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


# Round trips ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_full_checkpoint_there_and_back(trained, tmp_path, suffix, dtype):
  path = export(trained, tmp_path / f"a{suffix}", format="attmask", dtype=dtype)
  file = files.read(str(path))
  assert set(file.networks) == {"student", "teacher"}
  assert file.epoch == 2 and set(file.centers) == {"center", "center_patch"}
  for network in ("student", "teacher"):
    ours, theirs = load(trained, network), load(path, network)
    rounded = jax.tree.map(
      lambda x: np.asarray(x).astype(dtype).astype("f4"), ours.params
    )
    same(theirs.params, rounded)
  # Written again it is the same file.
  again = export(path, tmp_path / f"b{suffix}", format="attmask", dtype=dtype)
  if suffix == ".pth":
    assert path.read_bytes() == again.read_bytes()
  else:  # the package writes its notes in any order
    (first, notes), (second, others) = map(tensors.read, (path, again))
    assert notes == others
    same(first, second)


def test_a_backbone_alone(trained, tmp_path, caplog):
  teacher = load(trained)
  for name, form in (("a.pth", "attmask"), ("b.pth", "timm"), ("c.pth", "hf")):
    path = export(trained, tmp_path / name, format=form, backbone_only=True)
    # A flat file does not say how many heads there are: 8 wide is unusual.
    found = load(path, num_heads=2)
    assert list(found.params) == ["backbone"]
    same(found.params["backbone"], teacher.params["backbone"])
  assert set(pth.read(tmp_path / "a.pth")) == {"state_dict", "heads"}
  assert "rename c.pth" in caplog.text


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_formats_of_two_networks_hold_both(trained, tmp_path, network):
  """Whichever network is named."""
  path = tmp_path / "a.pth"
  export(trained, path, format="attmask", network=network)
  for name in ("student", "teacher"):
    same(load(path, name).params, load(trained, name).params)
  bare = export(trained, tmp_path / "b.pth", format="timm", network=network)
  want = load(trained, network).params["backbone"]
  same(load(bare, num_heads=2).params["backbone"]["norm"], want["norm"])


def test_a_file_without_centers_goes_through(exported, tmp_path, caplog):
  no_centers = lambda tree: tree.pop("ibot_loss")
  where = changed(exported, tmp_path / "a.pth", no_centers)
  config = evals.get_config("knn")
  config.weights = where
  interchange.import_weights(config, str(tmp_path / "new"))
  again = export(tmp_path / "new", tmp_path / "b.pth", format="attmask")
  assert "ibot_loss" not in pth.read(again)
  assert "holds no loss centres" in caplog.text
  # DINO's one is there under another name.
  center = pth.read(exported)["ibot_loss"]["center"]
  dino = lambda t: t.update(dino_loss={"center": t.pop("ibot_loss")["center"]})
  config.weights = changed(exported, tmp_path / "c.pth", dino)
  assert set(files.read(config.weights).centers) == {"center"}
  interchange.import_weights(config, str(tmp_path / "dino"))
  again = export(tmp_path / "dino", tmp_path / "d.pth", format="attmask")
  same(pth.read(again)["ibot_loss"], {"center": center})


def test_import_is_a_checkpoint_of_ours(trained, exported, tmp_path, capsys):
  config = evals.get_config("knn")
  config.weights = str(exported)
  interchange.import_weights(config, str(tmp_path / "new"))
  said = capsys.readouterr().out
  assert "ViT 16x2x2 with patches of 4 and images of 16 pixels" in said
  for network in ("student", "teacher"):
    same(load(tmp_path / "new", network).params, load(trained, network).params)
  again = export(tmp_path / "new", tmp_path / "b.pth", format="attmask")
  a, b = pth.read(exported), pth.read(again)
  same(a["teacher"], b["teacher"])
  same(a["ibot_loss"], b["ibot_loss"])
  with pytest.raises(InputError, match="is not empty"):
    interchange.import_weights(config, str(tmp_path / "new"))
  with pytest.raises(InputError, match="is a file: give a new directory"):
    interchange.import_weights(config, str(exported))


OFFICIAL = dict(
  class_token=True, decoder_class_token=True, position_order="xy",
  target_layout="hwc", target_variance="unbiased", decoder_num_heads=4,
)  # fmt: skip


@pytest.mark.parametrize("family", ["mae", "official mae", "extrema"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_other_families(tmp_path, family, suffix):
  official, family = family.startswith("official"), family.split()[-1]
  config = tiny.get_config(family)
  if official:
    config.method.update(OFFICIAL)
    config.evals.pool = "cls"
  method = METHODS[family].from_config(config, steps_per_epoch=1)
  params, teacher, _ = jax.device_get(method.init(jax.random.key(3)))
  bumped = lambda tree: jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.01 * ("qkv" not in str(path)), tree
  )
  params, teacher = bumped(params), bumped(teacher)
  known = dict(aux={}, config=config, digest="", step=0, where="x")
  of = lambda tree, name: loading.Weights(
    method=method, params=tree, network=name, run_dir=None, **known
  )
  student = of(params, "student")
  other = of(teacher, "teacher") if teacher else student
  path = tmp_path / f"a{suffix}"
  exporting.export(str(path), student, other, format=family, epoch=4)
  file = files.read(str(path))
  assert file.epoch == 4
  # MAE's code bases say which epoch was the last, counted from 0.
  assert file.rest["epoch"] == (3 if family == "mae" else 4)
  same(load(path, "student").params, params)
  same(load(path, "teacher").params, teacher or params)
  if family == "mae":
    found = load(path, "student").method
    assert found.decoder.num_heads == (4 if official else 2)
    assert found.decoder.class_token == official
    assert found.target_layout == ("hwc" if official else "chw")
    other = {"chw": "hwc", "hwc": "chw"}[method.target_layout]
    mixed = dataclasses.replace(method, target_layout=other)
    with pytest.raises(InputError, match="no code base has both"):
      exporting.export(
        str(path), *[student._replace(method=mixed)] * 2, format="mae"
      )


# Evaluations on files -------------------------------------------------------


def evaluated(name, where, folder, **changes):
  config = evals.get_config(name)
  config.weights = str(where)
  config.evals.batch_size = 16
  config.data.update(source="shapes", shapes_train=64, shapes_val=48)
  config.run.tensorboard = False
  config.update_from_flattened_dict(changes)
  evaluate.evaluate(config.lock(), str(folder))
  return json.loads((folder / "results.json").read_text())["values"]


@pytest.mark.slow
def test_evaluations_take_files(trained, exported, tmp_path):
  options = {"evals.knn_ks": (3, 5)}
  ours = evaluated("knn", trained, tmp_path / "a", **options)
  theirs = evaluated("knn", exported, tmp_path / "b", **options)
  assert ours == pytest.approx(theirs)
  short = {"method.last_blocks": 1, "optim.epochs": 1, "data.batch_size": 16}
  evaluated("linear", exported, tmp_path / "probe", **short)
  folder = tmp_path / "probe"
  clean = evaluated(
    "masked", exported, tmp_path / "c",
    **{"probe": str(folder), "evals.ratios": ()},
  )  # fmt: skip
  # The same probe as AttMask's file.
  told = json.loads((folder / "classifier.json").read_text())
  head = load(f"{folder}/checkpoints/{told['step']}", "student").params["head"]
  linear = {
    "module.linear.weight": np.asarray(head["kernel"][0]).T,
    "module.linear.bias": np.asarray(head["bias"][0]),
  }
  file = tmp_path / "linear.pth"
  pth.write(file, {"epoch": 1, "state_dict": linear, "best_acc": 1.0})
  options = {"probe": str(file), "evals.ratios": ()}
  again = evaluated("masked", exported, tmp_path / "d", **options)
  assert again == pytest.approx(clean)
  # And both in one file.
  backbone = export(
    trained, tmp_path / "e.pth", format="timm", backbone_only=True
  )
  whole = pth.read(backbone) | {
    k.removeprefix("module."): v for k, v in linear.items()
  }
  pth.write(tmp_path / "combined.pth", {"state_dict": whole})
  options = {"evals.ratios": (), "num_heads": 2}
  again = evaluated("masked", tmp_path / "combined.pth", tmp_path / "f",
                    **options)  # fmt: skip
  assert again == pytest.approx(clean)
  with pytest.raises(InputError, match="linear layer without a network"):
    evaluated("knn", file, tmp_path / "g")


def test_class_names_of_a_run_without_evaluation(tmp_path):
  method = types.SimpleNamespace(classifies=True, num_classes=8)
  run = types.SimpleNamespace(
    method=method, run_dir=tmp_path, config=small.config()
  )
  names = classifiers.class_names(run)
  assert (len(names), names[0], names[6]) == (8, "bar", "star")
  run.config.data.source = "folder"
  run.config.data.path = str(tmp_path / "moved")
  assert classifiers.class_names(run) == ()
  run.config.data.source, method.num_classes = "shapes", 9
  assert classifiers.class_names(run) == ()  # not its classes


@pytest.mark.slow
def test_a_trained_probe_is_exported(trained, tmp_path):
  short = {"method.last_blocks": 1, "optim.epochs": 1, "data.batch_size": 16,
           "method.lrs": (0.1, 0.3)}  # fmt: skip
  probe = tmp_path / "probe"
  evaluated("linear", trained, probe, **short)
  with pytest.raises(InputError, match="the probe with --config.probe"):
    export(probe, tmp_path / "a.pth", format="timm")
  mesh, source = meshes.make_mesh(), load(trained)
  classifier = classifiers.load(str(probe), source, mesh=mesh)
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("f4")
  want = classifier.method.logits(classifier.params, images)
  for form in ("timm", "hf"):
    path = tmp_path / form / "model.safetensors"
    export(trained, path, format=form, probe=str(probe))
    found = load(path)
    got = found.method.logits(found.params, images)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert config["id2label"] == {
    "0": "bar", "1": "crescent", "2": "cross", "3": "disc", "4": "ring",
    "5": "square", "6": "star", "7": "triangle",
  }  # fmt: skip
  assert config["label2id"]["star"] == 6 and len(config["label2id"]) == 8
  again = tmp_path / "again" / "model.safetensors"
  export(tmp_path / "hf" / "model.safetensors", again, format="hf")
  assert json.loads((again.parent / "config.json").read_text()) == config
  with pytest.raises(InputError, match="holds no linear probe"):
    export(trained, tmp_path / "a.pth", format="mae", probe=str(probe))
  combined = tmp_path / "combined.pth"
  export(trained, combined, format="attmask", probe=str(probe))
  found = load(combined)
  same(found.params["backbone"], classifier.params["backbone"])
  same(found.params["head"], classifier.params["head"])
  got = found.method.logits(found.params, images)
  np.testing.assert_array_equal(got, want)
  four = tmp_path / "four"
  evaluated("linear", trained, four, **short | {"method.last_blocks": 2})
  for form in ("timm", "attmask"):  # two class tokens
    with pytest.raises(InputError, match=f'"{form}" cannot hold'):
      export(trained, tmp_path / "a.pth", format=form, probe=str(four))


@pytest.mark.slow
def test_a_probe_and_fine_tuning_on_a_narrow_mlp(trained, tmp_path):
  """The width of the MLP is that of the file, not four times the tokens'."""
  path = export(trained, tmp_path / "a.pth", format="timm")
  tree = pth.read(path)
  for i in (0, 1):
    for name, cut in (
      ("fc1.weight", np.s_[:48]), ("fc1.bias", np.s_[:48]),
      ("fc2.weight", np.s_[:, :48]),
    ):  # fmt: skip
      name = f"blocks.{i}.mlp.{name}"
      tree[name] = np.ascontiguousarray(tree[name][cut])
  pth.write(tmp_path / "b.pth", tree)
  short = {"optim.epochs": 1, "data.batch_size": 16, "num_heads": 2}
  where = tmp_path / "b.pth"
  linear = short | {"method.last_blocks": 1}
  evaluated("linear", where, tmp_path / "c", **linear)
  tune = short | {"optim.warmup_epochs": 0, "data.repeats": 1}
  evaluated("finetune", where, tmp_path / "d", **tune)
  fc1 = load(tmp_path / "d").params["backbone"]["blocks"]["mlp"]["fc1"]
  assert fc1["kernel"].shape == (2, 16, 48)


# Starting from them ---------------------------------------------------------


@pytest.mark.slow
def test_a_full_checkpoint_goes_on(trained, exported, tmp_path, caplog):
  copy = shutil.copy(exported, tmp_path / "copy.pth")
  config = small.config({"optim.epochs": 3, "init_from": str(copy)})
  with caplog.at_level(logging.INFO):
    method = METHODS["attmask"].from_config(config, steps_per_epoch=8)
    start = starts.start(config, method, meshes.make_mesh())
  assert start.epoch == 2
  assert "continuing after epoch 2" in caplog.text
  for tree, network in (("params", "student"), ("teacher", "teacher")):
    same(start.trees[tree], jax.device_get(load(trained, network).params))
  centers = jax.device_get(loading.load_centers(load(trained)))
  same(start.trees["aux"], centers)
  folder = tmp_path / "run"
  train.train(config, str(folder))
  lines = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
  steps = [x["step"] for x in lines if "epoch/loss" in x]
  assert steps == [24]  # the third epoch alone
  copy.unlink()
  train.train(config, str(folder))  # a run that continues does not read it
  done = small.config({"optim.epochs": 2, "init_from": str(exported)})
  with pytest.raises(InputError, match="has completed 2 epochs"):
    starts.start(done, method, meshes.make_mesh())


def begun(config, caplog):
  """Where a run of this config starts, and what is said of it."""
  method = METHODS[config.method.name].from_config(config, steps_per_epoch=8)
  caplog.clear()
  with caplog.at_level(logging.INFO):
    start = starts.start(config, method, meshes.make_mesh())
  return start, caplog.text


def test_whole_files_that_do_not_go_on(trained, exported, tmp_path, caplog):
  again = {"optim.epochs": 3, "init_epoch": False}
  for target, change, options in (
    ("a.pth", lambda tree: None, again),
    ("b.pth", lambda tree: tree.pop("ibot_loss"), {"optim.epochs": 3}),
    ("c.pth", lambda tree: tree.pop("teacher"), {"optim.epochs": 3}),
  ):
    where = changed(exported, tmp_path / target, change)
    start, said = begun(small.config(options | {"init_from": where}), caplog)
    assert start.epoch == 0 and "continuing" not in said
    assert ("no loss centres" in said) == (target == "b.pth")
  assert start.trees["aux"].keys() == {"center", "center_patch"}
  # DINO's own loss has one centre.
  dino = lambda tree: tree.update(
    dino_loss={"center": tree.pop("ibot_loss")["center"]}
  )
  where = changed(exported, tmp_path / "d.pth", dino)
  config = small.config(
    {"optim.epochs": 3, "init_from": where, "method.patch_weight": 0.0}
  )
  start, said = begun(config, caplog)
  assert start.epoch == 2 and start.trees["aux"].keys() == {"center"}
  # A run of ours gives its weights.
  config = small.config({"optim.epochs": 3, "init_from": str(trained)})
  assert begun(config, caplog)[0].epoch == 0


@pytest.mark.parametrize("family", ["mae", "extrema"])
def test_whole_files_of_other_families_start_at_zero(tmp_path, family, caplog):
  config = tiny.get_config(family)
  method = METHODS[family].from_config(config, steps_per_epoch=1)
  params, teacher, _ = jax.device_get(method.init(jax.random.key(3)))
  source = loading.Weights(
    method, params, {}, config, "", 0, "student", "x", None
  )
  path = tmp_path / "a.pth"
  teacher = source._replace(params=teacher or params)
  exporting.export(str(path), source, teacher, format=family, epoch=1)
  assert files.read(str(path)).epoch == 1
  config.init_from = str(path)
  start, said = begun(config, caplog)
  assert start.epoch == 0 and "initial values" not in said
  same(start.trees["params"], params)


@pytest.mark.slow
def test_positions_of_another_kind(trained, tmp_path, caplog):
  """Fixed ones are written out; a class token's place comes or goes."""
  from attmask_jax.models import positions

  config = tiny.get_config("mae")
  config.data.image_size = 16
  config.method.update(variant="16x2x2", patch_size=4)
  method = METHODS["mae"].from_config(config, steps_per_epoch=1)
  params = jax.device_get(method.init(jax.random.key(3))[0])
  source = loading.Weights(
    method, params, {}, config, "", 0, "student", "x", None
  )
  path = str(tmp_path / "a.pth")
  exporting.export(path, source, source, format="mae")
  sizes = {"init_from": path, "num_heads": 2}
  start, said = begun(small.config(sizes), caplog)
  table = positions.sin_cos((4, 4), 16, "yx")
  got = start.trees["params"]["backbone"]["pos_embed"]
  np.testing.assert_array_equal(got[:, 1:], table)
  assert not got[:, 0].any()  # this run has a class token, and the file none
  assert "at initial values: backbone/cls_token" in said
  assert "not used by this run: decoder/" in said
  large = {"data.image_size": 24, "data.local_size": 12}
  with pytest.raises(InputError, match="--config.init_resample=True"):
    begun(small.config(sizes | large), caplog)
  large["init_resample"] = True
  start, _ = begun(small.config(sizes | large), caplog)
  want = positions.interpolate(got, 24, 24, 4, num_prefix_tokens=1)
  np.testing.assert_allclose(
    start.trees["params"]["backbone"]["pos_embed"], want, atol=1e-6
  )


def test_a_backbone_starts_every_family(trained, tmp_path, caplog):
  path = export(trained, tmp_path / "a.pth", format="timm")
  mesh = meshes.make_mesh()
  teacher = jax.device_get(load(trained).params["backbone"])
  for family in ("attmask", "mae", "extrema"):
    config = tiny.get_config(family)
    config.update_from_flattened_dict(
      {"method.variant": "16x2x2", "method.patch_size": 4,
       "data.image_size": 16, "init_from": str(path), "num_heads": 2}
    )  # fmt: skip
    method = METHODS[family].from_config(config, steps_per_epoch=8)
    caplog.clear()
    with caplog.at_level(logging.INFO):
      start = starts.start(config, method, mesh)
    assert start.epoch == 0
    found = start.trees["params"]["backbone"]
    same(found["blocks"], teacher["blocks"])
    same(found["patch_embed"], teacher["patch_embed"])
    assert ("pos_embed" in found) == (family == "attmask")
    fresh = {"attmask": "head/mlp", "mae": "decoder/blocks",
             "extrema": "backbone/readout_0"}[family]  # fmt: skip
    (said,) = [x for x in caplog.messages if "at initial values" in x]
    assert fresh in said


def test_a_prefix_chooses_a_network_wherever_files_are_read(
  trained, exported, tmp_path, caplog
):
  path = export(trained, tmp_path / "a.pth", format="timm", backbone_only=True)
  right = {k: v for k, v in pth.read(path).items() if k != "heads"}
  both = {f"right.{k}": v for k, v in right.items()}
  both |= {f"left.{k}": np.zeros_like(v) for k, v in right.items()}
  path = tmp_path / "both.pth"
  pth.write(path, {"state_dict": both})
  want = jax.device_get(load(trained).params["backbone"])
  with pytest.raises(InputError, match='behind "left.", "right.": name one'):
    load(path)
  options = {"num_heads": 2, "tensor_prefix": "right"}
  same(attmask_jax.load(path, **options).params["backbone"], want)
  start, _ = begun(small.config({"init_from": str(path)} | options), caplog)
  same(start.trees["params"]["backbone"]["norm"], want["norm"])
  config = evals.get_config("knn")
  config.update(weights=str(path), **options)
  interchange.import_weights(config, str(tmp_path / "new"))
  same(load(tmp_path / "new").params["backbone"], want)
  interchange.export_weights(
    config, str(tmp_path / "b.pth"), format="timm", dtype="float32",
    backbone_only=True,
  )  # fmt: skip
  same(load(tmp_path / "b.pth", num_heads=2).params["backbone"], want)
  few = {"evals.knn_ks": (3,)}
  ours = evaluated("knn", trained, tmp_path / "c", **few)
  theirs = evaluated("knn", path, tmp_path / "d", **few, **options)
  assert theirs == pytest.approx(ours)


def test_positions_of_another_size(trained, tmp_path):
  path = export(trained, tmp_path / "a.pth", format="timm")
  config = small.config({"data.image_size": 24, "data.local_size": 12,
                         "init_from": str(path), "num_heads": 2})  # fmt: skip
  method = METHODS["attmask"].from_config(config, steps_per_epoch=8)
  mesh = meshes.make_mesh()
  with pytest.raises(InputError, match="--config.init_resample=True"):
    starts.start(config, method, mesh)
  with config.unlocked():
    config.init_resample = True
  table = starts.start(config, method, mesh).trees["params"]["backbone"]
  from attmask_jax.models import positions

  old = jax.device_get(load(trained).params["backbone"]["pos_embed"])
  want = positions.interpolate(old, 24, 24, 4, num_prefix_tokens=1)
  np.testing.assert_allclose(table["pos_embed"], want, atol=1e-6)
  wide = small.config({"method.variant": "24x2x2", "init_from": str(path),
                       "num_heads": 2})  # fmt: skip
  method = METHODS["attmask"].from_config(wide, steps_per_epoch=8)
  with pytest.raises(InputError, match="set .*method.variant"):
    starts.start(wide, method, mesh)


# What is refused ------------------------------------------------------------


def changed(path, target, change):
  tree = pth.read(path)
  change(tree)
  pth.write(target, {k: v for k, v in tree.items()})
  return str(target)


def test_anything_but_a_full_match_is_refused(exported, tmp_path, caplog):
  file = tmp_path / "a.pth"
  name = "backbone.blocks.1.mlp.fc1.bias"
  where = changed(exported, file, lambda t: t["teacher"].pop(name))
  with pytest.raises(InputError, match=f"lacks {name}.*allow_missing"):
    load(where)
  # Its other blocks are then without a place.
  rest = ("backbone.blocks.",)
  found = load(where, allow_missing=rest)
  ours = load(exported)
  bias = found.params["backbone"]["blocks"]["mlp"]["fc1"]["bias"]
  assert not np.any(bias)  # start values
  kernel = lambda w: w.params["backbone"]["blocks"]["mlp"]["fc1"]["kernel"]
  same(kernel(found), kernel(ours))
  extra = lambda t: t["teacher"].update({"new.thing": np.zeros(2, "f4")})
  with pytest.raises(InputError, match="network lacks: new.thing"):
    load(changed(exported, file, extra))
  escape = lambda t: t["teacher"].update({"\x1b[31m": np.zeros(2, "f4")})
  with pytest.raises(InputError, match=r"network lacks: \\x1b\[31m:"):
    load(changed(exported, tmp_path / "b.pth", escape))
  load(str(file), allow_missing=("new.",))
  load(str(file), allow_missing="head.x,new.")  # as the command line has it
  short = lambda t: t["teacher"].update({name: np.zeros(3, "f4")})
  with pytest.raises(InputError, match=r"fc1.bias has shape \(3,\)"):
    load(changed(exported, file, short))
  nan = lambda t: t["teacher"].update(
    {"backbone.norm.bias": np.full(16, np.nan, "f4")}
  )
  with caplog.at_level(logging.WARNING):
    load(changed(exported, file, nan))
  assert "1 tensors are not finite" in caplog.text


def test_a_file_is_in_memory_once(tmp_path):
  """Of a checkpoint with an optimiser: the network's float32 values alone."""
  method = networks.Backbone(vit.ViT(**vit.VARIANTS["tiny"], image_size=32))
  shapes = jax.eval_shape(method.init, jax.random.key(0))[0]
  tree = jax.tree.map(lambda x: np.ones(x.shape, np.float16), shapes)
  flat = names.to_theirs(tree, tables.backbone())
  moments = {i: x.astype("f4") for i, x in enumerate(flat.values())}
  path = tmp_path / "a.pth"
  pth.write(path, {"state_dict": flat, "optimizer": {"state": moments}})
  size = sum(4 * x.size for x in jax.tree.leaves(tree))
  del tree, flat, moments
  load_file = lambda: files.load(files.read(str(path)), "teacher")
  load_file()  # what is made once
  tracemalloc.start()
  found = load_file()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert found.params["backbone"]["norm"]["bias"].dtype == np.float32
  assert size < peak < 1.2 * size


def test_odd_notes_of_a_file(trained, tmp_path):
  path = export(trained, tmp_path / "a.safetensors", format="attmask")
  flat, notes = tensors.read(path)
  for epoch in ("²", "5" * 5000, "-1", "x"):
    tensors.write(path, flat, notes | {"epoch": epoch})
    assert files.read(str(path)).epoch == 0
    load(path)


def test_files_without_a_network(tmp_path):
  for tree, match in (
    ([1, 2], "holds a list, not a state dict"),
    ({"epoch": 3}, "no state dict here"),
    ({"a.b": np.zeros(3, "f4")}, "of an unknown code base"),
  ):
    pth.write(tmp_path / "a.pth", tree)
    with pytest.raises(InputError, match=match):
      load(tmp_path / "a.pth")
  with pytest.raises(InputError, match="is not a file"):
    load(tmp_path / "b.pth")


def test_exports_that_cannot_be(trained, exported, tmp_path):
  path = tmp_path / "a.pth"
  for options, match in (
    (dict(format="onnx"), 'format "onnx" is unknown'),
    (dict(format="timm", dtype="int8"), 'dtype "int8" is unknown'),
    (dict(format="mae"), 'format "mae" cannot hold'),
    (dict(format="extrema"), 'format "extrema" cannot hold'),
  ):
    with pytest.raises(InputError, match=match):
      export(trained, path, **options)
    assert not path.exists()
  with pytest.raises(InputError, match=r"must end in .pth or .safetensors"):
    export(trained, tmp_path / "a.onnx", format="timm")
  with pytest.raises(InputError, match="exists"):
    export(trained, exported, format="timm")
  config = (trained / "config.json").read_text()
  with pytest.raises(InputError, match="config.json exists"):
    export(trained, trained / "a.safetensors", format="hf")
  assert (trained / "config.json").read_text() == config
  (tmp_path / "file").write_text("")
  for form in ("timm", "hf"):
    with pytest.raises(InputError, match="cannot be written"):
      export(trained, tmp_path / "file" / "a.pth", format=form)
  for form, helps in (("attmask", True), ("extrema", False)):
    probe = supervised_only(load(trained), final_norm=False)
    with pytest.raises(InputError, match="cannot hold") as error:
      exporting.export(str(path), probe, probe, format=form)
    assert ("--backbone_only" in str(error.value)) == helps


def supervised_only(source, **fields):
  """The same network with an untrained linear layer."""
  method = classify.Classify(
    source.method.backbone, 5, epochs=1, steps_per_epoch=1, image_size=16,
    batch_size=8, frozen=False, **fields,
  )  # fmt: skip
  params = jax.device_get(method.init(jax.random.key(1))[0])
  params["backbone"] = source.params["backbone"]
  return source._replace(method=method, params=params)


@pytest.mark.parametrize(
  "fields",
  [dict(final_norm=False), dict(pool="mean", final_norm=False),
   dict(pool="cls+mean"), dict(head_norm="layer"), dict(last_blocks=2)],
)  # fmt: skip
@pytest.mark.parametrize("form", ["timm", "hf"])
def test_classifiers_that_read_something_else(trained, tmp_path, fields, form):
  """No model there leaves the norm out, or reads several class tokens."""
  ours = supervised_only(load(trained), **fields)
  with pytest.raises(InputError, match=f'"{form}" cannot hold.*backbone_only'):
    exporting.export(str(tmp_path / "a.pth"), ours, ours, format=form)


def test_exported_files_have_the_usual_rights(trained, tmp_path):
  mask = os.umask(0o022)
  try:
    for name in ("a.pth", "a.safetensors"):
      path = export(trained, tmp_path / name, format="timm")
      assert path.stat().st_mode & 0o777 == 0o644
  finally:
    os.umask(mask)
  assert tensors.read(tmp_path / "a.safetensors")[1]["heads"] == "2"
