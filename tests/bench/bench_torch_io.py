"""Reading and writing a large file: time, and peak memory over its size.

python tests/bench/bench_torch_io.py [--variant base] [--suffix .pth]

Writes a ViT with random weights, reads the file's tensors, and loads it as
evaluations do (`loading.load`, with one device). Each of these runs in a
process of its own; the memory is the operating system's peak of that process
less what it had before.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from attmask_jax import mesh as meshes
from attmask_jax import trees
from attmask_jax.models import vit
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import names, networks, pth, tables, tensors

PARTS = ("write", "read", "load")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--variant", choices=tuple(vit.VARIANTS), default="base")
  parser.add_argument("--suffix", choices=(".pth", ".safetensors"),
                      default=".pth")  # fmt: skip
  parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.child:
    child(*options.child, variant=options.variant)
    return
  with tempfile.TemporaryDirectory() as folder:
    path = f"{folder}/a{options.suffix}"
    for part in PARTS:
      subprocess.run(
        [sys.executable, *sys.argv, "--child", part, path], check=True
      )


def child(part: str, path: str, *, variant: str) -> None:
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  mesh = meshes.make_mesh()
  given = state_dict(variant) if part == "write" else {}
  kind = tensors if path.endswith(".safetensors") else pth
  before, start = peak(), time.perf_counter()
  if part == "write":
    kind.write(path, given)
  elif part == "read":
    given = kind.read(path)
  else:
    given = loading.load(path, network="teacher", mesh=mesh).params
  seconds, more = time.perf_counter() - start, peak() - before
  assert jax.tree.leaves(given)
  size = pathlib.Path(path).stat().st_size / 2**20
  print(
    f"{part:5} {size:.0f} MiB: {seconds:.2f} s, {more:.0f} MiB more memory at "
    f"the peak ({more / size:.2f} x the file)"
  )


def state_dict(variant: str) -> dict[str, np.ndarray]:
  """Random weights under timm's names."""
  method = networks.Backbone(vit.ViT(**vit.VARIANTS[variant]))
  leaves = trees.flat(jax.eval_shape(method.init, jax.random.key(0))[0])
  empty = {name: np.zeros(x.shape, np.int8) for name, x in leaves.items()}
  shapes = names.to_theirs(trees.nested(empty), tables.backbone())
  draw = np.random.default_rng(0).standard_normal
  return {name: draw(x.shape, np.float32) for name, x in shapes.items()}


if __name__ == "__main__":
  main()
