"""Train steps in turns: settings, other checkouts, the PyTorch releases.

python tests/bench/bench_step.py [--config attmask_vits16:high_100] [--batch 8]
    [--turns 5] [--set method.dtype=float32 ...] [--case run.remat=none ...]
    [--code FOLDER ...] [--against attmask=FOLDER]

The first program is this checkout with the settings of --set. Every --case
(settings joined by semicolons) is one more, every --code FOLDER the same by the
code of another checkout, and --against a step of a release, see peers.py.
Each has a process of its own, and waits while another one steps. A product of
matrices of 2048 x 2048 before each step tells how fast the machine is then.

Prints medians: seconds, their ratio to the first program, processor seconds,
and peak memory of the process.
"""

import argparse
import ast
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIDE = 2048


class Worker:
  """A program that is ready for its next step."""

  def __init__(self, case: dict) -> None:
    self.process = subprocess.Popen(
      [sys.executable, str(HERE / "step_worker.py"), json.dumps(case)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    while (line := self.process.stdout.readline()) != "ready\n":
      if not line:
        sys.exit(f"{case} ended with code {self.process.wait()}")

  def step(self) -> list[float]:
    """Seconds, processor seconds, peak memory in GB."""
    self.process.stdin.write("\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())


def settings(text: str) -> dict[str, object]:
  """KEY=VALUE[;KEY=VALUE ...] with values in Python's notation, or text."""
  values = {}
  for item in filter(None, text.split(";")):
    key, _, value = item.partition("=")
    try:
      values[key] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      values[key] = value
  return values


def cases(options: argparse.Namespace) -> dict[str, dict]:
  """Name -> program, see `step_worker`."""
  keys = {"data.batch_size": options.batch, "method.dtype": "float32"}
  for text in options.set:
    keys |= settings(text)
  first = dict(config=options.config, code=str(ROOT), keys=keys)
  programs = {"this checkout": first}
  for text in options.case:
    programs[text] = first | dict(keys=keys | settings(text))
  for folder in options.code:
    path = str(pathlib.Path(folder).resolve())
    programs[folder] = first | dict(code=path)
  for text in options.against:
    peer, _, folder = text.partition("=")
    programs[text] = dict(peer=peer, code=folder, batch=options.batch)
  return programs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="attmask_vits16:high_100")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--turns", type=int, default=5)
  for name in ("set", "case", "code", "against"):
    parser.add_argument(f"--{name}", action="append", default=[])
  options = parser.parse_args()
  workers = {name: Worker(case) for name, case in cases(options).items()}

  import jax

  product = jax.jit(lambda x: jax.numpy.matmul(x, x, precision="highest"))
  matrix = jax.random.normal(jax.random.key(0), (SIDE, SIDE))
  product(matrix).block_until_ready()
  rates, results = [], {name: [] for name in workers}
  for _ in range(options.turns):
    for name, worker in workers.items():
      start = time.perf_counter()
      product(matrix).block_until_ready()
      rates.append(2 * SIDE**3 / (time.perf_counter() - start) / 1e9)
      results[name].append(worker.step())
  print(
    f"{options.config}, batch {options.batch}, {os.cpu_count()} cores, matrix "
    f"product {statistics.median(rates):.0f} GFLOP/s "
    f"({min(rates):.0f}-{max(rates):.0f})"
  )
  first = None
  for name, values in results.items():
    seconds, used, peak = map(statistics.median, zip(*values, strict=True))
    first = first or seconds
    print(
      f"{name:40} {seconds:7.2f} s  {seconds / first:5.2f} x  "
      f"{used:6.2f} processor s  {peak:5.2f} GB"
    )


if __name__ == "__main__":
  main()
