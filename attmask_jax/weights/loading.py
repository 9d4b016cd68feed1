"""Loads weights from a run, checkpoint or file, with their network.

Evaluations, exports and users read trained weights here: `load` returns
`Weights`, whose `features` and `attention` take images.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from attmask_jax import Params, trees
from attmask_jax import mesh as meshes
from attmask_jax.data.decoding import Reading
from attmask_jax.errors import DamagedError, InputError
from attmask_jax.methods import METHODS, base
from attmask_jax.methods.base import Method
from attmask_jax.runs import checkpoint, saved_items
from attmask_jax.runs import config as run_config
from attmask_jax.weights import restore
from attmask_jax.weights.images import as_batch
from attmask_jax.weights.torch_io import files, networks

NETWORKS = run_config.NETWORKS


class Weights(NamedTuple):
  """One trained network, and where it comes from.

  `features` and `attention` compute float32 products at the highest precision,
  as evaluations do by default.

  Attributes:
    method: what trained it; its `backbone` is the network.
    params: its parameters, whole on every device of the mesh.
    aux: a classifier's batch norm, else {}.
    config: of the run that trained it.
    digest: 16 hex digits over names, shapes and values.
    step: completed optimiser steps.
    network: one of NETWORKS.
    where: the checkpoint that was read.
    run_dir: the run directory it belongs to, or None.
  """

  method: Method
  params: Params
  aux: Params
  config: ml_collections.ConfigDict
  digest: str
  step: int
  network: str
  where: str
  run_dir: pathlib.Path | None

  def features(
    self,
    images: Any,
    *,
    last: int = 1,
    final_norm: bool = True,
    normalised: bool = False,
    batch_size: int = 64,
  ) -> tuple[np.ndarray | None, np.ndarray]:
    """Features of whole images.

    Args:
      images: uint8 [B, H, W, 3], Pillow images or paths, see `images.as_batch`.
      last: number of last blocks to take class tokens from.
      final_norm: apply the network's final LayerNorm.
      normalised: the images are normalised floats.
      batch_size: images on the device at a time.

    Returns:
      cls [B, last * D], None for a network without class token, and patches
      [B, N, D], float32.

    Raises:
      InputError: see `images.as_batch`; or more blocks than there are, or a
        linear probe without a network.
    """
    depth = self.method.backbone.depth
    if not 1 <= last <= depth:
      raise InputError(f"last {last} must lie between 1 and the {depth} blocks")
    compiled = _compiled(self.method, last, final_norm)
    return self._in_batches(compiled, images, normalised, batch_size)

  def attention(
    self, images: Any, *, normalised: bool = False, batch_size: int = 64
  ) -> np.ndarray:
    """Attention of the last block to each patch: [B, A, N] float32.

    From the class token or, without one, the mean over patches; see `features`
    for the arguments.
    """
    compiled = _compiled(self.method, 0, False)
    return self._in_batches(compiled, images, normalised, batch_size)

  def _in_batches(
    self,
    compiled: Callable[[Params, np.ndarray], Any],
    images: Any,
    normalised: bool,
    batch_size: int,
  ) -> Any:
    """Outputs on the host; batches are padded so that one shape is compiled."""
    backbone, data = self.method.backbone, self.config.get("data", {})
    if "backbone" not in self.params:
      raise InputError(
        f"{self.where} is a linear probe without a network: load the weights "
        "that it was trained on"
      )
    if batch_size < 1:
      raise InputError(f"batch_size {batch_size} must be at least 1")
    batch = as_batch(
      images,
      size=data.get("image_size", 0) or backbone.image_size,
      patch_size=backbone.patch_size,
      resample=data.get("eval_resample", "") or "bicubic",
      normalised=normalised,
      reading=Reading.of(data),
    )
    n, rows = len(batch), min(batch_size, len(batch))
    if n < 1:
      raise InputError("there are no images: give at least one")
    parts = []
    with jax.default_matmul_precision("highest"):
      for start in range(0, n, rows):
        chosen = np.minimum(np.arange(start, start + rows), n - 1)
        outputs = jax.device_get(compiled(self.params, batch[chosen]))
        parts.append(jax.tree.map(lambda x, s=start: x[: n - s], outputs))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@functools.lru_cache(maxsize=16)
def _compiled(
  method: Method, last: int, final_norm: bool
) -> Callable[[Params, jax.Array], Any]:
  """(weights, images) -> features, or attention for last = 0."""
  if not last:
    return jax.jit(method.attention)
  return jax.jit(
    lambda params, images: method.features(
      params, images, last=last, norm=final_norm
    )
  )


def load(
  where: str,
  *,
  network: str,
  mesh: jax.sharding.Mesh,
  num_heads: int = 0,
  allow_missing: str | Sequence[str] = "",
  tensor_prefix: str = "",
) -> Weights:
  """Reads the weights that `config.weights` names.

  Args:
    where: a run directory (its newest checkpoint), a checkpoint of one, such
      as RUN/checkpoints/936, or a .pth or .safetensors file.
    network: one of NETWORKS, or "": the student of a fine-tuned network, else
      the teacher.
    mesh: devices that get a copy.
    num_heads: of a file's attention, 0 = by convention.
    allow_missing: see `files.load`, for files.
    tensor_prefix: see `files.read`, for files.

  Raises:
    InputError: no weights, no such network, or arrays that do not fit the
      config beside them.
  """
  if network and network not in NETWORKS:
    raise InputError(
      f'network "{network}" is unknown: use {", ".join(NETWORKS)}'
    )
  if not where:
    raise InputError(
      "no weights given: set --config.weights to a run directory, a "
      "checkpoint of one, or a .pth or .safetensors file"
    )
  if files.is_file(where):
    file = files.read(where, tensor_prefix)
    options = dict(num_heads=num_heads, allow_missing=allow_missing)
    return _of_file(file, network, mesh, options)
  run_dir, steps = _locate(pathlib.Path(where).expanduser())
  steps = sorted(meshes.union(dict.fromkeys(steps, "")))
  config = run_config.read_config(run_dir)
  try:
    method = method_of(config)
    # The moving average of a short fine-tuning is still close to its start.
    network = network or ("student" if method.classifies else "teacher")
    shapes = _shapes(method, network)
  except InputError:
    raise
  except Exception as error:  # missing keys and odd values raise many types
    reason = f"{type(error).__name__}: {saved_items.first_line(error)}"
    raise InputError(
      f"{run_dir / 'config.json'} describes no network ({reason}): restore it"
    ) from error
  if network == "untrained":
    step, params, aux = 0, _untrained(method, config, mesh), {}
  else:
    step, params, aux = _newest(
      steps,
      lambda step: (
        restore.network(run_dir, step, network, shapes, mesh),
        restore.aux(run_dir, step, method, mesh, method.served_aux),
      ),
    )
  where = f"{run_dir}/checkpoints/{step}"
  if network == "untrained":
    where = f"{run_dir}, untrained"
  logging.info("weights: %s of %s", network, where)
  return Weights(
    method, params, aux, config, digest(params), step, network, where, run_dir
  )


def method_of(config: ml_collections.ConfigDict) -> Method:
  """The method that a config names, trained here or imported.

  Raises:
    InputError: an unknown one.
  """
  name = config.method.name
  if name == networks.NAME:
    return networks.from_config(config)
  if name not in METHODS:
    raise InputError(
      f'the config of these weights names the method "{name}", which this '
      f"program does not have: it knows {', '.join(METHODS)}"
    )
  return METHODS[name].from_config(config, steps_per_epoch=1)


def _of_file(
  file: files.File,
  network: str,
  mesh: jax.sharding.Mesh,
  options: dict[str, Any],
) -> Weights:
  """Weights of another code base's file."""
  network = network or "teacher"
  name = "student" if network == "student" else "teacher"
  loaded = files.load(file, name, **options)
  params, aux = loaded.params, loaded.aux
  if network == "untrained":
    rng = jax.random.key(0)
    params, _, aux = jax.device_get(jax.jit(loaded.method.init)(rng))
  params, aux = _moved(mesh, params), _moved(mesh, aux)
  logging.info("weights: %s of %s", network, file.path)
  return Weights(
    loaded.method,
    params,
    aux,
    loaded.config,
    digest(params),
    0,
    network,
    str(file.path),
    None,
  )


def _moved(mesh: jax.sharding.Mesh, tree: Params) -> Params:
  """Moves a tree to the devices, emptying it: the host keeps no copy."""
  placed = {}
  for name in list(tree):
    value = tree.pop(name)
    if isinstance(value, dict):
      placed[name] = _moved(mesh, value)
    else:
      placed[name] = jax.block_until_ready(meshes.put(mesh, value))
  return placed


def digest(tree: Params) -> str:
  """16 hex digits that change with any name, shape, type or value."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(jax.device_get(leaf))
    total.update(
      f"{trees.path_name(path)} {array.shape} {array.dtype}".encode()
    )
    total.update(array.reshape(-1).view(np.uint8))  # no copy of the bytes
  return total.hexdigest()[:16]


def _newest(
  steps: Sequence[int], read: Callable[[int], tuple[Params, Params]]
) -> tuple[int, Params, Params]:
  """The last of the steps that can be read, and what `read` returns of it.

  The same on all processes: `read` waits for none of them.
  """
  *older, step = steps
  try:
    return step, *meshes.together(lambda: read(step))
  except DamagedError as error:
    if not older:
      raise
    logging.warning("%s: reading step %d instead", error, older[-1])
  return _newest(older, read)


def _locate(path: pathlib.Path) -> tuple[pathlib.Path, list[int]]:
  """Run directory and steps of a run, a checkpoint or one of its items."""
  if not path.exists():
    raise InputError(
      f"weights {path} do not exist: give a run directory, a checkpoint of "
      "one, or a .pth or .safetensors file"
    )
  path = path.resolve()
  for folder in (path, path.parent):
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
      return folder.parent.parent, [int(folder.name)]
  folder = path if path.name == "checkpoints" else path / "checkpoints"
  steps = checkpoint.steps(folder.parent)
  if not steps:
    raise InputError(
      f"{path} holds no checkpoint: give a run directory that has trained for "
      "at least one epoch, or a folder such as RUN/checkpoints/936"
    )
  return folder.parent, steps


def _shapes(method: Method, network: str) -> Params:
  """ShapeDtypeStructs of a network."""
  params, teacher, _ = jax.eval_shape(method.init, jax.random.key(0))
  return params if network == "student" or not teacher else teacher


def _untrained(
  method: Method, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Params:
  """The teacher (or, without one, the student) before the first step.

  Raises:
    InputError: the run was initialised from other weights.
  """
  where = config.get("init_from", "")
  if where or method.classifies:
    raise InputError(
      "network=untrained has random initial values, and this run began with "
      f"those of {where or 'other weights'}: evaluate these"
    )

  def make() -> Params:
    rng, _ = base.split_key(config.method.get("seed", 0))
    start = method.init(rng)
    return start.teacher or start.params

  return jax.jit(make, out_shardings=meshes.replicated(mesh))()


def load_centers(source: Weights) -> Params:
  """The loss centres [K] saved with AttMask weights: center, center_patch.

  Imported checkpoints may lack them, as the files they come from may.
  """
  method, mesh = source.method, meshes.make_mesh()
  folder = source.run_dir / "checkpoints" / str(source.step) / "train"
  if not folder.is_dir():
    return {}
  with saved_items.reading(folder):
    metadata = ocp.PyTreeCheckpointHandler().metadata(folder)
  saved = trees.shapes(metadata.tree)
  names = jax.eval_shape(method.init, jax.random.key(0)).aux
  names = tuple(name for name in names if f"aux/{name}" in saved)
  return restore.aux(source.run_dir, source.step, method, mesh, names)
