"""What is kept on disk, what is damaged there, and what is refused."""

import shutil
import subprocess

import jax
import numpy as np
import pytest
import small
from PIL import Image
from stopping import (
  MAIN,
  assert_same_end,
  at_step,
  checkpoint_of,
  command,
  contents,
  records_of,
  steps_of,
  stop,
)

from attmask_jax import data, train
from attmask_jax import mesh as meshes
from attmask_jax.errors import (
  DamagedError,
  InputError,
  NotFiniteError,
  SaveError,
)
from attmask_jax.runs import checkpoint, lock, saved_items
from attmask_jax.runs import config as run_config
from attmask_jax.weights import loading

pytestmark = pytest.mark.usefixtures("one_device")


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


def cut(folder):
  """Leaves 10 bytes of each file of arrays below a folder."""
  chunks = [path for path in folder.glob("**/d/*") if path.is_file()]
  assert chunks
  for chunk in chunks:
    chunk.write_bytes(chunk.read_bytes()[:10])


@pytest.mark.parametrize(
  "damage, reason",
  [
    (lambda newest: cut(newest / "params"), "checkpoints/16 is damaged"),
    (lambda newest: shutil.rmtree(newest / "train"), "16/train is missing"),
    (lambda newest: cut(newest / "train"), "checkpoints/16 is damaged"),
    (
      lambda newest: (newest / "progress" / "metadata").write_text("{}"),
      "checkpoints/16 is damaged ('window')",
    ),
  ],
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
  tmp_path, whole, caplog, damage, reason
):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  newest = folder / "checkpoints" / "16"
  damage(newest)
  before = contents(newest)
  train.train(small.config(), str(folder))
  assert_same_end(folder, whole)
  assert contents(folder / "checkpoints" / "16.damaged") == before
  # Orbax leaves failed tasks, which asyncio logs whenever they are collected.
  ours = [r.getMessage() for r in caplog.records if r.name != "asyncio"]
  (message,) = (m for m in ours if "damaged" in m)
  assert reason in message and "continues from step 8" in message
  assert "\n" not in message


def test_a_bare_exception_about_a_file_is_damage(tmp_path, whole):
  """Orbax raises one where a file that a manifest names is gone."""
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  newest = folder / "checkpoints" / "16"
  for chunk in (newest / "params" / "ocdbt.process_0" / "d").iterdir():
    chunk.unlink()
  with pytest.raises(DamagedError, match="16/params is damaged") as error:
    loading.load(str(newest), network="student", mesh=meshes.make_mesh())
  assert type(error.value.__cause__) is Exception


def test_the_only_checkpoint_is_damaged(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "8")
  cut(folder / "checkpoints" / "16" / "params")
  before = contents(folder)
  with pytest.raises(DamagedError, match="there is no older checkpoint") as e:
    train.train(small.config(), str(folder))
  assert "checkpoints/16 is damaged" in str(e.value)
  assert "\n" not in str(e.value)
  assert contents(folder) == before


def test_an_older_checkpoint_stays_until_a_newer_one_is_whole(tmp_path):
  items = {name: {"x": np.ones(3)} for name in saved_items.ARRAY_ITEMS}
  with checkpoint.Checkpoints(tmp_path) as saved:
    for step in (1, 2, 3):
      saved.save(step, items, {})
      saved.wait()
    assert steps_of(tmp_path) == [2, 3]
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "params")
    saved.save(4, items, {})
    saved.wait()
  assert steps_of(tmp_path) == [2, 4]


def test_half_written_saves_are_deleted_by_who_is_alone(tmp_path):
  left = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "params"
  left.mkdir(parents=True)
  items = {name: {"x": np.ones(3)} for name in saved_items.ARRAY_ITEMS}
  for alone in (False, True):
    with checkpoint.Checkpoints(tmp_path, alone=alone) as saved:
      assert saved.latest == (None if not alone else 1)
      saved.save(1 + alone, items, {})
    assert left.exists() != alone


def test_a_run_in_another_process_is_left_alone(tmp_path, whole):
  folder = tmp_path / "run"
  shutil.copytree(whole, folder)
  shutil.rmtree(folder / "checkpoints" / "16")
  with lock.RunLock(folder):
    before = contents(folder)
    with pytest.raises(InputError, match="is being trained by process"):
      train.train(small.config(), str(folder))
    assert contents(folder) == before
  train.train(small.config({"run.break_lock": True}), str(folder))
  assert_same_end(folder, whole)


def test_a_run_that_lost_its_directory_saves_nothing_more(tmp_path):
  def take_over(results):
    lock.RunLock(tmp_path, break_lock=True).__enter__()
    return results

  config = small.config({"run.save_steps": 3})
  with at_step(5, take_over), pytest.raises(SaveError, match="taken over"):
    train.train(config, str(tmp_path))
  assert steps_of(tmp_path) == [3]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
  tmp_path, whole, monkeypatch
):
  config = small.config({"run.save_steps": 5})
  usage = shutil.disk_usage(tmp_path)

  def fill(results):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9))
    return results

  with at_step(7, fill), pytest.raises(SaveError) as error:
    train.train(config, str(tmp_path))
  message = str(error.value)
  assert "step 8 needs" in message and "0 MiB are free" in message
  assert "\n" not in message
  assert steps_of(tmp_path) == [5]
  monkeypatch.undo()
  small.use_devices(monkeypatch, 1)
  train.train(small.config(), str(tmp_path))
  assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_a_save_that_the_system_refuses_is_one_sentence(tmp_path, programs):
  """A limit of 64 KiB on files, which no look at the free room announces."""
  limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash"]
  changes = {"evals.mask_images": 0, "evals.overlap_images": 0}
  run = subprocess.run(
    [*limited, *command(tmp_path, changes | {"run.save_steps": 2})],
    cwd=MAIN.parent,
    env=small.environment(programs),
    capture_output=True,
    text=True,
  )
  assert run.returncode == 1
  lines = run.stderr.splitlines()
  assert "Traceback" not in run.stderr
  (problem,) = (line for line in lines if line.startswith("error:"))
  assert problem.startswith("error: no checkpoint could be written")
  assert "File too large" in problem and str(tmp_path) in problem
  assert steps_of(tmp_path) == []


def poison(results):
  """An action: the patch loss is not a number."""
  state, values, per_image = results
  nan = jax.numpy.full_like(values["loss"], np.nan)
  return state, values | {"loss": nan, "patch": nan}, per_image


@pytest.mark.slow
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


@pytest.mark.parametrize("part", ["params", "teacher", "aux", "opt"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, part):
  """Though its loss, of the weights before, is."""

  def overflow(results):
    leaves, treedef = jax.tree.flatten(getattr(results.state, part))
    last = max(i for i, x in enumerate(leaves) if x.dtype == np.float32)
    leaves[last] = leaves[last].at[..., -1].set(np.inf)
    tree = jax.tree.unflatten(treedef, leaves)
    return results._replace(state=results.state.replace(**{part: tree}))

  config = small.config({"run.save_steps": 2, "evals.mask_images": 0})
  with at_step(4, overflow), pytest.raises(NotFiniteError) as error:
    train.train(config, str(tmp_path))
  names = dict(
    params="parameters", teacher="teacher", aux="centres", opt="optimiser"
  )
  assert f"step 4 is not finite: {names[part]};" in str(error.value)
  assert "last good checkpoint is step 2" in str(error.value)
  assert steps_of(tmp_path) == [2]


def test_a_huge_learning_rate_is_found_and_named(tmp_path):
  config = small.config({"optim.lr_per_256": 1e30})
  with pytest.raises(NotFiniteError) as error:
    train.train(config, str(tmp_path))
  assert "there is no checkpoint yet" in str(error.value)
  assert "optim.lr_per_256" in str(error.value)
  assert steps_of(tmp_path) == []
  for record in records_of(tmp_path):
    assert all(np.isfinite(v) for v in record.values())


@pytest.mark.slow
def test_the_last_two_the_best_and_every_n_are_kept(tmp_path):
  config = small.config({"run.keep_steps": 5})
  train.train(config, str(tmp_path))
  knn = {
    r["step"]: r["knn/top1"] for r in records_of(tmp_path) if "knn/top1" in r
  }
  best = max((8, 16), key=lambda step: (knn[step], step))
  assert steps_of(tmp_path) == sorted({5, 10, 15, 16, best})


def test_every_second_epoch_is_kept(tmp_path):
  changes = {
    "optim.epochs": 5,
    "run.keep_epochs": 2,
    "evals.knn": False,
    "evals.overlap_images": 0,
  }
  train.train(small.config(changes), str(tmp_path))
  assert steps_of(tmp_path) == [16, 32, 40]  # 40 is the last one


def save(folder, scores, **options):
  """Saves {step: k-NN or None} in one sitting; what is on disk after each."""
  kept = []
  with checkpoint.Checkpoints(folder, best="knn/top1", **options) as saved:
    for step, score in scores.items():
      items = {
        name: {"x": np.full(3, step)} for name in saved_items.ARRAY_ITEMS
      }
      values = {} if score is None else {"knn/top1": score}
      saved.save(step, items, {"step": step}, metrics=values)
      saved.wait()
      kept.append(steps_of(folder))
  return kept


def test_the_best_is_known_after_a_stop(tmp_path):
  assert save(tmp_path, {1: None, 2: 50.0, 3: None, 4: 40.0}) == [
    [1], [1, 2], [2, 3], [2, 3, 4]
  ]  # fmt: skip
  # A sitting later: 2 is still the best, until there is a better one.
  assert save(tmp_path, {5: None, 6: 45.0, 7: 60.0, 8: None}) == [
    [2, 4, 5], [2, 5, 6], [6, 7], [7, 8]
  ]  # fmt: skip


def test_every_n_steps_stay_for_good(tmp_path):
  assert save(tmp_path, {2: 9.0, 3: 8.0, 4: 7.0}, keep_steps=[3])[-1] == [
    2, 3, 4
  ]  # fmt: skip
  assert save(tmp_path, {5: 10.0, 6: 1.0, 7: 1.0}, keep_steps=[3])[-1] == [
    3, 5, 6, 7
  ]  # fmt: skip


def test_checkpoints_without_scores_do_not_pile_up(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as saved:  # k-NN off
    items = {name: {"x": np.zeros(3)} for name in saved_items.ARRAY_ITEMS}
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
