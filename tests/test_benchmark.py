import json
import time

import pytest
import small

from attmask_jax import benchmark
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.planning import flops
from attmask_jax.training import setup, train_step

PARTS = [
  "transfer", "forward", "forward and backward", "step", "data",
  "step with data",
]  # fmt: skip
WAIT = 0.1  # seconds


@pytest.mark.parametrize("arg", ["attmask", "mae", "extrema"])
def test_what_is_written(arg, tmp_path, capsys):
  config = small.config(arg=arg)
  results = benchmark.bench(config, str(tmp_path / "new"), repeats=1)
  assert json.loads((tmp_path / "new" / "bench.json").read_text()) == results
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["bench.json"]
  assert list(results["seconds"]) == PARTS
  for name, seconds in results["seconds"].items():
    assert seconds > 0
    assert results["images_per_s"][name] * seconds == pytest.approx(8)
  flops = results["share_of_peak"] * results["peak_flops_per_s"]
  assert flops * results["seconds"]["step"] == pytest.approx(results["flops"])
  words = capsys.readouterr().out
  assert all(f"\n{name} " in words for name in PARTS)
  assert "nan" not in words


def test_a_slow_pipeline_is_seen(tmp_path, monkeypatch):
  build = setup.build

  def slow(config):
    run = build(config)
    batches = run.pipeline.batches

    def wait(*steps):
      for batch in batches(*steps):
        time.sleep(WAIT)
        yield batch

    monkeypatch.setattr(run.pipeline, "batches", wait)
    return run

  monkeypatch.setattr(setup, "build", slow)
  results = benchmark.bench(small.config(), str(tmp_path), repeats=2)
  seconds = results["seconds"]
  assert seconds["data"] >= WAIT
  assert seconds["step with data"] >= WAIT
  assert results["data_wait"] * seconds["step with data"] >= 0.9 * WAIT


def vit_flops(*, tokens, width, depth, patch):
  """Of one image, forward: matrix products of embedding, blocks, attention."""
  embedding = 2 * (tokens - 1) * 3 * patch**2 * width
  linear = 2 * tokens * (3 + 1 + 4 + 4) * width**2
  attention = 2 * 2 * tokens**2 * width
  return embedding + depth * (linear + attention)


@pytest.mark.parametrize("scan, remat", [(True, "full"), (False, "none")])
def test_flops_are_those_of_the_formula(scan, remat):
  depth, batch = 4, 8
  size = dict(width=128, depth=depth, patch=4)
  config = small.config(
    {
      "method.variant": f"128x{depth}x2", "method.out_dim": 64,
      "method.head_hidden": 32, "method.mask": "none",
      "method.patch_weight": 0.0, "run.scan": scan, "run.remat": remat,
    }
  )  # fmt: skip
  run = setup.build(config)
  state, _ = train_step.init_state(run.method, run.tx, run.mesh, seed=0)
  host = next(run.pipeline.batches(0, 1))
  got = flops.model_flops(run, state, meshes.shard(run.mesh, host))
  whole = vit_flops(tokens=17, **size)
  local = vit_flops(tokens=5, **size)
  # Two global views by the teacher and, with gradients, the student; two local.
  want = batch * (2 * whole + 3 * (2 * whole + 2 * local))
  assert want < got < 1.1 * want  # heads, softmax, norms, the optimiser


def test_compilation_is_timed_although_programs_are_kept(tmp_path):
  with small.keep_programs(tmp_path / "kept", seconds=0):
    for name in ("first", "second"):
      benchmark.bench(small.config(), str(tmp_path / name), repeats=1)
    kept = [p.name for p in (tmp_path / "kept").iterdir()]
  assert any("loss" in name for name in kept)  # other programs are kept
  assert not any("train_step" in name for name in kept)


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / "bench.json").write_text("mine")
  with pytest.raises(InputError, match="bench.json exists: give another"):
    benchmark.bench(small.config(), str(tmp_path))
  assert (tmp_path / "bench.json").read_text() == "mine"


def test_no_repeats(tmp_path):
  with pytest.raises(InputError, match="--repeats 0 must be at least 1"):
    benchmark.bench(small.config(), str(tmp_path / "new"), repeats=0)
  assert not (tmp_path / "new").exists()


def test_a_file_as_workdir(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="is a file: give a directory"):
    benchmark.bench(small.config(), str(tmp_path / "file"))
