"""Report of a run: report.html, one self-contained file.

Numbers, curves, pictures and evaluations of a run directory. All of it comes
from other files of the directory. A damaged file is named on the page and does
not keep it from being written.
"""

import base64
import datetime
import html
import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
from PIL import Image

from attmask_jax import atomic
from attmask_jax.runs import metrics, records

MAX_POINTS = 500  # per curve; longer ones are averaged in bins
MAX_PICTURE_BYTES = 1_000_000  # larger pictures are shown as JPEG
MAX_PICTURE_WIDTH = 2400  # pixels, of these JPEGs
# Title: metrics of the plot; those that a run does not have are left out.
CURVES = {
  "Loss": ("epoch/loss", "epoch/cls", "epoch/patch", "val/loss", "train/loss"),
  "k-NN and accuracy, %": (
    "knn/top1", "knn/top5", "val/top1", "val/top5", "ema/top1",
  ),
  "Clusters against labels": ("epoch/nmi", "epoch/ari", "epoch/fscore"),
  "Learning rate": ("train/lr",),
  "Weight decay": ("train/wd",),
  "Teacher momentum": ("train/momentum",),
  "Gradient norm": ("train/grad_norm",),
  "Images per second": ("train/img_per_s",),
}  # fmt: skip
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
figure { margin: 1rem 0; }
details td { text-align: left; font-family: ui-monospace, monospace;
  font-size: .85rem; }
"""


def write(folder: pathlib.Path) -> pathlib.Path:
  """Replaces FOLDER/report.html atomically; returns its path."""
  folder = pathlib.Path(folder)
  problems: list[str] = []
  config = records.read_json(folder / "config.json", problems) or {}
  lines = _read_lines(folder / "metrics.jsonl", problems)
  per_epoch = _steps_per_epoch(config)
  evaluations = records.read(folder, problems)
  if not config and evaluations:
    config = evaluations[-1].get("config") or {}
  parts = [
    _head(folder, config, lines, per_epoch),
    _curves(lines, per_epoch),
    _scores(lines, per_epoch),
    _pictures(folder, problems),
    *(_record(record, folder) for record in reversed(evaluations)),
    _config(config),
  ]
  body = "\n".join(part for part in parts if part)
  notes = "".join(f'<p class="note">{_text(p)}</p>' for p in problems)
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{_text(folder.resolve().name)}</title><style>{STYLE}</style>"
    f"</head><body>\n{body}\n{notes}</body></html>\n"
  )
  path = folder / "report.html"
  with atomic.replaced(path) as temporary:
    temporary.write_text(page, encoding="utf-8")
  return path


def _read_lines(
  path: pathlib.Path, problems: list[str]
) -> list[dict[str, Any]]:
  """Metrics of the run; damaged lines are left out and reported."""
  if not path.is_file():
    return []
  lines, damaged = [], 0
  for line in path.read_bytes().splitlines():
    try:
      record = json.loads(line)
      lines.append({k: metrics.decode(v) for k, v in record.items()})
    except (ValueError, AttributeError):
      damaged += 1
  if damaged:
    problems.append(f"{damaged} lines of {path.name} are damaged.")
  return [line for line in lines if isinstance(line.get("step"), int)]


def _steps_per_epoch(config: Mapping[str, Any]) -> int:
  """Steps per epoch; 0 if the config does not say."""
  try:
    return int(config["data.images"]) // int(config["data.batch_size"])
  except (KeyError, TypeError, ValueError, ZeroDivisionError):
    return 0


def _head(
  folder: pathlib.Path,
  config: Mapping[str, Any],
  lines: list[dict[str, Any]],
  per_epoch: int,
) -> str:
  """Title, description and the main numbers."""
  description = [
    config.get("evals.name") or config.get("method.name"),
    config.get("method.mask"),
    config.get("method.variant"),
    config.get("data.source"),
    datetime.datetime.now().isoformat(" ", "minutes"),
  ]
  facts = []
  if lines:
    step = max(line["step"] for line in lines)
    total = int(config.get("optim.steps") or 0)
    total = total or per_epoch * int(config.get("optim.epochs") or 0)
    facts.append(("steps", f"{step:,}" + (f" of {total:,}" if total else "")))
  for key, name in (("knn/top1", "k-NN top-1"), ("val/top1", "accuracy")):
    values = [line[key] for line in lines if key in line]
    if values:
      facts.append((f"{name}, last", f"{metrics.percent(values[-1])} %"))
      facts.append((f"{name}, best", f"{metrics.percent(max(values))} %"))
  losses = [line["epoch/loss"] for line in lines if "epoch/loss" in line]
  losses = losses or [x["train/loss"] for x in lines if "train/loss" in x]
  if losses:
    facts.append(("loss", f"{losses[-1]:.4f}"))
  cards = "".join(
    f"<div>{_text(name)}<b>{_text(value)}</b></div>" for name, value in facts
  )
  return (
    f"<h1>{_text(folder.resolve().name)}</h1>"
    f'<p class="sub">{_text(" · ".join(str(d) for d in description if d))}</p>'
    f'<div class="facts">{cards}</div>'
  )


def _curves(lines: list[dict[str, Any]], per_epoch: int) -> str:
  """One small plot per entry of CURVES that the run has numbers for."""
  plots = []
  for title, keys in CURVES.items():
    curves = {}
    for key in keys:
      points = [
        (line["step"] / (per_epoch or 1), line[key])
        for line in lines
        if isinstance(line.get(key), (int, float)) and math.isfinite(line[key])
      ]
      if len(points) > 1:
        curves[key] = binned(points, MAX_POINTS)
    if len(curves) > 1:  # means per epoch suffice
      curves.pop("train/loss", None)
    if curves:
      image = _plot(title, curves, "epoch" if per_epoch else "step")
      plots.append(f'<img alt="{_text(title)}" src="{image}">')
  return f'<h2>Curves</h2><div class="curves">{"".join(plots)}</div>' * bool(
    plots
  )


def binned(
  points: list[tuple[float, float]], limit: int
) -> list[tuple[float, float]]:
  """At most `limit` points: means over equal bins of neighbours."""
  if len(points) <= limit:
    return points
  size = math.ceil(len(points) / limit)
  bins = [points[i : i + size] for i in range(0, len(points), size)]
  mean = lambda values: sum(values) / len(values)
  return [(mean([x for x, _ in b]), mean([y for _, y in b])) for b in bins]


def _plot(
  title: str, curves: Mapping[str, list[tuple[float, float]]], unit: str
) -> str:
  """A plot as the data URI of an SVG."""
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure

  figure = Figure(figsize=(4.6, 2.9), layout="constrained")
  FigureCanvasSVG(figure)
  axis = figure.subplots()
  for name, points in curves.items():
    few = len(points) < 40
    axis.plot(
      *zip(*points, strict=True),
      marker="o" if few else None,
      markersize=3,
      label=name,
    )
  axis.set_title(title, fontsize=10)
  axis.set_xlabel(unit, fontsize=8)
  axis.tick_params(labelsize=8)
  axis.grid(alpha=0.3)
  axis.spines[["top", "right"]].set_visible(False)
  if len(curves) > 1:
    axis.legend(frameon=False, fontsize=8)
  file = io.BytesIO()
  figure.savefig(file, format="svg", metadata={"Date": None})
  return _uri(file.getvalue(), "image/svg+xml")


def _scores(lines: list[dict[str, Any]], per_epoch: int) -> str:
  """k-NN or accuracy at every evaluation during training."""
  measured = [
    line for line in lines if any(k.startswith(("knn/", "val/")) for k in line)
  ]
  keys = [
    key
    for key in dict.fromkeys(key for line in measured for key in line)
    if key.startswith(("knn/", "val/", "ema/"))
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
  return "<h2>Evaluations during training</h2>" + _table(
    ["epoch", "step", *keys], rows
  )


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
    source = _uri(content, "image/png")
    if len(content) > MAX_PICTURE_BYTES:
      source = _smaller(content)
  except OSError:
    problems.append(f"The picture {path} is missing or damaged.")
    return ""
  text = _text(caption)
  return (
    f'<figure><img alt="{text}" src="{source}">'
    f"<figcaption>{text}</figcaption></figure>"
  )


def _images(config: Mapping[str, Any]) -> str:
  """Images of an evaluation: "folder /data/pets, 128 px"."""
  words = [config.get("data.source"), config.get("data.path")]
  if config.get("evals.images"):
    words = [config["evals.images"]]
  text = " ".join(str(word) for word in words if word)
  if config.get("data.subset"):
    text += f", {config['data.subset']} training images per class"
  if text and config.get("data.image_size"):
    text += f", {config['data.image_size']} px"
  return text


def _smaller(png: bytes) -> str:
  """A data URI of a large picture as JPEG."""
  file = io.BytesIO()
  with Image.open(io.BytesIO(png)) as picture:
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_PICTURE_WIDTH, picture.height))
    picture.save(file, "jpeg", quality=85)
  return _uri(file.getvalue(), "image/jpeg")


def _record(record: Mapping[str, Any], folder: pathlib.Path) -> str:
  """Table, notes and pictures of one evaluation."""
  try:
    weights = record.get("weights") or {}
    about = [
      weights.get("network"),
      f"step {weights['step']}" if "step" in weights else None,
      _images(record.get("config") or {}),
      record.get("date"),
    ]
    counts = record.get("counts") or {}
    about += [f"{v:,} {k}" for k, v in counts.items()]
    table = record["table"]
    notes = "".join(
      f'<p class="note">{_text(note)}</p>' for note in record.get("notes", ())
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
      f"<h2>{_text(record['evaluation'])}</h2>"
      f'<p class="sub">{_text(" · ".join(str(a) for a in about if a))}</p>'
      + _table(table["headings"], table["rows"])
      + notes
      + figures
    )
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    logging.warning(
      "a record of an evaluation in %s is damaged: %s", folder, error
    )
    return '<p class="note">The record of an evaluation is damaged.</p>'


def _config(config: Mapping[str, Any]) -> str:
  """The config, collapsed."""
  if not config:
    return ""
  rows = [[key, json.dumps(value)] for key, value in sorted(config.items())]
  return (
    "<h2>Config</h2><details><summary>all keys</summary>"
    + _table(["key", "value"], rows)
    + "</details>"
  )


def _table(headings: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
  cells = lambda row, tag: "".join(f"<{tag}>{_text(c)}</{tag}>" for c in row)
  body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
  head = f"<tr>{cells(headings, 'th')}</tr>"
  return (
    f'<div class="wide"><table><thead>{head}</thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def _text(value: object) -> str:
  return html.escape(str(value), quote=True)


def _uri(content: bytes, kind: str) -> str:
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"
