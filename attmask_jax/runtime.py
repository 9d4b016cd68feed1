"""Process settings of a run: matmul precision, compilation cache, cluster.

Every command applies them itself, so that a notebook and the command line
compute the same numbers.
"""

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache

from attmask_jax import mesh
from attmask_jax.errors import InputError


def setup(run: ml_collections.ConfigDict) -> None:
  """Applies matmul_precision, compilation_cache and distributed.

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
  folder = run.compilation_cache
  if folder and folder != jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # or JAX keeps the first folder
  mesh.init_distributed(run.distributed)
