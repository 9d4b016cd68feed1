"""Reads changed files: python mutate.py KIND SEED COUNT FOLDER.

Ends with 0 if each was read or refused with one of the program's own errors,
within SECONDS of processor time and MEMORY more, and nothing was run, imported
or written that the files as they were do not need. FOLDER/progress holds the
number of the last file, FOLDER/last its bytes.
"""

import collections
import grp  # noqa: F401 - imported by libraries where they need it
import io
import logging
import os
import pathlib
import pwd  # noqa: F401
import resource
import shutil
import signal
import sys
import traceback
import warnings
from typing import NamedTuple

import mutations
import numpy as np
from absl import logging as absl_logging
from PIL import Image
from safetensors.numpy import save_file

from attmask_jax import data, train
from attmask_jax.data import BrokenImage
from attmask_jax.errors import InputError
from attmask_jax.mesh import make_mesh
from attmask_jax.training import setup, train_step
from attmask_jax.weights import loading
from attmask_jax.weights.torch_io import pth
from configs import tiny

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE / "runs"))
import test_old_runs as old_runs  # noqa: E402

MEMORY = 2**30  # in use; Pillow may reserve what a damaged length says
ADDRESSES = 8 * MEMORY
SECONDS, WAITING = 20, 1800
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM")
# Audit events of running, loading or sending something.
ACTIONS = (
  "exec", "import", "marshal.loads", "pickle.find_class",
  "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
  "os.spawn", "subprocess.Popen", "pty.spawn", "ctypes.dlopen",
  "socket.connect", "socket.bind",
)  # fmt: skip


class Original(NamedTuple):
  """A file that can be read, its kind for the counts, and where it belongs."""

  kind: str
  content: bytes
  path: pathlib.Path


def images(folder, rng):
  """A reader (original, content), and originals."""
  path = folder / "images" / "train" / "a" / "0.png"
  path.parent.mkdir(parents=True)
  pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
  originals = []
  for format in FORMATS:
    for array in (pixels, pixels[..., 0], np.uint16(257) * pixels[..., 0]):
      buffer = io.BytesIO()
      try:
        Image.fromarray(array).save(buffer, format)
      except OSError:  # no 16 bits in this format
        continue
      # The ending says nothing to Pillow, and to `mutations` the format.
      named = path.with_suffix(f".{format.lower()}")
      originals.append(Original(format, buffer.getvalue(), named))
  config = tiny.get_config()
  config.data.update(source="folder", path=str(folder / "images"))
  path.write_bytes(originals[0].content)
  source = data.build(config.data, "train")

  def read(original, content):
    path.write_bytes(content)
    assert source.load(0).mode == "RGB"

  return read, originals


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
  originals = [
    Original(p.name, p.read_bytes(), folder / f"changed{p.suffix}")
    for p in paths
  ]
  mesh = make_mesh()

  def read(original, content):
    original.path.write_bytes(content)
    where = str(original.path)
    loading.load(where, network="teacher", num_heads=2, mesh=mesh)

  return read, originals


def checkpoints(folder, rng):
  """The same of a finished run, one file of which is changed.

  The run is loaded, and then continued, which reads everything else.
  """
  kept, run = folder / "kept", folder / "run"
  shutil.copytree(old_runs.DATA / "attmask", kept)
  shutil.rmtree(kept / "checkpoints" / "8")  # or it would go on from there
  config = old_runs.attmask_config()
  built, mesh = setup.build(config), make_mesh()
  like = train_step.abstract_state(
    built.method, built.tx, built.mesh, seed=config.method.seed
  )
  # These do not depend on the files.
  train.build = lambda config: built
  train_step.abstract_state = lambda *_, **__: like
  paths = [p for p in sorted(kept.rglob("*")) if p.is_file()]
  originals = [
    Original(_short(p.relative_to(kept)), p.read_bytes(), p.relative_to(kept))
    for p in paths
    if p.stat().st_size and p.name != "commit_success.txt"  # says nothing
  ]

  def read(original, content):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(kept, run)
    (run / original.path).write_bytes(content)
    if original.kind.startswith(("params", "config")):
      loading.load(str(run), network="student", mesh=mesh)
    train.train(config, str(run))

  return read, originals


def _short(path):
  """A path in a run without steps and the names of blocks of numbers."""
  parts = [p for p in path.parts if p not in ("checkpoints", "16")]
  return "/".join(parts[:-1] if "d" in parts else parts)


def forbid_actions(folder):
  """Ends the process where a file makes it act; returns a switch."""
  on = []

  def hook(event, arguments):
    if not on:
      return
    wrong = event in ACTIONS
    if event == "open" and isinstance(arguments[0], str | bytes):
      path, mode, flags = arguments
      writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
      wrong = writes and not os.fsdecode(path).startswith(str(folder))
    if wrong:
      on.clear()
      text = f"{event} {arguments!r:.300}\n"
      traceback.print_stack()
      os.write(2, text.encode())
      os._exit(70)

  sys.addaudithook(hook)
  return on


def refuses(read, original, content):
  """Whether the program refuses these bytes; other errors pass."""
  signal.setitimer(signal.ITIMER_PROF, SECONDS)  # both kill: nothing here
  signal.alarm(WAITING)  # catches them
  try:
    read(original, content)
    return False
  except (InputError, BrokenImage):
    return True
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)


def main(kind, seed, count, folder):
  """Changes and reads `count` files."""
  logging.disable()
  absl_logging.set_verbosity(absl_logging.FATAL)
  warnings.simplefilter("ignore")
  sys.unraisablehook = lambda _: None  # TensorStore's after a refusal
  folder = folder.resolve()
  rng = np.random.default_rng(seed)
  read, originals = {
    "images": images, "weights": weights, "checkpoints": checkpoints
  }[kind](folder, rng)  # fmt: skip
  for original in originals:
    assert not refuses(read, original, original.content)
  status = pathlib.Path("/proc/self/status").read_text()
  size = int(status.split("VmSize:")[1].split()[0]) * 1024
  resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, size + ADDRESSES))
  most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  before, results = most(), collections.Counter()
  forbidden = forbid_actions(folder)
  for i in range(count):
    original = originals[rng.integers(len(originals))]
    how, content = mutations.changed(original.path.name, original.content, rng)
    (folder / "progress").write_text(f"{i}, {original.kind}")
    (folder / "last").write_bytes(content)
    forbidden.append(True)
    refused = refuses(read, original, content)
    forbidden.clear()
    assert most() - before < MEMORY, f"{most() - before} bytes more"
    results[original.kind, how, "refused" if refused else "read"] += 1
  for (name, how, result), n in sorted(results.items()):
    print(f"  {name}, {how}: {n} {result}")
  refused = sum(n for (*_, result), n in results.items() if result == "refused")
  more = (most() - before) // 2**20
  print(f"{kind}: {count} files, {refused} refused, {more} MiB more")


if __name__ == "__main__":
  main(
    sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
  )
