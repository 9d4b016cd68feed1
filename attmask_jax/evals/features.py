"""Feature extraction: a whole data set through one compiled function."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from attmask_jax import mesh as meshes
from attmask_jax import schema
from attmask_jax.errors import InputError
from attmask_jax.models import embedding

FeaturesFn = Callable[[jax.Array], jax.Array]
HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Keys:
  """Which features of a network are used."""

  last_blocks: int = schema.key(
    1, "number of last blocks to take class tokens from", low=1
  )
  pool: str = schema.key(
    "cls", "tokens used as features", choices=embedding.POOLS
  )
  final_norm: bool = schema.key(
    True, "apply the backbone's final LayerNorm; False for MAE and ExtreMA"
  )


class Features(NamedTuple):
  """Features of a data set, on the host, in the order of its batches.

  features: [n, F] float32, not normalised.
  labels: [n] int32, -1 = none.
  index: [n] int32, row in the data source.
  """

  features: np.ndarray
  labels: np.ndarray
  index: np.ndarray


def check(
  settings: ml_collections.ConfigDict, *, depth: int, class_token: str
) -> None:
  """Refuses features that a network does not have.

  Args:
    settings: pool and last_blocks.
    depth: number of blocks of the network.
    class_token: of the network, see `vit.ViT`.

  Raises:
    InputError: either is out of range.
  """
  pool, blocks = settings.pool, settings.last_blocks
  if not 1 <= blocks <= depth:
    raise InputError(
      f"evals.last_blocks {blocks} must lie between 1 and the {depth} blocks "
      "of the network"
    )
  if class_token == "readout" and blocks > 1:
    raise InputError(
      f"evals.last_blocks {blocks} asks for class tokens of several blocks, "
      "but this network has one only after the last block: set "
      "--config.evals.last_blocks=1"
    )
  if class_token == "none" and pool != "mean":
    raise InputError(
      f"evals.pool {pool} reads the class token, which this network does not "
      "have: set --config.evals.pool=mean"
    )


def extract(
  features_fn: FeaturesFn,
  batches: Iterable[HostBatch],
  *,
  mesh: Mesh | None = None,
) -> Features:
  """Features of every valid row of `batches`.

  The next batch is prepared and sent while the device works on the current one;
  at most two batches are on the device.

  Args:
    features_fn: compiled; [B, H, W, 3] uint8 -> [B, F] float32.
    batches: padded batches, each `images` [B, H, W, 3] uint8, `label` [B]
      int32, `index` [B] int32, `valid` [B] bool. With several processes each
      yields its own rows, and all yield the same number of batches.
    mesh: batches are split over all of its devices; None = default device.

  Returns:
    The valid rows of all processes, on every process.

  Raises:
    InputError: there is no valid row, or a batch does not divide over the
      devices.
  """
  parts: list[Features] = []
  pending: tuple[jax.Array, HostBatch] | None = None
  for batch in batches:
    started = features_fn(_place(batch["images"], mesh)), batch
    if pending is not None:
      parts.append(_collect(*pending, mesh=mesh))
    pending = started
  if pending is not None:
    parts.append(_collect(*pending, mesh=mesh))
  if not sum(len(part.index) for part in parts):
    raise InputError(
      "The evaluation data holds no images: check data.path and data.subset."
    )
  return Features(*map(np.concatenate, zip(*parts, strict=True)))


def _place(rows: np.ndarray, mesh: Mesh | None) -> jax.Array:
  """Host rows [B, ...] -> device array, split over the mesh's devices."""
  if mesh is None:
    return jnp.asarray(rows)
  devices = len(mesh.local_devices)
  if len(rows) % devices:
    raise InputError(
      f"An evaluation batch of {len(rows)} rows does not divide over {devices}"
      " devices: choose a multiple of the number of devices."
    )
  return jax.make_array_from_process_local_data(
    meshes.batch_sharding(mesh), rows
  )


def _collect(
  features: jax.Array, batch: HostBatch, *, mesh: Mesh | None
) -> Features:
  """Waits for features [B, F]; returns the valid rows on the host."""
  rows: dict[str, Any] = {
    name: batch[name] for name in ("label", "index", "valid")
  }
  if jax.process_count() > 1:
    # Labels are gathered as the features are: the order of rows in a global
    # array follows the mesh, which need not follow the process number.
    rows = {name: _place(array, mesh) for name, array in rows.items()}
    features, rows = multihost_utils.process_allgather(
      (features, rows), tiled=True
    )
  valid = np.asarray(rows["valid"], bool)
  return Features(
    np.asarray(features, np.float32)[valid],
    np.asarray(rows["label"], np.int32)[valid],
    np.asarray(rows["index"], np.int32)[valid],
  )
