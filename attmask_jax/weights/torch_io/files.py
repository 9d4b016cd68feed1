"""Reads weight files of other code bases as networks with our parameters.

`read` opens a file, `load` converts one of its networks; `loading.load` moves
it to the devices.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from attmask_jax import Params, schema, trees
from attmask_jax.errors import InputError
from attmask_jax.methods.base import Method
from attmask_jax.weights.torch_io import (
  layouts,
  names,
  networks,
  pth,
  tables,
  tensors,
)
from attmask_jax.weights.torch_io.lazy import ARRAYS, Tensor
from attmask_jax.weights.torch_io.unpickling import quoted

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")
MAX_NAMES = 5  # in a message
# Kinds that save the number of the last epoch; others save the number of
# completed epochs.
ZERO_BASED = ("mae", "facebook_mae", "mae_classifier", "extrema_classifier")


# A safetensors note that can be an epoch or a number of heads.
_NUMBER = re.compile("[0-9]{1,9}")


class File(NamedTuple):
  """A weight file.

  Attributes:
    path: of the file.
    networks: {"student" | "teacher" | "model": {name: tensor}}; a tensor is
      read from the file each time it is converted to an array.
    rest: other contents of the file; plain values, centres.
  """

  path: pathlib.Path
  networks: dict[str, dict[str, Tensor | np.ndarray]]
  rest: dict[str, Any]

  @property
  def epoch(self) -> int:
    """Completed epochs, 0 if the file does not say."""
    epoch = self.rest.get("epoch")
    if type(epoch) is not int:
      return 0
    return max(epoch + (kind_of(self) in ZERO_BASED), 0)

  def num_heads(self, key: str = "heads") -> int | None:
    """Heads of its attention, or "decoder_heads"; None if it does not say."""
    count = self.rest.get(key)
    return count if isinstance(count, int) and count > 0 else None

  @property
  def centers(self) -> Params:
    """Loss centres [K] of AttMask and iBOT, or DINO's; {} if there are none."""
    losses = self.rest.get("ibot_loss", self.rest.get("dino_loss"))
    if not isinstance(losses, dict):
      return {}
    return {
      ours: np.asarray(losses[theirs], np.float32).reshape(-1)
      for ours, theirs in (("center", "center"), ("center_patch", "center2"))
      if isinstance(losses.get(theirs), ARRAYS)
    }


class Network(NamedTuple):
  """One network of a file.

  Attributes:
    method: interface for evaluations, see `networks.build`.
    params: float32, on the host.
    aux: a classifier's batch norm, else {}.
    config: see `networks.config_of`.
    name: "student", "teacher" or "model".
    layout: its code base and sizes.
  """

  method: Method
  params: Params
  aux: Params
  config: ml_collections.ConfigDict
  name: str
  layout: layouts.Layout


def is_file(where: str) -> bool:
  """Whether this names a weight file rather than one of our directories."""
  path = pathlib.Path(where).expanduser()
  return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read(where: str, tensor_prefix: str = "") -> File:
  """Opens a weight file.

  Args:
    where: the file.
    tensor_prefix: takes the tensors behind it alone, see `layouts.unwrap`.

  Raises:
    InputError: missing, damaged, without a state dict or that prefix.
  """
  path = pathlib.Path(where).expanduser()
  if path.suffix.lower() == ".safetensors":
    flat, notes = tensors.read(path, lazy=True)
    content: dict[str, Any] = _unflatten(flat)
    numbers = {k: int(v) for k, v in notes.items() if _NUMBER.fullmatch(v)}
  else:
    content, numbers = pth.read(path, lazy=True), {}
  if not isinstance(content, dict):
    raise InputError(
      f"{path} holds a {type(content).__name__}, not a state dict: save the "
      "model's state_dict()"
    )
  try:
    unwrapped = layouts.unwrap(content, tensor_prefix)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error
  keys = (*layouts.NETWORKS, *layouts.AVERAGES, "optimizer")
  rest = {k: v for k, v in content.items() if k not in keys} | numbers
  return File(path, dict(unwrapped), rest)


def _unflatten(flat: dict[str, Tensor]) -> dict[str, Any]:
  """Nests our .safetensors files with several networks, as in .pth files."""
  parts = ("student.", "teacher.", "ibot_loss.")
  if not any(name.startswith("student.") for name in flat):
    return flat
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    part = next((p for p in parts if name.startswith(p)), None)
    if part is None:
      nested[name] = value
    else:
      nested.setdefault(part[:-1], {})[name.removeprefix(part)] = value
  return nested


def choose(file: File, network: str) -> str:
  """The file's name for the requested network."""
  for name in (network, "model", "student", "teacher"):
    if name in file.networks:
      if name != network:
        logging.info(
          "%s has no %s: taking its %s", file.path.name, network, name
        )
      return name
  raise InputError(f"{file.path} holds no network")  # `unwrap` ensures one


def load(
  file: File,
  network: str,
  *,
  num_heads: int = 0,
  allow_missing: str | Sequence[str] = "",
) -> Network:
  """One network of a file.

  Args:
    file: of `read`.
    network: "teacher" or "student"; a file with one network gives that.
    num_heads: of its attention; 0 = by convention.
    allow_missing: prefixes of tensor names, as "A,B" or a list, that may be
      missing from the file or from our network. Parameters missing from the
      file get initial values.

  Raises:
    InputError: an unknown code base, or anything but a full match.
  """
  name = choose(file, network)
  try:
    layout = layouts.recognise(
      file.networks[name],
      num_heads=num_heads or file.num_heads(),
      decoder_num_heads=file.num_heads("decoder_heads"),
    )
    method = networks.build(layout)
    shapes = networks.shapes_of(method, layout, name)
    converted = names.to_ours(
      file.networks[name], layout.table, shapes, dtype=np.float32
    )
  except InputError as error:
    raise InputError(f"{file.path}: {error}") from error
  _check(file.path, converted, layout, schema.words(allow_missing))
  params = _filled(method, shapes, converted.tree)
  if layout.kind != "attmask":  # nothing else masks the input
    params["backbone"].pop("mask_token", None)
  _warn_of_nan(file.path, params)
  aux = {k: params.pop(k) for k in ("batch_norm",) if k in params}
  return Network(method, params, aux, networks.config_of(layout), name, layout)


def kind_of(file: File) -> str:
  """Code base of a file's first network, see `layouts.Layout`."""
  return layouts.kind_of(next(iter(file.networks.values())))


def load_probe(file: File) -> Params:
  """The linear layer of a file with nothing else: kernel and bias.

  Raises:
    InputError: the file holds something else.
  """
  flat = next(iter(file.networks.values()))
  layout = layouts.recognise(flat)
  if layout.kind != "linear":
    raise InputError(
      f"{file.path} holds a network ({layout.kind}), not only a linear probe"
    )
  shapes = {
    "head": {
      "kernel": jnp.zeros((1, layout.features, layout.num_classes)),
      "bias": jnp.zeros((1, layout.num_classes)),
    }
  }
  converted = names.to_ours(flat, tables.linear(), shapes)
  _check(file.path, converted, layout, ())
  return {
    k: np.asarray(v, np.float32) for k, v in converted.tree["head"].items()
  }


def _check(
  path: pathlib.Path,
  converted: names.Converted,
  layout: layouts.Layout,
  allowed: tuple[str, ...],
) -> None:
  """Logs the match; every difference must be allowed by name."""
  logging.info(
    "%s: %d tensors matched, %d missing, %d unexpected (%s)",
    path.name,
    len(converted.matched),
    len(converted.missing),
    len(converted.unexpected),
    layout.kind,
  )
  for what, listed in (
    ("lacks", converted.missing),
    ("holds tensors that this network lacks:", converted.unexpected),
  ):
    wrong = [n for n in listed if not (allowed and n.startswith(allowed))]
    if wrong:
      listed = ", ".join(map(quoted, wrong[:MAX_NAMES]))
      rest = len(wrong) - MAX_NAMES
      more = f" and {rest} more" if rest > 0 else ""
      raise InputError(
        f"{path} ({layout.kind}) {what} {listed}{more}: if "
        "that is intended, list them (or prefixes of them) in "
        "--config.allow_missing=NAME,NAME"
      )


def _filled(method: Method, shapes: Any, tree: Params) -> Params:
  """The tree in float32; leaves that it lacks get initial values."""
  given, start = trees.flat(tree), {}
  if set(given) != set(trees.flat(shapes)):
    logging.info("missing tensors get initial values")
    made, _, aux = jax.device_get(jax.jit(method.init)(jax.random.key(0)))
    start = trees.flat(made | aux)
  return trees.map_named(
    lambda name, leaf: np.asarray(
      given[name] if name in given else start[name], np.float32
    ),
    shapes,
  )


def _warn_of_nan(path: pathlib.Path, params: Params) -> None:
  leaves = trees.flat(params)
  wrong = [name for name, x in leaves.items() if not np.isfinite(x).all()]
  if wrong:
    logging.warning(
      "%s: %d tensors are not finite, such as %s", path, len(wrong), wrong[0]
    )
