"""Start values of a training run from other weights: `config.init_from`.

Reads both networks with `loading.load` and keeps what the run has a place for.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging

from attmask_jax import Params, trees
from attmask_jax.errors import InputError
from attmask_jax.methods.base import Method
from attmask_jax.models import positions
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import files

POSITIONS = "backbone/pos_embed"
Leaves = dict[str, Any]  # by path


class Start(NamedTuple):
  """Where a run begins.

  Attributes:
    trees: "params", "teacher", "aux" -> values, see `train_step.overlay`.
    epoch: completed epochs; 0 unless a file carries a whole training state:
      student, teacher, their heads and all loss centres of AttMask.
  """

  trees: dict[str, Params]
  epoch: int


def start(
  config: ml_collections.ConfigDict, method: Method, mesh: jax.sharding.Mesh
) -> Start:
  """Values for `method` out of `config.init_from`; says what is not there.

  The student's values go to params and the teacher's to the teacher; weights
  with one network give it to both. Heads, decoders and predictors of another
  shape keep their start values; a backbone of another shape is an error, but
  for positions with `config.init_resample`. Fixed positions become the start
  values of learned ones.

  Raises:
    InputError: see `loading.load`; or a backbone that does not fit.
  """
  where = config.init_from
  options = dict(
    mesh=mesh,
    num_heads=config.num_heads,
    allow_missing=config.allow_missing,
    tensor_prefix=config.tensor_prefix,
  )
  given = {
    "params": loading.load(where, network="student", **options),
    "teacher": loading.load(where, network="teacher", **options),
  }
  wanted = jax.eval_shape(method.init, jax.random.key(0))
  wanted = dict(zip(("params", "teacher", "aux"), wanted, strict=True))
  chosen, fresh = {}, []
  for name, source in given.items():
    shapes, values = trees.flat(wanted[name]), trees.flat(source.params)
    if POSITIONS in shapes:
      values |= _positions(source, method, config.init_resample)
    fitting = _fitting(values, shapes, where)
    chosen[name] = trees.nested(fitting)
    if name == "params":
      fresh = sorted(shapes.keys() - fitting.keys())
      _log_parts(
        f"in {where}, of no use to this run", values.keys() - fitting.keys()
      )
  if not chosen["params"]:
    raise InputError(f"{where} holds nothing that this run could start from")
  epoch = _training_state(config, wanted["aux"], fresh, chosen)
  _log_parts(f"not in {where}, at start values", fresh)
  return Start({k: v for k, v in chosen.items() if v}, epoch)


def _log_parts(what: str, paths: Collection[str]) -> None:
  """Logs the parts that these leaves belong to, if any."""
  parts = sorted({"/".join(path.split("/")[:2]) for path in paths})
  if parts:
    logging.info("%s: %s", what, ", ".join(parts))


def _fitting(values: Leaves, shapes: Leaves, where: str) -> Leaves:
  """The values that this run has a place for.

  Raises:
    InputError: one of the backbone is of another shape.
  """
  fitting = {}
  for path, leaf in shapes.items():
    value = values.get(path)
    if value is not None and value.shape == leaf.shape:
      fitting[path] = np.asarray(jax.device_get(value))
    elif value is not None and path.startswith("backbone/"):
      raise InputError(
        f"{where}: {path} has shape {tuple(value.shape)}, and this run's "
        f"{tuple(leaf.shape)}: set method.variant, method.patch_size and "
        "data.image_size to those of the weights"
      )
  return fitting


def _training_state(
  config: ml_collections.ConfigDict,
  aux: Params,
  fresh: Collection[str],
  chosen: dict[str, Params],
) -> int:
  """Takes up loss centres; the completed epochs of a whole checkpoint.

  Only AttMask's says with its centres that it is one: of a file with the
  networks of MAE or ExtreMA, nobody knows what the schedules were.
  """
  if not files.is_file(config.init_from):
    return 0
  file = files.read(config.init_from, config.tensor_prefix)
  centers = {
    name: value
    for name, value in file.centers.items()
    if name in aux and aux[name].shape == value.shape
  }
  if centers:
    chosen["aux"] = centers
  if fresh or not aux:
    return 0
  lacking = sorted(aux.keys() - centers.keys())
  if lacking:
    logging.warning(
      "%s has heads, but no loss centres of these sizes (%s): they start at "
      "zero, and the epochs too",
      config.init_from,
      ", ".join(lacking),
    )
  both = {"student", "teacher"} <= file.networks.keys()
  if lacking or not both or not config.init_epoch:
    return 0
  if file.epoch >= config.optim.epochs:
    raise InputError(
      f"{config.init_from} has completed {file.epoch} epochs, and optim.epochs "
      f"is {config.optim.epochs}: raise it, or start its schedules again with "
      "--config.init_epoch=False"
    )
  if file.epoch:
    logging.info("going on after epoch %d, optimiser state apart", file.epoch)
  return file.epoch


def _positions(
  source: loading.Weights, method: Method, resample: bool
) -> Leaves:
  """Start values of learned positions: {path: table}, {} without any.

  Raises:
    InputError: they are of another size, and may not be resampled.
  """
  theirs, ours = source.method.backbone, method.backbone
  old = source.params["backbone"].get("pos_embed")
  if old is None and theirs.positions == "learned":
    return {}
  if old is None:
    logging.info("fixed positions are the start values of learned ones")
  old = positions.adapt(old, theirs, num_prefix_tokens=ours.num_prefix_tokens)
  tokens = ours.num_prefix_tokens + ours.grid**2
  if old.shape[1:] == (tokens, ours.width):
    return {POSITIONS: old}
  if not resample or old.shape[2] != ours.width:
    raise InputError(
      f"{source.where} has positions for {old.shape[1]} tokens of width "
      f"{old.shape[2]}, and this run {tokens} of width {ours.width}: set "
      "data.image_size and method.variant to those of the weights, or "
      "resample the positions with --config.init_resample=True"
    )
  side, p = ours.image_size, ours.patch_size
  table = positions.interpolate(
    old,
    side,
    side,
    p,
    num_prefix_tokens=ours.num_prefix_tokens,
    offset=ours.grid_offset,
  )
  return {POSITIONS: table}
