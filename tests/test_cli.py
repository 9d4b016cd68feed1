"""The command line: one sentence for bad input, and nothing written."""

import pathlib
import signal
import subprocess
import sys

import jax
import pytest
import small
from PIL import Image

from attmask_jax import cli, evaluate, interchange, schema, train
from attmask_jax.errors import InputError, NotFiniteError, StoppedError
from attmask_jax.runs import checkpoint
from attmask_jax.runs import config as run_config
from attmask_jax.training import epoch

ROOT = pathlib.Path(__file__).parents[1]
TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"


@pytest.fixture
def call(start):
  """call(*flags) -> exit code and stderr."""

  def call(*flags):
    code, _, errors = start(cli, *flags)
    return code, errors

  return call


def flags_of(changes):
  return [f"--config.{k}={v}" for k, v in (small.SIZES | changes).items()]


def check_sentence(code, words, wanted):
  """Bad input is answered by one line that holds the wanted words."""
  assert code == 2
  assert words.startswith("error: ") and words.count("\n") == 1, words
  assert "Traceback" not in words and "Error" not in words
  for word in wanted:
    assert word in words, words


def image_folder(root, *, classes=("ant", "bee"), empty=()):
  """A data set of 16 images per class in both splits; some classes empty."""
  for split in ("train", "val"):
    for name in classes:
      (root / split / name).mkdir(parents=True)
      for i in range(0 if name in empty else 16):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(
          root / split / name / f"{i}.png"
        )


FOLDER = {"data.source": "folder"}

# (config keys, words of the sentence: the value and the remedy)
BAD_VALUES = {
  "no data path": (FOLDER, ["--config.data.path=FOLDER"]),
  "missing data folder": (
    FOLDER | {"data.path": "{tmp}/nowhere"}, ["{tmp}/nowhere", "existing"],
  ),
  "empty data folder": (FOLDER | {"data.path": "{tmp}/empty"}, ["{tmp}/empty"]),
  "class without images": (FOLDER | {"data.path": "{tmp}/gap"}, ["bee", "gap"]),
  "flat folder without images": (
    {"data.source": "flat", "data.path": "{tmp}/empty"}, ["{tmp}/empty"],
  ),
  "unknown source": ({"data.source": "imagenet"}, ["imagenet", "folder"]),
  "batch over devices": (
    {"data.batch_size": 12}, ["12", "8 devices", "use 8 or 16"],
  ),
  "batch over accumulation": (
    {"data.batch_size": 24, "run.accumulate": 2},
    ["24", "run.accumulate 2", "use 16 or 32"],
  ),
  "batch larger than the data": (
    {"data.batch_size": 128}, ["128", "64 images"],
  ),
  "image size": ({"data.image_size": 18}, ["18", "patch_size 4", "16", "20"]),
  "local size": ({"data.local_size": 10}, ["10", "patch_size 4", "8", "12"]),
  "ratio below its variance": (
    {"method.mask_ratio": 0.1, "method.mask_ratio_var": 0.2}, ["0.1", "0.2"],
  ),
  "ratio above 1": (
    {"method.mask_ratio": 1.2, "method.mask_ratio_var": 0.0},
    ["1.2", "between 0 and 1"],
  ),
  "temperature warm-up": (
    {"method.temp_warmup_epochs": 3}, ["3", "optim.epochs 2", "lower method."],
  ),
  "learning rate warm-up": (
    {"optim.warmup_epochs": 3}, ["3", "optim.epochs 2", "shorten"],
  ),
  "one view": (
    {"data.global_crops": 1, "data.local_crops": 0},
    ["global_crops 1", "local_crops 0", "at least two"],
  ),
  "head sizes": (
    {"method.shared_head": False, "method.patch_out_dim": 32},
    ["32", "16", "shared_head_teacher=False"],
  ),
  "empty head": ({"method.head_hidden": 0}, ["head_hidden 0", "at least 1"]),
  "no prototype": ({"method.out_dim": 0}, ["out_dim 0", "at least 1"]),
  "k beyond the set": ({"evals.knn_ks": 65}, ["65", "64 images", "lower k"]),
  "k beyond the bank": ({"evals.knn_bank": 4}, ["(3, 5, 10)", "4 images"]),
  "unknown method": ({"method.name": "attmsk"}, ["attmsk", "attmask, extrema"]),
  "unknown variant": ({"method.variant": "vast"}, ["vast", "small"]),
  "unknown mask": ({"method.mask": "high"}, ["high", "attmask_high"]),
  "unknown optimiser": ({"optim.optimizer": "adam"}, ["adam", "adamw"]),
  "unknown dtype": ({"method.dtype": "float8"}, ["float8", "bfloat16"]),
  "fsdp": ({"run.fsdp": 3}, ["3", "8 devices", "divisor"]),
  "epochs": ({"optim.epochs": 0}, ["optim.epochs 0", "at least 1"]),
  "word for an integer": ({"optim.epochs": "many"}, ["optim.epochs", "many"]),
  "fraction for an integer": ({"optim.epochs": 2.5}, ["optim.epochs", "2.5"]),
  "word for a number": ({"optim.lr_per_256": "fast"}, ["lr_per_256", "fast"]),
  "word for a switch": ({"evals.knn": "maybe"}, ["evals.knn", "maybe"]),
  "words for ratios": ({"method.mask_ratio": "half"}, ["mask_ratio", "half"]),
  "one for two": ({"optim.weight_decay": 0.04}, ["weight_decay", "(0.04,)"]),
  "fraction for k": ({"evals.knn_ks": 2.5}, ["knn_ks", "2.5", "whole"]),
  "nearest key": ({"optim.lr_per256": 1}, ["lr_per256", "lr_per_256"]),
  "no near key": ({"optim.zzz": 1}, ["config.optim.zzz", "docs/config.md"]),
  "unknown section": ({"zzz.a": 1}, ["zzz", "docs/config.md"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(call, tmp_path, case):
  (tmp_path / "empty").mkdir()
  image_folder(tmp_path / "gap", empty=["bee"])
  changes, wanted = BAD_VALUES[case]
  fill = lambda x: (
    x.replace("{tmp}", str(tmp_path)) if isinstance(x, str) else x
  )
  changes = {key: fill(value) for key, value in changes.items()}
  flags = flags_of(changes)
  code, words = call(TINY, f"--workdir={tmp_path / 'run'}", *flags)
  check_sentence(code, words, map(fill, wanted))
  assert not (tmp_path / "run").exists()


BAD_FLAGS = {
  "no config": (["--workdir=W"], ["--config"]),
  "no workdir": ([TINY], ["--workdir"]),
  "no such config": (
    ["--config=configs/nope.py", "--workdir=W"], ["configs/nope.py"],
  ),
  "no such config, in two words": (
    ["--config", "configs/nope.py", "--workdir=W"], ["configs/nope.py"],
  ),
  "unknown argument": ([f"{TINY}:foo", "--workdir=W"], ["foo", "hint"]),
  "a section": ([TINY, "--workdir=W", "--config.data=3"], ["data", "'3'"]),
  "a training config in an evaluation": (
    ["--mode=eval", TINY, "--config.weights=W", "--workdir=W"],
    ["tiny.py describes a training run", "--config=evals:knn"],
  ),
  "no weights either": (
    ["--mode=eval", TINY, "--workdir=W"],
    ["describes a training run", "--config=evals:knn", "--config.weights=RUN"],
  ),
  "fraction for an integer": (
    [TINY, "--workdir=W", "--config.data.batch_size=64.5"],
    ["data.batch_size 64.5 must be a whole number\n"],
  ),
  "word for a number": (
    [TINY, "--workdir=W", "--config.optim.lr_per_256=fast"],
    ["optim.lr_per_256 fast must be a number\n"],
  ),
  "word for a switch": (
    [TINY, "--workdir=W", "--config.run.scan=maybe"],
    ["run.scan maybe must be True or False\n"],
  ),
  "unknown flag": ([TINY, "--workdir=W", "--workdr=W"], ["workdr"]),
  "unknown mode": ([TINY, "--workdir=W", "--mode=run"], ["mode", "train"]),
  "no flag at all": ([TINY, "--workdir=W", "epochs=3"], ["epochs=3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag(call, tmp_path, monkeypatch, case):
  monkeypatch.chdir(tmp_path)
  flags, wanted = BAD_FLAGS[case]
  code, words = call(*flags)
  check_sentence(code, words, wanted)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", [False, True])
def test_workdir_in_the_place_of_a_file(call, tmp_path, below):
  file = tmp_path / "run"
  file.write_text("a file")
  workdir = file / "below" if below else file
  code, words = call(TINY, f"--workdir={workdir}", *flags_of({}))
  wanted = "not writable" if below else "is a file"
  check_sentence(code, words, [str(workdir), wanted])
  assert file.read_text() == "a file"


def contents(folder):
  files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
  return {str(p): p.read_bytes() for p in files}


@pytest.mark.slow
def test_checkpoint_of_another_architecture(call, tmp_path):
  config = small.config({"method.variant": "24x2x2"})
  run, state, _ = small.parts(config)
  sums = epoch.Epoch(
    run.method, steps=small.STEPS_PER_EPOCH, positions=range(8), batch_size=8
  )
  items = state.items() | {"epoch": sums.items(run.mesh)}
  with checkpoint.Checkpoints(tmp_path) as saved:
    saved.save(3, items, sums.progress() | {"broken": {}})
  call_tiny = lambda: call(TINY, f"--workdir={tmp_path}", *flags_of({}))
  check_sentence(*call_tiny(), ["checkpoints but no config.json", "restore"])
  run_config.write_config(small.config(), tmp_path, images=64)
  before = contents(tmp_path)
  code, words = call_tiny()
  check_sentence(code, words, ["another architecture", "24", "16", "config"])
  assert contents(tmp_path) == before


def test_directory_of_an_evaluation_is_not_trained_in(call, tmp_path):
  (tmp_path / "results.json").write_text("{}")
  code, words = call(TINY, f"--workdir={tmp_path}", *flags_of({}))
  check_sentence(code, words, ["holds an evaluation", "--workdir"])
  assert list(contents(tmp_path)) == [str(tmp_path / "results.json")]


def test_the_config_comes_first(call):
  code, words = call("--config.data.seed=1", TINY, "--workdir=W")
  check_sentence(code, words, ["--config=FILE must stand before"])


def test_another_config_on_a_run(call, tmp_path):
  config = small.config({"data.seed": 5})
  run_config.write_config(config, tmp_path, images=64)
  before = contents(tmp_path)
  code, words = call(TINY, f"--workdir={tmp_path}", *flags_of({}))
  check_sentence(code, words, ["data.seed (5 there, 0 here)", "--workdir"])
  assert contents(tmp_path) == before


def test_an_evaluation_is_not_trained(call, tmp_path):
  path = TINY.replace("tiny.py", "evals.py")
  for name in ("knn", "linear"):
    code, words = call(f"{path}:{name}", f"--workdir={tmp_path}/new")
    check_sentence(code, words, ["describes an evaluation", "--mode=eval"])
    assert "--config.weights=RUN" in words
    flags = [f"--workdir={tmp_path}/new", "--config.weights=runs/tiny"]
    code, words = call(f"{path}:{name}", *flags)
    check_sentence(code, words, ["describes an evaluation", "--mode=eval"])
    assert "weights" not in words  # they were given
  code, words = call("--mode=bench", f"{path}:knn", f"--workdir={tmp_path}/new")
  check_sentence(code, words, ["describes an evaluation", "--mode=eval"])
  code, words = call(f"{path}:compare", f"--workdir={tmp_path}/new")
  assert "--mode=eval" in words and "weights" not in words  # it takes none
  assert contents(tmp_path) == {}


@pytest.mark.parametrize(
  "error, code",
  [
    (InputError("bad"), 2),
    (NotFiniteError("bad"), 3),
    (StoppedError("bad", signal=signal.SIGTERM), 143),
    (StoppedError("bad", signal=signal.SIGINT), 130),
  ],
)
def test_exit_codes(call, monkeypatch, tmp_path, error, code):
  def fail(*_):
    raise error

  monkeypatch.setattr(train, "train", fail)
  assert call(TINY, f"--workdir={tmp_path}") == (code, "error: bad\n")


def test_flags_reach_the_run(call, monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(train, "train", lambda *args: seen.append(args))
  changes = {"evals.knn_ks": "(3,4)", "optim.betas": "0.8,0.9"}
  with jax.default_matmul_precision("highest"):
    code, words = call(f"{TINY}:hint", "--workdir=W", *flags_of(changes))
  ((config, workdir),) = seen
  assert (code, words, workdir) == (0, "", "W")
  assert config.method.mask == "attmask_hint" and config.is_locked
  assert config.evals.knn_ks == (3, 4) and config.optim.betas == (0.8, 0.9)
  assert config.data.batch_size == small.SIZES["data.batch_size"]


@pytest.mark.parametrize(
  "flags",
  [
    ["--config=tiny:mae"], ["--config", "tiny:mae"], ["--config=tiny.py:mae"],
    ["--config=configs/tiny.py:mae"], ["-config=tiny:mae"],
  ],
)  # fmt: skip
def test_a_config_is_given_by_name(call, monkeypatch, tmp_path, flags):
  monkeypatch.chdir(tmp_path)
  seen = []
  monkeypatch.setattr(train, "train", lambda *args: seen.append(args))
  changes = ["--config.data.batch_size=8"]
  assert call(*flags, "--workdir=W", *changes) == (0, "")
  ((config, _),) = seen
  assert (config.method.name, config.data.batch_size) == ("mae", 8)


def test_a_file_comes_before_a_name(call, monkeypatch, tmp_path):
  (tmp_path / "tiny.py").write_text(
    "from configs import tiny\n"
    "def get_config(arg='attmask'):\n"
    "  config = tiny.get_config(arg)\n"
    "  config.data.batch_size = 24\n"
    "  return config\n"
  )
  monkeypatch.chdir(tmp_path)
  seen = []
  monkeypatch.setattr(train, "train", lambda *args: seen.append(args))
  for path in ("tiny.py", tmp_path / "tiny.py"):
    assert call(f"--config={path}:hint", "--workdir=W") == (0, "")
    config, _ = seen.pop()
    assert config.data.batch_size == 24
    assert config.method.mask == "attmask_hint"


def test_a_path_of_another_folder_is_no_name(call, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  for path in ("mine/tiny.py", tmp_path / "tiny.py", "../configs/tiny.py"):
    code, words = call(f"--config={path}", "--workdir=W")
    check_sentence(code, words, [str(path), "no such config file"])


def test_a_missing_flag_is_answered_with_an_example(call):
  examples = {
    "train": ["--workdir is missing", "--config=tiny --workdir="],
    "eval": ["--workdir is missing", "--config=evals:knn --config.weights="],
    "plan": ["--workdir is missing", "--config.run.topology=v5e:4x4"],
    "import": ["--output is missing", "--config.weights=FILE.pth --output=DIR"],
    "export": ["--output is missing", "--output=backbone.safetensors"],
  }
  for mode, wanted in examples.items():
    check_sentence(*call(f"--mode={mode}", TINY), wanted)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_the_flags(capsys, flag):
  with pytest.raises(SystemExit) as stop:
    cli.parse(["main.py", flag])
  text = capsys.readouterr().out
  assert stop.value.code == 0
  for part in (
    "--config=tiny:mae",
    "--workdir: Run directory",
    "--mode: <train",
  ):
    assert part in text


def test_lists_of_words_reach_the_program(call, monkeypatch):
  seen = []
  monkeypatch.setattr(
    interchange, "import_weights", lambda config, _: seen.append(config)
  )
  monkeypatch.setattr(
    evaluate, "evaluate", lambda config, _: seen.append(config)
  )
  flags = ["--mode=import", "--output=D", "--config.weights=a.pth"]
  for given in ("head.,fc_norm", "head."):
    assert call(*flags, f"--config.allow_missing={given}") == (0, "")
    assert schema.words(seen.pop().allow_missing) == tuple(given.split(","))
  flags = ["--mode=eval", f"--config={ROOT / 'configs' / 'evals.py'}:compare"]
  runs = ["--config.evals.runs=runs/a,runs/b", "--config.evals.labels=A, B"]
  assert call(*flags, "--workdir=D", *runs) == (0, "")
  (config,) = seen
  assert schema.words(config.evals.runs) == ("runs/a", "runs/b")
  assert schema.words(config.evals.labels) == ("A", "B")


def shell(programs, *flags, python=()):
  """The program as a user starts it."""
  return subprocess.run(
    [sys.executable, *python, "main.py", *flags],
    cwd=ROOT,
    env=small.environment(programs),
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  "flags", [["--help"], ["--workdir=W"], ["--config=nope", "--workdir=W"]]
)
def test_program_answers_without_jax(programs, flags):
  done = shell(programs, *flags, python=["-X", "importtime"])
  imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
  assert "attmask_jax.cli" in imported
  assert not imported & {"jax", "numpy", "attmask_jax.train"}
  assert "--config" in done.stdout + done.stderr.splitlines()[-1]


def test_program_ends_a_wrong_flag_with_one_sentence(programs, tmp_path):
  workdir = tmp_path / "run"
  flags = ["--config=configs/tiny.py", f"--workdir={workdir}"]
  done = shell(programs, *flags, "--config.optim.epoch=3")
  check_sentence(done.returncode, done.stderr, ["optim.epoch", '"epochs"'])
  assert not workdir.exists() and done.stdout == ""


def test_program_ends_bad_data_with_one_sentence(programs, tmp_path):
  workdir = tmp_path / "run"
  changes = FOLDER | {"data.path": str(tmp_path / "nowhere")}
  flags = ["--config=configs/tiny.py", f"--workdir={workdir}"]
  done = shell(programs, *flags, *flags_of(changes))
  check_sentence(done.returncode, done.stderr, ["nowhere", "data.path"])
  assert not workdir.exists() and done.stdout == ""
