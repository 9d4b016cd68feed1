"""Finds the experiments of configs/ by name, installed or in a checkout."""

import contextlib
import importlib.util
import pathlib
import sys
import types
from collections.abc import Collection

import ml_collections

from attmask_jax.errors import InputError

PACKAGE = pathlib.Path(__file__).parent
# Installed beside the modules, or in the source checkout.
CONFIGS = next(
  (p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir()),
  PACKAGE / "configs",
)


def get(config: str) -> ml_collections.ConfigDict:
  """Loads a config by name, locked: an unknown key is an error.

  Its warm-ups follow optim.epochs and optim.steps, see training/lengths.py.

  Args:
    config: NAME of configs/ or path of a config file, and an argument for it
      after a colon, such as "tiny:mae".

  Raises:
    InputError: there is no such file.
  """
  share()
  path, _, argument = find(config).partition(":")
  if not pathlib.Path(path).is_file():
    raise InputError(
      f"there is no config {path}, neither here nor in {CONFIGS}: it holds "
      f"{', '.join(names())}"
    )
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([argument] if argument else [])).lock()
  plan(config)
  return config


def plan(
  config: ml_collections.ConfigDict, name: str = "", given: Collection[str] = ()
) -> None:
  """Applies `lengths.plan` to a config from a recipe.

  Args:
    config: as the recipe made it, but for the keys in `given`.
    name: of the recipe, see `get`; needed where `given` is.
    given: dotted names of keys that were set since.
  """
  from attmask_jax.training import lengths  # it imports jax

  recipe = config
  if "optim.epochs" in given:
    with contextlib.redirect_stdout(None):  # it may have printed its choices
      recipe = get(name)
  lengths.plan(config, recipe.get("optim", {}).get("epochs", 0), given)


def names() -> list[str]:
  """Names of the experiments."""
  shared = ("__init__", "common", "supervised")
  return sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in shared)


def share() -> None:
  """Makes `from configs import ...` work in config files of any folder.

  The installed folder is not a top-level package, because many projects use
  that name.
  """
  package = types.ModuleType("configs")
  package.__path__ = [str(CONFIGS), str(pathlib.Path.cwd() / "configs")]
  sys.modules.setdefault("configs", package)


def find(config: str) -> str:
  """Path of a config file: as given, else the one of this name in configs/."""
  path, colon, argument = config.partition(":")
  given = pathlib.Path(path)
  own = CONFIGS / f"{given.name.removesuffix('.py')}.py"
  # A path in another folder is another file, even if its name is in configs/.
  named = path and str(given.parent) in (".", "configs")
  if not named or given.is_file() or not own.is_file():
    return config
  return f"{own}{colon}{argument}"
