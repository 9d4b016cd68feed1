"""Settings of the process that a run asks for: precision, cache, cluster.

Every command applies them itself, so that it computes the same numbers from a
notebook as from the command line.
"""

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache

from attmask_jax import mesh
from attmask_jax.errors import InputError


def setup(run: ml_collections.ConfigDict) -> None:
  """Applies matmul_precision, compilation_cache and distributed; may repeat.

  Args:
    run: section `run` of a config.

  Raises:
    InputError: an unknown precision, or no cluster where one is asked for.
  """
  try:
    jax.config.update("jax_default_matmul_precision", run.matmul_precision)
  except ValueError as error:
    raise InputError(
      f'run.matmul_precision "{run.matmul_precision}" is unknown: use highest, '
      "high or default"
    ) from error
  folder = run.compilation_cache
  if folder and folder != jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it keeps the folder of the first use
  mesh.init_distributed(run.distributed)
