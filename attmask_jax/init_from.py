"""Start values of a training run from weights that exist already."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from attmask_jax import Params, positions, trees, weights
from attmask_jax.errors import InputError
from attmask_jax.torch_io import checkpoints


class Start(NamedTuple):
  """Where a run begins.

  Attributes:
    trees: "params", "teacher", "aux" -> values, see `train_step.overlay`.
    epoch: completed epochs; 0 unless the weights carry a whole training state
      of the same method.
  """

  trees: dict[str, Params]
  epoch: int


def start(
  config: ml_collections.ConfigDict, method: Any, mesh: jax.sharding.Mesh
) -> Start:
  """Values for `method` out of `config.init_from`; says what is not there.

  The student's values go to params and the teacher's to the teacher; weights
  with one network give it to both. Heads, decoders and predictors of another
  shape keep their start values; a backbone of another shape is an error, but
  for positions with `config.init_resample`.

  Raises:
    InputError: see `weights.load`; or a backbone that does not fit.
  """
  where = config.init_from
  options = dict(
    mesh=mesh, heads=config.heads, allow_missing=config.allow_missing
  )
  given = {
    "params": weights.load(where, network="student", **options).params,
    "teacher": weights.load(where, network="teacher", **options).params,
  }
  wanted = jax.eval_shape(method.init, jax.random.key(0))
  wanted = dict(zip(("params", "teacher", "aux"), wanted, strict=True))
  chosen, fresh = {}, []
  for name, tree in given.items():
    values = trees.flat(tree)
    shapes = trees.flat(wanted[name])
    _resample(values, shapes, method, where, allowed=config.init_resample)
    found = {}
    for path, leaf in shapes.items():
      value = values.get(path)
      if value is not None and value.shape == leaf.shape:
        found[path] = np.asarray(jax.device_get(value))
      elif value is not None and path.startswith("backbone/"):
        raise InputError(
          f"{where}: {path} has shape {tuple(value.shape)}, and this run's "
          f"{tuple(leaf.shape)}: set method.variant, method.patch_size and "
          "data.image_size to those of the weights"
        )
      elif name == "params":
        fresh.append(path)
    chosen[name] = trees.nested(found)
  if not chosen["params"]:
    raise InputError(f"{where} holds nothing that this run could start from")
  epoch = _training_state(config, wanted["aux"], fresh, chosen)
  if fresh:
    parts = sorted({"/".join(path.split("/")[:2]) for path in fresh})
    logging.info("not in %s, at start values: %s", where, ", ".join(parts))
  return Start({k: v for k, v in chosen.items() if v}, epoch)


def _training_state(
  config: ml_collections.ConfigDict,
  aux: Params,
  fresh: list[str],
  chosen: dict[str, Params],
) -> int:
  """Takes up loss centres; the completed epochs of a whole checkpoint."""
  if not checkpoints.is_file(config.init_from):
    return 0
  file = checkpoints.read(config.init_from)
  centers = {
    name: value
    for name, value in file.centers.items()
    if name in aux and aux[name].shape == value.shape
  }
  if centers:
    chosen["aux"] = centers
  if fresh or set(centers) != set(aux) or not config.init_epoch:
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


def _resample(
  values: dict[str, Any],
  shapes: dict[str, Any],
  method: Any,
  where: str,
  *,
  allowed: bool,
) -> None:
  """Gives learned positions the size of this run's images."""
  path = "backbone/pos_embed"
  if path not in values or path not in shapes:
    return
  old, new = values[path], shapes[path]
  if old.shape == new.shape:
    return
  if not allowed or old.shape[-1] != new.shape[-1]:
    raise InputError(
      f"{where} has positions for {old.shape[1]} tokens of width "
      f"{old.shape[2]}, and this run {new.shape[1]} of width {new.shape[2]}: "
      "set data.image_size and method.variant to those of the weights, or "
      "resample the positions with --config.init_resample=True"
    )
  backbone = method.backbone
  values[path] = positions.interpolate(
    jnp.asarray(old),
    backbone.image_size,
    backbone.image_size,
    backbone.patch_size,
    lead=backbone.lead,
    offset=backbone.grid_offset,
  )
