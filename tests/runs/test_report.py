"""A run's page and the comparison of runs, from files written by hand."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import types
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from attmask_jax.errors import InputError
from attmask_jax.evals import compare
from attmask_jax.evals.job import Job
from attmask_jax.runs import curves, records, report

DATA = pathlib.Path(__file__).parents[1] / "data" / "runs_0_1"
CONFIG = {
  "data.images": 40,
  "data.batch_size": 10,
  "data.source": "shapes",
  "optim.epochs": 5,
  "method.name": "attmask",
  "method.mask": "attmask_high",
}
LINES = [
  {"step": 0, "knn/top1": 10.0},
  {"step": 4, "train/loss": 9.0},
  {"step": 8, "epoch/loss": 7.5, "knn/top1": 20.0},
  {"step": 20, "epoch/loss": 6.25, "knn/top1": 17.5},
]


def write_run(folder, lines=LINES, **changes):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(CONFIG | changes))
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return folder


def record(value, *, digest="d", **config):
  return {
    "evaluation": "knn",
    "values": {"k20/top1": value},
    "counts": {"queries": 7},
    "table": {"headings": ["k", "top-1 %"], "rows": [["20", f"{value:.2f}"]]},
    "figures": [],
    "notes": ["A <note> & more."],
    "weights": {"network": "teacher", "step": 20, "digest": digest},
    "config": config,
  }


def test_page_shows_all_that_the_folder_holds(tmp_path):
  folder = write_run(tmp_path / "my <run>")
  (folder / "figures").mkdir()
  Image.new("RGB", (4, 3), (9, 8, 7)).save(folder / "figures" / "masks.png")
  records.append(folder, record(12.34))
  page = report.write(folder).read_text()
  assert "my &lt;run&gt;" in page and "<run>" not in page
  assert "A &lt;note&gt; &amp; more." in page
  for text in ("12.34", "20 of 20", "17.50 %", "20.00 %", "6.2500", "7 queries",
               "attmask_high", "method.mask"):  # fmt: skip
    assert text in page, text
  # Epochs: 4 steps each.
  assert "<td>0</td><td>0</td><td>10.00</td>" in page
  assert "<td>2</td><td>8</td><td>20.00</td>" in page
  png = re.search(r'alt="masks" src="data:image/png;base64,([^"]+)"', page)
  file = folder / "figures" / "masks.png"
  assert base64.b64decode(png[1]) == file.read_bytes()
  # One file that opens without a server: nothing else is fetched.
  assert not re.search(r'(src|href)="(?!data:)', page)
  assert 'alt="Loss" src="data:image/svg' in page


def test_names_that_are_no_utf8_are_escaped(tmp_path):
  odd = os.fsdecode(b"caf\xe9")
  folder = write_run(tmp_path / odd, **{"data.path": f"/data/{odd}"})
  page = report.write(folder).read_text(encoding="utf-8")
  assert "<h1>caf\\xe9</h1>" in page


def cells(page, label):
  """The cells of the table row whose first cell is a term of this label."""
  row = re.search(rf">{re.escape(label)}</abbr></td>(.*?)</tr>", page)
  return re.findall(r"<td>(.*?)</td>", row[1])


def test_panel_answers_whether_the_run_has_learned(tmp_path):
  lines = [
    {"step": 0, "knn/top1": 60.0, "knn/chance": 12.5, "knn/queries": 800,
     "knn/teacher": 1, "overlap/attmask_high": 0.3, "overlap/random": 0.25},
    {"step": 4, "train/img_per_s": 20.0, "train/teacher_entropy": 3.0},
    {"step": 8, "knn/top1": 20.0, "epoch/nmi": 0.25, "epoch/loss": 5.0,
     "epoch/ari": -0.0004},
    {"step": 20, "knn/top1": 17.5, "epoch/nmi": 0.5, "epoch/loss": 6.25,
     "overlap/attmask_high": 0.4, "overlap/random": 0.24},
  ]  # fmt: skip
  folder = write_run(tmp_path / "run", lines, **{"method.out_dim": 1024})
  page = report.write(folder).read_text()
  panel = page[page.index('<section class="panel">') : page.index("</section>")]
  assert page.index('class="panel"') < page.index("<h2>Curves")
  # Mean 0.3875: 2 sqrt(2 * 0.3875 * 0.6125 / 800) = 0.0487.
  assert (
    "k-NN is below the untrained network by more than noise: this run has made "
    "the features worse (17.50 % against 60.00 %, noise ± 4.9 points)." in panel
  )
  assert "Rule: k-NN over n queries" in panel
  assert "<th>untrained</th><th>without learning</th><th>best</th>" in panel
  assert cells(panel, "k-NN top-1") == [
    "17.50 %", "60.00 %", "12.50 % (chance)", "20.00 % (epoch 2)",
  ]  # fmt: skip
  assert cells(panel, "prototypes and labels, NMI") == [
    "0.500", "0.250 (first epoch)", "–", "–",
  ]  # fmt: skip
  assert cells(panel, "prototypes and labels, ARI") == [
    "0.000", "0.000 (first epoch)", "0.000 (chance)", "–",
  ]  # fmt: skip
  assert cells(panel, "mask on the object, attmask_high") == [
    "40.0 %", "30.0 %", "24.0 % (random mask)", "–",
  ]  # fmt: skip
  # 10 log 2 = 6.93.
  assert cells(panel, "entropy of the teacher") == [
    "3.00 nats", "3.00 nats (first steps)", "6.93 nats (uniform)", "–",
  ]  # fmt: skip
  # 20 steps of 10 images at 20 images/s.
  assert "time in training steps<b>10 s</b>" in panel
  assert "images/s, median<b>20</b>" in panel
  assert "Of the teacher." in page
  assert "knn/top1</abbr></th><th>" not in panel
  assert "knn/chance</abbr></th>" not in page  # once, not a column


def test_terms_have_tooltips_and_a_table(tmp_path):
  page = report.write(write_run(tmp_path / "run")).read_text()
  assert '<th><abbr title="accuracy of weighted k-NN on the teacher' in page
  assert '<abbr title="knn/top1: accuracy of weighted k-NN' in page
  table = page[page.index("<h2>Metrics") : page.index("<h2>Config")]
  assert "<td>loss</td><td>the minimised loss</td><td></td><td>lower</td>" in (
    table
  )
  assert "<td>knn/top1</td>" in table and "knn/top5" not in table


@pytest.mark.parametrize(
  "network, title",
  [
    ("teacher", "knn of the teacher network, step 20"),
    ("student", "knn of the student network, step 20"),
    ("untrained", "knn of the untrained network, step 20"),
  ],
)
def test_evaluations_say_which_network(tmp_path, network, title):
  entry = record(12.34)
  entry["weights"]["network"] = network
  records.append(tmp_path, entry)
  assert f"<h2>{title}</h2>" in report.write(tmp_path).read_text()


@pytest.mark.parametrize(
  "config, text",
  [
    ({"data.source": "", "data.subset": -1}, "7 queries"),
    ({"data.source": "shapes", "data.subset": 3, "data.image_size": 32},
     "shapes, 3 training images per class, 32 px · 7 queries"),
    ({"data.source": "shapes", "data.subset": 0}, "shapes · 7 queries"),
  ],
)  # fmt: skip
def test_evaluations_say_on_which_images(tmp_path, config, text):
  records.append(tmp_path, record(12.34, **config))
  page = report.write(tmp_path).read_text()
  assert (
    f'<h2>knn of the teacher network, step 20</h2><p class="sub">{text}<'
    in (page)
  )


def test_evaluations_during_training_say_which_network(tmp_path):
  for network, text in ((0, "Of the student."), (1, "Of the teacher.")):
    lines = [{"step": 0, "knn/top1": 1.0, "knn/teacher": network}]
    page = report.write(write_run(tmp_path / "run", lines)).read_text()
    assert text in page
  page = report.write(write_run(tmp_path / "run")).read_text()
  assert "Of the teacher; of the student if the method has no teacher." in page
  lines = [{"step": 4, "val/top1": 1.0, "ema/top1": 2.0}]
  page = report.write(write_run(tmp_path / "run", lines)).read_text()
  assert "classifier in training (val) and of the moving average" in page


@pytest.mark.parametrize(
  "name", ["attmask", "attmask_stopped", "mae", "extrema", "probe", "finetune"]
)
def test_page_of_a_run_of_version_0_1(tmp_path, name):
  folder = shutil.copytree(
    DATA / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints")
  )
  page = report.write(folder).read_text()
  assert 'class="panel"' in page and "damaged" not in page


# Curves -----------------------------------------------------------------------

WARM = {
  "method.temp_warmup_epochs": 3,
  "method.teacher_temp": [0.04, 0.07],
  "method.teacher_patch_temp": [0.04, 0.04],
}


@pytest.mark.parametrize(
  "changes, span",
  [
    ({}, (0, 3)),
    ({"method.mask_start_epoch": 50}, (0, 3)),  # of patches, which are flat
    ({"method.teacher_patch_temp": [0.04, 0.07]}, (0, 3)),
    (
      {
        "method.mask_start_epoch": 50,
        "method.teacher_patch_temp": [0.04, 0.07],
      },
      (0, 53),
    ),
    ({"method.teacher_temp": [0.07, 0.07]}, None),
    ({"method.temp_warmup_epochs": 0}, None),
    ({"method.teacher_temp": None}, None),
  ],
)
def test_warm_up_of_the_temperature(changes, span):
  assert curves.temperature_warmup(WARM | changes) == span


def test_warm_up_is_shaded_and_explained(tmp_path):
  lines = [*LINES, {"step": 20, "epoch/cls": 1.0}, {"step": 16, "epoch/cls": 2}]
  loss, knn = curves.plots(CONFIG | WARM, lines)
  assert (loss.title, loss.names) == ("Loss", ("epoch/loss", "epoch/cls"))
  assert "epochs 0 to 3. A loss that rises during it is expected" in loss.remark
  assert b"temperature warm-up" in loss.svg and b"warm-up" not in knn.svg
  flat, _ = curves.plots(CONFIG, lines)
  assert not flat.remark and b"warm-up" not in flat.svg
  folder = write_run(tmp_path / "run", lines, **WARM)
  assert "A loss that rises during it" in report.write(folder).read_text()


def test_a_loss_with_a_teacher_follows_its_entropy():
  lines = [*LINES, {"step": 4, "train/teacher_entropy": 1.0}]
  loss = curves.plots(CONFIG, lines)[0]
  assert "rises and falls with the teacher's entropy" in loss.remark


def test_legends_are_outside_of_the_axes():
  lines = [
    {"step": 0, "knn/top1": 10.0, "knn/top5": 50.0, "knn/chance": 12.5},
    {"step": 20, "knn/top1": 20.0, "knn/top5": 60.0},
  ]
  plot, _ = curves.plots(CONFIG, lines)
  tree = ElementTree.fromstring(plot.svg)
  inside = tree.find(".//*[@id='axes_1']")
  assert tree.find(".//*[@id='legend_1']") is not None
  assert inside.find(".//*[@id='legend_1']") is None
  assert b"top-1 by chance" in plot.svg


def test_large_pictures_are_in_the_page_too(tmp_path):
  folder = write_run(tmp_path / "run")
  (folder / "figures").mkdir()
  noise = np.random.default_rng(0).integers(0, 256, (700, 2600, 3))
  picture = Image.fromarray(noise.astype(np.uint8))
  picture.save(folder / "figures" / "attention.png")
  page = report.write(folder).read_text()
  found = re.search(
    r'alt="attention" src="data:image/jpeg;base64,([^"]+)"', page
  )
  shown = Image.open(io.BytesIO(base64.b64decode(found[1])))
  assert shown.size == (2400, 646)


def test_pictures_of_a_folder_used_again_are_not_shown(tmp_path):
  folder, home = write_run(tmp_path / "run"), tmp_path / "eval"
  (home / "figures").mkdir(parents=True)
  Image.new("RGB", (4, 3)).save(home / "figures" / "a.png")
  told = record(12.34) | {"figures": ["figures/a.png"], "folder": str(home)}
  records.append(folder, told)
  (home / "results.json").write_text(json.dumps(told))
  assert 'alt="figures/a.png"' in report.write(folder).read_text()
  (home / "results.json").write_text(json.dumps(told | {"date": "later"}))
  page = report.write(folder).read_text()
  assert 'alt="figures/a.png"' not in page and "no longer available" in page


def test_page_of_damaged_files_says_so(tmp_path):
  folder = write_run(tmp_path / "run")
  with (folder / "metrics.jsonl").open("ab") as file:
    file.write(b'{"step": 21, "tr\xff\n[1]\n')
  (folder / "evals.jsonl").write_text("{\n" + json.dumps({"table": 3}) + "\n")
  (folder / "results.json").write_text("x")
  (folder / "config.json").write_text("[]x")
  page = report.write(folder).read_text()
  for text in ("config.json is damaged", "2 lines of metrics.jsonl are damaged",
               "evals.jsonl line 1 is damaged", "results.json is damaged",
               "The record of an evaluation is damaged"):  # fmt: skip
    assert text in page, text
  assert "17.50" in page


def test_page_of_an_empty_folder(tmp_path):
  assert "<h1>" in report.write(tmp_path).read_text()


def test_of_the_same_evaluation_the_last_record_counts(tmp_path):
  for entry in (
    record(1.0), record(2.0, k=5), record(3.0, digest="e"), record(4.0),
  ):  # fmt: skip
    records.append(tmp_path, entry)
  found = [r["values"]["k20/top1"] for r in records.read(tmp_path)]
  assert found == [2.0, 3.0, 4.0]


def test_long_curves_become_means():
  points = [(float(i), 2.0 * i) for i in range(10)]
  assert curves.binned(points, 10) == points
  assert curves.binned(points, 4) == [
    (1.0, 2.0), (4.0, 8.0), (7.0, 14.0), (9.0, 18.0),
  ]  # fmt: skip


def job(folder, runs, labels=()):
  config = types.SimpleNamespace(
    evals=types.SimpleNamespace(name="compare", runs=runs, labels=labels)
  )
  return Job(config, None, folder)


def test_comparison_counts_epochs_and_what_differs(tmp_path):
  one = write_run(tmp_path / "one")
  lines = [
    {"step": 0, "knn/top1": 10.0},
    {"step": 4, "epoch/loss": 5.0, "knn/top1": 21.0},
    {"step": 8, "epoch/loss": 4.0, "knn/top1": 30.0},
  ]
  two = write_run(tmp_path / "two", lines, **{"method.mask": "random"})
  found = compare.run(job(tmp_path, f"{one},{two}"))
  assert found.values == {
    "one/first": 10.0, "one/last": 17.5, "one/best": 20.0,
    "one/reached_epoch": 2.0, "one/loss": 6.25,
    "two/first": 10.0, "two/last": 30.0, "two/best": 30.0,
    "two/reached_epoch": 1.0, "two/loss": 4.0,
  }  # fmt: skip
  assert found.notes == (
    "one and two differ in method.mask (attmask_high and random).",
  )
  assert "epoch of 20.0 %" in found.table.headings
  # The untrained network is never the best, nor does it reach anything.
  worse = [{"step": 0, "knn/top1": 90.0}, {"step": 4, "knn/top1": 19.0}]
  three = write_run(tmp_path / "three", worse)
  values = compare.run(job(tmp_path, f"{one},{three}")).values
  assert values["three/best"] == 19.0 and "three/reached_epoch" not in values
  alone = compare.run(job(tmp_path, str(three)))
  assert alone.values["three/reached_epoch"] == 1.0
  assert "epoch of 19.0 %" in alone.table.headings
  tuned = write_run(tmp_path / "tuned", [{"step": 4, "val/top1": 50.0}])
  mixed = compare.run(job(tmp_path, (str(one), str(tuned))))
  assert "Top-1 is accuracy or k-NN top-1, which cannot be" in mixed.notes[0]
  picture = np.asarray(Image.open(found.figures[0]))
  assert picture.shape[0] > 500 and len(np.unique(picture)) > 50


def test_comparisons_that_cannot_be_made(tmp_path):
  one = str(write_run(tmp_path / "one"))
  for runs, labels, match in (
    ((), (), "evals.runs is empty"),
    (f"{one},{one}", "a", "must name each of the 2 runs"),
    ((one, one), ("a", "a"), "with different names"),
    ((str(tmp_path),), (), "holds no run|config.json"),
  ):
    with pytest.raises(InputError, match=match):
      compare.run(job(tmp_path, runs, labels))
