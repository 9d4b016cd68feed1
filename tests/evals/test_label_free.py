"""Measures without labels against plain loops over the papers' formulas."""

import math

import jax
import numpy as np
import pytest
import small
from PIL import Image

from attmask_jax import data, evaluate, schema, train
from attmask_jax.augment import TRANSFORMS, transforms
from attmask_jax.errors import InputError
from attmask_jax.evals import inputs, label_free
from attmask_jax.runs import metrics
from attmask_jax.training import setup, train_step
from configs import evals as recipes

# Few images, of which not all are looked at, and an odd number of them.
FEW = {
  "data.shapes_val": 24,
  "evals.label_free_images": 13,
  "evals.batch_size": 8,
  "evals.knn": False,
  "evals.overlap_images": 0,
  "optim.epochs": 1,
}
NAMES = {"rankme", "alignment", "uniformity", "retrieval"}
PROTOTYPES = {"prototypes_used", "prototypes_effective"}
CLOSE = dict(rel=1e-4)  # float32 features, in another order of sums


# The formulas -----------------------------------------------------------------


def rankme_loop(x):
  """exp(-sum p log p), p = s / |s|_1 + 1e-7: the eigenvalues of x x^T are s^2.

  Equation 1 of arXiv:2210.02885.
  """
  squares = np.linalg.eigvalsh(x.astype(np.float64) @ x.T.astype(np.float64))
  # Beyond min(n, F) singular values there is only rounding.
  values = [math.sqrt(max(s, 0)) for s in squares[::-1][: min(x.shape)]]
  total, entropy = sum(values), 0.0
  for s in values:
    p = s / total + 1e-7
    entropy -= p * math.log(p)
  return math.exp(entropy)


def loops(first, second):
  """The measures of arXiv:2005.10242 and the retrieval, image by image."""
  one, other = (
    [row / math.sqrt(sum(v * v for v in row)) for row in x.astype(np.float64)]
    for x in (first, second)
  )
  n, distance = len(one), lambda a, b: math.sqrt(sum((a - b) ** 2))
  aligned = sum(distance(one[i], other[i]) ** 2 for i in range(n)) / n
  kernel, pairs, hits = 0.0, 0, 0
  for i in range(n):
    for j in range(i):
      kernel += math.exp(-2 * distance(one[i], one[j]) ** 2)
      pairs += 1
    to_all = [distance(one[i], other[j]) for j in range(n)]
    hits += to_all.index(min(to_all)) == i
  return {
    "rankme": rankme_loop(first),
    "alignment": aligned,
    "uniformity": math.log(kernel / pairs),
    "retrieval": 100 * hits / n,
  }


@pytest.mark.parametrize("rows", [5, 1024])
@pytest.mark.parametrize("shape", [(23, 6), (7, 40), (2, 3)])
def test_measures_equal_loops(monkeypatch, shape, rows):
  monkeypatch.setattr(label_free, "ROWS", rows)
  rng = np.random.default_rng(shape[0])
  first = (rng.normal(size=shape) + 0.5).astype(np.float32)
  second = first + 3 * rng.normal(size=shape).astype(np.float32)
  found = label_free.measures(first, second)
  want = loops(first, second)
  assert found.keys() == NAMES
  assert found == pytest.approx(want, rel=1e-6)
  if shape[0] > 2:
    assert 0 < want["retrieval"] < 100 and want["rankme"] > 2


def test_effective_rank_at_its_limits():
  rng = np.random.default_rng(0)
  same = np.outer(rng.random(9) + 1, rng.normal(size=5)).astype(np.float32)
  # Four values of 0 + 1e-7 each add 1e-7 log 1e7.
  assert label_free.rankme(same) == pytest.approx(1, abs=1e-5)
  # Equal in all directions: six of nine images span six, p = 1 / 6.
  assert label_free.rankme(3 * np.eye(9, 6)) == pytest.approx(6, rel=1e-5)
  # Two directions, 3 : 1.
  halves = np.diag([3.0, 1.0])
  want = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
  assert label_free.rankme(halves) == pytest.approx(want, rel=1e-5)
  # The scale says nothing, the mean does: it is one more direction.
  assert label_free.rankme(1e-3 * halves) == pytest.approx(want, rel=1e-5)
  assert label_free.rankme(np.zeros((3, 2))) == pytest.approx(1, abs=1e-5)


def test_constant_features_are_at_every_limit():
  same = np.tile(np.float32([[3.0, 4.0]]), (8, 1))
  found = label_free.measures(same, same, np.zeros(8, int))
  assert found == pytest.approx(
    {"rankme": 1, "alignment": 0, "uniformity": 0, "retrieval": 100 / 8,
     "prototypes_used": 1, "prototypes_effective": 1}, abs=1e-5
  )  # fmt: skip


def test_views_apart_and_images_apart():
  corners = np.float32([[1, 0], [0, 1], [-1, 0], [0, -1]])
  found = label_free.measures(corners, -corners)
  assert found["alignment"] == pytest.approx(4)  # d = 2
  assert found["retrieval"] == 0
  # Of six pairs four have d^2 = 2 and two d^2 = 4.
  want = math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6)
  assert found["uniformity"] == pytest.approx(want)


def test_prototypes_by_hand():
  used, effective = label_free.in_use(np.array([7, 7, 2, 2]))
  assert (used, effective) == (2, pytest.approx(2))
  used, effective = label_free.in_use(np.array([5, 5, 5, 9]))
  # Shares 3/4 and 1/4: as in the test of the rank.
  assert (used, effective) == (2, pytest.approx(1.7547654))
  assert label_free.in_use(np.arange(6)) == (6, pytest.approx(6))


@pytest.mark.parametrize(
  "x, text",
  [
    (np.ones((1, 3)), "compare images, and there is 1: set evals.label_free"),
    (np.array([[1.0, np.nan], [1, 1]]), "not finite"),
  ],
)
def test_bad_features_are_refused(x, text):
  with pytest.raises(InputError, match=text):
    label_free.measures(x, np.ones_like(x))


# Two views --------------------------------------------------------------------


def picture(seed=0, side=24):
  pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3))
  return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_pair_is_what_a_step_compares(name):
  recipe = TRANSFORMS[name](image_size=16)
  draw = lambda: recipe.pair(picture(), np.random.default_rng(3))
  views = draw()
  assert views.shape == (2, 16, 16, 3) and views.dtype == np.uint8
  np.testing.assert_array_equal(views, draw())
  assert (views[0] == views[1]).all() == (name == "centre_crop")
  # The first is that of training with the same generator.
  step = recipe(picture(), np.random.default_rng(3))["images"]
  np.testing.assert_array_equal(views[0], step[0])
  if len(step) > 1:
    np.testing.assert_array_equal(views[1], step[1])


def test_one_global_crop_still_gives_two_views():
  recipe = transforms.MultiCrop(image_size=16, global_crops=1, local_size=8)
  views = recipe.pair(picture(), np.random.default_rng(3))
  assert views.shape == (2, 16, 16, 3)


# During training --------------------------------------------------------------


def evaluated(config, *, seed=0):
  """The run of a config, a state, and the evaluator's scores of it."""
  run = setup.build(config)
  state, _ = train_step.init_state(run.method, run.tx, run.mesh, seed=seed)
  return run, state, run.evaluator.before(state)


@pytest.mark.parametrize("family", ["attmask", "mae", "extrema"])
def test_a_run_is_measured_as_a_loop_over_its_images(monkeypatch, family):
  small.use_devices(monkeypatch, 8)
  config = small.config(FEW, arg=family)
  run, state, found = evaluated(config)
  recipe = TRANSFORMS[config.data.transform]
  recipe = recipe(**schema.take(recipe, config.data))
  weights = state.teacher or state.params
  features = jax.jit(run.method.features, static_argnames="norm")
  rows, prototypes = [], []
  for index in inputs.spread(64, 13):
    rng = np.random.default_rng([config.data.seed, 0, int(index), 5])
    views = recipe.pair(run.train_source.load(int(index)), rng)
    cls, patches = features(weights, views, norm=config.evals.final_norm)
    pooled = patches.mean(1) if config.evals.pool == "mean" else cls
    rows.append(np.asarray(pooled))
    if family == "attmask":
      prototypes.append(int(run.method.assignments(weights, views)[0]))
  want = loops(*np.stack(rows, axis=1))
  if family == "attmask":
    want["prototypes_used"] = len(set(prototypes))
    shares = [prototypes.count(k) / 13 for k in set(prototypes)]
    want["prototypes_effective"] = math.prod(p**-p for p in shares)
  assert found == pytest.approx(
    {f"label_free/{k}": v for k, v in want.items()} | {"label_free/images": 13},
    **CLOSE,
  )


@pytest.mark.parametrize("family", ["attmask", "mae"])
def test_one_and_eight_devices_measure_the_same(monkeypatch, family):
  found = []
  for count in (1, 8):
    small.use_devices(monkeypatch, count)
    found.append(evaluated(small.config(FEW, arg=family))[2])
  assert found[0] == pytest.approx(found[1], **CLOSE)


def test_the_measure_is_the_same_function_at_every_step():
  run, state, before = evaluated(small.config(FEW))
  again, other = (run.evaluator.scores(s) for s in (state, evaluated(
    small.config(FEW), seed=1)[1]))  # fmt: skip
  assert again == {k: before[k] for k in again} and len(again) == 6
  assert other != again


def test_an_image_that_cannot_be_read_is_left_out(monkeypatch):
  run, state, before = evaluated(small.config(FEW | {"data.max_broken": 0.5}))
  broken = int(inputs.spread(64, 13)[4])
  load = run.train_source.load

  def fails(index):
    if index == broken:
      raise data.BrokenImage("cut short")
    return load(index)

  monkeypatch.setattr(run.train_source, "load", fails, raising=False)
  found = run.evaluator.before(state)
  assert (before["label_free/images"], found["label_free/images"]) == (13, 12)
  assert found["label_free/rankme"] != before["label_free/rankme"]


@pytest.mark.parametrize("images, on", [(1, False), (2, True)])
def test_one_image_is_not_compared(images, on):
  config = small.config(FEW | {"data.shapes_val": images, "evals.knn": True,
                               "evals.knn_ks": (1,)})  # fmt: skip
  found = evaluated(config)[2]
  assert ("label_free/rankme" in found) == on and "knn/top1" in found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Run directory of an epoch with all evaluations."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  train.train(small.config(FEW | {"evals.knn": True}), str(folder))
  return folder


def logged(folder):
  """Lines of the log without what is measured in seconds."""
  times = ("train/img_per_s", "train/data_wait")
  lines = metrics.read_metrics(folder / "metrics.jsonl")
  return [{k: v for k, v in x.items() if k not in times} for x in lines]


def test_training_is_the_same_without_them(trained, tmp_path):
  config = small.config(FEW | {"evals.knn": True, "evals.label_free": False})
  train.train(config, str(tmp_path / "off"))
  plain = lambda lines: [
    {k: v for k, v in x.items() if not k.startswith("label_free/")}
    for x in lines
  ]
  off, on = logged(tmp_path / "off"), logged(trained)
  assert off == plain(off) == plain(on) != on


def test_the_evaluation_of_a_run_is_that_of_its_log(trained, tmp_path):
  config = recipes.get_config("label_free")
  config.weights = str(trained)
  config.evals.update(label_free_images=13, batch_size=8)
  found = evaluate.evaluate(config, str(tmp_path / "eval"))
  last = [x for x in logged(trained) if "label_free/rankme" in x][-1]
  assert found.values == pytest.approx(
    {k: last[f"label_free/{k}"] for k in NAMES | PROTOTYPES}, **CLOSE
  )
  assert found.counts == {"images": 13, "feature width": 16}
  page = (trained / "report.html").read_text()
  assert "label_free of the teacher network" in page


def test_a_flat_folder_without_labels_is_measured(tmp_path):
  (tmp_path / "mine").mkdir()
  for i in range(16):
    picture(i).save(tmp_path / "mine" / f"{i}.png")
  config = small.config(
    FEW | {"data.source": "flat", "data.path": str(tmp_path / "mine"),
           "evals.knn": True}
  )  # fmt: skip
  train.train(config, str(tmp_path / "run"))
  lines = [x for x in logged(tmp_path / "run") if "label_free/rankme" in x]
  assert [x["step"] for x in lines] == [0, 2]
  names = {f"label_free/{k}" for k in NAMES | PROTOTYPES}
  assert names < lines[0].keys() and names < lines[1].keys()
  page = (tmp_path / "run" / "report.html").read_text()
  panel = page[page.index('<section class="panel">') : page.index("</section>")]
  assert "effective rank (RankMe)</abbr>" in panel
  assert f"{lines[1]['label_free/rankme']:.3f}" in panel
  assert "7.69 % (chance)" in panel  # one of 13 images
