"""Rollout against recorded maps and a plain loop; reconstructions by hand.

Of mae/rollout.npz `overlay/*` is not compared: it is OpenCV's rainbow over the
whole image, and our pictures (`drawing.heat`) have a scale of their own.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from recorded_classifiers import mae_method, under, weights_of

from attmask_jax import evaluate, train
from attmask_jax.errors import InputError
from attmask_jax.evals import reconstruct
from attmask_jax.evals import rollout as evaluation
from attmask_jax.methods import masking
from attmask_jax.methods.mae import Mae
from attmask_jax.models import rollout
from attmask_jax.rows import row_keys
from configs import evals

CLOSE = dict(rtol=1e-4, atol=2e-5)  # golden/mae/README.md


def square(values):
  return np.asarray(values).reshape((int(len(values) ** 0.5),) * 2)


@pytest.mark.parametrize("fusion", rollout.FUSIONS)
def test_golden_rollout(golden, fusion):
  file = golden("mae/rollout.npz")
  attention = jnp.asarray(file["in/attentions"])
  for ratio in file["cfg/ratios"]:
    for kind, layer in (
      ("rollout", -1), ("rollout_layer", int(file["cfg/layer_index"])),
    ):  # fmt: skip
      rolled = rollout.roll(
        rollout.fuse(attention, fusion), discard=float(ratio), layer=layer
      )
      got = rollout.relevance(rolled, num_prefix_tokens=1, mean=False)[0]
      want = file[f"out/{kind}/{fusion}/{ratio:.2f}"]
      np.testing.assert_allclose(square(got), want, **CLOSE)


def test_golden_gradient_rollout(golden):
  file = golden("mae/rollout.npz")
  fused = rollout.fuse_gradients(
    jnp.asarray(file["in/attentions"]), jnp.asarray(file["in/gradients"])
  )
  for ratio in file["cfg/ratios"]:
    rolled = rollout.roll(fused, discard=float(ratio), protect=False)
    got = rollout.relevance(rolled, num_prefix_tokens=1, mean=False)[0]
    want = file[f"out/grad_rollout/{ratio:.2f}"]
    np.testing.assert_allclose(square(got), want, **CLOSE)


def test_golden_rollout_of_a_classifier(golden):
  file, forward = golden("mae/rollout.npz"), golden("mae/finetune_forward.npz")
  method = mae_method(forward, True, head_norm="layer")
  weights = weights_of(under(forward, "sd/cls/"), fixed=True)
  images = jnp.asarray(reference.nhwc(file["in/e2e/image"]))
  category = int(file["in/e2e/category"])
  attention, gradients = rollout.logit_gradients(
    method, weights, images, category=category
  )
  np.testing.assert_allclose(attention, file["out/e2e/attentions"], **CLOSE)
  want = file["out/e2e/gradients"][::-1]  # theirs: last block first
  np.testing.assert_allclose(gradients, want, **CLOSE)
  for ratio in file["cfg/ratios"]:
    for fusion in rollout.FUSIONS:
      got = rollout.attention_rollout(
        method.backbone, weights["backbone"], images,
        fusion=fusion, discard=float(ratio),
      )  # fmt: skip
      want = file[f"out/e2e/rollout/{fusion}/{ratio:.2f}"]
      np.testing.assert_allclose(square(got[0]), want, **CLOSE)
    got = rollout.gradient_rollout(
      method, weights, images, category=category, discard=float(ratio),
      pairing="reference",
    )  # fmt: skip
    want = file[f"out/e2e/grad_rollout/{ratio:.2f}"]
    np.testing.assert_allclose(square(got[0]), want, **CLOSE)


def test_proper_rows_against_a_loop():
  rng = np.random.default_rng(0)
  fused = rng.random((3, 2, 5, 5)).astype("f4")
  got = rollout.roll(jnp.asarray(fused), discard=0.4, row_sums="rows")
  for image in range(2):
    whole = np.eye(5)
    for block in range(3):
      links = fused[block, image].astype(float)
      weak = np.argsort(links.ravel(), kind="stable")[: int(25 * 0.4)]
      kept = links.ravel().copy()
      kept[[i for i in weak if i != 0]] = 0
      links = (kept.reshape(5, 5) + np.eye(5)) / 2
      whole = (links / links.sum(axis=1, keepdims=True)) @ whole
    np.testing.assert_allclose(got[image], whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[image].sum(axis=1), 1, rtol=1e-5)


# End to end ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A small MAE run that asks its own attention what to hide."""
  folder = tmp_path_factory.mktemp("mae")
  changes = {
    "method.mask": "attmask_high",
    "method.variant": "16x2x2",
    "method.patch_size": 4,
    "method.decoder_width": 16,
    "method.decoder_depth": 1,
    "method.decoder_num_heads": 2,
    "data.image_size": 16,
    "data.shapes_train": 32,
    "data.shapes_val": 16,
    "data.batch_size": 8,
    "optim.epochs": 1,
    "optim.warmup_epochs": 0,
    "evals.knn_ks": (3,),
    "evals.batch_size": 16,
    "evals.mask_images": 3,
    "evals.overlap_images": 4,
    "run.tensorboard": False,
  }
  from configs import tiny

  config = tiny.get_config("mae")
  config.update_from_flattened_dict(changes)
  train.train(config.lock(), str(folder / "run"))
  return folder / "run"


def run(name, where, folder, **changes):
  config = evals.get_config(name)
  config.weights = str(where)
  config.evals.batch_size = 16
  config.update_from_flattened_dict(changes)
  evaluate.evaluate(config.lock(), str(folder))
  return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_run_draws_its_reconstructions(trained):
  picture = Image.open(trained / "figures" / "reconstructions.png")
  assert picture.width > 1000
  assert "reconstructions" in (trained / "report.html").read_text()


@pytest.mark.slow
def test_reconstruct_and_rollout_of_a_run(trained, tmp_path):
  found = run("reconstruct", trained, tmp_path / "a", **{"evals.count": 3})
  # 75 % of 16 patches.
  assert found["counts"] == {
    "pictures": 3, "hidden patches": 12, "patches": 16,
  }  # fmt: skip
  mse = found["values"]["mse"]
  assert 0 < mse < 1
  fewer = {"evals.count": 3, "evals.mask": "block", "evals.ratio": 0.5}
  other = run("reconstruct", trained, tmp_path / "b", **fewer)
  assert other["counts"]["hidden patches"] == 8
  raw = {"evals.count": 3, "evals.target": "raw"}
  assert run("reconstruct", trained, tmp_path / "f", **raw)["values"] != {
    "mse": mse, "psnr": found["values"]["psnr"]
  }  # fmt: skip
  name = tmp_path / "photo.png"
  Image.effect_noise((40, 25), 80).convert("RGB").save(name)
  wide = {"evals.images": str(name), "data.image_size": 24}
  found = run("reconstruct", trained, tmp_path / "c", **wide)
  assert found["counts"]["patches"] == 36  # the middle square
  found = run("rollout", trained, tmp_path / "d", **{"evals.count": 2})
  assert set(found["values"]) == {f"entropy/{f}" for f in rollout.FUSIONS}
  options = {"evals.explain": "class", "evals.count": 2, "optim.epochs": 1,
             "data.batch_size": 16, "evals.discard": 0.5,
             "method.pool": "mean", "method.last_blocks": 1}  # fmt: skip
  found = run("rollout", trained, tmp_path / "e", **options)
  assert set(found["values"]) == {"entropy/gradient"}
  assert "one was trained for 1 epochs" in found["notes"][0]
  # 16 patches: at most log 16.
  assert 0 < found["values"]["entropy/gradient"] <= np.log(16)


@pytest.mark.parametrize(
  "name, changes, match",
  [
    ("reconstruct", {"network": "teacher"}, "has no decoder.*network=student"),
    ("reconstruct", {"evals.ratio": 1.0}, "mask_ratio 1.0"),
    ("reconstruct", {"evals.mask": "x"}, '"x" is unknown'),
    ("reconstruct", {"evals.target": "x"}, "normalised, raw"),
    ("reconstruct", {"evals.images": "nowhere.png"}, "does not exist"),
    ("rollout", {"evals.discard": 1.0}, "discard 1.0"),
    ("rollout", {"evals.layer": 2}, "layer 2 is not a block: use 0 to 1"),
    ("rollout", {"evals.fusions": ("sum",)}, "mean, max, min"),
    ("rollout", {"evals.explain": "x"}, "use token or class"),
  ],
)
def test_what_is_refused(trained, tmp_path, name, changes, match):
  with pytest.raises(InputError, match=match):
    run(name, trained, tmp_path, **changes)


def test_pictures_without_a_link_are_empty_and_said_so(
  trained, tmp_path, monkeypatch
):
  maps = [np.full(16, np.nan), np.ones(16)]
  monkeypatch.setattr(evaluation, "_by_token", lambda *_: list(maps))
  options = {"evals.count": 2, "evals.fusions": ("min",)}
  found = run("rollout", trained, tmp_path, **options)
  assert "1 maps are empty, as evals.discard 0.9" in found["notes"][-1]
  assert [row[1] for row in found["table"]["rows"]] == ["-", "2.773", "2.773"]
  assert found["values"]["entropy/min"] == pytest.approx(np.log(16))


def test_errors_are_those_of_hidden_patches():
  @dataclasses.dataclass(frozen=True)
  class Grey(Mae):
    """Paints everything in mid grey."""

    def reconstruct(self, params, images, order):
      return jnp.full(images.shape, 0.5)

  from configs import tiny

  config = tiny.get_config("mae")
  config.method.update(variant="16x2x2", patch_size=4, decoder_width=16)
  config.data.image_size = 16
  whole = Mae.from_config(config, steps_per_epoch=1)
  method = Grey(**vars(whole))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (11, 16, 16, 3)).astype(np.uint8)
  found = reconstruct.reconstruct(method, {}, {}, images, seed=3)
  assert found.hidden.shape == (11, 4, 4)
  assert np.all(found.hidden.sum(axis=(1, 2)) == 12)
  for i in range(11):
    errors = [
      (images[i, y, x, c] / 255 - 0.5) ** 2
      for y in range(16) for x in range(16) for c in range(3)
      if found.hidden[i, y // 4, x // 4]
    ]  # fmt: skip
    assert found.error[i] == pytest.approx(np.mean(errors), rel=1e-5)
  keys = row_keys(jax.random.key(3), jnp.arange(11))
  order = masking.visible_first(
    "random", keys=keys, grid=(4, 4), n_hidden=12, show_max=0.1
  )
  hidden = np.zeros((11, 16), bool)
  np.put_along_axis(hidden, np.asarray(order)[:, 4:], True, axis=1)
  assert np.array_equal(hidden.reshape(11, 4, 4), found.hidden)
