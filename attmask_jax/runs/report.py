"""Report of a run: report.html, one self-contained file.

Numbers, curves, pictures and evaluations of a run directory. All of it comes
from other files of the directory. A damaged file is named on the page and does
not keep it from being written.
"""

import datetime
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging
from PIL import Image

from attmask_jax import atomic
from attmask_jax.runs import curves, judgement, metric_names, panel, records
from attmask_jax.runs.markup import table, term, text, uri

MAX_PICTURE_BYTES = 1_000_000  # larger pictures are shown as JPEG
MAX_PICTURE_WIDTH = 2400  # pixels, of these JPEGs
# Logged once: no columns of the table of evaluations.
CONSTANTS = ("knn/chance", "knn/queries", "knn/teacher")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.2rem; }
.sub, .note { opacity: .75; } .wide { overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.facts div { background: var(--soft); border-radius: .5rem;
  padding: .6rem 1rem; }
.facts b { display: block; font-size: 1.3rem; }
.facts b, table { font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line);
  text-align: right; }
td:first-child, th:first-child { text-align: left; }
.curves { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.curves img, figure img { width: 100%; background: #fff; border-radius: .5rem; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; opacity: .85; }
.curves figure { margin: 0; } abbr { text-decoration: underline dotted; }
.panel { border: 1px solid var(--line); border-radius: .7rem;
  padding: .4rem 1.2rem; margin: 1.2rem 0; }
.verdict { font-size: 1.2rem; font-weight: 600; }
.panel .note { font-size: .85rem; } .panel td + td { white-space: nowrap; }
details td { text-align: left; font-family: ui-monospace, monospace;
  font-size: .85rem; }
"""


def write(folder: pathlib.Path) -> pathlib.Path:
  """Replaces FOLDER/report.html atomically; returns its path."""
  folder = pathlib.Path(folder)
  problems: list[str] = []
  config = records.read_json(folder / "config.json", problems) or {}
  lines = records.read_metrics(folder / "metrics.jsonl", problems)
  per_epoch = records.steps_per_epoch(config)
  evaluations = records.read(folder, problems)
  if not config and evaluations:
    config = evaluations[-1].get("config") or {}
  parts = [
    _head(folder, config),
    panel.section(config, lines),
    _curves(config, lines),
    _scores(lines, per_epoch),
    _pictures(folder, problems),
    *(_record(record, folder) for record in reversed(evaluations)),
    _metrics(lines),
    _config(config),
  ]
  body = "\n".join(part for part in parts if part)
  notes = "".join(f'<p class="note">{text(p)}</p>' for p in problems)
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{text(folder.resolve().name)}</title><style>{STYLE}</style>"
    f"</head><body>\n{body}\n{notes}</body></html>\n"
  )
  path = folder / "report.html"
  with atomic.replaced(path) as temporary:
    temporary.write_text(page, encoding="utf-8")
  return path


def _head(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
  """Title and description."""
  description = [
    config.get("evals.name") or config.get("method.name"),
    config.get("method.mask"),
    config.get("method.variant"),
    config.get("data.source"),
    datetime.datetime.now().isoformat(" ", "minutes"),
  ]
  return (
    f"<h1>{text(folder.resolve().name)}</h1>"
    f'<p class="sub">{text(" · ".join(str(d) for d in description if d))}</p>'
  )


def _curves(config: Mapping[str, Any], lines: list[dict[str, Any]]) -> str:
  """The plots, each with the meaning of its metrics."""
  figures = []
  for plot in curves.plots(config, lines):
    image = uri(plot.svg, "image/svg+xml")
    names = ", ".join(term(name) for name in plot.names)
    remark = f"<br>{text(plot.remark)}" if plot.remark else ""
    figures.append(
      f'<figure><img alt="{text(plot.title)}" src="{image}">'
      f"<figcaption>{names}{remark}</figcaption></figure>"
    )
  if not figures:
    return ""
  return f'<h2>Curves</h2><div class="curves">{"".join(figures)}</div>'


def _scores(lines: list[dict[str, Any]], per_epoch: int) -> str:
  """k-NN or accuracy at every evaluation during training."""
  measured = [
    line for line in lines if any(k.startswith(("knn/", "val/")) for k in line)
  ]
  keys = [
    key
    for key in dict.fromkeys(key for line in measured for key in line)
    if key.startswith(("knn/", "val/", "ema/")) and key not in CONSTANTS
  ]
  if not measured:
    return ""
  number = lambda x: f"{x:.2f}" if isinstance(x, (int, float)) else "-"
  rows = [
    [
      f"{line['step'] / per_epoch:g}" if per_epoch else "-",
      str(line["step"]),
      *(number(line.get(key)) for key in keys),
    ]
    for line in measured
  ]
  return (
    "<h2>Evaluations during training</h2>"
    f'<p class="sub">{text(_measured_network(keys, lines))}</p>'
    + table(["epoch", "step", *map(term, keys)], rows)
  )


def _measured_network(keys: list[str], lines: list[dict[str, Any]]) -> str:
  """Which network the evaluations during training measure."""
  if not any(key.startswith("knn/") for key in keys):
    ema = any(key.startswith("ema/") for key in keys)
    return "Of the classifier in training" + (
      " (val) and of the moving average of its weights (ema)." if ema else "."
    )
  teacher = judgement.first(lines, "knn/teacher")
  if teacher is None:
    return "Of the teacher; of the student if the method has no teacher."
  return "Of the teacher." if teacher else "Of the student."


def _pictures(folder: pathlib.Path, problems: list[str]) -> str:
  """All PNGs of FOLDER/figures."""
  figures = [
    _figure(path, path.stem, problems)
    for path in sorted((folder / "figures").glob("*.png"))
  ]
  return "<h2>Pictures</h2>" + "".join(figures) if figures else ""


def _figure(path: pathlib.Path, caption: str, problems: list[str]) -> str:
  try:
    content = path.read_bytes()
    source = uri(content, "image/png")
    if len(content) > MAX_PICTURE_BYTES:
      source = _smaller(content)
  except OSError:
    problems.append(f"The picture {path} is missing or damaged.")
    return ""
  label = text(caption)
  return (
    f'<figure><img alt="{label}" src="{source}">'
    f"<figcaption>{label}</figcaption></figure>"
  )


def _images(config: Mapping[str, Any]) -> str:
  """Images of an evaluation: "folder /data/pets, 128 px"."""
  words = [config.get("data.source"), config.get("data.path")]
  if config.get("evals.images"):
    words = [config["evals.images"]]
  name = " ".join(str(word) for word in words if word)
  if name and (config.get("data.subset") or 0) > 0:
    name += f", {config['data.subset']} training images per class"
  if name and config.get("data.image_size"):
    name += f", {config['data.image_size']} px"
  return name


def _smaller(png: bytes) -> str:
  """A data URI of a large picture as JPEG."""
  file = io.BytesIO()
  with Image.open(io.BytesIO(png)) as picture:
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_PICTURE_WIDTH, picture.height))
    picture.save(file, "jpeg", quality=85)
  return uri(file.getvalue(), "image/jpeg")


def _record(record: Mapping[str, Any], folder: pathlib.Path) -> str:
  """Table, notes and pictures of one evaluation."""
  try:
    weights = record.get("weights") or {}
    whose = weights.get("network")
    step = f", step {weights['step']}" if "step" in weights else ""
    title = str(record["evaluation"])
    title += f" of the {whose} network{step}" if whose else ""
    about = [
      _images(record.get("config") or {}),
      record.get("date"),
    ]
    counts = record.get("counts") or {}
    about += [f"{v:,} {k}" for k, v in counts.items()]
    cells = record["table"]
    notes = "".join(
      f'<p class="note">{text(note)}</p>' for note in record.get("notes", ())
    )
    home = pathlib.Path(record.get("folder", folder))
    figures = ""
    if home.resolve() != folder.resolve():  # else they are above
      # A later evaluation in that directory may have replaced the pictures.
      if (records.read_json(home / "results.json", []) or {}) == record:
        figures = "".join(
          _figure(home / name, name, []) for name in record.get("figures", ())
        )
      else:
        notes += '<p class="note">Its pictures are no longer available.</p>'
    return (
      f"<h2>{text(title)}</h2>"
      f'<p class="sub">{text(" · ".join(str(a) for a in about if a))}</p>'
      + table(cells["headings"], cells["rows"])
      + notes
      + figures
    )
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    logging.warning(
      "a record of an evaluation in %s is damaged: %s", folder, error
    )
    return '<p class="note">The record of an evaluation is damaged.</p>'


def _metrics(lines: list[dict[str, Any]]) -> str:
  """Meaning of every metric of the run, collapsed."""
  names = dict.fromkeys(
    metric_names.key(name) for line in lines for name in line if name != "step"
  )
  metrics = [(name, metric_names.METRICS.get(name)) for name in names]
  rows = [[name, m.meaning, m.unit, m.better] for name, m in metrics if m]
  if not rows:
    return ""
  return (
    "<h2>Metrics</h2><details><summary>what they mean</summary>"
    + table(["metric", "meaning", "unit", "better"], rows)
    + "</details>"
  )


def _config(config: Mapping[str, Any]) -> str:
  """The config, collapsed."""
  if not config:
    return ""
  rows = [[key, json.dumps(value)] for key, value in sorted(config.items())]
  return (
    "<h2>Config</h2><details><summary>all keys</summary>"
    + table(["key", "value"], rows)
    + "</details>"
  )
