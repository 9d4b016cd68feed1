"""Evaluations against plain loops, hand counts and recorded numbers."""

import jax
import numpy as np
import pytest
from PIL import Image

from attmask_jax.errors import InputError
from attmask_jax.evals import features, nearest, visualize
from attmask_jax.methods import clustering

MESHES = [None, (1, 1), (8, 1), (4, 2)]


def make_mesh(shape):
  if shape is None:
    return None
  axis_types = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh(
    shape,
    ("data", "fsdp"),
    axis_types=axis_types,
    devices=jax.devices()[: shape[0] * shape[1]],
  )


# k-NN -----------------------------------------------------------------------


def knn_loop(bank, bank_labels, queries, query_labels, k, temp):
  """Top-1 and top-5 in percent, one query at a time, in float64."""
  bank = bank / np.linalg.norm(bank, axis=1, keepdims=True).astype(np.float64)
  queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
  hits = np.zeros(2)
  for query, label in zip(
    queries.astype(np.float64), query_labels, strict=True
  ):
    sims = bank @ query
    nearest = sorted(range(len(bank)), key=lambda i: (-sims[i], i))[:k]
    votes = {}
    for i in nearest:
      votes.setdefault(bank_labels[i], 0.0)
      votes[bank_labels[i]] += np.exp(sims[i] / temp)
    ranking = sorted(votes, key=lambda c: -votes[c])
    hits += [label in ranking[:1], label in ranking[:5]]
  return 100 * hits / len(queries)


def knn_problem(rng, *, bank, queries, classes, width=6):
  centres = rng.normal(size=(classes, width))
  bank_labels = rng.integers(0, classes, bank)
  query_labels = rng.integers(0, classes, queries)
  return (
    (centres[bank_labels] + rng.normal(size=(bank, width))).astype("f4"),
    bank_labels,
    (centres[query_labels] + rng.normal(size=(queries, width))).astype("f4"),
    query_labels,
  )


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("chunks", [(1000, 1000), (7, 5), (64, 16)])
def test_knn_equals_loop_whatever_the_chunks_and_devices(shape, chunks):
  problem = knn_problem(
    np.random.default_rng(0), bank=90, queries=37, classes=9
  )
  got = nearest.knn(
    *problem,
    ks=(4, 1, 20, 4),
    temp=0.1,
    num_classes=9,
    mesh=make_mesh(shape),
    bank_chunk=chunks[0],
    query_chunk=chunks[1],
  )
  for k in (1, 4, 20):
    want = knn_loop(*problem, k, 0.1)
    assert 10 < want[0] < 95  # else the problem would decide nothing
    assert [got[f"k{k}/top1"], got[f"k{k}/top5"]] == pytest.approx(want)


@pytest.mark.parametrize("queries", [1, 2, 9])
def test_knn_few_queries_and_two_classes(queries):
  problem = knn_problem(
    np.random.default_rng(1), bank=30, queries=queries, classes=2
  )
  got = nearest.knn(
    *problem, ks=(30,), temp=0.5, num_classes=2, mesh=make_mesh((8, 1))
  )
  assert got["k30/top1"] == pytest.approx(knn_loop(*problem, 30, 0.5)[0])
  assert got["k30/top5"] == 100.0


@pytest.mark.parametrize("bank_chunk", [1, 2, 100])
def test_knn_ties_go_to_the_lowest_bank_index(bank_chunk):
  bank = np.asarray([[0, 1], [1, 0], [2, 0], [3, 0], [1, 0]], np.float32)
  labels = np.asarray([3, 2, 0, 1, 0])
  query = np.asarray([[5, 0]], np.float32)

  def top1(label, k):
    return nearest.knn(
      bank,
      labels,
      query,
      np.asarray([label]),
      ks=(k,),
      temp=0.07,
      num_classes=4,
      bank_chunk=bank_chunk,
    )[f"k{k}/top1"]

  # Rows 1 to 4 are equally near: row 1 alone, then one vote each for 2, 0, 1
  # (the first wins), then two votes for 0.
  assert [top1(label, 1) for label in range(4)] == [0, 0, 100, 0]
  assert [top1(label, 3) for label in range(4)] == [0, 0, 100, 0]
  assert [top1(label, 4) for label in range(4)] == [100, 0, 0, 0]


def test_knn_counts_only_classes_with_a_vote():
  bank = np.eye(3, dtype=np.float32)
  got = nearest.knn(
    bank,
    np.arange(3),
    bank[:1],
    np.asarray([1]),
    ks=(1, 3),
    temp=1.0,
    num_classes=3,
  )
  # Of three classes a top-5 would hold all, but one neighbour votes for one.
  assert got["k1/top5"] == 0.0
  assert got["k3/top5"] == 100.0


def test_knn_padding_never_votes():
  # All similarities are negative: zero rows of padding would be nearer.
  bank = np.asarray([[-1, -0.1], [-1, 0.1], [-1, 0.2]], np.float32)
  got = nearest.knn(
    bank,
    np.asarray([1, 2, 2]),
    np.asarray([[1, 0]], np.float32),
    np.asarray([2]),
    ks=(3,),
    temp=1.0,
    num_classes=3,
    mesh=make_mesh((8, 1)),
    bank_chunk=2,
  )
  assert got == {"k3/top1": 100.0, "k3/top5": 100.0}


def test_knn_small_temperature_does_not_overflow():
  # exp(1 / 0.001) is infinite in float32, and infinite votes would tie.
  bank = np.asarray([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
  labels = np.asarray([0, 1, 1, 2])
  got = nearest.knn(
    bank,
    labels,
    bank[:1],
    np.asarray([1]),
    ks=(1, 4),
    temp=1e-3,
    num_classes=3,
  )
  assert got["k1/top1"] == 0.0
  assert got["k4/top1"] == 100.0
  assert got["k4/top5"] == 100.0


@pytest.mark.parametrize("shape", [None, (8, 1)])
@pytest.mark.parametrize("bank_chunk", [300, 130])
def test_knn_many_ties(shape, bank_chunk):
  # Rows of length 4 with products from -16 to 16: exact, and many are equal.
  rng = np.random.default_rng(3)
  bank, queries = (rng.choice(np.float32([-1, 1]), (n, 16)) for n in (300, 40))
  order = np.argsort(-(queries @ bank.T), axis=1, kind="stable")
  got = nearest.knn(
    bank,
    np.arange(300),  # a class each: they are ranked as the neighbours are
    np.repeat(queries, 5, axis=0),
    order[:, :5].ravel(),  # each of the first five in turn
    ks=(7,),
    temp=1.0,
    num_classes=300,
    mesh=make_mesh(shape),
    bank_chunk=bank_chunk,
  )
  assert got == {"k7/top1": 20.0, "k7/top5": 100.0}


@pytest.mark.parametrize("shape", [None, (8, 1)])
@pytest.mark.parametrize("k", [1, 2])
def test_knn_padding_hides_no_neighbour(shape, k):
  # All similarities are negative, so rows of zeros would be nearer than any.
  bank = np.stack([np.full(70, -1.0), np.linspace(9, 0, 70)], 1).astype("f4")
  got = nearest.knn(
    bank,
    np.arange(70),
    np.asarray([[1, 0]] * 2, np.float32),
    np.asarray([0, 69]),
    ks=(k,),
    temp=1.0,
    num_classes=70,
    mesh=make_mesh(shape),
  )
  assert got == {f"k{k}/top1": 50.0, f"k{k}/top5": 50.0}


def test_knn_refuses_what_it_cannot_do():
  bank, labels = np.ones((5, 2), np.float32), np.arange(5)
  good = dict(ks=(2,), temp=1.0, num_classes=5)

  def run(bank=bank, labels=labels, queries=bank, true=labels, **options):
    nearest.knn(bank, labels, queries, true, **{**good, **options})

  with pytest.raises(InputError, match="k = 20 .* bank has 5"):
    run(ks=(1, 20))
  with pytest.raises(InputError, match="at least 1"):
    run(ks=(0,))
  with pytest.raises(InputError, match="5 and 0 rows"):
    run(queries=bank[:0], true=labels[:0])
  with pytest.raises(InputError, match="2 and 3"):
    run(queries=np.ones((5, 3), np.float32))
  with pytest.raises(InputError, match=r"0\.\.3, found 0 to 4"):
    run(num_classes=4)
  with pytest.raises(InputError, match="found -1 to 3"):
    run(true=labels - 1)
  with pytest.raises(InputError, match="positive, got 0"):
    run(temp=0)
  with pytest.raises(InputError, match="not finite"):
    run(bank=np.where(np.eye(5, 2) > 0, np.nan, bank))


def golden_knn(data, k, temp, classes, **options):
  scores = nearest.knn(
    data["in/train_features_raw"],
    data["in/train_labels"],
    data["in/test_features_raw"],
    data["in/test_labels"],
    ks=(k,),
    temp=float(temp),
    num_classes=int(classes),
    **options,
  )
  return scores[f"k{k}/top1"], scores[f"k{k}/top5"]


def golden_cases(data):
  """(k, temp, class count, recorded top-1, top-5 or None) of every record."""
  usual = data["cfg/temperature"]
  for name in data.files:
    if not name.startswith("out/"):
      continue
    _, setting, k = name.split("/")
    classes = data["cfg/num_classes_default"]
    temp = usual
    if setting.startswith("default_T"):
      temp = setting.removeprefix("default_T")
    if setting == "small":
      classes = data["cfg/num_classes_small"]
    top1, top5 = data[name]
    # The top-5 of `small` ranks classes without votes in an arbitrary order.
    yield int(k[1:]), temp, classes, top1, None if setting == "small" else top5


@pytest.mark.parametrize("shape", [None, (8, 1)])
def test_knn_golden(golden, shape):
  data = golden("attmask/knn.npz")
  # Exact but for one query, whose neighbours or votes may nearly tie.
  one_query = 100 / len(data["in/test_labels"]) + 1e-9
  cases = list(golden_cases(data))
  assert cases
  for k, temp, classes, want1, want5 in cases:
    top1, top5 = golden_knn(
      data, k, temp, classes, mesh=make_mesh(shape), bank_chunk=256
    )
    assert top1 == pytest.approx(want1, abs=one_query)
    if want5 is not None:
      assert top5 == pytest.approx(want5, abs=one_query)


# Features -------------------------------------------------------------------


def feature_batches(rng, *, sizes, batch=8):
  """Padded batches with `sizes` valid rows each."""
  start = 0
  for size in sizes:
    yield {
      "images": rng.integers(0, 256, (batch, 4, 4, 3), np.uint8),
      "label": np.arange(start, start + batch, dtype=np.int32) % 3,
      "index": np.arange(start, start + batch, dtype=np.int32),
      "valid": np.arange(batch) < size,
    }
    start += size


@pytest.mark.parametrize("shape", MESHES)
def test_extract_drops_padding_and_keeps_order(shape):
  fn = jax.jit(lambda x: x.astype(np.float32).mean(axis=(1, 2)))
  sizes = (8, 8, 3)
  got = features.extract(
    fn,
    feature_batches(np.random.default_rng(0), sizes=sizes),
    mesh=make_mesh(shape),
  )
  want = [
    batch["images"][i].astype(np.float64).mean(axis=(0, 1))
    for batch in feature_batches(np.random.default_rng(0), sizes=sizes)
    for i in range(8)
    if batch["valid"][i]
  ]
  np.testing.assert_allclose(got.features, want, rtol=1e-6)
  np.testing.assert_array_equal(got.index, np.arange(19))
  np.testing.assert_array_equal(got.labels, np.arange(19) % 3)
  assert [a.dtype for a in got] == [np.float32, np.int32, np.int32]


def test_extract_splits_a_batch_over_all_devices():
  seen = []

  def fn(images):
    seen.append(images)
    return images[:, 0, 0].astype(np.float32)

  batches = feature_batches(np.random.default_rng(0), sizes=(8,))
  features.extract(fn, batches, mesh=make_mesh((4, 2)))
  shards = seen[0].addressable_shards
  assert len({shard.device for shard in shards}) == 8
  assert {shard.data.shape for shard in shards} == {(1, 4, 4, 3)}


def test_extract_keeps_one_batch_in_flight():
  log = []

  class Result:
    def __init__(self, number):
      self.number = number

    def __array__(self, dtype=None, copy=None):
      log.append(f"wait {self.number}")
      return np.zeros((8, 2), np.float32)

  def batches():
    rng = np.random.default_rng(0)
    for number, batch in enumerate(feature_batches(rng, sizes=(8, 8, 8))):
      log.append(f"load {number}")
      yield batch

  def fn(_):
    number = sum(entry.startswith("start") for entry in log)
    log.append(f"start {number}")
    return Result(number)

  features.extract(fn, batches())
  assert log == [
    *("load 0", "start 0", "load 1", "start 1", "wait 0"),
    *("load 2", "start 2", "wait 1", "wait 2"),
  ]


def test_extract_refuses_no_images_and_uneven_batches():
  def fn(images):
    return images[:, 0, 0].astype(np.float32)

  with pytest.raises(InputError, match="no images"):
    features.extract(fn, [])
  with pytest.raises(InputError, match="no images"):
    features.extract(fn, feature_batches(np.random.default_rng(0), sizes=(0,)))
  uneven = feature_batches(np.random.default_rng(0), sizes=(6,), batch=6)
  with pytest.raises(InputError, match="6 rows .* 8 devices"):
    features.extract(fn, uneven, mesh=make_mesh((8, 1)))


# Clusters -------------------------------------------------------------------


def test_cluster_scores_by_hand():
  labels = np.asarray([0, 0, 0, 1, 1, 1, -1, -1])
  assigned = np.asarray([7, 7, 9, 9, 9, 9, 7, 3])
  got = clustering.cluster_scores(labels, assigned)
  # Pairs of the six labelled rows: 6 share a class, 7 a cluster, 4 both.
  assert got["fscore"] == pytest.approx(4 / np.sqrt(6 * 7))
  chance = 6 * 7 / 15
  assert got["ari"] == pytest.approx((4 - chance) / ((6 + 7) / 2 - chance))
  joint = np.asarray([[2, 1], [0, 3]]) / 6
  part = joint[joint > 0]
  entropy = [-np.sum(p * np.log(p)) for p in (joint.sum(0), joint.sum(1), part)]
  mutual = entropy[0] + entropy[1] - entropy[2]
  assert got["nmi"] == pytest.approx(mutual / np.mean(entropy[:2]))
  assert all(type(value) is float for value in got.values())


def test_hungarian_accuracy_by_hand():
  labels = np.asarray([0, 0, 0, 1, 1, 2, -1])
  # Class 0 keeps cluster 5 (2 of 3), 1 takes 8 (1 of 2), 2 takes 6: 4 of 6;
  # cluster 8 for class 0 would lose more than it wins. Cluster 1 gets no class.
  assigned = np.asarray([5, 5, 8, 8, 1, 6, 6])
  got = clustering.hungarian_accuracy(labels, assigned)
  assert got == pytest.approx(4 / 6)


def test_clusters_without_labels():
  none = np.full(4, -1)
  assert clustering.cluster_scores(none, np.arange(4)) == {}
  assert np.isnan(clustering.hungarian_accuracy(none, np.arange(4)))


# Pictures -------------------------------------------------------------------


def test_mask_overlap_by_hand():
  # Two images of 4 x 6 pixels in 2 x 3 patches of 4 pixels.
  objects = np.zeros((2, 4, 6), bool)
  objects[0, :2, :3] = True  # patch 0 full, patch 1 half
  objects[1, 3, 5] = True  # patch 5 a quarter
  masks = np.zeros((2, 6), bool)
  masks[0, [1, 2]] = True  # half a patch of the object
  masks[1, 5] = True  # a quarter
  got = visualize.mask_overlap(masks, objects, grid=(2, 3))
  assert got["precision"] == pytest.approx(0.75 / 3)
  assert got["recall"] == pytest.approx(0.75 / 1.75)
  assert got["iou"] == pytest.approx(0.75 / (3 + 1.75 - 0.75))
  empty = visualize.mask_overlap(masks & False, objects, grid=(2, 3))
  assert np.isnan(empty["precision"]) and empty["recall"] == 0
  with pytest.raises(InputError, match="do not fit a 3 x 2 grid"):
    visualize.mask_overlap(masks, objects, grid=(3, 2))


def test_mask_gallery_hides_the_right_patches(tmp_path):
  images = np.zeros((2, 16, 24, 3), np.uint8)
  images[..., 0] = 255  # red
  masks = np.zeros((2, 6), bool)
  masks[1, 2] = True  # second image, top right patch
  path = tmp_path / "figures" / "masks.png"
  visualize.mask_gallery(
    path,
    images,
    np.ones((2, 6), np.float32),
    {"attmask_high": masks},
    patch_size=8,
    object_masks=images[..., 0] > 0,
    title="A title that is long enough to need more than one line here",
  )
  assert [p.name for p in path.parent.iterdir()] == ["masks.png"]
  pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
  height, width, _ = pixels.shape
  # Between the texts (whose edges are grey too; two lines of caption are 84
  # pixels high), in the second row of pictures, last column.
  part = pixels[height // 2 : height - 84, 2 * width // 3 :]
  grey = np.all(np.abs(part - 158) < 3, axis=-1)
  rows, columns = np.nonzero(grey)
  columns += 2 * width // 3
  patch = width / 9  # three columns of three patches, with small gaps
  assert np.ptp(columns) + 1 == pytest.approx(patch, rel=0.1)
  assert np.ptp(rows) + 1 == pytest.approx(patch, rel=0.1)
  assert len(rows) == pytest.approx(patch**2, rel=0.15)
  assert width * 0.97 < columns.max() < width
  assert rows.max() < grey.shape[0] - 0.8 * patch  # the upper of two patches


def test_mask_gallery_refuses_a_wrong_grid(tmp_path):
  images = np.zeros((2, 16, 24, 3), np.uint8)
  mask = np.zeros((2, 6), bool)
  with pytest.raises(InputError, match=r"low has shape \(2, 5\).*\(2, 6\)"):
    visualize.mask_gallery(
      tmp_path / "a.png",
      images,
      np.ones((2, 6), np.float32),
      {"high": mask, "low": mask[:, :5]},
      patch_size=8,
    )
  assert not list(tmp_path.iterdir())
