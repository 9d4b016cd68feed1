"""The train step of a config, lowered for devices that need not be there."""

import time
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from attmask_jax import Batch, runtime
from attmask_jax import mesh as meshes
from attmask_jax.models import blocks
from attmask_jax.planning import flops
from attmask_jax.planning.topologies import Topology
from attmask_jax.training import setup, train_step
from attmask_jax.training.setup import Run

IMAGENET = 1_281_167  # training images of ImageNet-1k
CLASSES = 1000


class Planned(NamedTuple):
  """A step that can be lowered for any batch.

  Attributes:
    run: parts of the run, on the devices of the topology.
    state: shapes and shardings of its state.
    step: the jitted step.
    row: arrays of one image of a batch.
    scalars: of the first step.
    assumed: sentences on what the config left open.
  """

  run: Run
  state: train_step.TrainState
  step: Any
  row: dict[str, np.ndarray]
  scalars: dict[str, jax.ShapeDtypeStruct]
  assumed: list[str]

  @property
  def unit(self) -> int:
    """A batch is a multiple of this."""
    return self.run.mesh.size * self.run.config.run.accumulate

  def batch(self, size: int, mesh: jax.sharding.Mesh | None = None) -> Batch:
    """Shapes and shardings of a batch of `size` images."""
    sharding = meshes.batch_sharding(mesh or self.run.mesh)
    return {
      name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=sharding)
      for name, x in self.row.items()
    }

  def compile(self, size: int) -> tuple[jax.stages.Compiled, float]:
    """The program for a batch of `size` images, and the seconds it took.

    Raises:
      jax.errors.JaxRuntimeError: it does not fit in memory.
    """
    lowered = self.step.lower(self.state, self.batch(size), self.scalars)
    with runtime.compiled_anew():
      start = time.perf_counter()
      return lowered.compile(), time.perf_counter() - start

  def flops(self, size: int) -> float:
    """Operations of a step on `size` images, see `flops.model_flops`."""
    # Counted on one device of this machine: libtpu does not count them.
    mesh = meshes.make_mesh(devices=jax.devices("cpu")[:1])
    place = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=meshes.replicated(mesh)
    )
    state = jax.tree.map(place, self.state)
    run = self.run._replace(mesh=mesh)
    return flops.model_flops(run, state, self.batch(size, mesh))


def build(config: ml_collections.ConfigDict, topology: Topology) -> Planned:
  """Parts of a train step; allocates nothing.

  Raises:
    InputError: the config cannot train on these devices.
  """
  config = config.copy_and_resolve_references()
  assumed = _without_images(config)
  with config.unlocked():
    config.run.remat = blocks.recomputed(
      config.run.remat, scan=config.run.scan, platform=topology.platform
    )
  run = setup.build(config, topology.devices)
  seed = config.method.seed
  state = train_step.abstract_state(run.method, run.tx, run.mesh, seed=seed)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = train_step.make_step(
    run.method,
    run.tx,
    run.mesh,
    shardings,
    seed=seed,
    accumulate=config.run.accumulate,
    augment=run.augment,
  )
  whole = meshes.replicated(run.mesh)
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
  values = run.schedules.at(0) | run.method.at(0)
  scalars = jax.tree.map(lambda x: shape(np.asarray(x)), values)
  row = {k: np.asarray(v) for k, v in run.pipeline.example().items()}
  return Planned(run, state, step, row, scalars, assumed)


def _without_images(config: ml_collections.ConfigDict) -> list[str]:
  """Generated images in the number of ImageNet's, if data.path is not set.

  A batch has the same shapes; only the length of the run depends on it.

  Args:
    config: changed where it reads images from a folder and names none.

  Returns:
    What was assumed, one sentence or none.
  """
  data = config.data
  if data.path or data.source in ("shapes", "objects"):
    return []
  images = min(IMAGENET, CLASSES * data.subset) if data.subset else IMAGENET
  with config.unlocked():
    config.data.update(source="shapes", shapes_train=images, subset=0)
    if "knn" in config.evals:
      config.evals.knn = False
  return [
    f"{images:,} training images, as ImageNet-1k has, since data.path is not "
    "set; for another number set data.source=shapes and data.shapes_train"
  ]
