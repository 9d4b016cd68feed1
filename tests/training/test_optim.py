"""Optimisers and schedules against recorded numbers and hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from attmask_jax import trees
from attmask_jax.training import optim
from attmask_jax.training.schedules import Schedules, cosine

TOLERANCE = 2e-6  # tests/golden/attmask/README.md


def toy(tensors):
  """The toy module's tensors as a tree whose names say what is decayed."""
  norm = lambda name: name.replace("norm.weight", "norm.scale")
  names = {name: norm(name).replace(".", "/") for name in tensors}
  tree = {}
  for name, value in tensors.items():
    *parents, leaf = names[name].split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = jnp.asarray(value)
  return tree


def recorded(file, prefix):
  keys = (k for k in file.files if k.startswith(prefix))
  return {k[len(prefix) :]: file[k] for k in keys}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_golden_optimizers(golden, name):
  file = golden("attmask/optim.npz")
  params = toy(recorded(file, "in/param/"))
  tx = optim.Optimizer(name=name, clip=0).build(frozen_at_start="last_layer")
  state = tx.init(params)
  steps = sorted({k.split("/")[2] for k in file.files if "in/grad/" in k})
  for t in steps:
    grads = recorded(file, f"in/grad/{t}/")
    frozen = not any("last_layer" in name for name in grads)
    missing = {
      k: np.zeros_like(file[f"in/param/{k}"])
      for k in recorded(file, "in/param/")
      if k not in grads
    }
    updates, state = tx.update(
      toy(grads | missing),
      state,
      params,
      lr=jnp.float32(file[f"cfg/{name}/lr/{t}"]),
      wd=jnp.float32(file[f"cfg/wd/{t}"]),
      frozen=jnp.bool_(frozen),
    )
    params = optax.apply_updates(params, updates)
    want = toy(recorded(file, f"out/{name}/{t}/"))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE),
      params,
      want,
    )


def test_golden_decay_table(golden):
  file = golden("attmask/optim.npz")
  params = toy(recorded(file, "in/param/"))
  tx = optim.Optimizer(name="adamw", clip=0).build()
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(
    zero, tx.init(params), params, lr=1.0, wd=1.0, frozen=False
  )
  moved = jax.tree.map(
    lambda u, p: bool((u == -p).all() and p.any()), updates, params
  )
  flat = {trees.path_name(k): v for k, v in jax.tree.leaves_with_path(moved)}
  for name in file["cfg/decayed"]:
    if file[f"in/param/{name}"].any():
      assert flat[name.replace(".", "/")], name
  for name in file["cfg/undecayed"]:
    key = name.replace("norm.weight", "norm.scale").replace(".", "/")
    assert not flat[key], name


def test_golden_clip(golden):
  file = golden("attmask/optim.npz")
  grads = recorded(file, "in/clip/")
  clip = optim.clip_per_tensor(float(file["cfg/clip"]))
  tree = {name: jnp.asarray(g) for name, g in grads.items()}
  got, _ = clip.update(tree, clip.init(tree))
  for name, norm in zip(
    file["cfg/clip_names"], file["out/clip/norms"], strict=True
  ):
    np.testing.assert_allclose(
      got[name], file[f"out/clip/{name}"], rtol=0, atol=TOLERANCE
    )
    np.testing.assert_allclose(
      reference.norms(tree)[name], norm, rtol=1e-5, err_msg=name
    )


def test_clip_sees_each_layer_of_stacked_blocks_alone():
  grads = {"blocks": {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}}
  clip = optim.clip_per_tensor(1.0)
  got, _ = clip.update(grads, clip.init(grads))
  np.testing.assert_allclose(
    got["blocks"]["w"], [[0.6, 0.8], [0.3, 0.4]], rtol=1e-5
  )


def test_lars_trusts_each_layer_alone():
  tx = optim.Optimizer(name="lars", clip=0).build()
  params = {"blocks": {"w": jnp.array([[3.0, 4.0], [30.0, 40.0]])}}
  grads = {"blocks": {"w": jnp.array([[1.0, 0.0], [2.0, 0.0]])}}
  updates, _ = tx.update(
    grads, tx.init(params), params, lr=1.0, wd=0.0, frozen=False
  )
  # 0.001 * |w| / |g| * g: 0.001 * 5 / 1 * 1 and 0.001 * 50 / 2 * 2.
  want = [[-0.005, 0.0], [-0.05, 0.0]]
  np.testing.assert_allclose(updates["blocks"]["w"], want, rtol=1e-5)


def test_frozen_leaves_and_their_state_do_not_move():
  tx = optim.Optimizer(clip=3.0).build(
    frozen_at_start="last_layer", untrained="gain"
  )
  params = {
    "body": jnp.ones(3),
    "last_layer": jnp.ones(3),
    "gain": jnp.ones(3),
  }
  state = tx.init(params)
  grads = jax.tree.map(lambda p: 0.5 * p, params)
  rates = dict(lr=jnp.float32(0.1), wd=jnp.float32(0.1))
  updates, after = tx.update(grads, state, params, frozen=True, **rates)
  assert updates["body"].all()
  assert not updates["last_layer"].any() and not updates["gain"].any()
  updates, _ = tx.update(grads, after, params, frozen=False, **rates)
  # Adam's first step has size lr whatever the gradient: the count began now.
  want = -0.1 * (1.0 + 0.1)
  np.testing.assert_allclose(updates["last_layer"], want, rtol=1e-5)
  assert not updates["gain"].any()


def test_global_clip_is_an_option():
  tx = optim.Optimizer(name="sgd", clip=1.0, clip_by="global").build()
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  updates, _ = tx.update(
    grads, tx.init(params), params, lr=1.0, wd=0.0, frozen=False
  )
  np.testing.assert_allclose(updates["a"], [-0.6], rtol=1e-5)
  np.testing.assert_allclose(updates["b"], [-0.8], rtol=1e-5)


def runs(file):
  return sorted({k.split("/")[1] for k in file.files})


def test_golden_schedules(golden):
  file = golden("attmask/schedules.npz")
  for run in runs(file):
    cfg = lambda name, run=run: file[f"cfg/{run}/{name}"].item()
    schedules = Schedules(
      lr=cfg("lr") * (cfg("bs") * cfg("world")) / 256.0,
      min_lr=cfg("min_lr"),
      warmup_epochs=cfg("warmup_epochs"),
      weight_decay=(cfg("weight_decay"), cfg("weight_decay_end")),
      momentum=(cfg("momentum"), 1.0),
      freeze_epochs=1,
      epochs=cfg("epochs"),
      steps_per_epoch=cfg("iters_per_epoch"),
    )
    assert schedules.total_steps == cfg("total_iters")
    assert schedules.lr == cfg("base_lr_scaled")
    values = [schedules.values(int(i)) for i in file[f"out/{run}/step"]]
    for name in ("lr", "wd", "momentum"):
      got = [v[name] for v in values]
      np.testing.assert_allclose(
        got, file[f"out/{run}/{name}"], rtol=0, atol=1e-12, err_msg=run
      )


def test_first_step_has_no_learning_rate_and_the_peak_holds_twice():
  at = lambda i: cosine(i, base=2.0, final=0.0, warmup=4, total=8)
  assert [at(i) for i in range(5)] == [0.0, 2 / 3, 4 / 3, 2.0, 2.0]
  assert at(7) > 0


def test_ema_by_hand():
  teacher = {"a": jnp.array([1.0]), "c": {"d": jnp.array([2.0])}}
  params = {"a": jnp.array([3.0]), "b": jnp.zeros(1), "c": {"d": jnp.zeros(1)}}
  got = optim.ema(teacher, params, jnp.float32(0.75))
  np.testing.assert_allclose(got["a"], [1.5])
  np.testing.assert_allclose(got["c"]["d"], [1.5])
  assert "b" not in got


def test_every_leaf_of_a_vit_is_in_the_right_decay_group(golden):
  file = golden("attmask/train_steps.npz")
  for group, decayed in (("decayed", True), ("undecayed", False)):
    for name in file[f"out/attmask_high/{group}_param_names"]:
      path, _ = reference._leaf(name, np.zeros((1, 1, 1, 1)))
      path = path.replace(".", "/")
      kept = not optim.re.search(optim.UNDECAYED, path)
      assert kept == decayed, path


@pytest.mark.parametrize("case", ["wd0", "wd", "nesterov", "nomom"])
def test_golden_lars_of_mae(golden, case):
  file = golden("mae/lars.npz")
  cfg = lambda name: file[f"cfg/{case}/{name}"].item()
  params = {k: jnp.asarray(file[f"in/param/{k}"]) for k in ("w", "b")}
  for name in ("w_zero", "w_zerograd"):
    params[name] = jnp.asarray(file[f"in/param/{name}"])
  momentum = optax.trace(cfg("momentum"), nesterov=cfg("nesterov"))
  tx = optax.chain(
    optim.mae_trust(trust=cfg("trust_coeff")),
    momentum if cfg("momentum") else optax.identity(),
    optim.scale_by_rates(decoupled=False, undecayed="^$"),
  )
  state = tx.init(params)
  for t in range(4):
    grads = {k: jnp.asarray(file[f"in/grad{t}/{k}"]) for k in params}
    updates, state = tx.update(
      grads, state, params, lr=cfg("lr"), wd=cfg("weight_decay")
    )
    params = optax.apply_updates(params, updates)
    for name, value in params.items():
      want = file[f"out/{case}/step{t}/{name}"]
      np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)


def test_lars_is_optax_lars_at_a_constant_rate():
  rng = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"kernel": draw(4, 3), "bias": draw(3)}
  decayed = {"kernel": True, "bias": False}
  ours = optim.Optimizer(name="lars", clip=0.0).build()
  theirs = optax.lars(
    0.3, weight_decay=0.1, weight_decay_mask=decayed, trust_ratio_mask=decayed
  )
  state, their_state, their_params = (
    ours.init(params),
    theirs.init(params),
    params,
  )
  for _ in range(4):
    grads = {"kernel": draw(4, 3), "bias": draw(3)}
    scalars = dict(lr=jnp.float32(0.3), wd=jnp.float32(0.1), frozen=False)
    updates, state = ours.update(grads, state, params, **scalars)
    params = optax.apply_updates(params, updates)
    updates, their_state = theirs.update(grads, their_state, their_params)
    their_params = optax.apply_updates(their_params, updates)
  for name, value in params.items():
    np.testing.assert_allclose(value, their_params[name], rtol=1e-5, atol=1e-7)


def test_golden_moving_average(golden):
  file = golden("mae/finetune_extras.npz")
  average = {"w": jnp.asarray(file["in/ema/w0"])}
  for i in (1, 2, 3):
    student = {"w": jnp.asarray(file[f"in/ema/w{i}"])}
    average = optim.ema(average, student, jnp.float32(0.9))  # the README's rate
    want = file[f"out/ema/w{i}"]
    np.testing.assert_allclose(average["w"], want, rtol=0, atol=1e-6)
