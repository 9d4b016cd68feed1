"""A run's page and the comparison of runs, from files written by hand."""

import base64
import io
import json
import os
import re
import types

import numpy as np
import pytest
from PIL import Image

from attmask_jax.errors import InputError
from attmask_jax.evals import compare
from attmask_jax.evals.job import Job
from attmask_jax.runs import records, report

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
  assert report.binned(points, 10) == points
  assert report.binned(points, 4) == [
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
