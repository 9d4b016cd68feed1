"""Masked images: whose attention selects the patches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from attmask_jax import evaluate
from attmask_jax import mesh as meshes
from attmask_jax.augment import transforms
from attmask_jax.data import shapes
from attmask_jax.errors import InputError
from attmask_jax.models import vit
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import names, pth, tables
from configs import evals

SIDE, COUNT, CLASSES = 32, 48, 8  # of the generated images


def pictures(seed=0):
  """The generated images as the evaluation crops them, and their labels."""
  source = shapes.Shapes(COUNT, size=SIDE, seed=seed, split="val")
  crop = lambda i: np.array(transforms.eval_crop(source.load(i), SIDE))
  return np.stack([crop(i) for i in range(COUNT)]), np.asarray(source.labels)


def write(path, *, patch, seed, classes=0):
  """A small ViT with pronounced attention, perhaps with a linear layer."""
  rng = np.random.default_rng(seed)
  network = vit.ViT(32, 2, 2, patch, SIDE)
  empty = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype("f4"),
    jax.eval_shape(network.init, jax.random.key(0), empty),
  )
  tree, table = {"backbone": variables["params"]}, tables.backbone()
  if classes:  # least squares, so that accuracy depends on the patches
    images, labels = pictures()
    tokens = network.apply(variables, small.normalised(images)).tokens[:, 0]
    tokens = np.pad(tokens, ((0, 0), (0, 1)), constant_values=1)
    # Without a limit the layer is large and its logits are rounding errors.
    layer, *_ = np.linalg.lstsq(tokens, np.eye(classes)[labels], rcond=3e-4)
    layer = layer.astype("f4")
    tree["head"] = {"kernel": layer[None, :-1], "bias": layer[-1:]}
    table = tables.combined()
  content = {"state_dict": names.to_theirs(tree, table), "heads": 2}
  pth.write(path, content)
  return str(path)


def run(name, weights, folder, **changes):
  config = evals.get_config(name)
  config.weights = weights
  config.evals.batch_size = 16
  config.run.tensorboard = False
  changes |= {
    "evals.policies": ("attmask_high",),
    "data.source": "shapes",
    "data.image_size": SIDE,
    "data.shapes_val": COUNT,
  }
  config.update_from_flattened_dict(changes)
  evaluate.evaluate(config.lock(), str(folder))
  return json.loads((folder / "results.json").read_text())


def expected(config, network, guide, share):
  """Accuracy in percent with the most attended patches black, by loops."""
  images, labels = pictures(config["data.seed"])
  attention = guide.attention(images).mean(axis=1)
  p = guide.method.backbone.patch_size
  across = SIDE // p
  for image, row in zip(images, attention, strict=True):
    for patch in np.argsort(-row)[: int(share * across**2)]:
      y, x = divmod(patch, across)
      image[y * p : (y + 1) * p, x * p : (x + 1) * p] = 0
  with jax.default_matmul_precision("highest"):
    logits = network.method.logits(network.params, jnp.asarray(images))
  right = np.argmax(logits, axis=-1) == labels
  return 100 * right.mean()


def test_the_published_protocol_asks_for_its_guide(tmp_path, monkeypatch):
  weights = write(tmp_path / "net.pth", patch=4, seed=0, classes=CLASSES)
  monkeypatch.chdir(tmp_path)
  url = "dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_"
  for percent in range(10, 100, 10):
    assert evals.get_config(f"masked_{percent}").evals.guide
  with pytest.raises(InputError, match=url):
    run("masked_70", weights, tmp_path / "a")
  missing = {"evals.guide": "other.pth"}
  with pytest.raises(InputError, match="other.pth does not exist"):
    run("masked_70", weights, tmp_path / "b", **missing)
  # In the current directory it is found without a flag.
  write(tmp_path / evals.GUIDE, patch=8, seed=1)
  found = run("masked_70", weights, tmp_path / "c")
  (note,) = found["notes"]
  assert evals.GUIDE in note


def test_patches_are_those_that_the_guide_attends_to(tmp_path):
  weights = write(tmp_path / "net.pth", patch=4, seed=0, classes=CLASSES)
  guide = write(tmp_path / "guide.pth", patch=8, seed=1)
  mesh, values = meshes.make_mesh(), []
  load = lambda where: loading.load(where, network="teacher", mesh=mesh)
  for name, selects in (("masked", weights), ("masked_70", guide)):
    changes = {"evals.ratios": (0.25,)}
    if name == "masked_70":
      changes["evals.guide"] = guide
    found = run(name, weights, tmp_path / name, **changes)
    values.append(found["values"]["attmask_high_25/top1"])
    want = expected(found["config"], load(weights), load(selects), 0.25)
    assert values[-1] == pytest.approx(want)
  assert values[0] != values[1]
  assert found["config"]["evals.guide"] == guide
