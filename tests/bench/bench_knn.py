"""k-NN against plain NumPy: answers, time and peak memory of both.

python tests/bench/bench_knn.py [--bank 100000] [--queries 10000] [--width 384]

Features are drawn around class centres, so that neither all nor no queries are
right. Each program runs in a process of its own, whose peak memory is the
operating system's count for the whole process less what it was with the
features made and nothing searched.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLASSES, KS, TEMP = 1000, (10, 20, 100, 200), 0.07


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
  for start in range(0, len(queries), 1000):
    similar = queries[start : start + 1000] @ bank.T
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


def child(program: str, folder: pathlib.Path, sizes: list[int]) -> None:
  """Runs one program; its answers or scores, time and memory go to a file."""
  if program == "jax":
    sys.path.insert(0, str(ROOT))
    import jax

    from attmask_jax.evals import nearest

    jax.config.update("jax_platforms", "cpu")
    jax.numpy.zeros(1).block_until_ready()
  bank, labels, queries, truth = draw(*sizes)
  memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  before, start = memory(), time.perf_counter()
  told = {}
  if program == "numpy":
    answers = with_numpy(bank, labels, queries)
    told["seconds"] = time.perf_counter() - start
    told["memory"] = memory() - before
    told["top1"] = {
      k: 100 * float(np.mean(a == truth)) for k, a in answers.items()
    }
    np.savez(folder / "answers.npz", **{str(k): a for k, a in answers.items()})
  else:
    run = lambda ks, truth: nearest.knn(
      bank, labels, queries, truth, ks=ks, temp=TEMP, num_classes=CLASSES
    )
    scores = run(KS, truth)
    told["seconds"] = time.perf_counter() - start
    told["memory"] = memory() - before
    told["top1"] = {k: scores[f"k{k}/top1"] for k in KS}
    # NumPy's answers as the truth: 100 % means the same answer everywhere.
    with np.load(folder / "answers.npz") as answers:
      told["same"] = {k: run((k,), answers[str(k)])[f"k{k}/top1"] for k in KS}
  (folder / f"{program}.json").write_text(json.dumps(told))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--bank", type=int, default=100_000)
  parser.add_argument("--queries", type=int, default=10_000)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  options = parser.parse_args()
  sizes = [options.bank, options.queries, options.width]
  if options.child:
    child(options.child[0], pathlib.Path(options.child[1]), sizes)
    return
  with tempfile.TemporaryDirectory() as folder:
    told = {}
    for program in ("numpy", "jax"):
      subprocess.run(
        [sys.executable, *sys.argv, "--child", program, folder], check=True
      )
      told[program] = json.loads(
        (pathlib.Path(folder) / f"{program}.json").read_text()
      )
  bank, queries, width = sizes
  print(f"bank {bank} x {width}, {queries} queries, {CLASSES} classes")
  for program, name in (("numpy", "NumPy"), ("jax", "attmask_jax")):
    found = told[program]
    tops = "  ".join(f"k={k} {v:.2f}" for k, v in found["top1"].items())
    print(
      f"{name:12} {found['seconds']:7.1f} s  {found['memory']:7.0f} MiB  "
      f"top-1 %: {tops}"
    )
  same = "  ".join(f"k={k} {v:.2f} %" for k, v in told["jax"]["same"].items())
  print(f"same answer: {same}")


if __name__ == "__main__":
  main()
