"""Files of a run that can be read and hold other values than we write."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import small
from stopping import assert_same_end, steps_of

from attmask_jax import mesh as meshes
from attmask_jax import train
from attmask_jax.errors import InputError
from attmask_jax.runs import checkpoint, judgement, metrics, saved_items
from attmask_jax.runs import config as run_config
from attmask_jax.training import setup
from attmask_jax.weights import classifier, loading

pytestmark = pytest.mark.usefixtures("one_device")
DATA = pathlib.Path(__file__).parents[1] / "data"


@pytest.fixture
def run(tmp_path, whole):
  """A finished run that may be written to."""
  return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
  "content", [b'{"knn/top1": 1', b"\x80", b"[1]", b'{"knn/top1": "high"}']
)
def test_a_checkpoint_with_damaged_metrics_is_one_without(
  tmp_path, caplog, content
):
  """The best of three loses its place, and its arrays are still there."""
  items = {name: {"x": np.ones(3)} for name in saved_items.ARRAY_ITEMS}
  with checkpoint.Checkpoints(tmp_path, best="knn/top1") as saved:
    for step, score in ((1, 20.0), (2, 30.0), (3, 10.0)):
      saved.save(step, items, {}, metrics={"knn/top1": score})
      saved.wait()
  assert steps_of(tmp_path) == [2, 3]
  path = tmp_path / "checkpoints" / "2" / "metrics" / "metrics"
  path.write_bytes(content)
  with checkpoint.Checkpoints(tmp_path, best="knn/top1") as saved:
    assert saved.latest == 3
    saved.save(4, items, {}, metrics={"knn/top1": 5.0})
    saved.wait()
    assert steps_of(tmp_path) == [3, 4]
  (message,) = (m for m in caplog.messages if "damaged" in m)
  assert str(path) in message and "\n" not in message


def test_a_run_with_damaged_metrics_of_a_checkpoint_goes_on(run):
  path = run / "checkpoints" / "16" / "metrics" / "metrics"
  path.write_bytes(b"\x80")
  train.train(small.config(), str(run))
  assert steps_of(run) == [8, 16]
  assert path.with_name("metrics.damaged").read_bytes() == b"\x80"
  loading.load(str(run), network="student", mesh=meshes.make_mesh())


@pytest.mark.parametrize(
  "key, value",
  [
    ("commit_timestamp_nsecs", 10**30),
    ("commit_timestamp_nsecs", "now"),
    ("performance_metrics", 1),
    ("item_handlers", [[]]),
  ],
)
def test_a_checkpoint_of_another_description_is_damaged(run, whole, key, value):
  """Orbax reads the descriptions of all checkpoints before it opens one."""
  path = run / "checkpoints" / "16" / "_CHECKPOINT_METADATA"
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  before = path.read_bytes()
  train.train(small.config(), str(run))
  assert steps_of(run) == [8, 16]
  aside = run / "checkpoints" / "16.damaged" / "_CHECKPOINT_METADATA.damaged"
  assert aside.read_bytes() == before
  assert_same_end(run, whole)


@pytest.mark.parametrize(
  "text",
  ["[1]", "null", '{"a": 1, "a.b": 2}', '{"evals.avgpool": 9}', '{"a'],
)
def test_a_config_of_other_values_is_damaged(run, text):
  path = run / "config.json"
  path.write_text(text)
  with pytest.raises(InputError, match="config.json is damaged") as error:
    loading.load(str(run), network="student", mesh=meshes.make_mesh())
  assert str(path) in str(error.value) and "\n" not in str(error.value)
  with pytest.raises(InputError, match="config.json is damaged"):
    config = small.config()
    run_config.check_config(
      config, run, images=64, defaults=setup.defaults(config)
    )
  with pytest.raises(InputError, match="config.json is damaged"):
    train.train(small.config(), str(run))


@pytest.mark.parametrize(
  "key, value",
  [
    ("method.shared_head_teacher", ...),  # not there
    ("method.name", ...),
    ("method.patch_size", None),
    ("method.mask_ratio", 0.3),
    ("method", 1),  # in place of the section
  ],
)
def test_a_config_that_describes_no_network(run, key, value):
  path = run / "config.json"
  flat = json.loads(path.read_text())
  if value is ...:
    del flat[key]
  elif key in flat:
    flat[key] = value
  else:
    flat = {k: v for k, v in flat.items() if not k.startswith(f"{key}.")}
    flat[key] = value
  path.write_text(json.dumps(flat))
  with pytest.raises(InputError) as error:
    loading.load(str(run), network="student", mesh=meshes.make_mesh())
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "line",
  [
    '{"step": "2", "a": 1.0}',
    '{"step": null}',
    '{"step": 2.5}',
    '{"step": 2, "a": "high"}',
    '{"step": 2, "a": [1.0]}',
    '{"step": 2, "a": null}',
  ],
)
def test_a_record_of_other_values_is_damaged(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  text = f'{{"step": 1, "a": "nan"}}\n{line}\n{{"step": 3, "a": 1.0}}\n'
  path.write_text(text)
  with pytest.raises(InputError, match="line 2"):
    metrics.read_metrics(path)
  with pytest.raises(InputError, match="line 2"):
    metrics.MetricsWriter(tmp_path, resume_step=3, tensorboard=False)
  assert path.read_text() == text


def test_a_judgement_of_impossible_numbers(tmp_path):
  """Accuracies beyond 0 and 100 % have no standard error."""
  for worst in (-1e308, -1.0, 101.0, 2.0**63):
    lines = [
      {"step": 0, "knn/top1": worst, "knn/queries": 10, "knn/chance": worst},
      {"step": 8, "knn/top1": 50.0, "knn/queries": 10, "knn/chance": worst},
    ]
    judgement.judge({"data.source": "shapes"}, lines)
  lines[0]["knn/queries"] = 0
  assert judgement.number_of_queries({}, lines) is None


@pytest.mark.parametrize("value", ["many", None, [3], -4, float("nan"), {}])
def test_a_judgement_without_what_the_config_does_not_say(run, value):
  lines = metrics.read_metrics(run / "metrics.jsonl")
  config = json.loads((run / "config.json").read_text())
  want = judgement.judge({"data.source": "shapes"}, lines)
  numbers = (
    "optim.epochs", "optim.steps", "data.batch_size", "data.shapes_val",
    "method.out_dim", "run.log_steps",
  )  # fmt: skip
  assert set(numbers) <= {*config, "optim.steps"}
  got = judgement.judge(
    {"data.source": "shapes"} | dict.fromkeys(numbers, value), lines
  )
  assert got == want


@pytest.mark.parametrize(
  "content",
  [b"", b"\x80", b"[1]", b'{"step": 4}',
   b'{"step": "four", "layer": 0, "class_names": []}',
   b'{"step": 4, "layer": null, "class_names": []}',
   b'{"step": 4, "layer": 0, "class_names": "bar"}'],
)  # fmt: skip
def test_a_damaged_description_of_a_classifier(tmp_path, content):
  shutil.copytree(DATA / "runs_0_1" / "finetune", tmp_path / "finetune")
  path = tmp_path / "finetune" / classifier.FILE
  source = loading.load(
    str(tmp_path / "finetune"), network="student", mesh=meshes.make_mesh()
  )
  assert classifier.class_names(source)[0] == "bar"
  path.write_bytes(content)
  for read in (classifier.own, classifier.class_names):
    with pytest.raises(InputError, match="classifier.json is damaged"):
      read(source)
  with pytest.raises(InputError, match="classifier.json is damaged"):
    classifier.load(str(path.parent), source, mesh=meshes.make_mesh())
