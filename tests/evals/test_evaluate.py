"""Evaluations end to end: a small run is trained once and evaluated by name."""

import json
import pathlib
import shutil
import types

import backgrounds_set
import numpy as np
import pytest
import small
from PIL import Image

from attmask_jax import evaluate, train
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import features
from attmask_jax.training import supervised
from attmask_jax.weights import loading
from configs import evals


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Run directory of a small AttMask run; programs are kept and shared."""
  folder = tmp_path_factory.mktemp("trained")
  train.train(small.config(), str(folder / "run"))
  return folder / "run"


def config(name, where, **changes):
  config = evals.get_config(name)
  config.weights = str(where)
  config.evals.batch_size = 16
  config.run.tensorboard = False
  config.update_from_flattened_dict(changes)
  return config.lock()


def run(name, where, folder, **changes):
  evaluate.evaluate(config(name, where, **changes), str(folder))
  return json.loads((folder / "results.json").read_text())


def test_knn_of_the_teacher_is_that_of_the_run(trained, tmp_path):
  lines = [
    json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines()
  ]
  logged = [x for x in lines if "knn/k5/top1" in x][-1]
  options = {"evals.knn_ks": (3, 5, 10), "evals.knn_temp": 0.1}
  found = run("knn", trained, tmp_path / "knn", **options)
  for k in (3, 5, 10):
    for name in ("top1", "top5"):
      key = f"k{k}/{name}"
      assert found["values"][key] == pytest.approx(logged[f"knn/{key}"])
  assert found["weights"]["step"] == small.TOTAL_STEPS
  assert found["config"]["data.source"] == "shapes"
  told = (trained / "evals.jsonl").read_text().splitlines()
  assert json.loads(told[-1])["evaluation"] == "knn"
  assert (tmp_path / "knn" / "report.html").exists()
  options["network"] = "untrained"
  other = run("knn", trained, tmp_path / "untrained", **options)
  assert other["weights"]["digest"] != found["weights"]["digest"]
  first = [x for x in lines if "knn/k5/top1" in x][0]
  assert first["step"] == 0
  assert other["values"]["k5/top1"] == pytest.approx(first["knn/k5/top1"])


def test_features_come_from_the_cache_and_give_the_same(
  trained, tmp_path, monkeypatch
):
  options = {"evals.knn_ks": (3,), "evals.cache": str(tmp_path / "cache")}
  first = run("knn", trained, tmp_path / "a", **options)
  assert len(list((tmp_path / "cache").glob("*.npz"))) == 2  # bank, queries
  forbid = lambda *_, **__: pytest.fail("features were extracted again")
  with monkeypatch.context() as patched:
    patched.setattr(features, "extract", forbid)
    again = run("knn", trained, tmp_path / "b", **options)
  assert again["values"] == first["values"]


@pytest.mark.parametrize(
  "changes",
  [
    {"network": "student"},
    {"data.seed": 9},
    {"data.shapes_train": 40},
    {"data.image_size": 20},
    {"data.eval_resample": "bilinear"},
    {"evals.pool": "cls+mean"},
    {"evals.last_blocks": 2},
    {"evals.final_norm": False},
    {"run.matmul_precision": "default"},
  ],
)
def test_features_of_anything_else_are_not_taken(
  trained, cached, tmp_path, changes
):
  options = {"evals.knn_ks": (3,), "evals.cache": str(cached)} | changes
  before = set(cached.glob("*.npz"))
  run("knn", trained, tmp_path, **options)
  new = set(cached.glob("*.npz")) - before
  assert len(new) == (1 if "data.shapes_train" in changes else 2)  # the bank


@pytest.fixture(scope="module")
def cached(trained, tmp_path_factory):
  """Folder of the features of a first evaluation."""
  folder = tmp_path_factory.mktemp("cache")
  options = {"evals.knn_ks": (3,), "evals.cache": str(folder)}
  run("knn", trained, folder / "out", **options)
  return folder


@pytest.fixture(scope="module")
def probe(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp("probe")
  options = PROBE | {"method.lrs": (0.01, 1.0)}
  return folder, run("linear", trained, folder, **options)


PROBE = {
  "method.last_blocks": 2,
  "optim.epochs": 2,
  "optim.lr_per_256": 1.0,
  "data.batch_size": 16,
}


@pytest.mark.slow
def test_linear_probe(trained, probe):
  folder, found = probe
  values = found["values"]
  for key in ("last/top1", "best/top1", "last/lr0.01/top1", "last/lr1/top1"):
    assert 0 <= values[key] <= 100
  best = max(values["best/lr0.01/top1"], values["best/lr1/top1"])
  assert values["best/top1"] == best
  assert found["counts"]["classes"] == 8
  # All that was trained on, the network's sizes among it.
  assert found["config"]["method.variant"] == "16x2x2"
  assert found["config"]["digest"] == found["weights"]["digest"]
  # Complete: the same command measures again and trains no further.
  lines = (folder / "metrics.jsonl").read_text()
  again = run("linear", trained, folder, **PROBE, **{"method.lrs": (0.01, 1.0)})
  assert again["values"] == values
  assert (folder / "metrics.jsonl").read_text() == lines


@pytest.mark.slow
def test_masked_and_a_given_probe(trained, probe, tmp_path):
  options = {"probe": str(probe[0]), "evals.ratios": (0.5,)}
  found = run("masked", trained, tmp_path, **options)
  clean = found["values"]["clean/top1"]
  assert clean == pytest.approx(probe[1]["values"]["best/top1"])
  for policy in ("attmask_high", "random", "attmask_low"):
    assert 0 <= found["values"][f"{policy}_50/top1"] <= 100
  assert found["classifier"]["where"].startswith(str(probe[0]))
  assert (tmp_path / "figures" / "masked.png").stat().st_size > 5000


def test_a_probe_of_other_weights_is_refused(trained, probe, tmp_path):
  options = {"probe": str(probe[0]), "network": "untrained"}
  with pytest.raises(InputError, match="trained on other weights"):
    run("masked", trained, tmp_path, **options)


@pytest.mark.slow
def test_a_probe_of_another_width_is_refused(trained, probe, tmp_path):
  other = small.config({"method.variant": "24x2x2", "optim.epochs": 1,
                        "evals.knn": False, "evals.mask_images": 0,
                        "evals.overlap_images": 0})  # fmt: skip
  train.train(other, str(tmp_path / "wide"))
  options = {"probe": str(probe[0])}
  with pytest.raises(InputError, match="width 32.*give 48"):
    run("masked", tmp_path / "wide", tmp_path / "out", **options)


@pytest.mark.slow
def test_fine_tuning_and_using_the_result(trained, tmp_path):
  options = {
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
    "optim.lr_per_256": 0.01,
    "data.batch_size": 16,
    "evals.eval_epochs": 1,
  }
  found = run("finetune", trained, tmp_path / "tuned", **options)
  assert found["counts"]["last step"] == 4
  clean = run(
    "masked", tmp_path / "tuned", tmp_path / "masked", **{"evals.ratios": ()},
    network="student",
  )  # fmt: skip
  assert clean["values"]["clean/top1"] == pytest.approx(
    found["values"]["best/top1"]
  )
  # What the moving average knows is another question.
  where = tmp_path / "tuned" / "checkpoints" / "4"
  teacher = run(
    "masked", where, tmp_path / "teacher", **{"evals.ratios": ()},
    network="teacher",
  )  # fmt: skip
  assert teacher["weights"]["network"] == "teacher"
  assert teacher["classifier"]["digest"] != clean["classifier"]["digest"]
  by_default = run("knn", where, tmp_path / "knn", **{"evals.knn_ks": (3,)})
  assert by_default["weights"]["network"] == "student"
  refused(
    "knn", where, tmp_path / "none", "evaluate these", network="untrained"
  )


def test_fine_tuning_may_drop_the_class_token(trained, tmp_path):
  options = {
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
    "data.batch_size": 16,
  }
  found = run("finetune_extrema", trained, tmp_path, **options)
  assert found["config"]["method.class_token"] == "none"
  assert found["counts"]["last step"] == 4


@pytest.mark.slow
def test_a_short_probe_is_owned_up_to(trained, probe, tmp_path, monkeypatch):
  options = PROBE | {"evals.ratios": (), "optim.epochs": 1}
  monkeypatch.chdir(tmp_path)
  found = run("masked", trained, pathlib.Path("masked"), **options)
  assert found["notes"][0].endswith("trained for 1 epochs, which is short.")
  given = run(
    "masked", trained, tmp_path / "given", probe=str(probe[0]),
    **{"evals.ratios": ()},
  )  # fmt: skip
  assert given["notes"] == []


def test_pictures_of_before_are_removed(trained, tmp_path):
  options = {"evals.count": 2, "evals.ratios": (0.3,)}
  first = run("masks", trained, tmp_path, **options)
  (tmp_path / "figures" / "mine.png").write_text("kept")
  options["evals.ratios"] = (0.5,)
  second = run("masks", trained, tmp_path, **options)
  assert first["figures"] != second["figures"]
  found = {f"figures/{p.name}" for p in (tmp_path / "figures").iterdir()}
  assert found == {*second["figures"], "figures/mine.png"}


@pytest.mark.slow
def test_clusters_fewshot_and_pictures_run(trained, tmp_path):
  found = run("clusters", trained, tmp_path / "clusters")
  assert 0 <= found["values"]["nmi"] <= 1
  options = {
    "evals.shots": (1,),
    "evals.knn_ks": (1,),
    "evals.starts": ((0, 1),),
  }
  found = run("fewshot", trained, tmp_path / "fewshot", **options)
  runs = [found["values"][f"shots1/start{s}/top1"] for s in (0, 1)]
  assert found["values"]["shots1/top1"] == pytest.approx(np.mean(runs))
  for name in ("attention", "masks", "pca", "overlap"):
    size = {"evals.count": 2}
    found = run(name, trained, tmp_path / name, **size)
    for figure in found["figures"]:
      assert (tmp_path / name / figure).stat().st_size > 2000
  names = {
    "evals.runs": f"{trained},{trained}",
    "evals.labels": "a,b",
  }
  found = run("compare", "", tmp_path / "compare", **names)
  assert found["weights"] is None


def test_backgrounds_of_shapes(trained, probe, tmp_path):

  backgrounds_set.write_shapes(tmp_path / "in9", per_class=2, size=16, seed=0)
  options = {
    "probe": str(probe[0]),
    "evals.backgrounds": str(tmp_path / "in9"),
  }
  values = run("backgrounds", trained, tmp_path / "out", **options)["values"]
  gap = values["mixed_same/top1"] - values["mixed_rand/top1"]
  assert values["bg_gap"] == pytest.approx(gap)


# What is refused, in one sentence -------------------------------------------


def refused(name, where, folder, match, **changes):
  with pytest.raises(InputError, match=match) as error:
    run(name, where, folder, **changes)
  assert "\n" not in str(error.value)
  assert not (folder / "results.json").exists()


def test_wrong_weights_and_directories(trained, tmp_path):
  refused("knn", "", tmp_path / "a", "no weights given")
  refused("knn", tmp_path / "nothing", tmp_path / "a", "do not exist")
  refused("knn", tmp_path, tmp_path / "a", "holds no checkpoint")
  refused("knn", trained, trained, "is the run that is evaluated")
  refused("knn", trained, tmp_path / "a", 'network "x"', network="x")
  refused("knn", trained, tmp_path / "a", "bank", **{"evals.knn_ks": (3, 5000)})
  shutil.copytree(trained, tmp_path / "copy")
  refused("pca", trained, tmp_path / "copy", "holds a training run")
  config = json.loads((trained / "config.json").read_text())
  config["method.variant"] = "24x2x2"
  (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
  refused(
    "knn", tmp_path / "copy", tmp_path / "a", "does not fit its config.*shape"
  )


def test_results_of_another_evaluation_stay(trained, tmp_path):
  run("pca", trained, tmp_path, **{"evals.count": 2})
  before = (tmp_path / "results.json").read_text()
  with pytest.raises(InputError, match=r"another evaluation \(pca\)"):
    run("knn", trained, tmp_path, **{"evals.knn_ks": (3,)})
  assert (tmp_path / "results.json").read_text() == before


@pytest.mark.parametrize(
  "where, network",
  [("", "untrained"), ("", "student"), ("checkpoints/8", "teacher")],
)
def test_results_of_other_weights_stay(trained, tmp_path, where, network):
  few = {"evals.count": 2}
  run("pca", trained, tmp_path, **few)
  before = (tmp_path / "results.json").read_text()
  with pytest.raises(InputError, match="results of other weights") as error:
    run("pca", trained / where, tmp_path, network=network, **few)
  assert "\n" not in str(error.value)
  assert (tmp_path / "results.json").read_text() == before
  run("pca", f"{trained}/checkpoints/16", tmp_path, **few)  # the same again


def test_settings_are_checked_before_the_work(trained, tmp_path, monkeypatch):
  forbid = lambda *_, **__: pytest.fail("features were extracted")
  monkeypatch.setattr(features, "extract", forbid)
  for changes, match in (
    ({"evals.knn_ks": (65,)}, "65 neighbours, but the bank has 64"),
    ({"evals.knn_ks": ()}, "one whole number or several"),
    ({"evals.knn_temp": -1.0}, "knn_temp -1.0 must be at least 0"),
    ({"evals.bank_chunk": 0}, "bank_chunk 0 must be at least 1"),
    ({"evals.last_blocks": 3}, "last_blocks 3.*the 2 blocks"),
    ({"evals.last_blocks": 0}, "last_blocks 0"),
    ({"evals.pool": "both"}, "evals.pool .both. is unknown"),
    ({"data.path": "/images"}, "data.path /images is given.*generated"),
  ):
    options = {"evals.knn_ks": (3,)} | changes
    refused("knn", trained, tmp_path / "out", match, **options)
  options = {"evals.shots": (1,), "evals.knn_ks": (9,), "evals.starts": ((0,),)}
  refused("fewshot", trained, tmp_path / "out", "9 neighbours", **options)


def test_a_class_without_images(trained, tmp_path):
  image = Image.new("RGB", (16, 16))
  for name in ("train/a", "train/b", "train/c", "val/a", "val/c"):
    (tmp_path / name).mkdir(parents=True)
    for i in range(3):
      image.save(tmp_path / name / f"{i}.png")
  options = {"data.source": "folder", "data.path": str(tmp_path)}
  for name in ("knn", "linear"):
    match = "no images of class b .1 of 3 classes"
    small = PROBE | {"data.batch_size": 8}
    small = {"evals.knn_ks": (1,)} if name == "knn" else small
    refused(name, trained, tmp_path / "out", match, **options, **small)


def test_data_that_do_not_do(trained, tmp_path):
  folder = tmp_path / "images"
  (folder / "train" / "a").mkdir(parents=True)
  (folder / "val").mkdir()
  options = {"data.source": "folder", "data.path": str(folder)}
  refused("knn", trained, tmp_path / "out", "no images", **options)
  refused("linear", trained, tmp_path / "out", "no images", **options)


def test_digest_knows_names_and_values(trained):
  mesh = meshes.make_mesh()
  one = loading.load(str(trained), network="teacher", mesh=mesh)
  same = loading.load(
    f"{trained}/checkpoints/{small.TOTAL_STEPS}", network="teacher", mesh=mesh
  )
  assert one.digest == same.digest
  tree = {"a": np.zeros(3), "b": np.ones(3)}
  digests = {
    loading.digest(t)
    for t in (tree, {"a": np.zeros(3), "c": np.ones(3)},
              {"a": np.ones(3), "b": np.zeros(3)},
              {"a": np.zeros(3), "b": np.ones(3, "f4")})
  }  # fmt: skip
  assert len(digests) == 4


PATCHES_OF_8 = types.SimpleNamespace(
  backbone=types.SimpleNamespace(patch_size=8)
)


@pytest.mark.parametrize(
  "given, want",
  [
    ({}, ("folder", "/a", 5, 64)),
    ({"path": "/b"}, ("folder", "/b", 0, 64)),
    ({"path": "/b", "subset": 7}, ("folder", "/b", 7, 64)),
    ({"source": "shapes"}, ("shapes", "", 0, 64)),
    ({"source": "flat", "path": "/b", "image_size": 32}, ("flat", "/b", 0, 32)),
    ({"subset": 0}, ("folder", "/a", 0, 64)),
  ],
)
def test_data_are_those_of_the_run_unless_named(given, want):
  settings = evals.get_config("knn")
  settings.data.update(given)
  theirs = evals.get_config("knn")
  theirs.data.update(source="folder", path="/a", subset=5, image_size=64)
  source = types.SimpleNamespace(
    config=theirs, where="runs/x", method=PATCHES_OF_8
  )
  found = evaluate.complete(settings, source).data
  got = (found.source, found.path, found.subset, found.image_size)
  assert got == want


@pytest.mark.parametrize(
  "batch, group", [(900, 150), (1024, 128), (64, 64), (2, 2), (7, 7)]
)
def test_groups_of_mixup_are_those_of_the_releases(batch, group):
  assert supervised.mixup_group(batch) == group


def test_weights_that_do_not_know_their_images():
  source = types.SimpleNamespace(
    config=types.SimpleNamespace(get=lambda name, default: default),
    where="w", method=PATCHES_OF_8,
  )  # fmt: skip
  with pytest.raises(InputError, match="set --config.data.source"):
    settings = evals.get_config("knn")
    settings.data.image_size = 16
    evaluate.complete(settings, source)


@pytest.mark.parametrize("name", evals.NAMES)
def test_defaults_are_no_mistakes(name):
  evaluate.check_values(evals.get_config(name))


@pytest.mark.parametrize(
  "name, changes, match",
  [
    (
      "knn",
      {"evals.knn_ks": (10, 2.5)},
      "evals.knn_ks .10, 2.5. must be one whole number or",
    ),
    ("masks", {"evals.ratios": (1, "a")}, "must be one number or several"),
    ("token_clusters", {"evals.clusters": (2.5,)}, "one whole number or"),
    ("linear", {"method.lrs": ("a",)}, "method.lrs"),
    ("knn", {"evals.batch_size": 0}, "batch_size 0 must be at least 1"),
    ("knn", {"data.image_size": 3}, "choose 4 or 8"),
    ("knn", {"data.image_size": 18}, "choose 16 or 20"),
    ("linear", {"method.lrs": (0.1,), "optim.lr_per_256": 0.0}, "lr_per_256 0"),
  ],
)
def test_numbers_are_checked_first(trained, tmp_path, name, changes, match):
  more = PROBE if name == "linear" else {}
  config = evals.get_config(name)
  config.weights = str(trained)
  with config.ignore_type():
    config.update_from_flattened_dict(more | changes)
  with pytest.raises(InputError, match=match):
    evaluate.evaluate(config.lock(), str(tmp_path / "out"))
  assert not (tmp_path / "out" / "results.json").exists()
