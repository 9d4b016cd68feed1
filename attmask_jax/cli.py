"""Command line: attmask-jax --config=NAME --workdir=DIR.

In a source checkout also python main.py --config=configs/NAME.py. NAME is a
file of configs/, or a path to a config file of your own; an argument for it
follows after a colon, as in --config=tiny:mae.

--mode=train (the default) trains; --mode=eval --config=evals:NAME
--config.weights=RUN measures what a run has learned; --mode=bench measures how
fast a config trains here; --mode=plan --config.run.topology=v5e:4x4 what it
needs on devices that are not here; --mode=export --output=FILE and
--mode=import --output=DIR move weights to and from PyTorch code bases.

Any key of the config can be set as --config.SECTION.KEY=VALUE, for example
--config.data.batch_size=64; docs/config.md lists all keys with their meaning,
configs/ the experiments.

Exit codes: 0 done, 1 a failure of the program or the machine, 2 bad input,
3 the loss is not finite, 128 + n stopped by signal n after saving.
"""

import errno
import inspect
import logging as python_logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from attmask_jax import recipes
from attmask_jax.errors import (
  InputError,
  NotFiniteError,
  SaveError,
  StoppedError,
)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
KINDS = {  # what Python and absl say of a value of another kind
  "invalid literal for int()": "a whole number",
  "could not convert string to float": "a number",
  "Non-boolean argument": "True or False",
}
EXAMPLE = "--config=tiny --workdir=runs/tiny"

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Name in configs/ or path of a config file; an argument for it follows after "
  "a colon.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Run directory: made if missing, continued if it holds a run.",
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "bench", "plan", "import", "export"],
  "What to do.",
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "bench: turns that are timed; other modes ignore it."
)
_COMPILATIONS = flags.DEFINE_integer(
  "compilations",
  4,
  "plan: at most so many; those after the first look for the largest batch.",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "import: new directory; export: .pth or .safetensors file."
)
_FORMAT = flags.DEFINE_string(
  "format", "timm", "export: attmask, timm, hf, mae or extrema."
)
_DTYPE = flags.DEFINE_string(
  "dtype", "float32", "export: float32, float16 or bfloat16."
)
_BACKBONE_ONLY = flags.DEFINE_bool(
  "backbone_only", False, "export: leave heads, decoder and predictor out."
)


def main(argv: list[str]) -> int:
  """Runs one mode; returns the exit code."""
  # Here, so that a wrong flag is answered at once.
  from attmask_jax import benchmark, evaluate, interchange, plan, train

  config, workdir = _CONFIG.value, _WORKDIR.value

  def work() -> None:
    _check(argv, config)
    if _MODE.value == "train":
      train.train(config, workdir)
    elif _MODE.value == "eval":
      evaluate.evaluate(config, workdir)
    elif _MODE.value == "bench":
      benchmark.bench(config, workdir, repeats=_REPEATS.value)
    elif _MODE.value == "plan":
      plan.plan(config, workdir, compilations=_COMPILATIONS.value)
    elif _MODE.value == "import":
      interchange.import_weights(config, _OUTPUT.value)
    else:
      interchange.export_weights(
        config,
        _OUTPUT.value,
        format=_FORMAT.value,
        dtype=_DTYPE.value,
        backbone_only=_BACKBONE_ONLY.value,
      )

  return exit_code(work, workdir)


def exit_code(work: Callable[[], None], workdir: str) -> int:
  """Does the work of a command; returns its exit code.

  An error that the user can act on becomes one sentence, not a traceback.
  """
  _quiet_libraries()
  try:
    work()
  except InputError as error:
    return _fail(error, 2)
  except NotFiniteError as error:
    return _fail(error, 3)
  except SaveError as error:
    return _fail(error, 1)
  except OSError as error:
    if error.errno not in DISK_ERRORS:
      raise
    return _fail(
      f"{error.filename or workdir}: {error.strerror}: make room or repair the "
      "disk; the same command continues from the last whole checkpoint, if any",
      1,
    )
  except StoppedError as error:
    return _fail(error, 128 + error.signal)
  except KeyboardInterrupt:
    return _fail("interrupted", 128 + signal.SIGINT)
  return 0


def _check(argv: list[str], config: ml_collections.ConfigDict) -> None:
  """Refuses words that are no flags, and other configs in train mode."""
  refuse_words(argv)
  trains = _MODE.value in ("train", "bench", "plan")
  if trains and "study" in config:
    raise InputError(
      "this config describes a study of several runs: use python -m "
      "attmask_jax.study with the same flags and --minutes=N"
    )
  if trains and "name" in config.get("evals", {}):
    from attmask_jax import evals

    needs = evals.by_name(config.evals.name).needed(config.evals)
    lacks = needs != "none" and not config.weights
    raise InputError(
      "this config describes an evaluation: add --mode=eval"
      + " and --config.weights=RUN" * lacks
    )


def refuse_words(argv: list[str]) -> None:
  """Raises InputError for the first word of a command that is no flag."""
  if len(argv) > 1:
    raise InputError(
      f'unexpected argument "{argv[1]}": write flags as --config.run.fsdp=2'
    )


def parse(
  argv: list[str], *, usage: str | None = None, example: str = ""
) -> list[str]:
  """Reads the flags; a wrong one ends the program with one sentence.

  Args:
    argv: the command.
    usage: what --help prints; None = the page of this module.
    example: flags of a complete command; "" = those of the mode.
  """
  if any(re.fullmatch(r"--?h(elp)?", word) for word in argv[1:]):
    own = f"{__doc__}\nFlags:\n{flags.FLAGS.module_help(__name__)}"
    print(own if usage is None else usage)
    sys.exit(0)
  try:
    recipes.share()
    rest = flags.FLAGS(_with_config(argv))
    moves = _MODE.value in ("import", "export")  # weights, and nothing else
    for flag in (_CONFIG, _OUTPUT if moves else _WORKDIR):
      if flag.value is None:
        raise flags.IllegalFlagValueError(
          f"--{flag.name} is missing, for example: {example or _example()}"
        )
    _CONFIG.value.lock()
    own = flags.FLAGS["config"]
    recipes.plan(_CONFIG.value, own.config_filename, own.override_values)
  except (AttributeError, KeyError) as error:
    sys.exit(_fail(_unknown_key(str(error), argv), 2))
  except OSError:  # of the config file; ml_collections keeps it until now
    sys.exit(
      _fail(
        f"{_config_flag(argv)}: no such config file, neither here nor in "
        f"{recipes.CONFIGS}: it holds {', '.join(recipes.names())}",
        2,
      )
    )
  except (flags.Error, ValueError, TypeError) as error:
    sys.exit(_fail(_sentence(str(error)), 2))
  return rest


def _example() -> str:
  """A command of this mode."""
  examples = {
    "train": EXAMPLE,
    "eval": "--mode=eval --config=evals:knn --config.weights=runs/tiny "
    "--workdir=runs/tiny_knn",
    "bench": "--mode=bench --config=tiny --workdir=bench/tiny",
    "plan": "--mode=plan --config=attmask_vits16 "
    "--config.run.topology=v5e:4x4 --workdir=plans/attmask",
    "import": "--mode=import --config.weights=FILE.pth --output=DIR",
    "export": "--mode=export --config.weights=runs/tiny "
    "--output=backbone.safetensors",
  }
  return examples[_MODE.value]


def _with_config(argv: list[str]) -> list[str]:
  """The arguments with a config given by name replaced by its path.

  Import and export need none from the user; that of an evaluation is used.
  """
  words = list(argv)
  for i, word in enumerate(words):
    flag = re.fullmatch(r"(--?config)(?:=(.*))?", word)
    if flag and flag[2] is not None:
      words[i] = f"{flag[1]}={recipes.find(flag[2])}"
    elif flag and i + 1 < len(words):
      words[i + 1] = recipes.find(words[i + 1])
  moves = any(re.fullmatch(r"--?mode=(im|ex)port", word) for word in words)
  if not moves or any(re.match(r"--?config(=|$)", word) for word in words):
    return words
  return [words[0], f"--config={recipes.CONFIGS / 'evals.py'}:knn", *words[1:]]


def _config_flag(argv: list[str]) -> str:
  """--config=FILE as it was given, in one word or two."""
  words = " ".join(argv).replace("--config ", "--config=").split()
  return next((w for w in words if w.startswith("--config=")), "--config")


def _sentence(error: str) -> str:
  """The first line, or the last of an error from within a config file."""
  if "before a value for --config was specified" in error:
    return "--config=FILE must stand before the flags --config.KEY=VALUE"
  value = re.match(r"flag --config\.([\w.]+)=(.*?): (.*)", error)
  for problem, kind in KINDS.items():
    if value and problem in value[3]:
      return f"{value[1]} {value[2]} must be {kind}"
  lines = error.strip().splitlines()
  if len(lines) > 1 and "Traceback" in error:
    return lines[-1].split(": ", 1)[-1]
  return lines[0]


def _unknown_key(error: str, argv: list[str]) -> str:
  """A sentence for ml_collections' complaint about a key."""
  near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', error)
  keys = [a.split("=")[0] for a in argv if a.startswith("--config.")]
  name = near[2] if near else error.strip("'\" ")
  evaluates = any(re.fullmatch(r"--?mode=eval", word) for word in argv)
  if evaluates and name in ("weights", "network", "probe"):
    return (
      f"{_config_flag(argv)} describes a training run, which has no "
      f"config.{name}: name an evaluation, such as --config=evals:knn"
    )
  if not near:
    flag = next((k for k in keys if name in k.split(".")), name)
    return f'unknown config key "{flag}": see docs/config.md for all keys'
  flag = next((k for k in keys if near[2] in k.split(".")), near[2])
  return f'unknown config key "{flag}": did you mean "{near[1]}"?'


def _fail(error: object, code: int) -> int:
  print(f"error: {error}", file=sys.stderr)
  return code


def _quiet_libraries() -> None:
  """Our own progress to the terminal; libraries from warnings up.

  Where a save fails, Orbax and TensorStore also print a traceback for each
  thread and array. The first error is raised to us, and one is enough.
  """
  logging.set_verbosity(logging.INFO)

  def worth_printing(record: python_logging.LogRecord) -> bool:
    if record.pathname.startswith(str(recipes.PACKAGE)):
      return True
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    raised = record.levelno == python_logging.ERROR and (
      of_orbax or record.name == "asyncio"
    )
    return record.levelno >= python_logging.WARNING and not raised

  def hook(unraisable: Any) -> None:
    closed = str(unraisable.exc_value) == "Event loop is closed"
    if not closed and not inspect.iscoroutine(unraisable.object):
      sys.__unraisablehook__(unraisable)

  logging.get_absl_handler().addFilter(worth_printing)
  sys.unraisablehook = hook


def entry() -> None:
  """The command attmask-jax."""
  app.run(main, flags_parser=parse)
