"""Backbone and linear probe in one file, as AttMask's combine_ckpt.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image

from attmask_jax import evaluate, interchange
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.methods.classify import Classify
from attmask_jax.models import vit
from attmask_jax.weights import export, loading
from attmask_jax.weights.torch_io import names, pth, tables, tensors
from configs import evals

WIDTH, SIDE, CLASSES = 16, 16, 1000
FISH = 1  # the goldfish of ImageNet, in the last of the nine folders
NETWORK = vit.ViT(WIDTH, 5, 2, 4, SIDE)
IMAGES = np.random.default_rng(7).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


def noise(shape, seed):
  return np.random.default_rng(seed).normal(0, 0.3, shape).astype("f4")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """A backbone's file and a probe's, n = 4, with what they hold."""
  folder = tmp_path_factory.mktemp("parts")
  empty = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), empty)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  leaves = [noise(leaf.shape, i) for i, leaf in enumerate(leaves)]
  params = jax.tree.unflatten(tree, leaves)
  backbone = names.to_theirs({"backbone": params}, tables.backbone())
  pth.write(folder / "backbone.pth", {"state_dict": backbone, "heads": 2})
  linear = {
    "linear.weight": noise((CLASSES, 4 * WIDTH), 90),
    "linear.bias": noise((CLASSES,), 91),
  }
  linear["linear.bias"][FISH] += 30  # always predicted
  wrapped = {f"module.{name}": x for name, x in linear.items()}
  file = {"epoch": 100, "state_dict": wrapped, "best_acc": 1.0}
  pth.write(folder / "linear.pth", file)
  return folder, params, backbone | linear


def combine(folder, path, **options):
  config = evals.get_config("knn")
  config.weights = str(folder / "backbone.pth")
  config.probe = str(folder / "linear.pth")
  settings = dict(dtype="float32", backbone_only=False) | options
  interchange.export_weights(config, str(path), format="attmask", **settings)
  return path


def load(path):
  return loading.load(str(path), network="", mesh=meshes.make_mesh())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_file_holds_both_under_the_names_of_the_release(
  parts, tmp_path, suffix
):
  folder, _, expected = parts
  path = combine(folder, tmp_path / f"a{suffix}")
  if suffix == ".pth":
    content = pth.read(path)
    assert set(content) == {"state_dict", "heads"}
    found = content["state_dict"]
  else:
    found, _ = tensors.read(path)
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  # Written again, from what was read, it is the same file.
  config = evals.get_config("knn")
  config.weights = str(path)
  again = tmp_path / "again.pth"
  interchange.export_weights(
    config, str(again), format="attmask", dtype="float32", backbone_only=False
  )
  assert again.read_bytes() == combine(folder, tmp_path / "b.pth").read_bytes()


def test_the_file_comes_in_as_the_same_classifier(parts, tmp_path):
  folder, params, expected = parts
  path = combine(folder, tmp_path / "a.pth")
  loaded = load(path)
  images = small.normalised(IMAGES)
  with jax.default_matmul_precision("highest"):
    blocks = NETWORK.apply({"params": params}, images, last=4).blocks
    got = loaded.method.logits(loaded.params, IMAGES)
  tokens = []  # the class token of each block after the norm, oldest first
  for block in blocks:
    x = np.asarray(block[:, 0], np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-6
    )
    tokens.append(x * params["norm"]["scale"] + params["norm"]["bias"])
  want = np.concatenate(tokens, axis=-1) @ expected["linear.weight"].T
  # float32 sums of 64 terms of size about 1
  np.testing.assert_allclose(
    got, want + expected["linear.bias"], rtol=0, atol=1e-5
  )


def test_backgrounds_reads_the_file(parts, tmp_path):
  folder, *_ = parts
  pictures = tmp_path / "in9"
  rng = np.random.default_rng(3)
  fish = {"original": 0, "mixed_rand": 2, "mixed_same": 8}
  for name in fish:
    for label in range(9):
      here = pictures / name / "val" / f"{label:02d}"
      here.mkdir(parents=True)
      for i in range(fish[name] if label == 8 else 1):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(here / f"{i}.png")
  combined = combine(folder, tmp_path / "combined.pth")
  interchange.import_weights(
    evaluation(combined, pictures), str(tmp_path / "imported")
  )
  whole = [combined, tmp_path / "imported"]
  found = [
    measured(x, pictures, tmp_path / f"{i}") for i, x in enumerate(whole)
  ]
  apart = measured(
    folder / "backbone.pth", pictures, tmp_path / "apart",
    probe=str(folder / "linear.pth"),
  )  # fmt: skip
  assert found[0]["values"] == found[1]["values"] == apart["values"]
  assert found[0]["notes"] == []  # no probe was trained
  assert found[0]["values"] == pytest.approx(
    {
      "original/top1": 0,
      "mixed_rand/top1": 100 * 2 / 10,
      "mixed_same/top1": 100 * 8 / 16,
      "bg_gap": 50 - 20,
    }
  )


def evaluation(where, pictures, probe=""):
  config = evals.get_config("backgrounds")
  config.weights, config.probe = str(where), probe
  config.run.tensorboard = False
  config.evals.update(batch_size=16, backgrounds=str(pictures))
  config.data.update(source="shapes", image_size=SIDE)
  return config.lock()


def measured(where, pictures, folder, **options):
  evaluate.evaluate(evaluation(where, pictures, **options), str(folder))
  return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
  "fields, fits",
  [
    (dict(), True),
    (dict(last_blocks=3), True),
    (dict(pool="cls+mean"), True),
    (dict(last_blocks=2), False),  # as wide as one and the mean patch
    (dict(pool="cls+mean", last_blocks=2), False),
    (dict(pool="mean"), False),
    (dict(final_norm=False), False),
    (dict(head_norm="layer"), False),
    (dict(head_norm="batch"), False),
  ],
)
def test_a_layer_that_would_be_read_otherwise_is_refused(
  parts, tmp_path, fields, fits
):
  source = load(parts[0] / "backbone.pth")
  method = Classify(
    source.method.backbone, CLASSES, epochs=1, steps_per_epoch=1,
    image_size=SIDE, batch_size=8, **fields,
  )  # fmt: skip
  shape = (1, method.feature_width, CLASSES)
  head = {"kernel": noise(shape, 5), "bias": noise((1, CLASSES), 6)}
  params = source.params | {"head": head}
  ours = source._replace(method=method, params=params)
  path = str(tmp_path / "a.pth")
  if not fits:
    with pytest.raises(InputError, match='"attmask" cannot hold a linear lay'):
      export.export(path, ours, ours, format="attmask")
    return
  export.export(path, ours, ours, format="attmask")
  theirs = load(path)
  np.testing.assert_array_equal(
    theirs.method.logits(theirs.params, IMAGES), method.logits(params, IMAGES)
  )
