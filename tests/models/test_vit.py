"""The ViT against recorded numbers and against itself in other forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from attmask_jax.errors import InputError
from attmask_jax.models import blocks, embedding, layers, noise, positions, vit
from attmask_jax.training import setup


@pytest.fixture(scope="module")
def recorded(golden):
  file = golden("attmask/vit_forward.npz")
  model = vit.ViT(
    width=int(file["cfg/dim"]),
    depth=int(file["cfg/depth"]),
    num_heads=int(file["cfg/heads"]),
    patch_size=int(file["cfg/patch"]),
    image_size=int(file["cfg/img"]),
  )
  return file, model, {"params": reference.load(file, "sd/")}


def close(got, want, atol):
  np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=atol)


# Tolerances of this file: tests/golden/attmask/README.md.
TOKENS, ATTENTION, POSITIONS = 1e-4, 1e-5, 5e-6


@pytest.mark.parametrize("name", ["global", "local", "rect", "big"])
@pytest.mark.parametrize("scan", [True, False])
def test_golden_forward(recorded, name, scan):
  file, model, variables = recorded
  model = model.clone(scan=scan)
  images = reference.nhwc(file[f"in/{name}"])
  out = model.apply(variables, images, return_attention="full")
  if name == "big":
    close(out.tokens[:, 0], file["out/big/tokens_cls"], TOKENS)
    close(out.tokens[:, -1], file["out/big/tokens_last"], TOKENS)
  else:
    close(out.tokens, file[f"out/{name}/tokens"], TOKENS)
  if f"out/{name}/attn" in file.files:
    close(out.attention, file[f"out/{name}/attn"], ATTENTION)
  if f"out/{name}/cls_attention" in file.files:
    row = jnp.mean(out.attention, axis=1)[:, 0, 1:]
    close(row, file[f"out/{name}/cls_attention"], ATTENTION)


@pytest.mark.parametrize("name", ["global", "rect"])
def test_golden_masked(recorded, name):
  file, model, variables = recorded
  mask = file["in/mask" if name == "global" else f"in/{name}_mask"]
  images = reference.nhwc(file[f"in/{name}"])
  out = model.apply(
    variables, images, mask.reshape(len(mask), -1), return_attention="cls"
  )
  close(out.tokens, file[f"out/{name}_masked/tokens"], TOKENS)
  if name == "global":
    want = file["out/global_masked/cls_attention"]
    close(jnp.mean(out.attention, axis=1), want, ATTENTION)


def test_golden_last_blocks_and_class_row(recorded):
  file, model, variables = recorded
  images = reference.nhwc(file["in/global"])
  out = model.apply(variables, images, last=2, return_attention="cls")
  want = file["out/global/last_selfattention_cls"]
  close(out.attention, want, ATTENTION)
  norm = {"params": variables["params"]["norm"]}
  for i, block in enumerate(out.blocks):
    got = layers.LayerNorm().apply(norm, block)
    close(got, file[f"out/global/intermediate_n2/{i}"], TOKENS)


@pytest.mark.parametrize("name", ["local", "rect", "big"])
def test_golden_positions(recorded, name):
  file, model, variables = recorded
  height, width = file[f"in/{name}"].shape[-2:]
  got = positions.interpolate(
    variables["params"]["pos_embed"], height, width, model.patch_size
  )
  close(got, file[f"out/pos_embed/{name}"], POSITIONS)


def test_golden_plainly_resampled_positions(golden):
  file = golden("mae/finetune_extras.npz")
  size = int(file["cfg/posinterp_new_size"])
  table, want = jnp.asarray(file["in/posinterp"]), file["out/posinterp"]
  close(positions.interpolate(table, size, size, 1, offset=0.0), want, 1e-6)
  # The rule of DINO and AttMask is another one.
  other = np.asarray(positions.interpolate(table, size, size, 1))
  assert np.abs(other - want).max() > 0.01


@pytest.mark.slow
def test_learned_positions_are_resampled_by_the_rule_of_the_network():
  images = jax.random.normal(jax.random.key(0), (1, 12, 12, 3))
  table = jax.random.normal(jax.random.key(1), (1, 1 + 4, 8))
  outputs = []
  for offset in (0.0, 0.1):
    model = vit.ViT(8, 1, 2, 4, 8, grid_offset=offset)
    params = model.init(jax.random.key(2), images[:, :8, :8])["params"]
    run = lambda m, x, params=params: (
      m.apply({"params": params | {"pos_embed": x}}, images).tokens
    )
    whole = positions.interpolate(table, 12, 12, 4, offset=offset)
    outputs.append(run(model, table))
    close(outputs[-1], run(model.clone(image_size=12), whole), 1e-6)
  assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_positions_of_a_non_square_image_with_equal_count_are_resampled():
  table = jax.random.normal(jax.random.key(0), (1, 1 + 16, 8))
  same = positions.interpolate(table, 32, 32, 8)
  assert same is table
  other = positions.interpolate(table, 16, 64, 8)  # 2 x 8 = 16 patches
  assert other.shape == table.shape
  assert not np.allclose(other, table)


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat", ["auto", "none", "elementwise", "dots", "full"]
)
@pytest.mark.parametrize("last", [1, 3])
def test_scan_and_remat_change_nothing(remat, last):
  model = vit.ViT(24, 3, 2, 4, 16, drop_path=0.3, scan=False)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = model.init(jax.random.key(1), images)
  draws = noise.drop_path(jax.random.key(2), jnp.arange(2), depth=3)

  def loss(variables, model):
    out = model.apply(variables, images, drop_path_noise=draws, last=last)
    return sum(jnp.sum(b**2) for b in out.blocks)

  want = jax.grad(loss)(variables, model)
  got = jax.grad(loss)(variables, model.clone(scan=True, remat=remat))
  # Scanned and unrolled bodies fuse differently: a few float32 ulps of sums.
  jax.tree.map(lambda a, b: close(a, b, 2e-4), got, want)


def test_drop_path_by_hand(monkeypatch):
  depth, rate = 4, 0.6
  model = vit.ViT(16, depth, 2, 4, 8, drop_path=rate)
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  variables = model.init(jax.random.key(1), images)
  blocks = variables["params"]["blocks"]
  # Block i has rate 0, .2, .4, .6. Draws just below a rate drop the branch.
  draws = np.array([0.0, 0.19, 0.41, 0.59], np.float32)
  draws = jnp.broadcast_to(draws[:, None, None], (depth, 2, 1))
  got = model.apply(variables, images, drop_path_noise=draws).blocks[0]
  survivors = {0: 1.0, 2: 1 / (1 - 0.4)}

  def no_blocks(module, block, x, **options):
    module.param("blocks", lambda key: blocks)
    return (x,), None

  monkeypatch.setattr(vit.blocks, "apply", no_blocks)
  x = model.apply(variables, images).blocks[0]
  for i, scale in survivors.items():
    layer = jax.tree.map(lambda a, i=i: a[i], blocks)
    keep = jnp.full((2, 1), scale)
    x, _ = layers.Block(2, 4.0, jnp.float32, "xla").apply(
      {"params": layer}, x, keep
    )
  close(got, np.asarray(x), 1e-5)


def test_golden_drop_path(golden):
  file = golden("mae/finetune_extras.npz")
  draws = jnp.asarray(file["in/droppath/u"]).reshape(1, 1, -1)
  # Two blocks: the first never drops, the last has the rate.
  scales = blocks.branch_scales(
    jnp.tile(draws, (2, 2, 1)), file["cfg/droppath_p"].item()
  )
  assert (scales[0] == 1).all()
  for branch in np.asarray(scales[1]):
    got = file["in/droppath/x"] * branch[:, None, None]
    close(got, file["out/droppath"], 1e-6)


@pytest.mark.parametrize("dropped", ["attention", "mlp"])
def test_the_branches_of_a_block_are_dropped_apart(dropped):
  """One branch of the last block gone and the other doubled, by its weights."""
  model = vit.ViT(8, 2, 2, patch_size=4, image_size=8, drop_path=0.5)
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(1), images)["params"]
  noise = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape), params)
  draws = np.full((2, 2, 1), 0.9, np.float32)
  draws[1, int(dropped == "mlp")] = 0.1
  got = model.apply({"params": params}, images, drop_path_noise=draws).tokens
  factors = (0.0, 2.0) if dropped == "attention" else (2.0, 0.0)
  blocks = params["blocks"]
  for layer, factor in zip(
    (blocks["attn"]["proj"], blocks["mlp"]["fc2"]), factors, strict=True
  ):
    for name, x in layer.items():
      layer[name] = x.at[1].multiply(factor)
  want = model.apply({"params": params}, images).tokens
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_key_bias_that_is_off_has_no_effect_and_no_gradient():
  """Not even rounding, which Adam would blow up to steps of size lr."""
  model = vit.ViT(8, 2, 2, patch_size=4, image_size=8, key_bias=False)
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  params = jax.jit(model.init)(jax.random.key(1), images)["params"]

  @jax.jit
  def outcome(keys):
    def loss(bias):
      layers = params["blocks"]["attn"]
      qkv = layers["qkv"] | {"bias": bias}
      blocks = params["blocks"] | {"attn": layers | {"qkv": qkv}}
      weights = {"params": params | {"blocks": blocks}}
      return jnp.sum(model.apply(weights, images).tokens ** 3)

    bias = params["blocks"]["attn"]["qkv"]["bias"] + 0.1  # of queries, values
    return jax.value_and_grad(loss)(bias.at[:, 8:16].set(keys))

  (want, _), (got, slope) = outcome(0.0), outcome(0.7)
  assert got == want and slope.shape == (2, 24)
  assert not slope[:, 8:16].any() and slope[:, :8].any()


def test_drop_path_noise_follows_the_row_and_not_its_place():
  key = jax.random.key(0)
  draws = noise.drop_path(key, jnp.array([5, 7, 5]), depth=2)
  np.testing.assert_array_equal(draws[..., 0], draws[..., 2])
  assert not np.array_equal(draws[..., 0], draws[..., 1])


@pytest.mark.slow
def test_bfloat16_stays_close_and_keeps_float32_parameters(recorded):
  file, model, variables = recorded
  images = reference.nhwc(file["in/global"])
  low = model.clone(dtype=jnp.bfloat16)
  out = low.apply(variables, images).tokens
  assert out.dtype == jnp.float32
  error = np.abs(out - file["out/global/tokens"])
  assert 1e-4 < error.max() and error.mean() < 0.05  # 8 bits of mantissa
  fresh = low.init(jax.random.key(0), images)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(fresh))


def test_initial_values_follow_the_reference():
  model = vit.ViT(64, 2, 2, 8, 32)
  images = jnp.zeros((1, 32, 32, 3))
  params = model.init(jax.random.key(0), images, jnp.zeros((1, 16), bool))
  params = params["params"]
  bound = (3 * 8 * 8) ** -0.5
  for leaf in params["patch_embed"].values():
    assert 0.9 * bound < np.abs(leaf).max() <= bound
  for name in ("qkv", "proj"):
    dense = params["blocks"]["attn"][name]
    assert abs(np.std(dense["kernel"]) - 0.02) < 0.001
    assert not dense["bias"].any()
  first, second = params["blocks"]["mlp"]["fc1"]["kernel"]
  assert not np.allclose(first, second)
  assert not params["mask_token"].any()
  assert abs(np.std(params["pos_embed"]) - 0.02) < 0.002


def test_normalize_images_by_hand():
  white = np.full((1, 2, 2, 3), 255, np.uint8)
  got = vit.normalize_images(jnp.asarray(white))[0, 0, 0]
  want = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
  close(got, want, 1e-6)
  floats = jnp.full((1, 2, 2, 3), 0.5)
  np.testing.assert_array_equal(vit.normalize_images(floats), floats)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"data.image_size": 70}, ["70", "64 or 80"]),
    ({"data.image_size": 8}, ["8", "16 or 32"]),
    ({"method.variant": "vast"}, ["vast", "tiny, small, base, large"]),
    ({"method.variant": "100x2x3"}, ["100", "3 heads", "99"]),
    ({"run.remat": "some"}, ["some", "auto, none, full, dots, elementwise"]),
    ({"run.attention": "flash"}, ["flash", "auto, xla, cudnn"]),
  ],
)
def test_bad_sizes(change, words):
  config = setup.default_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError) as error:
    vit.from_config(config)
  assert all(word in str(error.value) for word in words)


def test_published_sizes():
  model = vit.from_config(setup.default_config())
  assert (model.width, model.depth, model.num_heads) == (384, 12, 6)
  assert model.grid == 14


def without_positions(weights):
  """Fixed tables are no parameters of ours."""
  return {k: v for k, v in weights.items() if k != "pos_embed"}


@pytest.fixture(scope="module")
def reading(golden):
  """ExtreMA's encoder: fixed positions, a class token that reads at the end."""
  file = golden("extrema/vit_forward.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  model = vit.ViT(
    width=cfg("embed_dim"),
    depth=cfg("depth"),
    num_heads=cfg("num_heads"),
    patch_size=cfg("patch_size"),
    image_size=cfg("img_size"),
    class_token="readout",
    positions="xy",
    readout_layers=cfg("class_attention_layers"),
  )
  weights = without_positions(reference.load(file, "sd/"))
  images = reference.nhwc(file["in/images"])
  return file, model, {"params": weights}, images


def test_golden_class_attention_encoder(reading):
  file, model, variables, images = reading
  table = positions.sin_cos((model.grid,) * 2, model.width, "xy")
  close(table, file["sd/pos_embed"], 1e-7)
  out = model.apply(variables, images, return_attention="cls")
  close(out.blocks[-1], file["out/full/patch_tokens"], 2e-5)
  close(out.tokens, file["out/full/norm_tokens"], 2e-5)
  last = model.readout_layers - 1
  close(out.raw[:, :1], file[f"out/full/cls_after_ca{last}"], 2e-5)
  # The class token attends to itself, too, so a row sums to less than 1.
  assert out.attention.shape == (len(images), model.num_heads, model.grid**2)
  assert 0.5 < float(out.attention.sum(-1).max()) < 1
  cls, patches = embedding.features(model, variables["params"], images)
  close(cls, file["out/full/feature"], 2e-5)
  close(patches, file["out/full/norm_tokens"][:, 1:], 2e-5)


def test_golden_subsets_of_patches(reading):
  file, model, variables, images = reading
  ids = file["in/masks"].transpose(1, 0, 2)  # [B, M, K], as we have them
  b, m, _ = ids.shape
  out = model.apply(variables, images, keep_ids=jnp.asarray(ids))
  major = lambda x: np.asarray(x).reshape(b, m, *x.shape[1:]).swapaxes(0, 1)
  got = major(out.tokens[:, 0]).reshape(m * b, -1)
  close(got, file["out/masked/feature"], 2e-5)


@pytest.mark.parametrize("variant", ["gap", "cls"])
def test_golden_visible_patches_only(golden, variant):
  file = golden("mae/pretrain_forward.npz")
  cfg = lambda name: file[f"cfg/{name}"].item()
  model = vit.ViT(
    width=cfg("dim"),
    depth=cfg("depth"),
    num_heads=cfg("heads"),
    patch_size=cfg("patch"),
    image_size=cfg("img"),
    class_token="input" if variant == "cls" else "none",
    positions="yx",
    key_bias=False,
  )
  weights = reference.load(file, f"sd/{variant}/encoder.")
  variables = {"params": without_positions(weights)}
  images = reference.nhwc(file[f"in/{variant}/images"])
  shuffle = file[f"in/{variant}/shuffle"]
  ids = shuffle[:, : file[f"out/{variant}/visible_size"].item()]
  out = model.apply(variables, images, keep_ids=jnp.asarray(ids)[:, None])
  want = file[f"out/{variant}/latent_visible"]
  close(out.tokens[:, model.num_prefix_tokens :], want, 2e-5)


def test_a_key_bias_that_is_off_gets_no_gradient():
  model = vit.ViT(8, 1, 2, patch_size=4, image_size=8, key_bias=False)
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  params = model.init(jax.random.key(1), images)["params"]
  loss = lambda p: jnp.sum(model.apply({"params": p}, images).tokens[:, 1] ** 3)
  bias = np.asarray(jax.grad(loss)(params)["blocks"]["attn"]["qkv"]["bias"])[0]
  assert not bias[8:16].any()
  assert np.abs(bias[:8]).max() > 0 and np.abs(bias[16:]).max() > 0


def test_attention_received_without_a_class_token():
  model = vit.ViT(
    8, 2, 2, patch_size=4, image_size=12, class_token="none", positions="yx"
  )
  images = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
  variables = model.init(jax.random.key(1), images)
  full = model.apply(variables, images, return_attention="full").attention
  received = model.apply(variables, images, return_attention="cls").attention
  want = np.asarray(full).sum(axis=2) / 9  # over queries
  close(received, want, 1e-6)


def test_no_class_token_no_class_feature():
  model = vit.ViT(8, 1, 2, 4, 8, class_token="none", positions="yx")
  images = jnp.zeros((1, 8, 8, 3))
  params = model.init(jax.random.key(0), images)["params"]
  cls, patches = embedding.features(model, params, images)
  assert cls is None
  assert embedding.pool(cls, patches, pool="mean").shape == (1, 8)
  with pytest.raises(InputError, match="none"):
    embedding.pool(cls, patches, pool="cls")


@pytest.mark.parametrize("final_norm", [True, False])
def test_pooled_features(final_norm):
  """A network whose final norm multiplies by 3."""
  cls = np.arange(8.0).reshape(2, 4)
  patches = np.arange(30.0).reshape(2, 5, 3)

  def features(images, *, last, norm):
    assert last == 2
    return cls * (1 + 2 * norm), patches * (1 + 2 * norm)

  scale, mean = 3 if final_norm else 1, patches.sum(axis=1) / 5
  for pool, want in (
    ("cls", cls),
    ("mean", mean),
    ("cls+mean", np.concatenate([cls, mean], axis=1)),
  ):
    got = embedding.embed(
      features, np.zeros(1), last=2, pool=pool, final_norm=final_norm
    )
    close(got, scale * want, 1e-6)
