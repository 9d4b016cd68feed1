"""What an epoch gathers besides the state: assignments and running sums."""

from typing import Any

import jax
import numpy as np

from attmask_jax import mesh as meshes
from attmask_jax.evals import clusters
from attmask_jax.runs import metrics


class Epoch:
  """What must survive a stop inside an epoch: assignments and running sums.

  Attributes:
    label: [S, b] int32 of this process's rows, -1 = not seen or no label.
    assignment: [S, b] int32, prototype the teacher gave the image.
    window: metric sums since the last log line.
    sums: metric sums of the epoch.
  """

  def __init__(self, steps: int, positions: np.ndarray, batch_size: int):
    self._positions, self._batch_size = positions, batch_size
    self.label = np.full((steps, len(positions)), -1, np.int32)
    self.assignment = np.full_like(self.label, -1)
    self.window, self.sums = metrics.Averager(), metrics.Averager()

  def add(
    self, step: int, values: dict[str, float], label: Any, assignment: Any
  ) -> None:
    """Takes in one step's metrics and its rows; assignment -1 = none."""
    row = step % len(self.label)
    self.label[row], self.assignment[row] = label, assignment
    self.window.add(values)
    self.sums.add(values)

  def scores(self) -> dict[str, float]:
    """Means over the epoch, and NMI, ARI, F of the teacher's assignments."""
    label, assignment = self._gather()
    seen = assignment.ravel() >= 0
    scores = clusters.cluster_scores(
      label.ravel()[seen], assignment.ravel()[seen]
    )
    return self.sums.mean() | scores

  def reset(self) -> None:
    """Begins the next epoch; the log window goes on."""
    self.label[:], self.assignment[:] = -1, -1
    self.sums.reset()

  def items(self, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Arrays [S, B] of the global batch, on every device."""
    label, assignment = self._gather()
    arrays = {"label": label, "assignment": assignment}
    return meshes.put(mesh, arrays)

  def progress(self) -> dict[str, Any]:
    """The running sums, JSON-able, exact."""
    return {"window": self.window.state(), "sums": self.sums.state()}

  def restore(
    self, items: dict[str, jax.Array], progress: dict[str, Any]
  ) -> None:
    """Takes back `items` and `progress`, on any number of processes."""
    self.label = np.asarray(items["label"])[:, self._positions].copy()
    self.assignment = np.asarray(items["assignment"])[:, self._positions].copy()
    self.window = metrics.Averager.from_state(progress["window"])
    self.sums = metrics.Averager.from_state(progress["sums"])

  def _gather(self) -> tuple[np.ndarray, np.ndarray]:
    if jax.process_count() == 1:
      return self.label, self.assignment
    from jax.experimental import multihost_utils

    parts = multihost_utils.process_allgather(
      (self._positions, self.label, self.assignment)
    )
    shape = (len(self.label), self._batch_size)
    label, assignment = np.empty(shape, np.int32), np.empty(shape, np.int32)
    for positions, part_label, part_assignment in zip(*parts, strict=True):
      label[:, positions] = part_label
      assignment[:, positions] = part_assignment
    return label, assignment
