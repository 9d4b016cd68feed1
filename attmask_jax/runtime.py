"""Process settings of a run: matmul precision, compilation cache, cluster.

Every command applies them itself, so that a notebook and the command line
compute the same numbers.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import ml_collections
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from attmask_jax import mesh
from attmask_jax.errors import InputError


def setup(run: ml_collections.ConfigDict) -> None:
  """Applies matmul_precision, distributed and compilation_cache.

  It can be called again with other settings.

  Args:
    run: section `run` of a config.

  Raises:
    InputError: an unknown precision, or run.distributed without a cluster.
  """
  try:
    jax.config.update("jax_default_matmul_precision", run.matmul_precision)
  except ValueError as error:
    raise InputError(
      f'run.matmul_precision "{run.matmul_precision}" is unknown: use highest, '
      "high or default"
    ) from error
  mesh.init_distributed(run.distributed)
  _keep_programs(run.compilation_cache)


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
  """Compiles without reading or writing the compilation cache."""
  before = jax.config.jax_enable_compilation_cache
  _use_cache(False)
  try:
    yield
  finally:
    _use_cache(before)


def _use_cache(enable: bool) -> None:
  jax.config.update("jax_enable_compilation_cache", enable)
  compilation_cache.reset_cache()  # or JAX keeps what it decided first


def _keep_programs(folder: str) -> None:
  """Keeps compiled programs in a folder, or says why not.

  Args:
    folder: "auto" = the user's, but none if JAX has one already or the run has
      several processes; "" = what JAX has.
  """
  before = jax.config.jax_compilation_cache_dir
  auto = folder == "auto"
  # Processes with GPUs compile together. Where each host has its own folders,
  # one could wait for others that have the program.
  if auto and (before or jax.process_count() > 1):
    return
  try:
    folder = _user_folder() if auto else os.path.expanduser(folder)
    if not folder or folder == before:
      return
    if "://" not in folder:  # a bucket
      pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
      tempfile.TemporaryFile(dir=folder).close()
  except (OSError, RuntimeError) as error:
    logging.warning(
      "run.compilation_cache: compiled programs are not kept: %s", error
    )
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  compilation_cache.reset_cache()  # or JAX keeps the first folder


def _user_folder() -> str:
  """attmask_jax/xla in the user's cache folder; RuntimeError if homeless."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return os.fspath(pathlib.Path(caches, "attmask_jax", "xla"))
