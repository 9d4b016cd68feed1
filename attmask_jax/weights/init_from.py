"""Initialises a training run from other weights: `config.init_from`.

Reads both networks with `loading.load` and keeps the parameters that fit.
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
  """Initial values of a run.

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
  """Initial values of `method` from `config.init_from`; logs what is missing.

  The student's values go to params and the teacher's to the teacher; weights
  with one network give it to both. Heads, decoders and predictors of another
  shape keep their own initial values; a backbone of another shape is an error,
  except positions with `config.init_resample`. Fixed positions become the
  initial values of learned ones.

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
  expected = jax.eval_shape(method.init, jax.random.key(0))
  expected = dict(zip(("params", "teacher", "aux"), expected, strict=True))
  chosen, fresh = {}, []
  for name, source in given.items():
    shapes, values = trees.flat(expected[name]), trees.flat(source.params)
    if POSITIONS in shapes:
      values |= _positions(source, method, config.init_resample)
    fitting = _fitting(values, shapes, where)
    chosen[name] = trees.nested(fitting)
    if name == "params":
      fresh = sorted(shapes.keys() - fitting.keys())
      _log_parts(
        f"in {where}, not used by this run", values.keys() - fitting.keys()
      )
  if not chosen["params"]:
    raise InputError(f"{where} holds nothing that this run could start from")
  epoch = _training_state(config, expected["aux"], fresh, chosen)
  _log_parts(f"not in {where}, at initial values", fresh)
  return Start({k: v for k, v in chosen.items() if v}, epoch)


def _log_parts(what: str, paths: Collection[str]) -> None:
  """Logs the parts that these leaves belong to, if any."""
  parts = sorted({"/".join(path.split("/")[:2]) for path in paths})
  if parts:
    logging.info("%s: %s", what, ", ".join(parts))


def _fitting(values: Leaves, shapes: Leaves, where: str) -> Leaves:
  """The values that have a parameter of their shape in this run.

  Raises:
    InputError: one of the backbone has another shape.
  """
  fitting = {}
  for path, leaf in shapes.items():
    value = values.get(path)
    if value is not None and value.shape == leaf.shape:
      fitting[path] = np.asarray(jax.device_get(value))
    elif value is not None and path.startswith("backbone/"):
      raise InputError(
        f"{where}: {path} has shape {tuple(value.shape)}, but this run's "
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
  """Adds loss centres; returns the completed epochs of a whole checkpoint.

  Only AttMask checkpoints count as whole, by their centres: the schedules of
  files of MAE or ExtreMA are unknown.
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
      "%s has heads, but no loss centres of these sizes (%s): centres and "
      "epochs start at zero",
      config.init_from,
      ", ".join(lacking),
    )
  both = {"student", "teacher"} <= file.networks.keys()
  if lacking or not both or not config.init_epoch:
    return 0
  if file.epoch >= config.optim.epochs:
    raise InputError(
      f"{config.init_from} has completed {file.epoch} epochs, and optim.epochs "
      f"is {config.optim.epochs}: raise it, or restart its schedules with "
      "--config.init_epoch=False"
    )
  if file.epoch:
    logging.info("continuing after epoch %d, with a new optimiser", file.epoch)
  return file.epoch


def _positions(
  source: loading.Weights, method: Method, resample: bool
) -> Leaves:
  """Initial values of learned positions: {path: table}, or {}.

  Raises:
    InputError: they have another size, and may not be resampled.
  """
  theirs, ours = source.method.backbone, method.backbone
  old = source.params["backbone"].get("pos_embed")
  if old is None and theirs.positions == "learned":
    return {}
  if old is None:
    logging.info("fixed positions are the initial values of learned ones")
  old = positions.adapt(old, theirs, num_prefix_tokens=ours.num_prefix_tokens)
  tokens = ours.num_prefix_tokens + ours.grid**2
  if old.shape[1:] == (tokens, ours.width):
    return {POSITIONS: old}
  if not resample or old.shape[2] != ours.width:
    raise InputError(
      f"{source.where} has positions for {old.shape[1]} tokens of width "
      f"{old.shape[2]}, but this run {tokens} of width {ours.width}: set "
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
