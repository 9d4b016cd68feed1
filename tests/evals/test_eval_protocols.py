"""Few-shot, masked images, backgrounds and accuracy against plain loops."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import accuracy, backgrounds, fewshot, knn, masked
from attmask_jax.evals.features import Features

RNG = np.random.default_rng(0)


class Source:
  """Labels without images."""

  name = "a list"

  def __init__(self, labels, classes):
    self.labels = np.array(labels, np.int32)
    self.class_names = [str(i) for i in range(classes)]

  def __len__(self):
    return len(self.labels)


class Job:
  """Answers with given features instead of a network's."""

  mesh = None

  def __init__(self, train, val, vectors, **evals):
    self.config = types.SimpleNamespace(evals=types.SimpleNamespace(**evals))
    self._pair, self._vectors = (train, val), vectors

  def pair(self):
    return self._pair

  def embed(self, source, indices=None, *, desc):
    which = np.arange(len(source)) if indices is None else indices
    # As a broken file would: image 3 of the training set is in no bank.
    which = which[which != 3] if desc == "bank" else which
    return Features(self._vectors[desc][which], source.labels[which], which)


def nearest_votes(bank, labels, query, k, temp, classes):
  """Plain reading of the protocol."""
  unit = lambda x: x / np.linalg.norm(x)
  similar = np.array([unit(row) @ unit(query) for row in bank])
  votes = np.zeros(classes)
  for i in np.argsort(-similar)[:k]:
    votes[labels[i]] += np.exp(similar[i] / temp)
  return int(np.argmax(votes))


def few_shot_job(**changes):
  labels = np.array([2, 0, 1] * 6)
  truth = RNG.integers(0, 3, 25)
  centres = RNG.normal(size=(3, 8))
  near = lambda which: centres[which] + RNG.normal(size=(len(which), 8))
  vectors = {
    "bank": near(labels).astype("f4"),
    "queries": near(truth).astype("f4"),
  }
  settings = dict(
    shots=(1, 3), knn_ks=(1, 4), starts=((0, 2, 5), (0, 3)), knn_temp=0.1,
    bank_chunk=64, query_chunk=8, knn_bank=0, knn_queries=0,
  )  # fmt: skip
  job = Job(Source(labels, 3), Source(truth, 3), vectors, **settings | changes)
  return job, labels, truth, vectors


def test_few_shot_takes_neighbours_in_order_of_the_data():
  job, labels, truth, vectors = few_shot_job()
  found = fewshot.run(job)
  for shots, k, starts in ((1, 1, (0, 2, 5)), (3, 4, (0, 3))):
    scores = []
    for start in starts:
      picks = []
      for c in range(3):
        own = [i for i, label in enumerate(labels) if label == c]
        picks += own[start : start + shots]
      picks = [i for i in picks if i != 3]
      right = [
        nearest_votes(
          vectors["bank"][picks], labels[picks], query, k, 0.1, 3
        ) == t
        for query, t in zip(vectors["queries"], truth, strict=True)
      ]  # fmt: skip
      scores.append(100 * np.mean(right))
      value = found.values[f"shots{shots}/start{start}/top1"]
      assert value == pytest.approx(scores[-1])
    assert found.values[f"shots{shots}/top1"] == pytest.approx(np.mean(scores))
    spread = np.sqrt(
      np.sum((scores - np.mean(scores)) ** 2) / (len(scores) - 1)
    )
    assert found.values[f"shots{shots}/spread"] == pytest.approx(spread)
  assert found.counts["training images"] == 17
  assert [row[:3] for row in found.table.rows] == [
    ("1", "1", "3"), ("3", "4", "2"),
  ]  # fmt: skip


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"starts": ((0,), (4,))}, "has 6 images.*up to image 7"),
    ({"shots": (1,)}, "evals.shots"),
    ({"shots": (0, 3)}, "must be at least 1"),
  ],
)
def test_few_shots_that_do_not_fit(changes, match):
  with pytest.raises(InputError, match=match):
    fewshot.run(few_shot_job(**changes)[0])


def test_knn_table_of_features():
  job, labels, truth, vectors = few_shot_job(knn_ks=(1, 5))
  found = knn.run(job)
  kept = [i for i in range(len(labels)) if i != 3]
  for k in (1, 5):
    right = [
      nearest_votes(vectors["bank"][kept], labels[kept], q, k, 0.1, 3) == t
      for q, t in zip(vectors["queries"], truth, strict=True)
    ]
    assert found.values[f"k{k}/top1"] == pytest.approx(100 * np.mean(right))
  assert found.counts == {
    "bank images": 17, "queries": 25, "classes": 3, "feature width": 8,
    "queries of the largest class": max(list(truth).count(c) for c in range(3)),
  }  # fmt: skip


# Accuracy -------------------------------------------------------------------


def test_accuracy_of_several_classifiers_over_padded_batches():
  mesh = meshes.make_mesh()
  rows, layers, classes = 37, 2, 7
  logits = RNG.normal(size=(rows, layers, classes)).astype("f4")
  logits[5, 0] = 1.0  # all alike: the first class wins
  labels = RNG.integers(0, classes, rows).astype(np.int32)
  labels[5] = 0
  labels[11] = 6
  logits[11, 1] = 2.0  # class 6 is the last of seven equals
  table = jnp.asarray(np.concatenate([logits, np.zeros((1, layers, classes))]))

  def batches():
    for start in range(0, 48, 16):
      index = np.arange(start, start + 16)
      valid = index < rows
      valid[3] &= start != 16  # a broken image
      yield {
        "images": np.zeros((16, 2, 2, 3), np.uint8),
        "label": np.where(valid, labels[np.minimum(index, rows - 1)], -1),
        "index": np.where(index < rows, index, -1),
        "valid": valid,
      }

  count = accuracy.counter(lambda t, batch: t[batch["index"]], mesh)
  found = accuracy.scores(count, table, batches(), mesh=mesh)
  kept = [i for i in range(rows) if i != 19]
  assert found["images"] == 36
  for j in range(layers):
    top1 = top5 = loss = 0.0
    for i in kept:
      order = sorted(range(classes), key=lambda c: (-logits[i, j, c], c))
      top1 += order[0] == labels[i]
      top5 += labels[i] in order[:5]
      p = np.exp(logits[i, j].astype(float))
      loss -= np.log(p[labels[i]] / p.sum())
    assert found["top1"][j] == pytest.approx(100 * top1 / 36)
    assert found["top5"][j] == pytest.approx(100 * top5 / 36)
    assert found["loss"][j] == pytest.approx(loss / 36, rel=1e-5)


def test_broken_logits_are_never_right():
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  logits = np.zeros((4, 1, 6), np.float32)
  logits[:2, 0, 3] = np.nan  # the right class, and another
  logits[2:, 0, 0] = 1
  batch = {
    "images": np.zeros((4, 2, 2, 3), np.uint8),
    "label": np.array([3, 1, 0, 1], np.int32),
    "index": np.arange(4),
    "valid": np.ones(4, bool),
  }
  count = accuracy.counter(lambda t, b: t[b["index"]], mesh)
  found = accuracy.scores(count, jnp.asarray(logits), [batch], mesh=mesh)
  assert (found["top1"][0], found["top5"][0]) == (25, 50)


def test_golden_accuracy(golden):
  file = golden("mae/finetune_extras.npz")
  mesh = meshes.make_mesh(devices=jax.devices()[:1])
  logits, labels = jnp.asarray(file["in/ce/logits"]), file["in/mix/target"]
  rows = len(labels)
  batch = {
    "images": np.zeros((rows, 2, 2, 3), np.uint8),
    "label": labels.astype(np.int32),
    "index": np.arange(rows),
    "valid": np.ones(rows, bool),
  }
  count = accuracy.counter(lambda t, b: t[b["index"]][:, None], mesh)
  found = accuracy.scores(count, logits, [batch], mesh=mesh)
  got = [found[name][0] for name in ("top1", "top5")]
  np.testing.assert_allclose(got, file["out/ce/acc15"])
  np.testing.assert_allclose(found["loss"][0], file["out/ce/plain"], rtol=1e-6)


def test_accuracy_of_nothing_is_refused():
  mesh = meshes.make_mesh()
  count = accuracy.counter(lambda t, batch: t, mesh)
  with pytest.raises(InputError, match="validation set holds no images"):
    accuracy.scores(count, np.zeros(1), iter(()), mesh=mesh)


# Masked images --------------------------------------------------------------


def test_black_patches():
  # 3 x 3 patches of 2 pixels, and a border.
  images = RNG.integers(1, 256, (2, 7, 7, 3)).astype(np.uint8)
  mask = np.zeros((2, 9), bool)
  mask[0, 5] = mask[1, 0] = mask[1, 8] = True
  found = np.asarray(masked.blacken(jnp.asarray(images), mask, 2))
  want = images.copy()
  want[0, 2:4, 4:6] = 0
  want[1, 0:2, 0:2] = 0
  want[1, 4:6, 4:6] = 0
  assert np.array_equal(found, want)
  # 2 x 2 patches of 3 pixels: the border of 2 is no part of larger patches.
  images = RNG.integers(1, 256, (2, 8, 8, 3)).astype(np.uint8)
  found = masked.blacken(jnp.asarray(images), np.ones((2, 4), bool), 3)
  want = images.copy()
  want[:, :6, :6] = 0
  assert np.array_equal(found, want)


def test_which_patches_turn_black():
  attention = jnp.asarray(RNG.permuted(np.tile(np.arange(9.0), (4, 1)), axis=1))
  index = jnp.arange(4)
  hidden = lambda policy, n, seed=0, which=index, att=attention: np.asarray(
    masked.hidden_patches(att, which, policy, n, seed=seed)
  )
  high, low = hidden("attmask_high", 3), hidden("attmask_low", 3)
  assert np.array_equal(high, np.asarray(attention) >= 6)
  assert np.array_equal(low, np.asarray(attention) < 3)
  some = hidden("random", 3)
  assert np.array_equal(some.sum(axis=1), [3] * 4)
  assert not np.array_equal(some, hidden("random", 3, seed=1))
  # An image's draw is its own, whatever batch it is in; more of it hides more.
  turned = hidden("random", 3, which=index[::-1])
  assert np.array_equal(turned, some[::-1])
  assert np.all(hidden("random", 5) >= some)


# Backgrounds ----------------------------------------------------------------


def test_answers_outside_the_nine_are_wrong():
  logits = jnp.asarray(
    [[3.0, 1, 0, 0], [0, 0, 9, 1], [0, 5, 0, 1], [0, 0, 0, 2]]
  )
  mapped = np.array([1, 0, -1, 1])
  votes = np.asarray(backgrounds.vote(logits, mapped, 2))
  assert votes.argmax(axis=1).tolist() == [1, 2, 0, 1]


def test_backgrounds_on_many_devices_count_as_on_one():
  logits = jnp.asarray(RNG.normal(size=(32, 4)).astype("f4"))
  mapped = np.array([1, 0, -1, 1])
  labels = RNG.integers(0, 2, 32).astype(np.int32)
  batch = {
    "images": np.zeros((32, 2, 2, 3), np.uint8),
    "label": labels,
    "index": np.arange(32),
    "valid": np.ones(32, bool),
  }
  votes = lambda t, b: backgrounds.vote(t[b["index"]], mapped, 2)[:, None]
  right = np.mean(mapped[np.argmax(logits, axis=1)] == labels)
  for devices in (1, 8):
    mesh = meshes.make_mesh(devices=jax.devices()[:devices])
    count = accuracy.counter(votes, mesh)
    found = accuracy.scores(count, logits, [batch], mesh=mesh)
    assert found["top1"][0] == pytest.approx(100 * right)
