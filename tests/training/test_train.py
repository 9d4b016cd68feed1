"""The compiled step and the loop around it."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from attmask_jax import mesh as meshes
from attmask_jax import train, trees
from attmask_jax.errors import InputError
from attmask_jax.methods import METHODS, attmask, base, masking
from attmask_jax.runs import judgement, metrics, progress
from attmask_jax.training import optim, train_step
from attmask_jax.training import setup as runs

# Sums are taken in another order: a few units in the last place of float32,
# grown over 4 steps. See test_mesh.py.
ROUNDING = 5e-6


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  small.use_devices(monkeypatch, 1)


@pytest.fixture
def traces(monkeypatch):
  """Counts how often the loss is traced."""
  count = collections.Counter()
  loss = attmask.AttMask.loss

  def counted(self, *args):
    count["loss"] += 1
    return loss(self, *args)

  monkeypatch.setattr(attmask.AttMask, "loss", counted)
  return count


def test_fifty_steps_of_varying_ratios_compile_once(traces):
  changes = {
    "optim.epochs": 7,
    "method.mask": "attmask_hint",
    "method.mask_ratio": (0.2, 0.4),
    "method.mask_ratio_var": (0.1, 0.3),
    "method.show_max": 0.5,
  }
  run, state, step = small.parts(small.config(changes))
  counts = set()
  for batch, scalars in small.arguments(run, 50):
    counts.add((int(scalars["n_mask"]), int(scalars["n_show"])))
    state, _, _ = step(state, batch, scalars)
  assert int(state.step) == 50
  assert len(counts) > 5
  assert step._cache_size() == 1
  assert traces["loss"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  "family, policy",
  [("mae", policy) for policy in masking.VISIBLE_POLICIES]
  + [("extrema", policy) for policy in ("random", "attmask_hint")],
)
def test_every_mask_policy_compiles_once(monkeypatch, family, policy):
  changes = {"method.variant": "8x1x2", "method.mask": policy}
  config = small.config(changes, arg=family)
  cls = METHODS[family]
  loss, count = cls.loss, collections.Counter()

  def counted(self, *args):
    count["loss"] += 1
    return loss(self, *args)

  monkeypatch.setattr(cls, "loss", counted)
  run, state, step = small.parts(config)
  for batch, scalars in small.arguments(run, 4):
    state, values, _ = step(state, batch, scalars)
  assert int(state.step) == 4 and np.isfinite(float(values["loss"]))
  assert step._cache_size() == 1
  assert count["loss"] == 1


def test_the_state_is_donated():
  run, state, step = small.parts(small.config())
  batch, scalars = next(small.arguments(run, 1))
  new, _, _ = step(state, batch, scalars)
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves((new, batch)))


def test_each_step_draws_by_its_own_key():
  """The second half of the seed's key, folded with the steps completed."""
  changes = {
    "method.mask": "attmask_hint",
    "method.show_max": 0.5,
    "method.drop_path": 0.5,
    "method.seed": 3,
  }
  built, state, step = small.parts(small.config(changes))
  batch, scalars = next(small.arguments(built, 1))  # whose rate is 0
  _, root = jax.random.split(jax.random.key(3))
  losses = []
  for i in range(3):
    trees = jax.tree.map(np.asarray, (state.params, state.teacher, state.aux))
    by_hand = [
      small.loss_of(
        built.method, *trees, batch, jax.random.fold_in(root, j), scalars
      )
      for j in range(3)
    ]
    state, values, _ = step(state, batch, scalars)
    for name in ("loss", "mask_ratio"):
      want = by_hand[i][2][name]
      np.testing.assert_allclose(values[name], want, rtol=1e-5, err_msg=name)
    losses.append(float(values["loss"]))
    assert len({float(loss) for loss, *_ in by_hand}) == 3
  assert min(abs(np.diff(losses))) > 1e-3


DRAWS = {
  "data.batch_size": 16,
  "method.mask": "attmask_hint",
  "method.show_max": 0.3,
  "method.drop_path": 0.1,
}


@pytest.fixture(scope="module")
def whole_batch():
  with pytest.MonkeyPatch.context() as monkeypatch:
    small.use_devices(monkeypatch, 1)
    return small.run_steps(small.config(DRAWS), 4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_give_the_update_of_the_whole(whole_batch, accumulate):
  config = small.config(DRAWS | {"run.accumulate": accumulate})
  state, history = small.run_steps(config, 4)
  want_state, want_history = whole_batch
  small.assert_close(state.params, want_state.params, ROUNDING)
  small.assert_close(state.teacher, want_state.teacher, ROUNDING)
  small.assert_close(state.aux, want_state.aux, ROUNDING)
  for got, want in zip(history, want_history, strict=True):
    for name in set(want) - {"assignment", "grad_norm"}:
      np.testing.assert_allclose(
        got[name], want[name], rtol=0, atol=ROUNDING, err_msg=name
      )
    np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-5)
    np.testing.assert_array_equal(got["assignment"], want["assignment"])


@pytest.mark.slow
def test_bfloat16_stays_near_float32_and_keeps_float32_parameters(whole_batch):
  config = small.config(DRAWS | {"method.dtype": "bfloat16"})
  state, history = small.run_steps(config, 4)
  dtypes = {x.dtype for x in jax.tree.leaves((state.params, state.teacher))}
  assert dtypes == {jnp.dtype("float32")}
  # Same weights at the first step; products carry 8 bits, temperatures of 0.1
  # and 0.04 stretch them.
  got, want = history[0]["loss"], whole_batch[1][0]["loss"]
  assert got != want and abs(got - want) < 0.05 * want


def leaves(state):
  """{name: bytes} of the parameters."""
  return {
    trees.path_name(path): np.asarray(x).tobytes()
    for path, x in jax.tree.leaves_with_path(state.params)
  }


@pytest.mark.slow
@pytest.mark.parametrize("norm_last_layer", [False, True])
def test_prototypes_hold_for_the_first_epoch_and_then_move(norm_last_layer):
  changes = {
    "method.norm_last_layer": norm_last_layer,
    "method.shared_head": False,
    "method.shared_head_teacher": False,
  }
  run, state, step = small.parts(small.config(changes))
  held = {
    f"head/{layer}/{leaf}"
    for layer in ("last_layer", "last_layer2")
    for leaf in ("weight_g", "weight_v")
  }
  gains = {name for name in held if name.endswith("weight_g")}
  first = leaves(state)
  assert held < set(first)
  for i, (batch, scalars) in enumerate(small.arguments(run, 11), start=1):
    state, _, _ = step(state, batch, scalars)
    if i == small.STEPS_PER_EPOCH:
      middle = leaves(state)
  last = leaves(state)
  assert {k for k in first if first[k] == middle[k]} == held
  still = gains if norm_last_layer else set()
  assert {k for k in first if first[k] == last[k]} == still


class Plane:
  """Loss 3 x + 4 y, where x may be fixed."""

  teacher_first = False

  def __init__(self, untrained):
    self.untrained = untrained

  def init(self, rng):
    return base.InitialState({"x": jnp.ones(()), "y": jnp.ones(())}, {}, {})

  def loss(self, params, teacher, aux, batch, rng, scalars):
    return base.LossOutput(3 * params["x"] + 4 * params["y"], {})

  def update_aux(self, aux, stats):
    return aux


@pytest.mark.parametrize("untrained, norm", [(None, 5), ("x", 4)])
def test_the_gradient_norm_leaves_out_what_never_moves(untrained, norm):
  method, mesh = Plane(untrained), meshes.make_mesh()
  tx = optim.Optimizer(name="sgd", clip=1.0, clip_by="global").build(
    untrained=untrained
  )
  state, shardings = train_step.init_state(method, tx, mesh, seed=0)
  step = train_step.make_step(method, tx, mesh, shardings, seed=0)
  rates = dict(lr=1.0, wd=0.0, momentum=1.0)
  scalars = {k: np.float32(v) for k, v in rates.items()}
  scalars["frozen"] = np.bool_(False)
  state, values, _ = step(state, {}, scalars)
  assert float(values["grad_norm"]) == norm
  # Clipped to a norm of 1 before the step.
  assert float(state.params["y"]) == pytest.approx(1 - 4 / norm)
  x = 1.0 if untrained else 1 - 3 / 5
  assert float(state.params["x"]) == pytest.approx(x)


def test_frozen_prototypes_count_no_optimiser_steps():
  run, state, step = small.parts(small.config())
  for batch, scalars in small.arguments(run, 10):
    state, _, _ = step(state, batch, scalars)
  counts = {
    int(x)
    for name, x in train_step.enumerate_leaves(state.opt)
    if name.endswith("count")
  }
  assert counts == {10, 10 - small.STEPS_PER_EPOCH}


def test_the_teacher_follows_the_student_after_its_update():
  run, state, step = small.parts(small.config())
  batch, scalars = list(small.arguments(run, 2))[-1]  # the first rate is 0
  old = jax.tree.map(np.asarray, state.teacher)
  state, _, _ = step(state, batch, scalars)
  m = np.float64(scalars["momentum"])
  name = ("backbone", "patch_embed", "kernel")
  before, after, student = (
    tree[name[0]][name[1]][name[2]]
    for tree in (old, state.teacher, state.params)
  )
  want = m * before + (1 - m) * np.asarray(student, np.float64)
  assert np.abs(np.asarray(student) - before).max() > 1e-5
  np.testing.assert_allclose(after, want, rtol=0, atol=1e-7)


def guarded(monkeypatch, calls):
  """Steps may move nothing between host and device by themselves."""
  make_step = train_step.make_step

  def make(*args, **kwargs):
    step = make_step(*args, **kwargs)

    def call(*inputs):
      calls.append(step)
      with jax.transfer_guard("disallow"):
        return step(*inputs)

    return call

  monkeypatch.setattr(train_step, "make_step", make)


def test_the_loop_gives_the_step_device_arrays_only(
  monkeypatch, tmp_path, traces, caplog
):
  calls = []
  guarded(monkeypatch, calls)
  caplog.set_level("INFO", logger="absl")
  changes = {"run.log_steps": 5, "evals.mask_images": 2}
  train.train(small.config(changes), str(tmp_path))
  assert caplog.messages[-1] == judgement.read(tmp_path).sentence
  assert len(calls) == small.TOTAL_STEPS
  assert calls[0]._cache_size() == 1 and traces["loss"] == 1
  check_records(metrics.read_metrics(tmp_path / "metrics.jsonl"))
  assert (tmp_path / "figures" / "masks.png").exists()


def check_records(records):
  """Every number that a run promises, at every step that it promises."""
  at = lambda name: [r["step"] for r in records if name in r]
  names = (
    "loss cls patch lr wd momentum teacher_temp teacher_patch_temp grad_norm "
    "center_norm teacher_entropy mask_ratio masked_share agreement img_per_s "
    "data_wait"
  )
  for name in names.split():
    assert at(f"train/{name}") == [5, 10, 15], name
  for name in ("loss", "nmi", "ari", "fscore"):
    assert at(f"epoch/{name}") == [8, 16], name
  assert at("knn/top1") == at("knn/k5/top5") == [0, 8, 16]
  # 48 validation images of 8 classes, once.
  for name, value in {"chance": 12.5, "queries": 48, "teacher": 1}.items():
    assert at(f"knn/{name}") == [0] and records[0][f"knn/{name}"] == value
  for name in ("attmask_high", "attmask_hint", "attmask_low", "random"):
    assert at(f"overlap/{name}") == [0, 8, 16], name
  assert all(0 <= r.get("train/data_wait", 0) <= 1 for r in records)


@pytest.mark.slow
def test_logged_means_are_those_of_the_steps(monkeypatch, tmp_path):
  config = small.config({"run.log_steps": 5, "evals.knn": False})
  _, history = small.run_steps(config, small.TOTAL_STEPS)
  train.train(config, str(tmp_path))
  records = metrics.read_metrics(tmp_path / "metrics.jsonl")
  got = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
  loss = [h["loss"] for h in history]
  for done in (5, 10, 15):
    assert got[done] == pytest.approx(np.mean(loss[done - 5 : done]), rel=1e-12)
  got = {r["step"]: r["epoch/loss"] for r in records if "epoch/loss" in r}
  assert got[8] == pytest.approx(np.mean(loss[:8]), rel=1e-12)
  assert got[16] == pytest.approx(np.mean(loss[8:]), rel=1e-12)


def test_a_method_that_couples_images_refuses_micro_batches(monkeypatch):
  monkeypatch.setattr(attmask.AttMask, "batch_coupled", True)
  with pytest.raises(InputError, match="run.accumulate 2 .*attmask"):
    runs.build(small.config({"run.accumulate": 2}))
  runs.build(small.config())


def test_clock_leaves_evaluations_out(monkeypatch):
  now = iter([0.0, 1.0, 2.0, 10.0, 14.0, 10.0 + 4.0])
  monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
  clock = progress.Clock(batch_size=6)  # at 0
  with clock.waiting():  # 1 to 2
    pass
  with clock.paused():  # 10 to 14
    pass
  clock.step()
  rates = clock.lap()  # at 14, of which 4 do not count
  assert rates == {
    "img_per_s": pytest.approx(6 / 10), "data_wait": pytest.approx(1 / 10)
  }  # fmt: skip
