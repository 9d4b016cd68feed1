"""Reading and writing a large .pth file: time, and peak memory over its size.

python tests/bench_torch_io.py [--mebibytes 350]

Each direction runs in a process of its own; the memory is the operating
system's peak of that process less what it had before.
"""

import argparse
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from attmask_jax.torch_io import pth

TENSORS = 200


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--mebibytes", type=int, default=350)
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.child:
    child(*options.child, mebibytes=options.mebibytes)
    return
  with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/a.pth"
    for direction in ("write", "read"):
      subprocess.run(
        [sys.executable, *sys.argv, "--child", direction, path], check=True
      )


def child(direction: str, path: str, *, mebibytes: int) -> None:
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  tree = {}
  if direction == "write":
    count = mebibytes * 2**20 // 4 // TENSORS
    draw = np.random.default_rng(0).standard_normal
    tree = {f"t{i}": draw(count, np.float32) for i in range(TENSORS)}
  before, start = peak(), time.perf_counter()
  if direction == "write":
    pth.write(path, {"state_dict": tree})
  else:
    tree = pth.read(path)["state_dict"]
  seconds = time.perf_counter() - start
  size = pathlib.Path(path).stat().st_size / 2**20
  print(
    f"{direction:5} {size:.0f} MiB in {TENSORS} tensors: {seconds:.2f} s, "
    f"{peak() - before:.0f} MiB more memory at the peak "
    f"({(peak() - before) / size:.2f} x the file)"
  )


if __name__ == "__main__":
  main()
