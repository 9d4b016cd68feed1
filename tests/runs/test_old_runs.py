"""Runs of version 0.1 are read, evaluated, continued and exported as then.

The directories and the numbers are described in data/runs_0_1/README.md. Each
run's config has one function here, which makes it as the run was made.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import small

from attmask_jax import evaluate, interchange, train, trees
from attmask_jax import mesh as meshes
from attmask_jax.training import setup
from attmask_jax.weights import classifier as classifiers
from attmask_jax.weights import loading
from configs import evals
from configs import extrema as extrema_recipes
from configs import mae as mae_recipes

DATA = pathlib.Path(__file__).parents[1] / "data" / "runs_0_1"
STEPS, STOPPED_AT = 16, 11
NETWORKS = ("teacher", "student")
WITH_FEATURES = ("attmask", "mae", "extrema", "finetune", "imported")
CONTINUED = ("attmask", "mae")
# Measured in seconds: another each time.
TIMES = ("img_per_s", "data_wait")
CLOSE = dict(rtol=1e-5, atol=1e-6)  # of features, metrics and weights
CLOSE_LOGITS = dict(rtol=1e-5, atol=1e-8)  # these are at most 0.01 to 0.06

BATCHES = {
  "data.source": "shapes",
  "data.batch_size": 8,
  "data.image_size": 16,
  "data.shapes_train": 64,
  "data.shapes_val": 48,
  "optim.epochs": 2,
  "optim.warmup_epochs": 1,
  "optim.lr_per_256": 0.02,
  "optim.teacher_momentum": 0.8,
  "optim.weight_decay": (0.04, 0.04),
  "evals.eval_epochs": 1,
  "evals.knn_ks": (3, 5),
  "evals.batch_size": 32,
  "evals.mask_images": 0,
  "evals.overlap_images": 0,
  "evals.label_free": False,
  "run.log_steps": 3,
  "run.tensorboard": False,
}
NETWORK = {"method.variant": "8x2x2", "method.patch_size": 4}


def changed(config, *changes):
  for change in changes:
    config.update_from_flattened_dict(change)
  return config.lock()


def attmask_config():
  own = {
    "method.mask": "attmask_hint",
    "method.show_max": 0.3,
    "method.drop_path": 0.1,
    "method.out_dim": 16,
    "method.patch_out_dim": 16,
    "method.head_hidden": 16,
    "method.head_bottleneck": 8,
    "method.student_temp": 0.2,
    "method.teacher_temp": (0.08, 0.1),
    "method.teacher_patch_temp": (0.07, 0.1),
    "method.temp_warmup_epochs": 1,
    "data.local_size": 8,
    "data.local_crops": 2,
    "data.global_scale": (0.4, 1.0),
    "data.local_scale": (0.15, 0.4),
    "run.keep_steps": 8,
  }
  return changed(setup.default_config(), BATCHES, NETWORK, own)


def mae_config():
  own = {
    "method.decoder_width": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "data.scale": (0.4, 1.0),
  }
  return changed(mae_recipes.mae(), BATCHES, NETWORK, own)


def extrema_config():
  own = {
    "method.drop_path": 0.0,
    "method.mask_ratio": 0.75,
    "method.num_masks": 2,
    "method.readout_layers": 1,
    "method.head_hidden": 16,
    "method.out_dim": 16,
    "data.scale": (0.4, 1.0),
  }
  return changed(extrema_recipes.extrema(), BATCHES, NETWORK, own)


def probe_config(where):
  own = {
    "weights": str(where),
    "method.last_blocks": 2,
    "method.pool": "cls+mean",
    "method.lrs": (0.01, 1.0),
    "optim.epochs": 2,
    "optim.lr_per_256": 1.0,
    "data.batch_size": 16,
    "evals.batch_size": 16,
    "run.tensorboard": False,
  }
  return changed(evals.get_config("linear"), own)


def finetune_config(where):
  own = {
    "weights": str(where),
    "method.ema": True,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
    "optim.lr_per_256": 0.01,
    "optim.teacher_momentum": 0.8,
    "data.batch_size": 16,
    "evals.batch_size": 16,
    "run.tensorboard": False,
  }
  return changed(evals.get_config("finetune_mae_50e_gap"), own)


def knn_config(where):
  own = {"weights": str(where), "evals.knn_ks": (3, 5), "evals.batch_size": 16}
  return changed(evals.get_config("knn"), own)


def export_config(where):
  return changed(evals.get_config("knn"), {"weights": str(where)})


CONFIGS = {
  "attmask": attmask_config,
  "mae": mae_config,
  "extrema": extrema_config,
}


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """As the numbers were recorded."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    small.use_devices(monkeypatch, 1)
    yield


@pytest.fixture(scope="module")
def expected():
  return np.load(DATA / "expected.npz")


@pytest.fixture
def old(tmp_path):
  """old(NAME) copies a run, so that nothing is written into the data."""

  def copy(name):
    return pathlib.Path(shutil.copytree(DATA / name, tmp_path / name))

  return copy


def load(where, network="teacher"):
  return loading.load(str(where), network=network, mesh=meshes.make_mesh())


def outputs(source, images):
  """Features and attention of a network, by name; no cls without a token."""

  @jax.jit
  def run(params, images):
    cls, patches = source.method.features(params, images)
    attention = source.method.attention(params, images)
    return {"cls": cls, "patches": patches, "attention": attention}

  found = run(source.params, images)
  return {k: np.asarray(x) for k, x in found.items() if x is not None}


def logits(classifier, images):
  return np.asarray(
    jax.jit(classifier.method.logits)(classifier.params, images)
  )


def read(path):
  return json.loads(path.read_text())


def logged(folder, after):
  """{(step, name): value} of the metrics after a step, times left out."""
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  return {
    (line["step"], name): value
    for line in lines
    for name, value in line.items()
    if line["step"] > after and not any(t in name for t in TIMES)
  }


def assert_close(path, got, want):
  name = trees.path_name(path)
  np.testing.assert_allclose(got, want, **CLOSE, err_msg=name)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", WITH_FEATURES)
def test_weights_features_and_attention(old, expected, name, network):
  source = load(old(name), network)
  prefix = f"{name}/{network}/"
  assert source.digest == expected[f"{prefix}digest"]
  found = outputs(source, expected["images"])
  keys = {k[len(prefix) :] for k in expected if k.startswith(prefix)}
  assert set(found) == keys - {"digest"}
  for key, value in found.items():
    want = expected[prefix + key]
    np.testing.assert_allclose(value, want, **CLOSE, err_msg=key)


def test_an_earlier_checkpoint(old, expected):
  source = load(old("attmask") / "checkpoints" / "8")
  assert source.step == 8
  assert source.digest == expected["attmask/8/digest"]


def test_knn(old, expected, tmp_path):
  folder = old("attmask")
  before = (folder / "evals.jsonl").read_text()
  evaluate.evaluate(knn_config(folder), str(tmp_path / "knn"))
  found = read(tmp_path / "knn" / "results.json")["values"]
  want = {k[4:]: expected[k] for k in expected if k.startswith("knn/")}
  assert found == want and len(want) == 4
  # The run keeps what was measured of it before.
  after = (folder / "evals.jsonl").read_text()
  assert after.startswith(before) and len(after) > len(before) > 0


def set_raw(folder, raw):
  """Edits config.json as if the run had been made with this `method.raw`."""
  path = folder / "config.json"
  path.write_text(json.dumps(read(path) | {"method.raw": raw}))


@pytest.mark.parametrize("raw", [False, True])
def test_logits_of_the_probe(old, expected, raw):
  """avgpool=2: class tokens and mean patch, both with the final norm or not."""
  source, folder = load(old("attmask")), old("probe")
  set_raw(folder, raw)
  loaded = classifiers.load(str(folder), source, mesh=meshes.make_mesh())
  assert loaded.digest == expected["probe/digest"]
  assert len(loaded.class_names) == 8
  got, want = logits(loaded, expected["images"]), f"probe/raw={raw}"
  np.testing.assert_allclose(got, expected[want], **CLOSE_LOGITS)


@pytest.mark.parametrize("raw", [False, True])
def test_logits_of_the_fine_tuned_network(old, expected, raw):
  """avgpool=1: patches without the final norm, whatever `raw` said."""
  folder = old("finetune")
  set_raw(folder, raw)
  loaded = classifiers.own(load(folder, "student"))
  assert loaded.digest == expected["finetune/digest"]
  got = logits(loaded, expected["images"])
  np.testing.assert_allclose(got, expected["finetune/logits"], **CLOSE_LOGITS)


@pytest.mark.parametrize(
  "name, trained_on, config",
  [
    ("probe", "attmask", probe_config),
    ("finetune", "mae", finetune_config),
  ],
)
def test_a_finished_classifier_is_measured_again(old, name, trained_on, config):
  folder, source = old(name), old(trained_on)
  recorded = read(folder / "results.json")
  lines = (folder / "metrics.jsonl").read_text()
  evaluate.evaluate(config(source), str(folder))
  found = read(folder / "results.json")
  assert found["values"] == pytest.approx(recorded["values"], rel=1e-5)
  assert found["weights"]["digest"] == recorded["weights"]["digest"]
  assert (folder / "metrics.jsonl").read_text() == lines  # no step more


@pytest.mark.parametrize("name", CONTINUED)
def test_a_stopped_run_goes_on_to_the_same_end(old, name):
  folder = old(f"{name}_stopped")
  train.train(CONFIGS[name](), str(folder))
  # Among them the epoch's means, which hold steps from before the stop.
  found, want = (logged(x, STOPPED_AT) for x in (folder, DATA / name))
  assert found.keys() == want.keys()
  assert {(STEPS, "epoch/loss"), (12, "train/loss")} < want.keys()
  for key in want:
    np.testing.assert_allclose(found[key], want[key], **CLOSE, err_msg=key)
  for network in NETWORKS:
    ours, theirs = load(folder, network), load(DATA / name, network)
    assert ours.step == theirs.step == STEPS
    jax.tree.map_with_path(assert_close, ours.params, theirs.params)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_finished_run_is_left_as_it_is(old, name):
  folder = old(name)
  files = lambda: {p for p in folder.rglob("*") if p.is_file()}
  before, lines = files(), (folder / "metrics.jsonl").read_text()
  train.train(CONFIGS[name](), str(folder))
  assert files() == before
  assert (folder / "metrics.jsonl").read_text() == lines


def test_an_imported_run_is_exported(old, expected, tmp_path):
  path = tmp_path / "again.pth"
  interchange.export_weights(
    export_config(old("imported")),
    str(path),
    format="attmask",
    dtype="float32",
    backbone_only=False,
  )
  for network in NETWORKS:
    digest = expected[f"attmask/{network}/digest"]
    assert load(path, network).digest == digest
