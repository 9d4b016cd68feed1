"""Run logging: what is written reads back, through kills and resumes."""

import importlib.util
import io
import json
import math
import struct
import sys
import types

import jax
import numpy as np
import pytest
import small
from absl import logging
from PIL import Image

from attmask_jax import train
from attmask_jax.errors import InputError
from attmask_jax.evals import online
from attmask_jax.runs import metrics

NO_FIGURES = {
  "evals.mask_images": 0, "evals.overlap_images": 0,
  "optim.warmup_epochs": 0, "method.temp_warmup_epochs": 0,
}  # fmt: skip


def lines(path):
  return path.read_text().splitlines()


def plain(workdir, **options):
  """A writer of nothing but the JSONL."""
  options = {"resume_step": None, **options}
  return metrics.MetricsWriter(workdir, tensorboard=False, **options)


# metrics.jsonl --------------------------------------------------------------


def test_numbers_read_back_bit_for_bit(tmp_path):
  rng = np.random.default_rng(0)
  values = {f"x{i}": v for i, v in enumerate(rng.normal(size=50).tolist())}
  values |= {"tiny": 5e-324, "third": np.float32(1 / 3), "jax": jax.numpy.pi}
  with plain(tmp_path) as writer:
    writer.write(7, values)
    writer.write(8, {"count": np.int64(2**53 + 1)})
  first, second = metrics.read_metrics(tmp_path / "metrics.jsonl")
  assert first.pop("step") == 7
  assert first == {name: float(value) for name, value in values.items()}
  assert second == {"step": 8, "count": 2**53 + 1}
  assert lines(tmp_path / "metrics.jsonl")[0].startswith('{"step": 7, "x0": ')


def test_lines_stay_valid_json(tmp_path):
  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  with plain(tmp_path) as writer:
    writer.write(1, {"a": math.nan, "b": math.inf, "c": np.float32("-inf")})
  (line,) = lines(tmp_path / "metrics.jsonl")
  assert json.loads(line, parse_constant=refuse) == {
    "step": 1,
    "a": "nan",
    "b": "inf",
    "c": "-inf",
  }
  (record,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
  assert math.isnan(record["a"])
  assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_line_is_on_its_way_as_soon_as_written(tmp_path):
  writer = plain(tmp_path)
  writer.write(1, {"a": 1.0})
  assert len(lines(tmp_path / "metrics.jsonl")) == 1
  writer.close()
  writer.close()


@pytest.mark.parametrize(
  ("resume_step", "kept"), [(20, [10, 20, 20]), (-1, []), (None, [*range(5)])]
)
def test_resume_drops_later_lines_and_nothing_else(tmp_path, resume_step, kept):
  path = tmp_path / "metrics.jsonl"
  old = [
    '{"step": 10, "train/loss": 0.1}',
    '{"step":20,  "knn/top1": 50.0}',  # kept byte for byte
    '{"step": 30, "train/loss": 0.3}',
    '{"step": 20, "train/loss": 0.2}',
    '{"step": 40, "train/loss": "nan"}',
  ]
  path.write_text("\n".join(old) + '\n{"step": 41, "trai')  # killed here
  with plain(tmp_path, resume_step=resume_step) as writer:
    writer.write(30, {"train/loss": 9.0})
  keep = old if resume_step is None else [old[i] for i in (0, 1, 3)]
  keep = [] if resume_step == -1 else keep
  assert len(keep) == len(kept)
  assert lines(path) == [*keep, '{"step": 30, "train/loss": 9.0}']
  assert not list(tmp_path.glob("*.tmp"))


def test_resume_keeps_a_whole_last_line_without_newline(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}')
  with plain(tmp_path, resume_step=2) as writer:
    writer.write(3, {"a": 3.0})
  assert [r["a"] for r in metrics.read_metrics(path)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("tail", [b'{"step": 2, "\xc3', b"\0\0\0\0", b"\n\n"])
def test_a_damaged_tail_is_left_out(tmp_path, tail):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "a": 1.0}\n' + tail)
  assert metrics.read_metrics(path) == [{"step": 1, "a": 1.0}]
  plain(tmp_path, resume_step=1).close()
  assert path.read_bytes() == b'{"step": 1, "a": 1.0}\n'


def test_a_damaged_middle_is_an_error_not_a_loss(tmp_path):
  path = tmp_path / "metrics.jsonl"
  text = '{"step": 1}\n{"step": 2, "a\n{"step": 3}\n'
  path.write_text(text)
  with pytest.raises(InputError, match="line 2"):
    plain(tmp_path, resume_step=3)
  assert path.read_text() == text
  with pytest.raises(InputError, match="No metrics at"):
    metrics.read_metrics(tmp_path / "other.jsonl")


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with metrics.MetricsWriter(tmp_path / "run", resume_step=0) as writer:
    writer.write(1, {"a": 1.0})
    writer.write_image(1, "picture", tmp_path / "missing.png")
    writer.flush()
  assert not (tmp_path / "run").exists()


# TensorBoard and wandb ------------------------------------------------------


def events(folder):
  """All TensorBoard events of a folder (length, check, bytes, check)."""
  from tensorboardX.proto import event_pb2

  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      yield event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


needs_tensorboard = pytest.mark.skipif(
  importlib.util.find_spec("tensorboardX") is None,
  reason="tensorboardX is not installed",
)


@needs_tensorboard
def test_tensorboard_scalars_images_and_purge(tmp_path):
  picture = tmp_path / "a.png"
  Image.new("RGBA", (5, 4), (255, 0, 0, 255)).save(picture)
  with metrics.MetricsWriter(tmp_path, resume_step=6) as writer:
    writer.write(7, {"train/loss": 0.5})
    writer.write_image(7, "masks", picture)
  found = list(events(tmp_path / "tensorboard"))
  # status 1 = START: from this step on, earlier events no longer count.
  assert [e.step for e in found if e.session_log.status == 1] == [7]
  values = [(e.step, v) for e in found for v in e.summary.value]
  scalar, image = values
  assert (scalar[0], scalar[1].tag) == (7, "train/loss")
  assert scalar[1].simple_value == 0.5
  assert (image[0], image[1].tag) == (7, "masks")
  shown = np.asarray(
    Image.open(io.BytesIO(image[1].image.encoded_image_string))
  )
  assert shown.shape == (4, 5, 3) and (shown == [255, 0, 0]).all()


def test_without_tensorboard_one_warning(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *a: warnings.append(a))
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with metrics.MetricsWriter(tmp_path, resume_step=None) as writer:
    writer.write(1, {"a": 1.0})
    writer.write(2, {"a": 1.0})
  assert len(warnings) == 1 and "tensorboardX" in warnings[0][0]
  assert len(lines(tmp_path / "metrics.jsonl")) == 2


def test_missing_wandb_is_a_clear_error(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(InputError, match="pip install wandb"):
    plain(tmp_path, wandb={"project": "p"})
  assert not list(tmp_path.iterdir())


def test_a_run_without_wandb_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  config = small.config({"run.wandb.project": "p"})
  with pytest.raises(InputError, match="pip install wandb"):
    train.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@needs_tensorboard
def test_hyperparameters_reach_tensorboard_and_wandb(tmp_path, monkeypatch):
  from tensorboardX.proto import plugin_hparams_pb2

  calls = []
  fake = types.SimpleNamespace(
    init=lambda **options: calls.append(options),
    define_metric=lambda *args, **options: None,
    finish=lambda: None,
  )
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = {"optim.lr": 0.5, "data.scale": [1, 2], "run.scan": True, "a": "b"}
  options = dict(resume_step=-1, wandb={"project": "p"}, config=config)
  metrics.MetricsWriter(tmp_path, **options).close()
  assert calls[0]["config"] == config
  assert len(list((tmp_path / "tensorboard").iterdir())) == 1  # one run
  values = [
    v for e in events(tmp_path / "tensorboard") for v in e.summary.value
  ]
  (value,) = [v for v in values if v.tag == "_hparams_/session_start_info"]
  found = plugin_hparams_pb2.HParamsPluginData.FromString(
    value.metadata.plugin_data.content
  ).session_start_info.hparams
  assert found["optim.lr"].number_value == 0.5
  assert found["data.scale"].string_value == "[1, 2]"
  assert found["run.scan"].bool_value and found["a"].string_value == "b"


def test_a_percentage_reads_the_same_everywhere(tmp_path, monkeypatch):
  """12.25 lies between 12.2 and 12.3, as 98 of 800 images do."""
  shown = []
  write = lambda text, *a: shown.append(text % a if a else text)
  monkeypatch.setattr(logging, "info", write)
  monkeypatch.setattr(
    online.Evaluator, "scores", lambda *_: {"knn/top1": 12.25, "knn/top5": 1.0}
  )
  config = small.config({"optim.steps": 1, "optim.epochs": 1} | NO_FIGURES)
  train.train(config, str(tmp_path))
  assert "step 1: k-NN top-1 12.25 %" in shown
  assert "12.25 %" in (tmp_path / "report.html").read_text()


def test_wandb_continues_its_run(tmp_path, monkeypatch):
  calls = []
  fake = types.SimpleNamespace(
    init=lambda **options: calls.append(options),
    define_metric=lambda *args, **options: None,
    log=calls.append,
    finish=lambda: calls.append("finish"),
  )
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for step in (1, 2):
    with plain(tmp_path, wandb={"project": "p", "name": "n"}) as writer:
      writer.write(step, {"a": 0.5})
  first, log, finish, second, *_ = calls
  assert (first["project"], first["name"]) == ("p", "n")
  assert first["resume"] == "allow"
  assert first["id"] == second["id"]
  assert log == {"step": 1, "a": 0.5} and finish == "finish"


# Averages -------------------------------------------------------------------


def test_averager_means_and_reset():
  averager = metrics.Averager()
  assert averager.mean() == {}
  averager.add({"loss": 1.0, "acc": np.float32(0.25)})
  averager.add({"loss": 2.0})
  assert averager.mean() == {"loss": 1.5, "acc": 0.25}
  averager.reset()
  assert averager.mean() == {}


def test_averager_continues_bit_for_bit():
  values = np.random.default_rng(0).normal(size=200).tolist()
  whole, part = metrics.Averager(), metrics.Averager()
  for number, value in enumerate(values):
    whole.add({"x": value})
    part.add({"x": value})
    if number % 17 == 0:
      text = json.dumps(part.state(), allow_nan=False)
      part = metrics.Averager.from_state(json.loads(text))
  assert part.mean() == whole.mean()
  total = 0.0
  for value in values:  # sum() compensates its rounding since Python 3.12
    total += value
  assert whole.mean()["x"] == total / 200
  part.add({"x": math.inf})
  text = json.dumps(part.state(), allow_nan=False)
  again = metrics.Averager.from_state(json.loads(text))
  assert again.mean() == {"x": math.inf}


def test_averager_state_is_a_copy():
  averager = metrics.Averager()
  averager.add({"x": 1.0})
  state = averager.state()
  other = metrics.Averager.from_state(state)
  other.add({"x": 3.0})
  assert averager.mean() == {"x": 1.0} and state["counts"] == {"x": 1}
  assert other.mean() == {"x": 2.0}
