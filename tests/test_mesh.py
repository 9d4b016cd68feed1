"""Sharding: the same numbers on any mesh, all-reduces alone between chips."""

import re

import jax
import numpy as np
import pytest
import small

from attmask_jax import mesh as meshes
from attmask_jax import trees
from attmask_jax.errors import DamagedError, InputError

# Sums over the batch are taken in another order on every mesh: a few units in
# the last place of float32 (6e-8 of losses of about 3), grown over 8 steps.
LOSSES, PARAMETERS = 5e-6, 5e-6

# Everything that draws: hints, masks, drop path.
DRAWS = {
  "data.batch_size": 16,
  "data.shapes_train": 128,
  "method.mask": "attmask_hint",
  "method.show_max": 0.3,
  "method.drop_path": 0.1,
}


@pytest.fixture(scope="module")
def one_device():
  """State and history of 8 steps on one device."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    small.use_devices(monkeypatch, 1)
    return small.run_steps(small.config(DRAWS), 8)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_eight_devices_give_the_numbers_of_one(monkeypatch, one_device, fsdp):
  monkeypatch.setattr(meshes, "FSDP_MIN_SIZE", 16)
  state, history = small.run_steps(small.config(DRAWS | {"run.fsdp": fsdp}), 8)
  split = [
    x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated
  ]
  assert bool(split) == (fsdp > 1)
  want_state, want_history = one_device
  for got, want in zip(history, want_history, strict=True):
    for name in ("loss", "cls", "patch", "mask_ratio", "masked_share"):
      np.testing.assert_allclose(got[name], want[name], rtol=0, atol=LOSSES)
    np.testing.assert_array_equal(got["assignment"], want["assignment"])
  small.assert_close(state.params, want_state.params, PARAMETERS)
  small.assert_close(state.teacher, want_state.teacher, PARAMETERS)
  small.assert_close(state.aux, want_state.aux, PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("family", small.FAMILIES)
def test_guided_masks_of_eight_devices_are_those_of_one(monkeypatch, family):
  """Attention chooses, hints are drawn, ExtreMA's subsets are dealt out."""
  ends = []
  for count in (1, 8):
    small.use_devices(monkeypatch, count)
    ends.append(small.run_steps(small.config(DRAWS, arg=family), 4))
  (want, want_history), (got, history) = ends
  assert want.teacher
  for a, b in zip(history, want_history, strict=True):
    for name in set(b) - {"grad_norm"}:
      np.testing.assert_allclose(a[name], b[name], rtol=0, atol=LOSSES)
  small.assert_close(got.params, want.params, PARAMETERS)
  small.assert_close(got.teacher, want.teacher, PARAMETERS)


def collectives(config):
  """{kind: count} in the program compiled for a config's step."""
  run, state, step = small.parts(config)
  assert run.mesh.size == 8
  batch, scalars = next(small.arguments(run, 1))
  text = step.lower(state, batch, scalars).compile().as_text()
  kinds = (
    "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    "|collective-broadcast"
  )
  found = re.findall(rf"= \S.* ({kinds})(?:-start)?\(", text)
  return {kind: found.count(kind) for kind in found}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_data_parallel_program_only_reduces(accumulate):
  config = small.config(DRAWS | {"run.accumulate": accumulate})
  assert set(collectives(config)) == {"all-reduce"}


@pytest.mark.slow
def test_host_masks_only_reduce_too():
  changes = DRAWS | {"method.mask": "block", "method.mask_prob": 0.5}
  assert set(collectives(small.config(changes))) == {"all-reduce"}


def test_size_rule_splits_the_longest_divisible_axis(monkeypatch):
  monkeypatch.setattr(meshes, "FSDP_MIN_SIZE", 100)
  mesh = meshes.make_mesh(fsdp=4)
  shape = lambda *s: jax.ShapeDtypeStruct(s, np.float32)
  shapes = {
    "long": shape(8, 64),
    "odd": shape(8, 65),
    "none": shape(9, 65),
    "little": shape(64),
    "scalar": shape(),
  }
  specs = {
    k: tuple(s.spec) for k, s in meshes.param_shardings(mesh, shapes).items()
  }
  assert specs == {
    "long": (None, "fsdp"), "odd": ("fsdp",), "none": (), "little": (),
    "scalar": (),
  }  # fmt: skip
  whole = meshes.param_shardings(meshes.make_mesh(fsdp=1), shapes)
  assert all(s.is_fully_replicated for s in whole.values())


def test_mesh_shape_and_an_fsdp_that_does_not_divide():
  assert dict(meshes.make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2}
  with pytest.raises(InputError, match="run.fsdp 3 .* 8 devices"):
    meshes.make_mesh(fsdp=3)


def test_batch_must_divide_over_devices_and_micro_batches():
  mesh = meshes.make_mesh()
  meshes.check_batch(32, mesh=mesh, accumulate=4)
  with pytest.raises(InputError, match="40 .* 8 devices x .* 4: use 32 or 64"):
    meshes.check_batch(40, mesh=mesh, accumulate=4)
  with pytest.raises(InputError, match="use 8 or 16"):
    meshes.check_batch(4, mesh=mesh, accumulate=1)
  with pytest.raises(InputError, match="accumulate 0"):
    meshes.check_batch(8, mesh=mesh, accumulate=0)


@pytest.mark.parametrize("count, fsdp", [(1, 1), (8, 1), (8, 2)])
def test_rows_go_to_the_devices_and_come_back_in_order(count, fsdp):
  mesh = meshes.make_mesh(fsdp=fsdp, devices=jax.devices()[:count])
  np.testing.assert_array_equal(meshes.local_positions(mesh, 16), np.arange(16))
  rows = np.arange(32, dtype=np.int32).reshape(16, 2)
  x = meshes.shard(mesh, {"rows": rows})["rows"]
  assert x.addressable_shards[0].data.shape == (16 // count, 2)
  np.testing.assert_array_equal(meshes.local_rows(x), rows)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_batches_put_ahead_keep_their_order(count):
  mesh = meshes.make_mesh()
  host = ({"i": np.full(8, i, np.int32)} for i in range(count))
  got = [int(batch["i"][0]) for batch in meshes.ahead(mesh, host)]
  assert got == list(range(count))


def test_two_batches_are_on_the_devices_before_they_are_asked_for():
  taken = []

  def host():
    for i in range(5):
      taken.append(i)
      yield {"i": np.full(8, i, np.int32)}

  batches = meshes.ahead(meshes.make_mesh(), host())
  next(batches)
  assert taken == [0, 1, 2]


def failing(error):
  def read():
    raise error

  return read


@pytest.mark.parametrize(
  "own, other, kind, words",
  [
    (None, None, None, ""),
    (None, "0cut", DamagedError, "process 3: cut"),
    (DamagedError("hole"), None, DamagedError, "^hole"),
    (DamagedError("hole"), "1size", InputError, "process 3: size"),
    (InputError("size"), "0cut", InputError, "^size"),
    (InputError("size"), "2memory", RuntimeError, "process 3: memory"),
    (MemoryError("full"), "1size", MemoryError, "^full"),
  ],
)
def test_processes_fail_together_with_the_gravest_error(
  monkeypatch, own, other, kind, words
):
  others = {3: other} if other else {}
  monkeypatch.setattr(meshes, "union", lambda mine: mine | others)
  read = failing(own) if own else lambda: "read"
  if kind is None:
    assert meshes.together(read) == "read"
    return
  with pytest.raises(kind, match=words) as error:
    meshes.together(read)
  assert type(error.value) is kind


def test_some_variables_for_several_processes_are_not_enough(monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  with pytest.raises(InputError, match="JAX_COORDINATOR_ADDRESS.* not set"):
    meshes.init_distributed(False)


def test_names_of_leaves_are_unique_in_the_optimiser_state():
  run, state, _ = small.parts(small.config())
  names = [trees.path_name(p) for p, _ in jax.tree.leaves_with_path(state.opt)]
  assert run.mesh.size == 8 and len(names) == len(set(names))
