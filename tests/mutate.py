"""Reads files with other bytes: python mutate.py KIND SEED COUNT FOLDER.

Ends with 0 if each was read or refused with one of the program's own errors,
within 20 seconds and 1 GiB. FOLDER/progress holds the number of the last file.
"""

import io
import pathlib
import resource
import shutil
import signal
import sys

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from attmask_jax import data
from attmask_jax.data import BrokenImage
from attmask_jax.errors import InputError
from attmask_jax.mesh import make_mesh
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import pth
from configs import tiny

HERE = pathlib.Path(__file__).parent
MEMORY, SECONDS = 2**30, 20
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM")


def mutated(content, rng):
  """Bytes with a few others, a piece cut out, doubled or moved, or an end."""
  changed = bytearray(content)
  n = len(changed)
  kind = rng.integers(5)
  if kind <= 1:  # headers are where it hurts
    places = rng.integers(0, n if kind else min(n, 200), rng.integers(1, 20))
    for place in places:
      changed[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
  elif kind == 2:
    del changed[rng.integers(n) :]
  elif kind == 3:
    start, stop = np.sort(rng.integers(0, n + 1, 2))
    del changed[start:stop]
  else:
    start, stop = np.sort(rng.integers(0, n + 1, 2))
    changed[stop:stop] = changed[start:stop]
  return bytes(changed)


def images(folder, rng):
  """A reader (content, path) of images, and {content to change: path}."""
  (folder / "images" / "train" / "a").mkdir(parents=True)
  path = folder / "images" / "train" / "a" / "0.png"
  pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
  contents = {}
  for format in FORMATS:
    for array in (pixels, pixels[..., 0], np.uint16(257) * pixels[..., 0]):
      buffer = io.BytesIO()
      try:
        Image.fromarray(array).save(buffer, format)
      except OSError:  # no 16 bits in this format
        continue
      contents[buffer.getvalue()] = path
  config = tiny.get_config()
  config.data.update(source="folder", path=str(folder / "images"))
  path.write_bytes(next(iter(contents)))
  source = data.build(config.data, "train")

  def read(content, path):
    path.write_bytes(content)
    assert source.load(0).mode == "RGB"

  return read, contents


def weights(folder, rng):
  """The same of .pth and .safetensors files."""
  whole = HERE / "golden" / "attmask" / "checkpoint.pth"
  backbone = {
    k.removeprefix("backbone."): np.asarray(v)
    for k, v in pth.read(whole)["teacher"].items()
    if k.startswith("backbone.")
  }
  pth.write(folder / "backbone.pth", backbone)
  save_file(backbone, folder / "backbone.safetensors")
  paths = [whole, folder / "backbone.pth", folder / "backbone.safetensors"]
  contents = {p.read_bytes(): folder / f"changed{p.suffix}" for p in paths}

  def read(content, path):
    path.write_bytes(content)
    loading.load(str(path), network="teacher", num_heads=2, mesh=make_mesh())

  return read, contents


def checkpoints(folder, rng):
  """The same of a checkpoint, one file of which is changed."""
  shutil.copytree(HERE / "data" / "runs_0_1" / "mae", folder / "run")
  (step,) = (folder / "run" / "checkpoints").iterdir()
  paths = [p for p in sorted(step.rglob("*")) if p.is_file()]
  paths = [p for p in paths if p.stat().st_size]
  contents = {p.read_bytes(): p for p in paths}

  def read(content, path):
    original = path.read_bytes()
    path.write_bytes(content)
    try:
      loading.load(str(folder / "run"), network="student", mesh=make_mesh())
    finally:
      path.write_bytes(original)

  return read, contents


def main(kind, seed, count, folder):
  """Changes and reads `count` files."""
  rng = np.random.default_rng(seed)
  read, contents = {
    "images": images, "weights": weights, "checkpoints": checkpoints
  }[kind](folder, rng)  # fmt: skip
  originals = list(contents)
  for original, path in contents.items():
    read(original, path)  # as they are, they can be read
  status = pathlib.Path("/proc/self/status").read_text()
  size = int(status.split("VmSize:")[1].split()[0]) * 1024
  resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
  refused = 0
  for i in range(count):
    (folder / "progress").write_text(f"{i}")
    original = originals[rng.integers(len(originals))]
    changed = mutated(original, rng)
    (folder / "last").write_bytes(changed)
    signal.alarm(SECONDS)  # kills: nothing here catches it
    try:
      read(changed, contents[original])
    except (InputError, BrokenImage):
      refused += 1
    signal.alarm(0)
  print(f"{kind}: {refused} of {count} refused, the others read")


if __name__ == "__main__":
  main(
    sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
  )
