"""The report as a browser draws it; skipped where there is no Chromium."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import test_report
from PIL import Image

from attmask_jax.runs import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WIDTH, HEIGHT = 1200, 1000
CONFIG = test_report.CONFIG | {
  "method.temp_warmup_epochs": 2,
  "method.teacher_temp": [0.04, 0.07],
}
# Appended to a copy of the page: what the browser made of it.
MEASURE = """<script>
const box = s => document.querySelector(s).getBoundingClientRect();
const images = [...document.images];
document.body.dataset.measured = JSON.stringify({
  width: document.documentElement.scrollWidth,
  panel: box(".panel").bottom,
  left: box(".panel").left,
  verdict: parseFloat(getComputedStyle(document.querySelector(".verdict"))
    .fontSize),
  broken: images.filter(i => !(i.complete && i.naturalWidth)).length,
  images: images.length,
  terms: document.querySelectorAll("abbr[title]").length,
});
</script>"""

pytestmark = pytest.mark.skipif(
  BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}"
)


def browse(tmp_path, page, *options, height=HEIGHT):
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
    "--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}",
    f"--window-size={WIDTH},{height}", *options, page.as_uri(),
  ]  # fmt: skip
  return subprocess.run(
    command, check=True, capture_output=True, text=True, timeout=120
  ).stdout


@pytest.fixture
def page(tmp_path):
  """Report of a run whose loss falls, rises in the warm-up, falls again."""
  folder = tmp_path / "run"
  (folder / "figures").mkdir(parents=True)
  Image.new("RGB", (900, 300), (200, 30, 30)).save(
    folder / "figures" / "masks.png"
  )
  (folder / "config.json").write_text(json.dumps(CONFIG))
  losses = {4: 5.8, 8: 4.7, 12: 5.6, 16: 5.5, 20: 5.4}
  lines = [{"step": 0, "knn/top1": 12.0, "knn/queries": 800,
            "knn/chance": 12.5, "overlap/attmask_high": 0.3,
            "overlap/random": 0.25}]  # fmt: skip
  lines += [
    {"step": step, "epoch/loss": loss, "epoch/nmi": 0.01 * step,
     "epoch/ari": 0.001, "train/img_per_s": 20.0,
     "train/teacher_entropy": 2.0}
    for step, loss in losses.items()
  ]  # fmt: skip
  lines.append({"step": 20, "knn/top1": 45.0, "overlap/attmask_high": 0.4,
                "overlap/random": 0.25})  # fmt: skip
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return report.write(folder)


def test_layout_in_a_browser(tmp_path, page):
  copy = page.with_name("measured.html")
  text = page.read_text().replace("</body>", MEASURE + "</body>")
  copy.write_text(text)
  dom = browse(tmp_path, copy, "--dump-dom", "--virtual-time-budget=3000")
  measured = re.search(r'data-measured="([^"]+)"', dom)[1]
  got = json.loads(measured.replace("&quot;", '"'))
  assert got["width"] <= WIDTH  # nothing sticks out
  assert 0 < got["panel"] <= HEIGHT  # the answer is on the first screen
  assert got["left"] >= 16 and got["verdict"] > 16
  # Six plots and one picture.
  assert got["broken"] == 0 and got["images"] == 7
  assert got["terms"] > 10


def test_screenshot(tmp_path, page):
  path, height = tmp_path / "page.png", 1500
  browse(tmp_path, page, f"--screenshot={path}", height=height)
  pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
  assert pixels.shape == (height, WIDTH, 3)
  dark = (pixels.max(axis=-1) < 110).mean(axis=1)
  # Text or lines in each fifth of the page, and nowhere a black area.
  for part in np.split(dark, 5):
    assert 0 < part.mean() < 0.2
  # The loss is the first of three plots: of the epochs 0.8 to 5.2 that its axis
  # spans the first 1.2 are shaded, in orange on white.
  loss = pixels[:, : WIDTH // 3]
  axis = (loss.max(axis=-1) < 190).sum(axis=1).max()
  shaded = np.all(np.abs(loss - [252, 240, 218]) < 4, axis=-1)
  columns = np.flatnonzero(shaded.sum(axis=0) > 100)
  share = (columns[-1] - columns[0] + 1) / axis
  assert axis > 300 and share == pytest.approx(1.2 / 4.4, abs=0.01)
