"""Weighted k-NN classification of frozen features.

Source: knn_classifier in AttMask eval_knn.py.
differs: any number of queries, classes and devices; the bank is streamed, so
it may be larger than device memory; top-5 counts only classes that received a
vote (the reference ranks the others too, in an arbitrary order).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attmask_jax.errors import InputError
from attmask_jax.mesh import BATCH_AXES

ROWS = PartitionSpec(BATCH_AXES)  # queries, split over all devices
SAME = PartitionSpec()  # bank chunk, a copy on every device
# Bank rows on the device at a time, and queries compared at a time.
BANK_CHUNK, QUERY_CHUNK = 65536, 1024


def knn(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  *,
  ks: Sequence[int],
  temp: float,
  num_classes: int,
  mesh: Mesh | None = None,
  bank_chunk: int = BANK_CHUNK,
  query_chunk: int = QUERY_CHUNK,
) -> dict[str, float]:
  """Accuracy of the vote of each query's k nearest bank rows.

  Features are L2-normalised here. Each of the k neighbours with the largest
  dot products votes exp(similarity / temp) for its label. Equal similarities
  go to the lowest bank index, equal votes to the class with the nearer
  neighbour.

  The bank is sent to the device once, at most two chunks at a time. The device
  also holds the queries, their neighbours, and a block of similarities
  [query_chunk, bank_chunk] split over the devices. Every process passes the
  same arguments.

  Args:
    bank: [n, F] float32, host.
    bank_labels: [n] int, 0 to num_classes - 1.
    queries: [m, F] float32, m >= 1.
    query_labels: [m] int, 0 to num_classes - 1.
    ks: numbers of neighbours, each 1 to n.
    temp: temperature, > 0.
    num_classes: >= 2; only used to check the labels.
    mesh: queries are split over all of its devices; None = one device.
    bank_chunk: bank rows per step, at most but for rounding up.
    query_chunk: queries per step, over all devices.

  Returns:
    {"k{k}/top1": ..., "k{k}/top5": ...} in percent, for each k of `ks`.

  Raises:
    InputError: an argument outside these ranges, or features not finite.
  """
  _check(bank, bank_labels, queries, query_labels, ks, temp, num_classes)
  mesh = _one_device() if mesh is None else mesh
  query_chunk = min(query_chunk, len(queries))
  query_chunk += -query_chunk % mesh.size
  starts = range(0, len(queries), query_chunk)
  placed = [
    _put(unit_rows(queries, i, query_chunk), mesh, ROWS) for i in starts
  ]
  best = _search(placed, bank, bank_labels, max(ks), mesh, bank_chunk)
  truth = [
    _put(_slice(query_labels, i, query_chunk, fill=-1), mesh, ROWS)
    for i in starts
  ]
  counts = np.unique(np.asarray(ks, np.int32))  # ascending
  hits = [
    count_hits(*neighbours, true, np.float32(temp), counts, mesh=mesh)
    for neighbours, true in zip(best, truth, strict=True)
  ]
  share = 100.0 * np.sum([np.asarray(h) for h in hits], axis=0) / len(queries)
  scores = {}
  for k in ks:
    top1, top5 = share[np.searchsorted(counts, k)]
    scores[f"k{k}/top1"], scores[f"k{k}/top5"] = float(top1), float(top5)
  return scores


def _one_device() -> Mesh:
  """A mesh of this process's first device."""
  devices = np.asarray(jax.local_devices()[:1]).reshape(1, 1)
  return Mesh(devices, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def _check(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  query_labels: np.ndarray,
  ks: Sequence[int],
  temp: float,
  num_classes: int,
) -> None:
  """Raises InputError for arguments outside the ranges `knn` states."""
  if not len(bank) or not len(queries):
    raise InputError(
      f"k-NN needs a bank and queries; got {len(bank)} and {len(queries)} rows."
    )
  if bank.shape[1] != queries.shape[1]:
    raise InputError(
      f"k-NN bank and queries differ in width: {bank.shape[1]} and"
      f" {queries.shape[1]}; extract both with the same model."
    )
  if not ks or min(ks) < 1:
    raise InputError(f"k-NN needs neighbour counts of at least 1, got {ks}.")
  if max(ks) > len(bank):
    raise InputError(
      f"k-NN with k = {max(ks)} needs as many bank images, but the bank has"
      f" {len(bank)}: lower k or use more training images."
    )
  if not temp > 0:
    raise InputError(f"k-NN temperature must be positive, got {temp}.")
  if num_classes < 2:
    raise InputError(f"k-NN needs at least 2 classes, got {num_classes}.")
  for name, labels in (("bank", bank_labels), ("query", query_labels)):
    low, high = int(np.min(labels)), int(np.max(labels))
    if low < 0 or high >= num_classes:
      raise InputError(
        f"k-NN {name} labels must lie in 0..{num_classes - 1}, found {low} to"
        f" {high}: use a labelled data set and its class count."
      )


def _slice(
  array: np.ndarray, start: int, size: int, *, fill: int = 0
) -> np.ndarray:
  """Rows start .. start + size - 1 of [n, ...], `fill` beyond the end."""
  rows = np.asarray(array[start : start + size])
  padding = [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
  dtype = np.float32 if rows.dtype.kind == "f" else np.int32
  return np.pad(rows.astype(dtype), padding, constant_values=fill)


def unit_rows(features: np.ndarray, start: int, size: int) -> np.ndarray:
  """L2-normalised rows start .. start + size - 1 of [n, F], 0 beyond n."""
  rows = _slice(features, start, size)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  if not np.isfinite(norms).all():
    raise InputError(
      "k-NN features are not finite: the model has diverged or the weights are"
      " broken; use an earlier checkpoint."
    )
  return rows / np.maximum(norms, 1e-12)


def _put(array: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
  """A host array that every process holds in full -> global device array."""
  return jax.make_array_from_callback(
    array.shape, NamedSharding(mesh, spec), lambda index: array[index]
  )


def _search(
  queries: list[jax.Array],
  bank: np.ndarray,
  bank_labels: np.ndarray,
  k: int,
  mesh: Mesh,
  bank_chunk: int,
) -> list[tuple[jax.Array, jax.Array]]:
  """Similarities and labels, both [Q, k], of the neighbours of each chunk.

  Args:
    queries: chunks [Q, F], normalised, split over the devices.
    bank: [n, F] host, not normalised; bank_labels: [n].
    k: neighbours kept, <= n.
    mesh: see `knn`; bank_chunk: see `knn`.
  """
  # Chunks of one size, so that little of the last one is padding.
  bank_chunk = -(-len(bank) // -(-len(bank) // bank_chunk))
  group = _group(bank_chunk, k)
  bank_chunk += -bank_chunk % (mesh.size * group)
  shape = len(queries[0]), k
  initial = (
    _put(np.full(shape, -np.inf, np.float32), mesh, ROWS),
    _put(np.zeros(shape, np.int32), mesh, ROWS),
  )
  best = [initial] * len(queries)
  for start in range(0, len(bank), bank_chunk):
    # Each device receives its share of the chunk; `_merge_rows` gathers them.
    chunk = _put(unit_rows(bank, start, bank_chunk), mesh, ROWS)
    labels = _put(_slice(bank_labels, start, bank_chunk), mesh, SAME)
    count = np.int32(min(bank_chunk, len(bank) - start))
    # The copy above overlaps with the previous chunk's work; without this
    # wait the whole bank would be queued on the device.
    jax.block_until_ready(best)
    best = [
      _merge(*neighbours, query, chunk, labels, count, group=group, mesh=mesh)
      for neighbours, query in zip(best, queries, strict=True)
    ]
  return best


def _group(n: int, k: int) -> int:
  """Rows per group for the k nearest of n rows, see `_merge_rows`."""
  # The k nearest of n / group maxima, then those of k groups: about as many.
  # A power of two, over which a CPU takes the maximum three times as fast.
  return 2 ** ((n // k).bit_length() // 2)


@functools.partial(jax.jit, static_argnames=("group", "mesh"))
def _merge(
  *args: jax.Array, group: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """`_merge_rows`, the query rows split over the devices of `mesh`."""
  # On a split array outside shard_map, top_k compiles to an all-gather.
  return jax.shard_map(
    functools.partial(_merge_rows, group=group),
    mesh=mesh,
    in_specs=(ROWS, ROWS, ROWS, ROWS, SAME, SAME),
    out_specs=(ROWS, ROWS),
  )(*args)


def _merge_rows(
  best_sims: jax.Array,
  best_labels: jax.Array,
  queries: jax.Array,
  bank: jax.Array,
  bank_labels: jax.Array,
  count: jax.Array,
  *,
  group: int,
) -> tuple[jax.Array, jax.Array]:
  """Updates the k nearest neighbours with one more bank chunk.

  The k nearest rows lie in the k groups of adjacent rows whose nearest row is
  nearest, so only these groups are searched.

  Args:
    best_sims: [Q, k] float32, descending; best_labels: [Q, k] int32.
    queries: [Q, F] float32, unit length.
    bank: [n / devices, F] float32, unit length, this device's share of the
      chunk; bank_labels: [n] int32, of all of it.
    count: [] int32, rows of the chunk that are not padding.
    group: rows per group, a divisor of n.

  Returns:
    best_sims, best_labels after this chunk.
  """
  bank = jax.lax.all_gather(bank, BATCH_AXES, tiled=True)
  k, n = best_sims.shape[1], len(bank)
  sims = jnp.dot(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
  sims = sims.reshape(len(queries), n // group, group)
  starts = group * jnp.arange(n // group)
  nearest = jnp.where((starts < count)[None], jnp.max(sims, axis=2), -jnp.inf)
  # One more than k: padding may bring the group that holds some too near.
  _, picks = jax.lax.top_k(nearest, min(k + 1, n // group))
  # Ascending, so that equal similarities keep the lowest index.
  picks = jnp.sort(picks, axis=1)
  sims = jnp.take_along_axis(sims, picks[:, :, None], axis=1)
  rows = group * picks[:, :, None] + jnp.arange(group)[None, None]
  sims = jnp.where(rows < count, sims, -jnp.inf).reshape(len(queries), -1)
  rows = rows.reshape(len(queries), -1)
  # Earlier chunks come first, for the same reason.
  sims, picks = jax.lax.top_k(jnp.concatenate([best_sims, sims], axis=1), k)
  rows = jnp.take_along_axis(rows, jnp.maximum(picks - k, 0), axis=1)
  old = jnp.take_along_axis(best_labels, jnp.minimum(picks, k - 1), axis=1)
  return sims, jnp.where(picks < k, old, bank_labels[rows])


@functools.partial(jax.jit, static_argnames="mesh")
def count_hits(
  sims: jax.Array,
  labels: jax.Array,
  truth: jax.Array,
  temp: jax.Array,
  ks: jax.Array,
  *,
  mesh: Mesh,
) -> jax.Array:
  """Queries whose class is voted first, and among the first five.

  Votes are added up where they are cast, one neighbour after the other. That
  needs no array of length num_classes and no scatter, whose order of additions
  is not fixed on GPUs.

  Args:
    sims: [Q, K] float32, descending; labels: [Q, K] int32.
    truth: [Q] int32, -1 = padding, not counted.
    temp: [] float32.
    ks: [n] int32, numbers of neighbours that vote, ascending, at most K.
    mesh: the queries are split over all of its devices.

  Returns:
    [n, 2] int32, a copy on every device.
  """
  # Relative to the largest, so that exp never overflows; ranks are the same.
  votes = jnp.exp((sims - sims[:, :1]) / temp)
  places = jnp.arange(sims.shape[1])[None]
  right = labels == truth[:, None]
  own = jnp.argmax(right, axis=1, keepdims=True)  # nearest of its class

  def vote(
    i: jax.Array, carry: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    scores, first = carry
    same = labels == labels[:, i, None]
    scores += jnp.where(same, votes[:, i, None], 0.0)
    return scores, first & ~(same & (places > i))

  def count(
    carry: tuple[jax.Array, jax.Array], bounds: tuple[jax.Array, jax.Array]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    start, k = bounds
    scores, first = carry = jax.lax.fori_loop(start, k, vote, carry)
    score = jnp.max(jnp.where(right, scores, 0.0), axis=1, keepdims=True)
    ahead = (scores > score) | ((scores == score) & (places < own))
    rank = jnp.sum(ahead & first & (places < k), axis=1)
    # Padding, or a query without a neighbour of its class, is never a hit.
    found = jnp.any(right & (places < k), axis=1)
    hits = [jnp.sum(found & (rank < n)) for n in (1, 5)]
    return carry, jnp.stack(hits)

  # Votes for the class of each neighbour, and whether it is its class's first.
  carry = jnp.zeros_like(sims), jnp.ones_like(labels, bool)
  starts = jnp.concatenate([jnp.zeros_like(ks[:1]), ks[:-1]])
  _, hits = jax.lax.scan(count, carry, (starts, ks))
  return jax.lax.with_sharding_constraint(hits, NamedSharding(mesh, SAME))
