"""--mode=plan on virtual CPU devices, and what it refuses."""

import importlib.util
import json

import jax
import pytest
import small

from attmask_jax import mesh as meshes
from attmask_jax import plan, recipes
from attmask_jax.errors import InputError
from attmask_jax.planning import (
  collectives,
  flops,
  memory,
  program,
  step,
  topologies,
)
from attmask_jax.training import setup, train_step

CPU = {"run.topology": "cpu:8"}


@pytest.fixture(autouse=True)
def same_platforms():
  """A plan keeps JAX off accelerators; the next test has its own choice."""
  before = jax.config.jax_platforms
  yield
  jax.config.update("jax_platforms", before)


def planned(changes=None, *, arg="attmask"):
  config = small.config(CPU | (changes or {}), arg=arg)
  return step.build(config, topologies.find(config.run.topology))


def messages(parts):
  compiled, _ = parts.compile(parts.run.config.data.batch_size)
  found = collectives.collectives(
    program.parse(compiled.as_text()), devices=parts.run.mesh.size
  )
  return {x.kind: x for x in found}


def parameter_bytes(parts):
  leaves = jax.tree.leaves(parts.state.params)
  return sum(x.size * x.dtype.itemsize for x in leaves)


def metrics_and_centres(parts):
  """An upper bound, in bytes: centres twice, and 50 numbers."""
  aux = jax.tree.leaves(parts.state.aux)
  return sum(2 * x.size * 4 for x in aux) + 4 * 50


def test_what_is_written(tmp_path, capsys):
  config = small.config(CPU)
  results = plan.plan(config, str(tmp_path / "new"), compilations=1)
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["plan.json"]
  assert json.loads((tmp_path / "new" / "plan.json").read_text()) == results
  assert results["fits"] and results["largest_batch"] == 8
  (needed,) = results["memory"]
  parts = planned()
  assert needed["parameters"] == parameter_bytes(parts)
  # Two moments of Adam, and its two counts of steps.
  assert needed["optimizer"] == 2 * needed["parameters"] + 8
  images = 2 * 16 * 16 * 3 + 2 * 8 * 8 * 3
  assert needed["batch"] == images + 4 * 3  # label, index, position: one row
  assert needed["temporaries"] > 0
  (reduce,) = results["collectives"]
  assert reduce["kind"] == "all-reduce" and reduce["group"] == 8
  assert results["unexpected_collectives"] == []
  assert len(results["compile_seconds"]) == 1
  assert results["estimate"] is None  # no published figures of a CPU
  assert results["versions"]["jax"] == jax.__version__
  words = capsys.readouterr().out
  for part in ("cpu:8: 8 x cpu", "all-reduce", "GFLOP per image", "fits"):
    assert part in words


def test_flops_are_those_of_bench():
  parts = planned(arg="mae")
  run = setup.build(small.config(arg="mae"))
  state, _ = train_step.init_state(run.method, run.tx, run.mesh, seed=0)
  host = next(run.pipeline.batches(0, 1))
  want = flops.model_flops(run, state, meshes.shard(run.mesh, host))
  assert parts.flops(8) == pytest.approx(want, rel=1e-3)
  assert parts.flops(16) == pytest.approx(2 * want, rel=0.1)


def test_micro_batches_are_added_up_before_the_devices_are():
  changes = {"run.accumulate": 4, "data.batch_size": 32}
  parts = planned(changes, arg="mae")
  found = messages(parts)
  assert set(found) == {"all-reduce"}
  sent = found["all-reduce"].bytes
  once = parameter_bytes(parts)
  assert once <= sent <= once + metrics_and_centres(parts)


def test_views_that_the_devices_make_are_planned():
  changes = {"data.pipeline": "device", "data.canvas_size": 32}
  parts = planned(changes, arg="mae")
  assert parts.batch(8)["canvas"].shape == (8, 32, 32, 3)
  assert set(messages(parts)) == {"all-reduce"}


def test_micro_batches_need_less_memory():
  sizes = {"data.batch_size": 64}
  parts = [planned(sizes | {"run.accumulate": n}, arg="mae") for n in (1, 8)]
  whole, micro = (
    memory.measure(x, 64, x.compile(64)[0], 1e9).temporaries for x in parts
  )
  # Of 8 images per device one is computed at a time; gradients stay.
  assert micro < whole / 2


def test_compared_images_do_not_move_to_split_parameters(monkeypatch):
  monkeypatch.setattr(meshes, "FSDP_MIN_SIZE", 16)
  changes = {"method.contrast": "infonce", "run.fsdp": 4}
  found = messages(planned(changes, arg="extrema"))
  assert set(found) == {"all-reduce", "all-gather"}


@pytest.mark.parametrize("contrast", ["byol", "infonce"])
def test_images_that_are_compared_are_gathered_once(contrast):
  parts = planned({"method.contrast": contrast}, arg="extrema")
  coupled = contrast == "infonce"
  assert parts.run.method.batch_coupled == coupled
  found = messages(parts)
  assert set(found) - {"all-gather"} == {"all-reduce"}
  assert ("all-gather" in found) == coupled
  assert not coupled or found["all-gather"].count == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_split_parameters_are_gathered_once(monkeypatch, accumulate):
  monkeypatch.setattr(meshes, "FSDP_MIN_SIZE", 16)
  parts = planned(
    {"run.fsdp": 4, "run.accumulate": accumulate, "data.batch_size": 16}
  )
  found = messages(parts)
  once = parameter_bytes(parts)
  assert set(found) == {"all-reduce", "all-gather"}
  # Parameters and teacher; small odd leaves are whole everywhere.
  state = parts.state
  whole = [
    x.size * 4
    for x in jax.tree.leaves((state.params, state.teacher, state.aux))
    if not x.sharding.is_fully_replicated
  ]
  assert found["all-gather"].bytes == pytest.approx(sum(whole), rel=0.01)
  reduced = found["all-reduce"].bytes
  assert once <= reduced <= once + metrics_and_centres(parts)


def test_the_largest_batch_on_a_cpu(tmp_path, monkeypatch):
  config = small.config(CPU | {"data.shapes_train": 24}, arg="mae")
  results = plan.plan(config, str(tmp_path))
  # There is memory for all images.
  assert [x["batch_size"] for x in results["memory"]] == [8, 24]
  assert results["largest_batch"] == 24
  assert len(results["compile_seconds"]) == 2


def test_images_need_not_be_there():
  config = recipes.get("attmask_vits16:high_20pct")
  changes = {
    "method.variant": "16x1x2", "data.batch_size": 16, "run.topology": "cpu:8",
    "method.out_dim": 16,
  }  # fmt: skip
  config.update_from_flattened_dict(changes)
  parts = step.build(config, topologies.find("cpu:8"))
  assert len(parts.run.train_source) == 260_000
  assert "260,000 training images" in parts.assumed[0]
  assert parts.batch(16)["images"].shape == (16, 2, 224, 224, 3)
  assert config.data.source == "folder"  # the caller's own is unchanged
  assert planned().assumed == []


@pytest.mark.parametrize(
  "topology, words",
  [
    ("", "not set: say what to plan for, such as --config.run.topology=v5e"),
    ("v5e", '"v5e" is unknown: use v5e, v5p, v6e or cpu, a colon'),
    ("v9:4x4", '"v9:4x4" is unknown'),
    ("v5e:3x5", '"v5e:3x5" does not exist: slices of v5e are 1x1, 2x2'),
    ("v5e:32x32", "does not exist"),
    ("v5p:4x4", "does not exist: slices of v5p are 2x2x1"),
    ("cpu:none", '"cpu:none" does not exist: write cpu: and a number'),
    ("cpu:0", "does not exist"),
    ("cpu:9000", "needs 9000 devices.*has 8.*JAX_NUM_CPU_DEVICES=9000"),
  ],
)
def test_a_topology_that_does_not_exist(topology, words, tmp_path):
  with pytest.raises(InputError, match=words):
    plan.plan(small.config({"run.topology": topology}), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_a_batch_that_does_not_divide(tmp_path):
  config = small.config(CPU | {"data.batch_size": 12})
  with pytest.raises(InputError, match="batch_size 12 .* 8 devices.* 8 or 16"):
    plan.plan(config, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_the_compiler_for_tpus_is_missing(tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: None if n == "libtpu" else find(n)
  )
  config = small.config({"run.topology": "v5e:2x2"})
  with pytest.raises(InputError, match=r'v5e:2x2.*pip install "jax\[tpu\]"'):
    plan.plan(config, str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_no_compilations(tmp_path):
  with pytest.raises(InputError, match="--compilations 0 must be at least 1"):
    plan.plan(small.config(CPU), str(tmp_path / "new"), compilations=0)
  assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / "plan.json").write_text("mine")
  with pytest.raises(InputError, match="plan.json exists: give another"):
    plan.plan(small.config(CPU), str(tmp_path))
  assert (tmp_path / "plan.json").read_text() == "mine"
