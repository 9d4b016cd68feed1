"""k-NN against NumPy and PyTorch: answers, time and peak memory.

python tests/bench/bench_knn.py [--bank 100000] [--queries 10000] [--width 384]
  [--turns 3]

Features are drawn around class centres, so that neither all nor no queries are
right. First each program runs in a process of its own, whose peak memory is
the operating system's count for the whole process less what it was with the
features made and nothing searched. Then all run in turns in one process, for
the times; that process compiles before its first turn. PyTorch is left out
where it is not installed. NumPy and PyTorch do a matrix product, a selection
of the largest and a sum of votes.
"""

import argparse
import importlib.util
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLASSES, KS, TEMP = 1000, (10, 20, 100, 200), 0.07
NAMES = {"numpy": "NumPy", "jax": "attmask_jax", "torch": "PyTorch"}
QUERIES = 1000  # compared at a time by NumPy and PyTorch


def draw(bank: int, queries: int, width: int) -> tuple[np.ndarray, ...]:
  """Bank, its labels, queries, theirs; float32 and int32."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(CLASSES, width)).astype(np.float32)
  found = []
  for count in (bank, queries):
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    noise = rng.standard_normal((count, width), dtype=np.float32)
    found += [centres[labels] * 0.45 + 2.0 * noise, labels]
  return tuple(found)


def with_numpy(
  bank: np.ndarray, labels: np.ndarray, queries: np.ndarray
) -> dict[int, np.ndarray]:
  """Answer of every query for every k: a matrix product and a partition."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  bank, queries = unit(bank), unit(queries)
  answers = {k: np.zeros(len(queries), np.int32) for k in KS}
  for start in range(0, len(queries), QUERIES):
    similar = queries[start : start + QUERIES] @ bank.T
    top = np.argpartition(-similar, max(KS), axis=1)[:, : max(KS)]
    near = np.take_along_axis(similar, top, axis=1)
    order = np.argsort(-near, axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)
    near = np.take_along_axis(near, order, axis=1)
    for row, (picks, values) in enumerate(zip(top, near, strict=True)):
      votes = np.exp(values / TEMP)
      for k in KS:
        sums = np.bincount(labels[picks[:k]], votes[:k], minlength=CLASSES)
        answers[k][start + row] = np.argmax(sums)
  return answers


def with_torch(
  bank: np.ndarray, labels: np.ndarray, queries: np.ndarray
) -> dict[int, np.ndarray]:
  """The same with a matrix product, topk and scatter_add_."""
  import torch

  unit = lambda x: torch.nn.functional.normalize(torch.from_numpy(x), dim=1)
  bank, labels = unit(bank), torch.from_numpy(labels).long()
  answers = {k: [] for k in KS}
  for chunk in unit(queries).split(QUERIES):
    near, top = (chunk @ bank.T).topk(max(KS), dim=1)
    votes, picks = (near / TEMP).exp(), labels[top]
    for k in KS:
      sums = torch.zeros(len(chunk), CLASSES)
      sums.scatter_add_(1, picks[:, :k], votes[:, :k])
      answers[k].append(sums.argmax(1))
  return {k: torch.cat(found).int().numpy() for k, found in answers.items()}


def with_jax() -> Callable[..., dict[str, float]]:
  """`nearest.knn` with the options of the bench, JAX having started."""
  sys.path.insert(0, str(ROOT))
  import jax

  from attmask_jax.evals import nearest

  jax.config.update("jax_platforms", "cpu")
  jax.numpy.zeros(1).block_until_ready()

  def run(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    truth: np.ndarray,
    ks: tuple[int, ...] = KS,
  ) -> dict[str, float]:
    return nearest.knn(
      bank, labels, queries, truth, ks=ks, temp=TEMP, num_classes=CLASSES
    )

  return run


def alone(program: str, folder: pathlib.Path, sizes: list[int]) -> None:
  """Runs one program once; its scores and memory go to a file."""
  other = {"numpy": with_numpy, "torch": with_torch}.get(program)
  if program == "torch":
    import torch  # noqa: F401  # before memory is counted
  run = other or with_jax()
  *problem, truth = draw(*sizes)
  memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  before = memory()
  found = run(*problem) if other else run(*problem, truth)
  told = {"memory": memory() - before}
  if program == "numpy":
    np.savez(folder / "answers.npz", **{str(k): a for k, a in found.items()})
  with np.load(folder / "answers.npz") as file:
    wanted = {k: file[str(k)] for k in KS}
  percent = lambda x, y: 100 * float(np.mean(x == y))
  if other:
    told["top1"] = {k: percent(found[k], truth) for k in KS}
    told["same"] = {k: percent(found[k], wanted[k]) for k in KS}
  else:
    told["top1"] = {k: found[f"k{k}/top1"] for k in KS}
    # NumPy's answers as the truth: 100 % means the same answer everywhere.
    score = lambda k: run(*problem, wanted[k], (k,))[f"k{k}/top1"]
    told["same"] = {k: score(k) for k in KS}
  (folder / f"{program}.json").write_text(json.dumps(told))


def turns(folder: pathlib.Path, sizes: list[int], count: int) -> None:
  """Seconds of each program in each turn go to a file."""
  *problem, truth = draw(*sizes)
  jax_knn = with_jax()
  runs = {
    "numpy": lambda: with_numpy(*problem),
    "jax": lambda: jax_knn(*problem, truth),
    "torch": lambda: with_torch(*problem),
  }
  runs = {name: run for name, run in runs.items() if name in programs()}
  runs["jax"]()
  seconds = {name: [] for name in runs}
  for _ in range(count):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  (folder / "turns.json").write_text(json.dumps(seconds))


def programs() -> list[str]:
  """Names of the programs that can run here, NumPy first."""
  there = importlib.util.find_spec("torch") is not None
  return ["numpy", "jax", *["torch"] * there]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--bank", type=int, default=100_000)
  parser.add_argument("--queries", type=int, default=10_000)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  options = parser.parse_args()
  sizes = [options.bank, options.queries, options.width]
  if options.child:
    task, folder = options.child[0], pathlib.Path(options.child[1])
    if task == "turns":
      turns(folder, sizes, options.turns)
    else:
      alone(task, folder, sizes)
    return
  told = {}
  with tempfile.TemporaryDirectory() as folder:
    for task in (*programs(), "turns"):
      command = [sys.executable, *sys.argv, "--child", task, folder]
      subprocess.run(command, check=True)
      file = pathlib.Path(folder) / f"{task}.json"
      told[task] = json.loads(file.read_text())
  bank, queries, width = sizes
  print(f"bank {bank} x {width}, {queries} queries, {CLASSES} classes")
  ours = told["turns"]["jax"]
  for program, seconds in told["turns"].items():
    found = told[program]
    ratios = [a / b for a, b in zip(seconds, ours, strict=True)]
    show = lambda values: "  ".join(f"k={k} {v:.2f}" for k, v in values.items())
    print(
      f"{NAMES[program]:12} {statistics.median(seconds):6.1f} s, "
      f"{statistics.median(ratios):.2f} of attmask_jax "
      f"({min(ratios):.2f} to {max(ratios):.2f}), {found['memory']:.0f} MiB\n"
      f"  top-1 %: {show(found['top1'])}\n"
      f"  same answer as NumPy, %: {show(found['same'])}"
    )


if __name__ == "__main__":
  main()
