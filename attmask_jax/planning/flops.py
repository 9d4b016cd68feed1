"""Operations of a train step, counted in the program before optimisation."""

import jax
import ml_collections

from attmask_jax import Batch
from attmask_jax.methods import METHODS
from attmask_jax.methods.base import Method
from attmask_jax.training import train_step
from attmask_jax.training.setup import Run


def model_flops(run: Run, state: train_step.TrainState, batch: Batch) -> float:
  """FLOPs of a train step on the global batch.

  Counted by the compiler in the program with unrolled blocks, since the body of
  a loop counts once, and before optimisation. What `run.remat` recomputes is
  not counted; one of attention's seven products, which its backward pass
  recomputes in any case, is.
  """
  config = ml_collections.ConfigDict(run.config.to_dict())
  config.run.update(scan=False, remat="none", accumulate=1, patch_loss_chunks=1)
  config.run.attention = "xla"  # the compiler does not count cuDNN's
  method: Method = METHODS[config.method.name].from_config(
    config, steps_per_epoch=run.schedules.steps_per_epoch
  )
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_step(
    method, run.tx, run.mesh, shardings, seed=config.method.seed
  )
  scalars = run.schedules.at(0) | method.at(0)
  views = jax.eval_shape(run.augment, batch)
  return step.lower(state, views, scalars).cost_analysis()["flops"]
