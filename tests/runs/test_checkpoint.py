"""Stopping and continuing, what is kept on disk, and what is refused."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
from PIL import Image

from attmask_jax import data, train
from attmask_jax.errors import InputError, NotFiniteError, StoppedError
from attmask_jax.runs import checkpoint, metrics
from attmask_jax.runs import config as run_config
from attmask_jax.training import train_step

MAIN = pathlib.Path(__file__).parents[2] / "main.py"
WALL_CLOCK = {"train/img_per_s", "train/data_wait"}
# One device or eight: sums in another order, see test_mesh.py; the numbers
# that are logged are sums of such sums.
PARAMETERS, LOGGED = 1e-5, 1e-4


pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  small.use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Folder of a run that was never stopped."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as monkeypatch:
    small.use_devices(monkeypatch, 1)
    train.train(small.config(), str(folder))
  return folder


@contextlib.contextmanager
def at_step(number, act):
  """Calls `act(results)` in place of the results of step `number`."""
  make_step = train_step.make_step

  def make(*args, **kwargs):
    step = make_step(*args, **kwargs)

    def call(state, *rest):
      done = int(state.step) + 1
      results = step(state, *rest)
      return act(results) if done == number else results

    return call

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(train_step, "make_step", make)
    yield


def send(number):
  """An action: a signal to this process."""

  def act(results):
    os.kill(os.getpid(), number)
    return results

  return act


def power_cut(_):
  raise RuntimeError("power cut")


def stop(config, folder, step, act=None):
  """Runs until a signal after `step` steps."""
  with at_step(step, act or send(signal.SIGTERM)):
    with pytest.raises(StoppedError) as error:
      train.train(config, str(folder))
  assert steps_of(folder)[-1] == step
  return error.value


def steps_of(folder):
  """Complete checkpoints on disk."""
  names = [p.name for p in (folder / "checkpoints").glob("*")]
  return sorted(int(name) for name in names if name.isdigit())


def checkpoint_of(folder, step):
  """{item/leaf: array} of a checkpoint, read without our code, and progress."""
  root = folder / "checkpoints" / str(step)
  arrays = {}
  with ocp.StandardCheckpointer() as reader:
    # A method that keeps no rows of an epoch saves no item of it.
    for item in (i for i in checkpoint.ARRAY_ITEMS if (root / i).exists()):
      tree = reader.restore((root / item).absolute())
      for path, leaf in jax.tree.leaves_with_path(tree):
        arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  progress = next((root / "progress").glob("*"))
  return arrays, json.loads(progress.read_text())


def records_of(folder):
  """metrics.jsonl without wall-clock figures."""
  return [
    {k: v for k, v in record.items() if k not in WALL_CLOCK}
    for record in metrics.read_metrics(folder / "metrics.jsonl")
  ]


def assert_same_end(folder, want_folder, step=small.TOTAL_STEPS):
  """Bit for bit: state, epoch sums, and every number that was logged."""
  got, progress = checkpoint_of(folder, step)
  want, want_progress = checkpoint_of(want_folder, step)
  assert sorted(got) == sorted(want)
  for name in want:
    assert got[name].dtype == want[name].dtype, name
    assert got[name].tobytes() == want[name].tobytes(), name
  ours, theirs = records_of(folder), records_of(want_folder)
  assert [r["step"] for r in ours] == [r["step"] for r in theirs]
  assert ours == theirs
  # The window's wall-clock-free sums; rates are no part of them.
  assert progress == want_progress


def contents(folder):
  """{path: bytes} of all files below a folder."""
  return {
    str(p.relative_to(folder)): p.read_bytes()
    for p in sorted(folder.rglob("*"))
    if p.is_file()
  }


def test_the_run_measures_something(whole):
  """Else equal scores would say nothing."""
  for prefix in ("knn/", "epoch/nmi", "epoch/ari", "epoch/fscore"):
    scores = [
      tuple(v for k, v in record.items() if k.startswith(prefix))
      for record in records_of(whole)
    ]
    assert len(set(scores) - {()}) > 1, prefix


@pytest.mark.parametrize("step", [1, 5, 8])
def test_stopped_by_a_signal_and_continued_is_the_same_run(
  tmp_path, whole, step
):
  error = stop(small.config(), tmp_path, step)
  assert error.signal == signal.SIGTERM
  assert f"after step {step};" in str(error) and str(tmp_path) in str(error)
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(
  "family, changes",
  [
    ("mae", {"method.mask": "attmask_hint", "method.show_max": 0.3}),
    ("extrema", {"method.drop_path": 0.1}),
  ],
)
def test_the_other_families_continue_as_if_never_stopped(
  tmp_path, family, changes
):
  quick = {"optim.epochs": 1, "evals.mask_images": 0, "evals.overlap_images": 0}
  config = lambda: small.config(changes | quick, arg=family)
  train.train(config(), str(tmp_path / "whole"))
  stop(config(), tmp_path / "stopped", 5)
  train.train(config(), str(tmp_path / "stopped"))
  end = small.STEPS_PER_EPOCH
  assert_same_end(tmp_path / "stopped", tmp_path / "whole", end)


def test_stopped_again_and_again_is_the_same_run(tmp_path, whole):
  for step in (2, 11, 16):
    stop(small.config(), tmp_path, step)
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


def test_control_c_stops_like_a_signal(tmp_path):
  before = signal.getsignal(signal.SIGINT)
  error = stop(small.config(), tmp_path, 2, send(signal.SIGINT))
  assert error.signal == signal.SIGINT
  assert signal.getsignal(signal.SIGINT) is before


def test_crashed_between_checkpoints_is_the_same_run(tmp_path, whole):
  config = small.config({"run.save_steps": 5})
  with at_step(13, power_cut), pytest.raises(RuntimeError, match="power cut"):
    train.train(config, str(tmp_path))
  assert steps_of(tmp_path)[-1] == 10
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


def test_crashed_before_the_first_checkpoint_starts_again(tmp_path, whole):
  with at_step(5, power_cut), pytest.raises(RuntimeError):
    train.train(small.config(), str(tmp_path))
  assert steps_of(tmp_path) == []
  assert records_of(tmp_path)[-1]["step"] == 3
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


def command(workdir, changes):
  """The command line of a small run."""
  flags = [f"--config.{k}={v}" for k, v in (small.SIZES | changes).items()]
  config = "--config=configs/tiny.py"
  return [sys.executable, "main.py", config, f"--workdir={workdir}", *flags]


def newest_step(folder):
  """Step of the last line of metrics.jsonl, 0 before there is one."""
  try:
    return metrics.read_metrics(folder / "metrics.jsonl")[-1]["step"]
  except (InputError, IndexError):
    return 0


def test_killed_and_continued_is_the_same_run(monkeypatch, tmp_path, programs):
  small.use_devices(monkeypatch, 8)  # like the processes
  epochs, folder = 4, tmp_path / "killed"
  total = epochs * small.STEPS_PER_EPOCH
  changes = {"optim.epochs": epochs, "run.log_steps": 1, "run.save_steps": 3}
  options = dict(
    cwd=MAIN.parent,
    env=small.environment(programs),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  run = subprocess.Popen(command(folder, changes), **options)
  try:
    while newest_step(folder) < 10 and run.poll() is None:
      time.sleep(0.005)
  finally:
    run.kill()
    _, words = run.communicate()
  assert run.returncode == -signal.SIGKILL, words.decode()
  assert 8 <= steps_of(folder)[-1] < total
  subprocess.run(command(folder, changes), check=True, **options)
  changes["run.save_steps"] = 0
  train.train(small.config(changes), str(tmp_path / "whole"))
  assert_same_end(folder, tmp_path / "whole", total)


@pytest.mark.parametrize("counts", [(1, 8), (8, 1)])
def test_continued_on_another_number_of_devices(
  monkeypatch, tmp_path, whole, counts
):
  small.use_devices(monkeypatch, counts[0])
  stop(small.config(), tmp_path, 5)
  small.use_devices(monkeypatch, counts[1])
  train.train(small.config(), str(tmp_path))
  states = []
  for folder in (tmp_path, whole):
    arrays, _ = checkpoint_of(folder, small.TOTAL_STEPS)
    states.append(arrays)
  got, want = states
  for name in want:
    if name.endswith("['qkv']['bias']") or "qkv.bias" in name:
      continue  # of keys: see small.assert_close
    np.testing.assert_allclose(
      got[name], want[name], rtol=1e-4, atol=PARAMETERS, err_msg=name
    )
  for ours, theirs in zip(records_of(tmp_path), records_of(whole), strict=True):
    assert ours == pytest.approx(theirs, rel=LOGGED, abs=LOGGED)


def test_a_finished_run_is_left_as_it_is(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  before = contents(folder)
  with at_step(small.TOTAL_STEPS + 1, power_cut):
    train.train(small.config(), str(folder))
  assert contents(folder) == before


def test_what_may_differ_when_a_run_continues(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  free = {
    "run.log_steps": 7,
    "run.save_steps": 3,
    "evals.knn_ks": (3,),
    "data.path": "/elsewhere",
  }
  train.train(small.config(free), str(folder))
  assert records_of(folder) == records_of(whole)


def test_another_config_is_refused_with_the_keys_that_differ(whole):
  before = contents(whole)
  changes = {
    "optim.lr_per_256": 0.2,
    "method.mask_ratio": (0.25,),
    "run.log_steps": 7,
  }
  with pytest.raises(InputError) as error:
    train.train(small.config(changes), str(whole))
  message = str(error.value)
  assert "optim.lr_per_256 (0.02 there, 0.2 here)" in message
  assert "method.mask_ratio ([0.3] there, [0.25] here)" in message
  assert "log_steps" not in message and "--workdir" in message
  assert contents(whole) == before


def test_checkpoint_of_another_architecture_is_refused(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  other = small.config({"method.variant": "24x2x2"})
  (folder / "config.json").unlink()
  with pytest.raises(InputError, match="checkpoints but no config.json"):
    train.train(other, str(folder))
  run_config.write_config(other, folder, images=64)
  before = contents(folder)
  with pytest.raises(InputError) as error:
    train.train(other, str(folder))
  message = str(error.value)
  assert "another architecture" in message and "\n" not in message
  assert "(2, 16) there and (2, 24) here" in message
  assert contents(folder) == before


def test_a_damaged_checkpoint_is_one_sentence(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  chunks = folder.glob("checkpoints/16/params/**/d/*")
  for chunk in [path for path in chunks if path.is_file()]:
    chunk.write_bytes(chunk.read_bytes()[:10])
  before = contents(folder)
  with pytest.raises(InputError, match="checkpoints/16 is damaged") as error:
    train.train(small.config(), str(folder))
  assert "\n" not in str(error.value)
  assert contents(folder) == before


def test_a_checkpoint_without_an_item_is_one_sentence(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "16" / "params")
  with pytest.raises(InputError, match="checkpoints/16 is damaged") as error:
    train.train(small.config(), str(folder))
  assert "\n" not in str(error.value)


def poison(results):
  """An action: the patch loss is not a number."""
  state, values, per_image = results
  nan = jax.numpy.full_like(values["loss"], np.nan)
  return state, values | {"loss": nan, "patch": nan}, per_image


@pytest.mark.parametrize("step, saved", [(7, 5), (16, 15)])
def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
  tmp_path, whole, step, saved
):
  """At a step that would have been saved, too."""
  config = small.config({"run.save_steps": 5})
  with at_step(step, poison), pytest.raises(NotFiniteError) as error:
    train.train(config, str(tmp_path))
  message = str(error.value)
  assert f"step {step} is not finite" in message
  assert "loss = nan" in message and "patch = nan" in message
  assert "cls" not in message
  assert f"last good checkpoint is step {saved} of {tmp_path}" in message
  assert steps_of(tmp_path)[-1] == saved
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


def test_a_huge_learning_rate_is_found_and_named(tmp_path):
  config = small.config({"optim.lr_per_256": 1e30})
  with pytest.raises(NotFiniteError) as error:
    train.train(config, str(tmp_path))
  assert "there is no checkpoint yet" in str(error.value)
  assert "optim.lr_per_256" in str(error.value)
  assert steps_of(tmp_path) == []
  for record in records_of(tmp_path):
    assert all(np.isfinite(v) for v in record.values())


def test_latest_best_and_every_n_are_kept(tmp_path):
  config = small.config({"run.keep_steps": 5})
  train.train(config, str(tmp_path))
  knn = {
    r["step"]: r["knn/top1"] for r in records_of(tmp_path) if "knn/top1" in r
  }
  best = max((8, 16), key=lambda step: (knn[step], step))
  assert steps_of(tmp_path) == sorted({5, 10, 15, 16, best})


def save(folder, scores, **options):
  """Saves {step: k-NN or None} in one sitting; what is on disk after each."""
  kept = []
  with checkpoint.Checkpoints(folder, best="knn/top1", **options) as saved:
    for step, score in scores.items():
      items = {name: {"x": np.full(3, step)} for name in checkpoint.ARRAY_ITEMS}
      values = {} if score is None else {"knn/top1": score}
      saved.save(step, items, {"step": step}, metrics=values)
      saved.wait()
      kept.append(steps_of(folder))
  return kept


def test_the_best_is_known_after_a_stop(tmp_path):
  assert save(tmp_path, {1: None, 2: 50.0, 3: None, 4: 40.0}) == [
    [1], [2], [2, 3], [2, 4]
  ]  # fmt: skip
  # A sitting later: 2 is still the best, 4 goes; a better one takes its place.
  assert save(tmp_path, {5: None, 6: 45.0, 7: 60.0, 8: None}) == [
    [2, 5], [2, 6], [7], [7, 8]
  ]  # fmt: skip


def test_every_n_steps_stay_for_good(tmp_path):
  assert save(tmp_path, {2: 9.0, 3: 8.0, 4: 7.0}, keep_steps=3)[-1] == [2, 3, 4]
  assert save(tmp_path, {5: 10.0, 6: 1.0, 7: 1.0}, keep_steps=3)[-1] == [
    3, 5, 6, 7
  ]  # fmt: skip


def test_checkpoints_without_scores_do_not_pile_up(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as saved:  # k-NN off
    items = {name: {"x": np.zeros(3)} for name in checkpoint.ARRAY_ITEMS}
    saved.save(1, items, {})
  assert save(tmp_path, {2: None, 3: 5.0, 4: None})[-1] == [3, 4]


def write_images(folder, broken=()):
  """16 images of two classes in both splits; names in `broken` are cut."""
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for i in range(16):
      path = folder / split / f"class{i % 2}" / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
      Image.fromarray(pixels).save(path)
  for name in broken:
    path = next((folder / "train").rglob(name))
    path.write_bytes(path.read_bytes()[:60])


def test_broken_files_are_remembered_when_a_run_continues(tmp_path):
  write_images(tmp_path / "images", broken=["3.png"])
  config = small.config(
    {
      "data.source": "folder",
      "data.path": str(tmp_path / "images"),
      "data.max_broken": 0.1,
      "optim.epochs": 4,  # of 2 steps
      "evals.knn": False,
      "evals.mask_images": 0,
    }
  )
  stop(config, tmp_path / "run", 3)
  _, progress = checkpoint_of(tmp_path / "run", 3)
  ((index, reason),) = progress["broken"].items()
  write_images(tmp_path / "images")  # mended: it cannot be found again
  train.train(config, str(tmp_path / "run"))
  _, progress = checkpoint_of(tmp_path / "run", 8)
  assert progress["broken"] == {index: reason}


def test_restored_broken_files_count_towards_the_limit():
  source = data.build(small.config().data, "train")
  load = source.load

  def broken(index):
    if index == 9:
      raise data.BrokenImage("cut short")
    return load(index)

  source.load = broken
  pipeline = data.TrainPipeline(
    source,
    lambda image, rng: {"images": np.zeros(3)},
    batch_size=8,
    seed=0,
    max_broken=2 / 64,
  )
  pipeline.restore_broken({1: "old"})
  list(pipeline.batches(0, 8))
  assert pipeline.broken == {1: "old", 9: "cut short"}
  with pytest.raises(InputError, match="3 of the 64 images"):
    pipeline.restore_broken({2: "old"})


def test_another_number_of_images_is_another_config(whole):
  """As `data.path`, which may change, may bring about."""
  with pytest.raises(InputError, match="72 images, and had 64"):
    run_config.check_config(
      small.config(), whole, images=72, defaults=small.config()
    )
