"""Values collected over an epoch: integers per image and metric sums."""

from typing import Any

import jax
import numpy as np

from attmask_jax import mesh as meshes
from attmask_jax.methods.base import Method
from attmask_jax.runs import metrics

LABEL = "label"


class Epoch:
  """Values of the current epoch, saved so that a run can stop inside of it.

  Attributes:
    arrays: name -> [S, b] int32 of this process's rows, -1 = not seen. Holds
      the label and `method.per_image`; empty for a method without any.
    window: metric sums since the last log line.
    sums: metric sums of the epoch.
  """

  def __init__(
    self,
    method: Method,
    *,
    steps: int,
    positions: np.ndarray,
    batch_size: int,
  ) -> None:
    """Starts an empty epoch.

    Args:
      method: what is trained.
      steps: S, optimiser steps per epoch.
      positions: [b] rows of the global batch that this process holds.
      batch_size: B of the global batch.
    """
    self._method = method
    self._positions, self._batch_size = positions, batch_size
    names = (LABEL, *method.per_image) if method.per_image else ()
    self.arrays = {
      name: np.full((steps, len(positions)), -1, np.int32) for name in names
    }
    self.window, self.sums = metrics.Averager(), metrics.Averager()

  def add(
    self,
    step: int,
    values: dict[str, float],
    label: jax.Array,
    per_image: dict[str, jax.Array],
  ) -> None:
    """Adds the metrics of a step, and this process's rows of [B] arrays."""
    rows = {LABEL: label} | per_image
    for name, array in self.arrays.items():
      array[step % len(array)] = meshes.local_rows(rows[name])
    self.window.add(values)
    self.sums.add(values)

  def scores(self) -> dict[str, float]:
    """Means over the epoch, and `epoch_scores` of the method."""
    if not self.arrays:
      return self.sums.mean()
    arrays = {name: array.ravel() for name, array in self._all_rows().items()}
    seen = arrays[self._method.per_image[0]] >= 0
    arrays = {name: array[seen] for name, array in arrays.items()}
    label = arrays.pop(LABEL)
    return self.sums.mean() | self._method.epoch_scores(label, arrays)

  def reset(self) -> None:
    """Starts the next epoch; the log window continues."""
    for array in self.arrays.values():
      array[:] = -1
    self.sums.reset()

  def items(self, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Arrays [S, B] of the global batch, on every device."""
    return meshes.put(mesh, self._all_rows())

  def progress(self) -> dict[str, Any]:
    """The exact running sums, for JSON."""
    return {"window": self.window.state(), "sums": self.sums.state()}

  def restore(
    self, items: dict[str, jax.Array], progress: dict[str, Any]
  ) -> None:
    """Restores `items` and `progress`, on any number of processes."""
    self.arrays = {
      name: np.asarray(items[name])[:, self._positions].copy()
      for name in self.arrays
    }
    self.window = metrics.Averager.from_state(progress["window"])
    self.sums = metrics.Averager.from_state(progress["sums"])

  def _all_rows(self) -> dict[str, np.ndarray]:
    """name -> [S, B] of all processes."""
    if jax.process_count() == 1 or not self.arrays:
      return self.arrays
    from jax.experimental import multihost_utils

    parts = multihost_utils.process_allgather(
      {"positions": self._positions} | self.arrays
    )
    whole = {}
    for name, array in self.arrays.items():
      whole[name] = np.empty((len(array), self._batch_size), np.int32)
      for positions, rows in zip(parts["positions"], parts[name], strict=True):
        whole[name][:, positions] = rows
    return whole
