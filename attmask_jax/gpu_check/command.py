"""Checks this program on the machine's accelerator, within minutes.

python -m attmask_jax.gpu_check --output=DIR [--small] [--minutes=9]

Compares bfloat16 and cuDNN attention with float32, times a train step of each
family against the rate of a large matrix product, and runs a short study.
Every part is a process of its own, so that one that fails, crashes or takes
too long leaves the others alone. DIR/gpu_check.json holds all numbers and
errors, gpu_check.md the table, gpu_check.log what the parts have printed, and
study.json, study.md and study.png the study. --small takes small networks, for
a CPU. --part=NAME does one part alone and writes its numbers to a file, OUTPUT.

Exit codes: 0 every part ran and every comparison is within its tolerance, 1 not
so, 2 bad input.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Only what Python brings: the packages of this project may be missing, and a
# process that has started a GPU leaves little of its memory to others.
from attmask_jax import atomic
from attmask_jax.gpu_check import parts

NEEDED = (
  "jax", "flax", "optax", "orbax.checkpoint", "ml_collections", "numpy",
  "absl", "grain", "clu", "PIL", "sklearn", "scipy", "matplotlib",
  "safetensors", "tqdm",
)  # fmt: skip
JSON, TABLE, LOG = "gpu_check.json", "gpu_check.md", "gpu_check.log"
STUDY_FILES = ("study.json", "study.md", "study.png")
LEAST_SECONDS = 20  # a part is not started with less
ERROR_LINES = 3  # of a part's last output, kept as its error


def main(argv: Sequence[str] | None = None) -> int:
  """Runs all parts, or one of them; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--output", required=True, help="new or empty folder; with --part a file"
  )
  parser.add_argument("--small", action="store_true", help="for a CPU")
  parser.add_argument(
    "--minutes", type=float, default=9.0, help="for all parts"
  )
  parser.add_argument(
    "--part",
    help='one part alone, such as "mae: parity"',
  )
  options = parser.parse_args(argv)
  output = pathlib.Path(options.output).expanduser().absolute()
  if options.part:
    if output.exists():
      parser.error(f"--output {output} exists: give a new file")
    found = {part.name: part for part in parts.parts()}
    if options.part not in found:
      parser.error(f'--part "{options.part}": use one of {", ".join(found)}')
    part = found[options.part]
    result = part.run(options.small, 60 * options.minutes)
    output.write_text(json.dumps(result))
    return 0
  if not options.minutes > 0:
    parser.error(f"--minutes {options.minutes:g} must be above 0")
  if output.is_file() or output.is_dir() and any(output.iterdir()):
    parser.error(
      f"--output {output} exists and is not empty: give a new folder"
    )
  return check(output, small=options.small, seconds=60 * options.minutes)


def check(output: pathlib.Path, *, small: bool, seconds: float) -> int:
  """Runs every part and writes what it found; returns the exit code.

  Args:
    output: new folder.
    small: small networks.
    seconds: for all parts.
  """
  began = time.monotonic()
  output.mkdir(parents=True, exist_ok=True)
  results: dict[str, Any] = {"missing_packages": missing(), "parts": {}}
  if results["missing_packages"]:
    print(f"not installed: {', '.join(results['missing_packages'])}")
  with tempfile.TemporaryDirectory() as folder:
    for part in parts.parts():
      left = seconds - (time.monotonic() - began)
      result = run_part(
        part.name,
        pathlib.Path(folder),
        output,
        small=small,
        limit=min(part.share * seconds, left) if left > LEAST_SECONDS else 0,
      )
      results["parts"][part.name] = result
      print(f"{part.name}: {status(result)}", flush=True)
      write(output, results)
  print((output / TABLE).read_text())
  good = all(status(r) in ("done", "passed") for r in results["parts"].values())
  return 0 if good else 1


def missing() -> list[str]:
  """Packages of this project that are not installed."""

  def found(name: str) -> bool:
    try:
      return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
      return False

  return [name for name in NEEDED if not found(name)]


def run_part(
  name: str,
  folder: pathlib.Path,
  output: pathlib.Path,
  *,
  small: bool,
  limit: float,
) -> dict[str, Any]:
  """Runs one part in a process of its own.

  Args:
    name: of the part.
    folder: temporary one, where the process works.
    output: where its output is added to LOG, and the study's files go.
    small: small networks.
    limit: seconds after which the process is ended; 0 = do not start it.

  Returns:
    Its numbers, or {"error": why there are none}; and "took", its seconds.
  """
  if not limit:
    return {"error": "skipped: no time was left", "took": 0.0}
  place = folder / "result.json"
  place.unlink(missing_ok=True)
  command = [
    *(sys.executable, "-m", "attmask_jax.gpu_check", f"--output={place}"),
    *(f"--part={name}", f"--minutes={limit / 60}"),
    *(["--small"] if small else []),
  ]
  root = pathlib.Path(__file__).resolve().parents[2]
  path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
  began, log = time.monotonic(), output / LOG
  with log.open("a") as file:
    file.write(f"== {name}\n")
    file.flush()
    at = file.tell()
    try:
      code = subprocess.run(
        command, cwd=folder, env=environment, timeout=limit, stdout=file,
        stderr=subprocess.STDOUT, check=False,
      ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
      code = None
  for kept in STUDY_FILES:  # what is finished, also of one that was ended
    if (folder / "study" / kept).exists():
      shutil.copy(folder / "study" / kept, output / kept)
  taken = {"took": time.monotonic() - began}
  if code is None:
    return {"error": f"ended after {limit:.0f} seconds"} | taken
  if code or not place.exists():
    words = log.read_bytes()[at:].decode(errors="replace").split("\n")
    last = [line for line in words if line.strip()][-ERROR_LINES:]
    if last and "InputError: " in last[-1]:  # it is one sentence
      last = [last[-1].split("InputError: ")[1]]
    return {"error": f"exit code {code}: {' / '.join(last)}"} | taken
  return json.loads(place.read_text()) | taken


def status(result: dict[str, Any]) -> str:
  """passed, failed, done, or the error of a part."""
  if "error" in result:
    return result["error"]
  return {None: "done", True: "passed", False: "failed"}[result.get("passed")]


def write(output: pathlib.Path, results: dict[str, Any]) -> None:
  """Replaces gpu_check.json and gpu_check.md."""
  atomic.write_json(output / JSON, results)
  with atomic.replaced(output / TABLE) as temporary:
    temporary.write_text(page(results))


def page(results: dict[str, Any]) -> str:
  """The results as tables in Markdown."""
  found = results["parts"]
  machine = found.get("attention", {}).get("machine", {})
  lines = [", ".join(f"{k} {v}" for k, v in machine.items()), ""]
  if results["missing_packages"]:
    lines += [f"Not installed: {', '.join(results['missing_packages'])}.", ""]
  lines += ["| part | result | seconds |", "| --- | --- | ---: |"]
  for name, result in found.items():
    text = status(result).replace("|", "/")
    lines.append(f"| {name} | {text} | {result['took']:.0f} |")
  lines += ["", "| comparison with float32 | relative error | tolerance | |",
            "| --- | ---: | ---: | --- |"]  # fmt: skip
  for name, result in found.items():
    lines += [_check_row(name, check) for check in result.get("checks", ())]
  lines += [
    "",
    "| step | images | seconds | images/s | with data: images/s | TFLOP/s | "
    "of matrix product's | compilation, s | memory, GB |",
    "| --- |" + " ---: |" * 8,
  ]
  lines += [speed_row(r) for r in found.values() if "share_of_peak" in r]
  sentence = found.get("study", {}).get("sentence")
  return "\n".join([*lines, *(["", sentence] if sentence else [])]) + "\n"


def _check_row(part: str, check: dict[str, Any]) -> str:
  """A line of the table of comparisons."""
  error = check["error"]
  cells = (
    f"{part}: {check['name']}".replace("|", "/"),
    "-" if error is None else f"{error:.1e}",
    f"{check['tolerance']:.0e}",
    "passed" if check["passed"] else "FAILED",
  )
  return f"| {' | '.join(cells)} |"


def speed_row(r: dict[str, Any]) -> str:
  """A line of the table of step times."""
  memory = r["memory_gb"]["arguments"] + r["memory_gb"]["temporaries"]
  rates = r["images_per_s"]
  rate = r["flops"] / r["seconds"]["step"] / 1e12
  cells = (
    r["recipe"], r["batch"], f"{r['seconds']['step']:.4f}",
    f"{rates['step']:.0f}", f"{rates['step with data']:.0f}", f"{rate:.3g}",
    f"{r['share_of_peak']:.0%} of {r['peak_flops_per_s'] / 1e12:.3g}",
    f"{r['compile_seconds']:.0f}", f"{memory:.2f}",
  )  # fmt: skip
  return f"| {' | '.join(map(str, cells))} |"
