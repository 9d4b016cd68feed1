"""Single patch tokens: accuracy against a loop, clusters by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import token_clusters, tokens
from attmask_jax.evals.job import Job

WIDTH, PATCHES, CLASSES = 6, 4, 3
RNG = np.random.default_rng(5)
TABLE = RNG.normal(size=(48, 1 + PATCHES, WIDTH)).astype("f4")
LABELS = RNG.integers(0, CLASSES, 48).astype(np.int32)
KERNEL = RNG.normal(size=(WIDTH, CLASSES)).astype("f4")


class Network:
  """The tokens of image i are row i of a table; i is its first pixel."""

  backbone = types.SimpleNamespace(width=WIDTH, patch_size=8, class_token="in")
  pool, final_norm = "mean", False
  knn_temp = 0.07

  def features(self, weights, images, *, last=1, norm=True):
    rows = jnp.asarray(TABLE)[images[:, 0, 0, 0].astype(int)]
    rows = rows if norm else 2 * rows
    return rows[:, 0], rows[:, 1:]

  def classify(self, weights, x):
    return (x @ KERNEL)[:, None]


class TokenJob(Job):
  """Images of which only the first pixel counts."""

  def pair(self):
    names = [str(i) for i in range(CLASSES)]
    parts = (np.arange(32), np.arange(32, 48))
    return [types.SimpleNamespace(rows=p, class_names=names) for p in parts]

  def batches(self, source, indices=None, *, desc, crop=None):
    images = np.zeros((16, 16, 16, 3), np.uint8)
    found = []
    for start in range(0, len(source.rows), 16):
      rows = source.rows[start : start + 16]
      images = images.copy()
      images[:, 0, 0, 0] = rows
      found.append(
        {"images": images, "label": LABELS[rows], "index": rows,
         "valid": np.ones(16, bool)}
      )  # fmt: skip
    import contextlib

    return contextlib.nullcontext(iter(found))


def make_job(**changes):
  evals = dict(
    name="tokens", places=2, seed=0, final_norm=True, knn_k=5, knn_temp=0.1,
    bank_chunk=64, query_chunk=16,
  ) | changes  # fmt: skip
  config = types.SimpleNamespace(
    evals=types.SimpleNamespace(**evals),
    data=types.SimpleNamespace(image_size=16),
  )
  known = types.SimpleNamespace(method=Network(), params={}, where="w")
  mesh = meshes.make_mesh(devices=jax.devices()[:4])
  return TokenJob(config, mesh, None, known, known)


def nearest(bank, labels, query):
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  similar = unit(bank) @ unit(query)
  votes = np.zeros(CLASSES)
  for i in np.argsort(-similar)[:5]:
    votes[labels[i]] += np.exp(similar[i] / 0.1)
  return votes.argmax()


def test_tokens_vote_alone():
  found = tokens.run(make_job()).values
  places = np.sort(np.random.default_rng([0, 7]).permutation(PATCHES)[:2])
  train, val = np.arange(32), np.arange(32, 48)
  means = TABLE[:, 1:].mean(axis=1)
  score = lambda hits: 100 * np.mean(hits)
  assert found["class/knn"] == pytest.approx(
    score(
      [nearest(TABLE[train, 0], LABELS[train], TABLE[i, 0]) == LABELS[i]
       for i in val]
    )
  )  # fmt: skip
  assert found["mean/knn"] == pytest.approx(
    score(
      [nearest(means[train], LABELS[train], means[i]) == LABELS[i] for i in val]
    )
  )
  bank = [(TABLE[i, 1 + p], LABELS[i]) for i in train for p in places]
  vectors, labels = map(np.array, zip(*bank, strict=True))
  hits = [
    nearest(vectors, labels, TABLE[i, 1 + p]) == LABELS[i]
    for i in val for p in places
  ]  # fmt: skip
  assert found["token/knn"] == pytest.approx(score(hits))
  # The probe saw patches that no final norm had seen: twice ours.
  alone = [
    (TABLE[i, 1 + p] @ KERNEL).argmax() == LABELS[i]
    for i in val for p in places
  ]  # fmt: skip
  assert found["token/linear"] == pytest.approx(score(alone))
  whole = [(means[i] @ KERNEL).argmax() == LABELS[i] for i in val]
  assert found["mean/linear"] == pytest.approx(score(whole))


def test_tokens_refuse_what_means_nothing():
  with pytest.raises(InputError, match="places 5 must be 1 to 4"):
    tokens.check(make_job(places=5))
  job = make_job()
  job.classifier.method.pool = "cls"
  with pytest.raises(InputError, match="trained with pool=cls"):
    tokens.run(job)


def test_clusters_of_three_directions():
  directions = np.eye(4)[:3]
  which = np.array([2, 2, 2, 2, 0, 0, 0, 1, 1])
  # Length does not count.
  points = directions[which] * RNG.uniform(0.1, 9, (9, 1))
  ids, share = token_clusters.cluster(points, 3, seed=0)
  assert ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
  assert share == pytest.approx(1)
  ids, share = token_clusters.cluster(points, 2, seed=0)
  # The largest cluster stands alone; the others share one of 5: within it
  # the squares are 3 * 2 / 5 * |e0 - e1|^2 = 2.4, in all 9 - 29 / 9.
  assert share == pytest.approx(1 - 2.4 / (9 - 29 / 9))
  with pytest.raises(InputError, match="more than the 9 tokens"):
    token_clusters.cluster(points, 10, seed=0)
