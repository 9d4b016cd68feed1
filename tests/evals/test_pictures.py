"""Picture evaluations against hand counts, plain loops and numpy."""

import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from matplotlib.figure import Figure
from PIL import Image

from attmask_jax import data, evaluate
from attmask_jax import mesh as meshes
from attmask_jax.data import files, shapes
from attmask_jax.errors import InputError
from attmask_jax.evals import (
  attention,
  drawing,
  masks,
  overlap,
  pca,
  pictures,
  uniform,
)
from attmask_jax.evals.job import Job
from attmask_jax.methods import METHODS, masking
from attmask_jax.weights.loading import Weights
from configs import evals as evals_config


@functools.cache
def network():
  """The small method and an untrained teacher."""
  method = METHODS["attmask"].from_config(small.config(), steps_per_epoch=1)
  init = jax.jit(lambda key: method.init(key)[1])
  return method, jax.device_get(init(jax.random.key(0)))


def make_job(folder, name, changes=None, *, method=None, devices=8):
  """An evaluation of an untrained network, or of a stand-in for one."""
  run, mesh = small.config(), meshes.make_mesh(devices=jax.devices()[:devices])
  params = {}
  if method is None:
    method, params = network()
    params = meshes.put(mesh, params)
  known = dict(method=method, params=params, config=run, network="teacher")
  weights = Weights(**dict.fromkeys(Weights._fields) | known)
  config = evals_config.get_config(name)
  config.data.update(run.data)
  config.evals.batch_size = 8
  config.update_from_flattened_dict(changes or {})
  return Job(config.lock(), mesh, folder, weights)


# Regions and numbers --------------------------------------------------------


def test_keep_mask_against_a_loop():
  rng = np.random.default_rng(0)
  # Coarse values tie often.
  rows = [*rng.random((20, 16)), *rng.integers(0, 4, (20, 16)) / 8 + 0.125]
  for keep in (0.1, 0.5, 0.6, 1.0):
    got = attention.keep_mask(np.stack(rows).astype(np.float32), keep)
    for row, mask in zip(rows, got, strict=True):
      want, held = np.zeros(16, bool), 0.0
      for patch in sorted(range(16), key=lambda i: (-np.float32(row[i]), i)):
        if held >= keep * row.sum() - 1e-6:
          break
        want[patch], held = True, held + row[patch]
      np.testing.assert_array_equal(mask, want)


def test_keep_mask_by_hand():
  # 0.5 + 0.1 reaches 0.6 exactly, whatever the rounding of the sum.
  got = attention.keep_mask(np.asarray([0.1, 0.5, 0.1, 0.1, 0.1, 0.1]), 0.6)
  np.testing.assert_array_equal(got, [1, 1, 0, 0, 0, 0])


def test_entropy_by_hand():
  assert uniform.entropy(np.full(16, 3.0)) == pytest.approx(np.log(16))
  assert uniform.entropy(np.asarray([2, 2, 0, 0])) == pytest.approx(np.log(2))


class Halves:
  """Four pictures, object at the left; only the first is bright there.

  The second cannot be read.
  """

  name, class_names = "halves", ()

  def __len__(self):
    return 4

  def label(self, index):
    return -1

  def describe(self, index):
    return f"folder/{index}.png"

  def load(self, index):
    if index == 1:
      raise data.BrokenImage("no image")
    pixels = np.full((32, 32, 3), 20, np.uint8)
    half = np.s_[:, :16] if index == 0 else np.s_[:, 16:]
    pixels[half] = 220
    return Image.fromarray(pixels)

  def object_mask(self, index):
    assert index != 1
    mask = np.zeros((32, 32), bool)
    mask[:, :16] = True
    return mask


class Brightness:
  """Attends to bright patches of 4 pixels three times as much."""

  backbone = types.SimpleNamespace(patch_size=4)
  refills_hints = False

  def attention(self, weights, images):
    b, height, width, _ = images.shape
    cells = images.reshape(b, height // 4, 4, width // 4, 4, 3)
    bright = jnp.mean(cells, axis=(2, 4, 5)).reshape(b, 1, -1) > 120
    return jnp.where(bright, 3.0, 1.0) / 32


def test_overlap_by_hand(monkeypatch, tmp_path):
  monkeypatch.setattr(data, "build", lambda config, split: Halves())
  changes = {
    "evals.ratios": (0.25,),
    "evals.show_max": 0.5,
    "evals.seed": 1,
    "data.max_broken": 0.5,
  }
  job = make_job(tmp_path, "overlap", changes, method=Brightness())
  result = overlap.run(job)
  got = result.values
  assert result.counts == {"images": 3}
  assert got["object_share"] == 0.5
  # Each picture has 4 x 4 patches, 8 of them bright and 8 on the object. 60 %
  # of 8 * 3 + 8 * 1 = 32 are 7 bright patches: 18 < 19.2 <= 21. They lie on
  # the object in one of three pictures.
  want = {
    "attention/share": 7 / 16,
    "attention/precision": 7 / 21,
    "attention/recall": 7 / 24,
    "attention/iou": 7 / (21 + 24 - 7),
    "attmask_high_25/precision": 4 / 12,
    "attmask_high_25/recall": 4 / 24,
    "attmask_high_25/iou": 4 / (12 + 24 - 4),
    "attmask_low_25/precision": 8 / 12,
    # int(0.5 * 0.25 * 16) = 2 of the 8 most attended are revealed.
    "random_25/share": 4 / 16,
  }
  for name, value in want.items():
    assert got[name] == pytest.approx(value), name
  assert 2 / 16 <= got["attmask_hint_25/share"] <= 4 / 16
  drawn = [
    masking.host_masks(
      "random", seeds=(1, 0, i), grid=(4, 4), views=1, ratios=[0.25],
      variances=[0.0],
    )[0]
    for i in (0, 2, 3)
  ]  # fmt: skip
  left = np.stack(drawn).reshape(3, 4, 4)[:, :, :2]
  assert got["random_25/recall"] == pytest.approx(left.sum() / 24)
  assert [p.name for p in result.figures] == ["overlap.png"]
  with Image.open(result.figures[0]) as picture:
    assert picture.width >= 1000 and picture.height >= 600
  assert len(result.table.rows) == 1 + 5 + 1
  assert {len(row) for row in result.table.rows} == {len(result.table.headings)}


def test_overlap_is_the_same_on_any_number_of_devices(tmp_path):
  changes = {"evals.count": 11, "evals.ratios": (0.3, 0.5)}
  one = overlap.run(make_job(tmp_path, "overlap", changes, devices=1))
  eight = overlap.run(make_job(tmp_path, "overlap", changes))
  assert one.counts == eight.counts == {"images": 11}
  assert one.values.keys() == eight.values.keys()
  for name, value in one.values.items():
    # Rounding may swap two patches of one image: 1 of 11 * 4 in a region.
    drawn = name.startswith(("random", "block", "object"))
    assert eight.values[name] == pytest.approx(value, abs=0 if drawn else 0.03)


# Principal components -------------------------------------------------------


def test_components_of_known_tokens():
  rng = np.random.default_rng(0)
  directions = np.linalg.qr(rng.normal(size=(8, 3)))[0].T
  for row in directions:  # the sign that is promised
    row *= np.sign(row[np.abs(row).argmax()])
  # Orthogonal to a column of ones, so that nothing is left to centre.
  columns = np.c_[np.ones(50), rng.normal(size=(50, 3))]
  scores = np.linalg.qr(columns)[0][:, 1:]
  sizes = np.asarray([5.0, 3.0, 2.0])
  tokens = (scores * sizes) @ directions + rng.normal(size=8)
  got, shares = pca.components(tokens)
  np.testing.assert_allclose(got, scores * sizes, atol=1e-10)
  np.testing.assert_allclose(shares, sizes**2 / (sizes**2).sum(), atol=1e-12)


def test_components_against_a_covariance():
  tokens = np.random.default_rng(1).normal(size=(40, 6)) * np.arange(1, 7)
  got, shares = pca.components(tokens.astype(np.float32))
  centred = tokens - tokens.mean(axis=0)
  variances = np.linalg.eigvalsh(centred.T @ centred)[::-1]
  np.testing.assert_allclose((got**2).sum(axis=0), variances[:3], rtol=1e-5)
  np.testing.assert_allclose(shares, variances[:3] / variances.sum(), rtol=1e-5)
  with pytest.raises(InputError, match="2 patch tokens .* 3 components"):
    pca.components(tokens[:2])


def test_stretch_ignores_outliers_and_flat_components():
  scores = np.stack([np.arange(201.0), np.full(201, 1e-14)], axis=1)
  scores[0, 1] = -1e-14
  scores[200, 0] = 1e6
  got = pca.stretch(scores)
  # The 1st and 99th percentile of 201 values are the 2nd and 198th.
  assert got[100, 0] == pytest.approx((100 - 2) / (198 - 2))
  assert got[0, 0] == 0 and got[200, 0] == 1
  assert (got[:, 1] == 0.5).all()


# Which pictures -------------------------------------------------------------


def test_fit_keeps_the_aspect_ratio():
  pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
  image = Image.fromarray(pixels)
  got = pictures.fit(image, 32, 8)
  # 70 * 32 / 50 = 44.8, so 45 pixels, of which 40 are whole patches.
  want = image.resize((45, 32), Image.Resampling.BICUBIC).crop((2, 0, 42, 32))
  np.testing.assert_array_equal(got, np.asarray(want))
  assert pictures.fit(image.rotate(90, expand=True), 20, 8).shape == (24, 16, 3)


def test_forward_keeps_the_order_and_compiles_once_per_size():
  rng = np.random.default_rng(0)
  sizes = [(8, 8), (8, 16), (8, 8)] * 4 + [(8, 8)] * 3
  images = [rng.integers(0, 256, (*s, 3), np.uint8) for s in sizes]
  traced = []

  def fn(params, images):
    traced.append(images.shape)
    return params * jnp.mean(images.astype(jnp.float32), axis=(1, 2, 3))

  got = pictures.forward(fn, jnp.float32(2), images)
  want = [2 * image.astype(np.float64).mean() for image in images]
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert sorted(traced) == [(4, 8, 16, 3), (pictures.CHUNK, 8, 8, 3)]


def test_revealed_hints_make_room_where_masks_are_refilled():
  scores = np.random.default_rng(3).random((5, 16)).astype(np.float32)
  options = dict(ratio=0.5, show_max=0.25, policies=("attmask_hint",))
  count = lambda **more: pictures.policy_masks(
    scores, (4, 4), **options, **more
  )["attmask_hint"].sum(axis=1)
  # int(0.25 * 8) = 2 hints of the 4 most attended.
  assert count().tolist() == [6] * 5
  assert count(refill=True).tolist() == [8] * 5


def test_policy_masks_depend_on_the_image_and_not_on_its_place():
  scores = np.random.default_rng(0).random((3, 16)).astype(np.float32)
  options = dict(ratio=0.5, show_max=0.5, seed=3)
  rows = np.asarray([7, 2, 9])
  whole = pictures.policy_masks(scores, (4, 4), rows=rows, **options)
  assert list(whole) == [p for p in masking.POLICIES if p != "none"]
  for policy in ("random", "block"):
    assert len({mask.tobytes() for mask in whole[policy]}) == 3
  for i in range(3):
    alone = pictures.policy_masks(
      scores[i : i + 1], (4, 4), rows=rows[i : i + 1], **options
    )
    for policy in whole:
      np.testing.assert_array_equal(whole[policy][i], alone[policy][0])


class Silhouettes(shapes.Shapes):
  """Each object in white on black."""

  def load(self, index):
    return Image.fromarray(self.object_mask(index)).convert("RGB")


def test_object_goes_through_the_crop_of_its_image():
  source = Silhouettes(4, size=40, seed=0, split="val")
  for picture in pictures.crops(source, np.arange(4), 32):
    np.testing.assert_array_equal(
      picture.object_mask, picture.image[..., 0] > 127
    )
    assert 0.05 < picture.object_mask.mean() < 0.5


# Galleries ------------------------------------------------------------------


def test_attention_of_a_folder(tmp_path):
  rng = np.random.default_rng(0)
  folder = tmp_path / "images"
  folder.mkdir()
  for name, size in {"a": (20, 30), "b": (40, 20)}.items():
    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
  job = make_job(tmp_path, "attention", {"evals.images": str(folder)})
  result = attention.run(job)
  assert result.counts == {"pictures": 2}
  # 16 x 24 pixels and 32 x 16 pixels in patches of 4.
  want = (np.log(4 * 6) + np.log(8 * 4)) / 2
  assert result.values["entropy_uniform"] == pytest.approx(want)
  assert 0.99 * want < result.values["entropy"] <= want  # untrained: even
  assert 0.5 < result.values["kept"] < 0.65
  assert [row[0] for row in result.table.rows] == ["a.png", "b.png", "mean"]
  (path,) = result.figures
  assert path == tmp_path / "figures" / "attention.png"
  with Image.open(path) as picture:
    # Five cells of 1.5 inches; two rows of 1 and 2.4 (1.6 times as high).
    assert picture.width == pytest.approx(5 * 312, abs=60)
    assert picture.height == pytest.approx(300 * (16 / 24 + 1.6) + 220, abs=60)


def test_attention_of_a_folder_with_odd_files(tmp_path, caplog):
  folder = tmp_path / "images"
  folder.mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
  # No UTF-8, no formula, and more than 16 times as long as wide.
  for name in (b"caf\xe9", b"$\\oops$", b"plain"):
    file = os.path.join(os.fsencode(folder), name + b".png")
    Image.fromarray(pixels).save(file)
  Image.fromarray(pixels[:1, :17]).save(folder / "thin.png")
  (folder / "broken.png").write_bytes(b"nothing")
  job = make_job(tmp_path, "attention", {"evals.images": str(folder)})
  result = attention.run(job)
  names = [row[0] for row in result.table.rows]
  assert names == ["$\\oops$.png", "caf\\xe9.png", "plain.png", "mean"]
  assert "broken.png cannot be read" in caplog.text
  assert "thin.png has 17 x 1 pixels" in caplog.text
  assert result.figures[0].is_file()
  only = {"evals.images": str(folder / "thin.png")}
  with pytest.raises(InputError, match="thin.png holds only pictures that"):
    attention.run(make_job(tmp_path, "attention", only))


def test_validation_images_that_cannot_be_read_are_named(tmp_path, caplog):
  (tmp_path / "0.png").write_bytes(b"nothing")
  Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
  source = files.Flat(str(tmp_path))
  drawn = pictures.crops(source, np.arange(2), 8)
  assert [picture.name for picture in drawn] == ["1.png"]
  assert f"left out: {tmp_path}/0.png cannot be read: not an" in caplog.text


def test_attention_of_a_moving_picture(tmp_path):
  pixels = np.zeros((5, 16, 32, 3), np.uint8)
  # No two alike: Pillow would make one frame of them.
  pixels += 5 * np.arange(5, dtype=np.uint8)[:, None, None, None]
  pixels[:, :, :16] = 255
  pixels[2] = 255
  frames = [Image.fromarray(frame) for frame in pixels]
  path = tmp_path / "moving.gif"
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
  old = tmp_path / "figures" / "attention" / "0099.png"
  old.parent.mkdir(parents=True)
  old.write_bytes(b"of an earlier run")
  changes = {"evals.images": str(path), "evals.count": 0, "evals.every": 2}
  job = make_job(tmp_path, "attention", changes, method=Brightness())
  result = attention.run(job)
  assert result.counts == {"pictures": 3}
  assert [p.name for p in result.figures] == ["attention.png", "attention.gif"]
  with Image.open(result.figures[1]) as animation:
    assert animation.n_frames == 3
    assert animation.size == (2 * 32 * 16 + 4, 256)
  names = sorted(p.name for p in old.parent.iterdir())
  assert names == ["0001.png", "0002.png", "0003.png"]
  # All frames in one scale: the bright one is attended to everywhere.
  with Image.open(old.parent / names[1]) as frame:
    heat = np.asarray(frame)[:, 2 * 256 + 4 :]
  assert heat.shape == (256, 512, 3)
  assert (heat[..., 1] < 50).all() and (heat[..., 0] > 100).all()


def test_masks_of_validation_images(tmp_path):
  changes = {"evals.ratios": (0.25, 0.5), "evals.count": 3}
  result = masks.run(make_job(tmp_path, "masks", changes))
  assert [p.name for p in result.figures] == ["masks_25.png", "masks_50.png"]
  for path in result.figures:
    with Image.open(path) as picture:
      assert picture.width > 7 * 300 and picture.height > 3 * 300
  got = result.values
  for policy in ("attmask_high", "attmask_low", "random"):
    assert got[f"{policy}_25/hidden"] == 0.25
    assert got[f"{policy}_50/hidden"] == 0.5
  assert 0 < got["block_50/hidden"] <= 0.5
  # The two are complements at one half.
  recall = got["attmask_high_50/recall"] + got["attmask_low_50/recall"]
  assert recall == pytest.approx(1)
  assert len(result.table.rows) == 10
  assert len(result.table.headings) == 6


def test_pca_of_validation_images(tmp_path):
  result = pca.run(make_job(tmp_path, "pca", {"evals.count": 20}))
  assert result.counts == {"pictures": 20, "tokens": 20 * 16}
  shares = list(result.values.values())
  assert 1 > shares[0] > shares[1] > shares[2] > 0 and sum(shares) <= 1
  assert "16 of 20" in result.notes[0]
  with Image.open(result.figures[0]) as picture:
    assert picture.width > 3 * 300 and picture.height > 16 * 300


PALE = [177 + 0.1 * (c - 177) for c in (255, 255, 204)]  # of grey 100, no heat


def test_uniform_attention_by_hand():
  # Half the patches at 1 + d, half at 1 - d: the entropy is about d^2 / 2 below
  # log N, exactly 0.00983 for d = 0.14 and 0.01129 for d = 0.15.
  halves = lambda d: np.repeat([1 + d, 1 - d], 10)
  below = lambda d: (1 + d) / 2 * np.log(1 + d) + (1 - d) / 2 * np.log(1 - d)
  assert below(0.14) < 0.01 < below(0.15)
  entropy = np.log(20) - below(0.14)
  assert uniform.entropy(halves(0.14)) == pytest.approx(entropy)
  assert uniform.is_uniform(7 * halves(0.14))
  assert not uniform.is_uniform(7 * halves(0.15))
  assert uniform.is_uniform(np.zeros(4))
  assert not uniform.is_uniform(np.asarray([[0, 0], [0, 1]]))


def test_ends_of_the_colour_scale_by_hand():
  assert uniform.ends(np.asarray([[1.0, 2], [3, 2]])) == "0.50–1.50"
  close = np.asarray([1.0, 1.02, 0.98, 1.0])
  assert uniform.ends(close) == "uniform, 0.98–1.02"
  assert uniform.ends(np.zeros(3)) == "0"
  assert "Pale" not in uniform.caption(np.asarray([1.0, 3]))
  assert "Pale: uniform" in uniform.caption(np.asarray([1.0, 3]), close)


def test_maps_name_the_ends_of_their_scale():
  axis = Figure().subplots()
  drawing.show_heat(axis, np.zeros((8, 8, 3), np.uint8), np.eye(2) + 1, 4)
  assert [text.get_text() for text in axis.texts] == ["0.67–1.33"]


def test_uniform_attention_is_drawn_pale():
  image = np.full((8, 8, 3), 100, np.uint8)
  close = np.asarray([[1.0, 1.02], [0.98, 1.0]])
  np.testing.assert_allclose(
    drawing.heat(image, close, 4), np.broadcast_to(PALE, (8, 8, 3)), atol=1
  )
  # A quarter more or less has a scale of its own, up to the darkest red.
  spread = drawing.heat(image, np.asarray([[1.0, 1.25], [0.75, 1]]), 4)
  dark = [177 + 0.9 * (c - 177) for c in (128, 0, 38)]
  np.testing.assert_allclose(spread[0, 7], dark, atol=1)
  np.testing.assert_allclose(spread[7, 0], PALE, atol=1)


def test_pictures_of_uniform_attention_say_so(tmp_path):
  """Of a grey and a half bright picture, the first has nothing to attend to."""
  folder = tmp_path / "images"
  folder.mkdir()
  pixels = np.full((2, 16, 16, 3), 100, np.uint8)
  pixels[1, :, :8] = 255
  for name, image in zip("ab", pixels, strict=True):
    Image.fromarray(image).save(folder / f"{name}.png")
  changes = {"evals.images": str(folder)}
  job = make_job(tmp_path, "attention", changes, method=Brightness())
  result = attention.run(job)
  assert result.notes[0].startswith("The mean attention of 1 of 2 pictures is")
  with Image.open(result.figures[0]) as picture:
    drawn = np.asarray(picture.convert("RGB")).astype(int)
  # The darkest red over white, in two cells of the second row.
  dark = np.all(np.abs(drawn - [141, 25, 60]) < 3, axis=-1)
  middle = drawn.shape[0] // 2
  assert not dark[:middle].any() and dark[middle:].sum() > 50_000


class Faint(Brightness):
  """Attends to bright patches of 4 pixels 2 % more."""

  def attention(self, weights, images):
    return super().attention(weights, images) / 100 + 1


def test_a_film_of_uniform_attention_is_pale(tmp_path):
  pixels = np.full((2, 16, 16, 3), 100, np.uint8)
  pixels[:, :, :8] = 255
  pixels[1, 0, 0] = 254  # Pillow would make one frame of two that are alike
  film = tmp_path / "film.png"
  frames = [Image.fromarray(frame) for frame in pixels]
  frames[0].save(film, save_all=True, append_images=frames[1:])
  changes = {"evals.images": str(film)}
  attention.run(make_job(tmp_path, "attention", changes, method=Faint()))
  with Image.open(tmp_path / "figures" / "attention" / "0002.png") as frame:
    heat = np.asarray(frame)[:, -256:]
  bright = [254.5 + 0.1 * (c - 254.5) for c in (255, 255, 204)]
  for part, colour in ((heat[:, :128], bright), (heat[:, 128:], PALE)):
    want = np.broadcast_to(colour, (256, 128, 3))
    np.testing.assert_allclose(part, want, atol=1)


def test_heat_map_by_hand():
  image = np.full((9, 8, 3), 100, np.uint8)
  weights = np.asarray([[0.0, 1.0], [0.25, 3.0]])
  got = drawing.heat(image, weights, 4, bounds=(0, 1))
  pale = 127 + 50
  # Of YlOrRd (ColorBrewer): both ends, and below what is at a quarter. Opacity
  # is 0.1 + 0.8 * sqrt(share).
  low = [pale + 0.1 * (c - pale) for c in (255, 255, 204)]
  high = [pale + 0.9 * (c - pale) for c in (128, 0, 38)]
  np.testing.assert_allclose(got[0, 0], low, atol=1)
  np.testing.assert_allclose(got[3, 4], high, atol=1)
  quarter = [pale + 0.5 * (c - pale) for c in (254, 217, 118)]
  np.testing.assert_allclose(got[4, 3], quarter, atol=1)
  np.testing.assert_array_equal(got[7, 7], got[3, 4])  # beyond the scale
  assert (got[8] == pale).all()  # no patch
  scaled = drawing.heat(image, 5 * weights + 1, 4, bounds=(1, 6))
  np.testing.assert_array_equal(got, scaled)


def test_patch_outline_has_the_edges_of_the_region():
  from matplotlib.figure import Figure

  axis = Figure().add_subplot()
  mask = np.asarray([[1, 1, 0], [0, 0, 0], [0, 0, 1]], bool)
  drawing.outline_patches(axis, mask, 10)
  lines = axis.collections[0].get_segments()
  got = {tuple(map(tuple, np.asarray(line) + 0.5)) for line in lines}
  assert len(lines) == 6 + 4
  assert ((0, 0), (10, 0)) in got and ((20, 0), (20, 10)) in got
  assert ((10, 0), (10, 10)) not in got  # between two of the region
  assert ((30, 20), (30, 30)) in got


# Mistakes -------------------------------------------------------------------


def refuses(run, job, match):
  with pytest.raises(InputError, match=match):
    run(job)
  assert not list(job.folder.rglob("*.png"))


def test_clear_messages(monkeypatch, tmp_path):
  def job(name, changes, **options):
    options.setdefault("method", Brightness())
    return make_job(tmp_path, name, changes, **options)

  missing = str(tmp_path / "nothing_here")
  where = {"evals.images": missing}
  refuses(attention.run, job("attention", where), "nothing_here")
  # Before an evaluation runs its keys are checked, and its images' size.
  keys = lambda job: evaluate.check_values(job.config)
  sizes = lambda job: evaluate.complete(job.config, job.weights)
  refuses(keys, job("attention", {"evals.keep": 0.0}), "keep 0")
  refuses(keys, job("masks", {"evals.ratios": (0.3, 30.0)}), "30.0")
  refuses(keys, job("masks", {"evals.ratios": ()}), "ratios")
  refuses(keys, job("overlap", {"evals.ratios": (0.0,)}), "ratios .0.0,.")
  refuses(keys, job("masks", {"evals.show_max": 2.0}), "show_max 2.0")
  refuses(keys, job("masks", {"evals.count": -1}), "count -1")
  refuses(keys, job("overlap", {"evals.count": -1}), "count -1")
  refuses(keys, job("pca", {"evals.every": 0}), "every 0")
  refuses(keys, job("masks", {"evals.policies": ("none",)}), "none")
  refuses(sizes, job("masks", {"data.image_size": 3}), "3 .* size 4: .* 4 or 8")
  refuses(
    sizes, job("overlap", {"data.image_size": 18}), "18 is not .* 16 or 20"
  )
  plain = types.SimpleNamespace(name="plain pictures")
  monkeypatch.setattr(data, "build", lambda config, split: plain)
  refuses(overlap.run, job("overlap", {}), "plain pictures has none: set")
