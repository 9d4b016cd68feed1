"""Attention dropout: in training only, by row, and free where it is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.methods import METHODS
from attmask_jax.methods.classify import Classify
from attmask_jax.models import layers, noise, vit
from configs import evals, extrema, tiny

RATE = 0.4


def test_dropout_zeroes_a_share_and_scales_the_rest():
  keys = jax.random.split(jax.random.key(0), 50)
  x = np.random.default_rng(0).uniform(1, 2, (50, 4, 20, 20)).astype("f4")
  got = np.asarray(layers.dropout(x, keys, rate=RATE))
  kept = got != 0
  np.testing.assert_allclose(got[kept], x[kept] / (1 - RATE), rtol=1e-6)
  # 80,000 draws: 4 standard errors are 0.007.
  assert abs(kept.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / x.size)
  # So the mean stays: 0.8 / sqrt(80,000) is one standard error of it.
  assert abs(got.mean() - x.mean()) < 4 * got.std() / np.sqrt(x.size)
  rows = {row.tobytes() for row in kept}
  assert len(rows) == 50  # each has its own


@pytest.mark.parametrize("bias", [False, True])
def test_attention_with_dropout_against_numpy(bias):
  """Weights are dropped after the softmax; what is returned is before it."""
  rows, tokens, width, heads = 2, 5, 6, 3
  rng = np.random.default_rng(1)
  x = rng.normal(size=(rows, tokens, width)).astype("f4")
  bias = rng.normal(size=(rows, heads, tokens, tokens)).astype("f4") * bias
  keys = jax.random.split(jax.random.key(2), rows)
  module = layers.Attention(heads, jnp.float32, "auto", drop=RATE)
  call = dict(return_attention="full", logit_bias=bias)
  params = module.init(jax.random.key(3), x, **call)["params"]
  params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f4"), params)
  with jax.default_matmul_precision("highest"):
    out, returned = module.apply({"params": params}, x, drop_keys=keys, **call)
  qkv, proj, d = params["qkv"], params["proj"], width // heads
  for r in range(rows):
    shape = (heads, tokens, tokens)
    kept = np.asarray(jax.random.bernoulli(keys[r], 1 - RATE, shape))
    q, k, v = np.split(x[r] @ qkv["kernel"] + qkv["bias"], 3, axis=1)
    joined = []
    for h in range(heads):
      part = slice(h * d, (h + 1) * d)
      logits = q[:, part] @ k[:, part].T / np.sqrt(d) + bias[r, h]
      weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
      np.testing.assert_allclose(returned[r, h], weights, rtol=1e-4, atol=1e-6)
      joined.append(weights * kept[h] / (1 - RATE) @ v[:, part])
    want = np.concatenate(joined, axis=1) @ proj["kernel"] + proj["bias"]
    # float32, sums of 6 terms of size up to 10
    np.testing.assert_allclose(out[r], want, rtol=0, atol=1e-4)


def fine_tuning(rate, *, frozen=False, drop_path=0.0):
  """Method, trees and batch of a fine-tuning."""
  backbone = vit.ViT(16, 2, 2, 4, 16, drop_path=drop_path, attn_drop=rate)
  method = Classify(
    backbone, 8, epochs=1, steps_per_epoch=1, image_size=16, batch_size=8,
    frozen=frozen,
  )  # fmt: skip
  rng = np.random.default_rng(4)
  trees = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype("f4"),
    jax.eval_shape(method.init, jax.random.key(0)),
  )
  batch = {
    "images": rng.integers(0, 256, (8, 1, 16, 16, 3), np.uint8),
    "label": np.arange(8, dtype=np.int32),
    "position": np.arange(8, dtype=np.int32),
  }
  return method, trees, batch


def pretraining(rate, *, drop_path=0.0):
  """The same of ExtreMA's; all patches visible, so that no mask is drawn."""
  changes = {
    "method.attn_drop": rate,
    "method.drop_path": drop_path,
    "method.variant": "16x2x2",
    "method.mask_ratio": 0.0,
    "method.num_masks": 1,
  }
  return small.example(changes, arg="extrema", rows=8)


CASES = {"extrema": pretraining, "fine-tuning": fine_tuning}


def loss(example, key=0):
  method, trees, batch = example
  out = small.loss_of(
    method, *trees, batch, jax.random.key(key), method.at(0)
  )  # fmt: skip
  return float(out[0]), out[2]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_depends_on_the_key_where_it_is_on(case):
  make = CASES[case]
  ends = [loss(make(rate), key) for rate in (0.0, 0.5) for key in (0, 1)]
  losses = [end[0] for end in ends]
  assert losses[0] == losses[1] and len(set(losses)) == 3
  if case == "extrema":  # whose teacher drops nothing
    stds = [float(end[1]["target_std"]) for end in ends]
    np.testing.assert_allclose(stds, stds[0], rtol=1e-6)


def test_a_probe_on_frozen_features_drops_nothing():
  ends = [loss(fine_tuning(rate, frozen=True))[0] for rate in (0.0, 0.5)]
  assert ends[0] == ends[1]


@pytest.mark.parametrize("case", CASES)
def test_off_it_costs_nothing_and_on_it_leaves_drop_path_alone(
  case, monkeypatch
):
  key, rows = jax.random.key(3), jnp.arange(8)
  drawn = [
    noise.sample(CASES[case](rate, drop_path=0.5)[0].backbone, key, rows)
    for rate in (0.0, RATE)
  ]
  assert drawn[0].keys() == {"drop_path_noise"}
  assert drawn[1].keys() == {"drop_path_noise", "attn_drop_keys"}
  np.testing.assert_array_equal(*(d["drop_path_noise"] for d in drawn))
  never = lambda *_, **__: pytest.fail("attention dropout was computed")
  monkeypatch.setattr(noise, "attention_keys", never)
  monkeypatch.setattr(layers, "dropout", never)
  assert np.isfinite(loss(CASES[case](0.0, drop_path=0.5))[0])


@pytest.mark.parametrize("case", CASES)
def test_evaluation_does_not_drop(case):
  (method, trees, batch), (same, *_) = CASES[case](0.5), CASES[case](0.0)
  params, images = trees[0], batch["images"][:, 0]

  def outputs(method):
    found = [*method.features(params, images), method.attention(params, images)]
    if case == "fine-tuning":
      found.append(method.logits(params, images))
    return found

  for got, want in zip(outputs(method), outputs(same), strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_eight_devices_drop_what_one_drops(case):
  method, trees, batch = CASES[case](0.5, drop_path=0.3)
  found = []
  for count in (1, 8):
    mesh = meshes.make_mesh(devices=jax.devices()[:count])
    shared = meshes.shard(mesh, batch)
    whole = meshes.put(mesh, trees)
    found.append(loss((method, whole, shared)))
  # Sums over 8 images in another order: a few units in the last place.
  assert found[0][0] == pytest.approx(found[1][0], rel=2e-6)
  # As little depends on which rows a micro-batch holds.
  if case == "fine-tuning":
    half = lambda i: {k: x[4 * i : 4 * i + 4] for k, x in batch.items()}
    parts = [loss((method, trees, half(i)))[0] for i in (0, 1)]
    assert np.mean(parts) == pytest.approx(found[0][0], rel=2e-6)


@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full")])
def test_scanned_and_recomputed_blocks_drop_the_same(scan, remat):
  method, trees, batch = fine_tuning(0.5)
  want = loss((method, trees, batch))[0]
  backbone = method.backbone.clone(scan=scan, remat=remat)
  other = Classify(
    backbone, 8, epochs=1, steps_per_epoch=1, image_size=16, batch_size=8,
    frozen=False,
  )  # fmt: skip
  assert loss((other, trees, batch))[0] == pytest.approx(want, rel=2e-6)


def test_keys_differ_between_blocks_and_follow_the_row():
  keys = noise.attention_keys(jax.random.key(0), jnp.array([5, 7, 5]), depth=3)
  data = np.asarray(jax.random.key_data(keys))
  assert data.shape[:2] == (3, 3)
  np.testing.assert_array_equal(data[:, 0], data[:, 2])
  assert len({x.tobytes() for x in data[:, :2].reshape(6, -1)}) == 6


def test_a_kernel_without_weights_is_refused():
  config = small.config(
    {"method.attn_drop": 0.1, "run.attention": "cudnn"}, arg="extrema"
  )
  with pytest.raises(InputError, match="attn_drop 0.1 needs .*attention=auto"):
    METHODS["extrema"].from_config(config, steps_per_epoch=1)
  config.method.attn_drop = 1.0
  with pytest.raises(InputError, match="method.attn_drop"):
    METHODS["extrema"].from_config(config, steps_per_epoch=1)


def test_the_key_is_there_where_a_release_has_the_flag():
  for config in (extrema.get_config(), tiny.get_config("extrema"),
                 evals.get_config("finetune"),
                 evals.get_config("finetune_mae_50e_gap"),
                 evals.get_config("finetune_extrema")):  # fmt: skip
    assert config.method.attn_drop == 0
  for name in ("attmask", "mae"):
    assert "attn_drop" not in tiny.get_config(name).method
