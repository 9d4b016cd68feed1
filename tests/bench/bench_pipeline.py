"""Images per second and core that the input pipelines read, in turns.

python tests/bench/bench_pipeline.py FOLDER [--transform multi_crop ...]
    [--turns 5] [--code CHECKOUT ...] [--batch 8]

The images anywhere below FOLDER go through each program once per turn, in one
thread: decoding alone; the host pipeline; the device pipeline's part on the
host; and the host pipeline of other checkouts. Each has a process of its own
and waits while another one runs.

Prints medians of processor milliseconds per image, with the smallest and the
largest, the images per second of processor time that go with them, and the
ratio to the host pipeline of the same turn. With --batch, also what the device
takes for its part: seconds and temporary memory of one batch, compiled alone.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
ROOT = HERE.parents[2]
# As the recipes for ImageNet have them.
SETTINGS = {
  "multi_crop": {},
  "crop_flip": dict(scale=(0.2, 1.0), resample="bicubic"),
  "two_colours": {},
}
CANVAS_SIZE = 512


def serve(case: dict) -> None:
  """Answers each line of input with the processor seconds of one pass."""
  sys.path[:0] = [case["code"]]

  from attmask_jax.augment import TRANSFORMS
  from attmask_jax.data import files, pipeline

  source = files.Flat(case["folder"])
  transform = lambda image, rng: {}
  if case["pipeline"] != "decoding":
    name = case["transform"]
    transform = TRANSFORMS[name](**SETTINGS[name])
  if case["pipeline"] == "device":
    from attmask_jax.augment import canvas

    transform = canvas.OnCanvas(transform, CANVAS_SIZE)
  pipe = pipeline.TrainPipeline(
    source, transform, batch_size=1, seed=0, threads=1, prefetch=1
  )

  def once() -> float:
    start = time.process_time()
    for _ in pipe.batches(0, len(source)):
      pass
    return time.process_time() - start

  once()
  print(len(source), flush=True)
  for _ in sys.stdin:
    print(once(), flush=True)


class Worker:
  """A program that is ready for its next pass."""

  def __init__(self, case: dict) -> None:
    self.process = subprocess.Popen(
      [sys.executable, str(HERE), "--serve", json.dumps(case)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    line = self.process.stdout.readline()
    if not line:
      sys.exit(f"{case} ended with code {self.process.wait()}")
    self.images = int(line)

  def milliseconds(self) -> float:
    """Processor time per image of one pass."""
    self.process.stdin.write("\n")
    self.process.stdin.flush()
    return 1000 * float(self.process.stdout.readline()) / self.images


def on_device(folder: str, name: str, batch_size: int, turns: int) -> str:
  """Time and memory of the views of one batch on the device."""
  sys.path[:0] = [str(ROOT)]

  import jax

  from attmask_jax.augment import TRANSFORMS, canvas, device
  from attmask_jax.data import files, pipeline

  recipe = TRANSFORMS[name](**SETTINGS[name])
  pipe = pipeline.TrainPipeline(
    files.Flat(folder),
    canvas.OnCanvas(recipe, CANVAS_SIZE),
    batch_size=batch_size,
    seed=0,
  )
  (host,) = pipe.batches(0, 1)
  batch = jax.device_put(host)
  program = jax.jit(lambda batch: device.augment(batch, recipe))
  program = program.lower(batch).compile()
  seconds = []
  for _ in range(turns + 1):
    start = time.perf_counter()
    jax.block_until_ready(program(batch))
    seconds.append(time.perf_counter() - start)
  middle = statistics.median(seconds[1:])
  planned = program.memory_analysis().temp_size_in_bytes / 1e6 / batch_size
  return (
    f"  on {jax.devices()[0].device_kind}, batch {batch_size}: "
    f"{1000 * middle / batch_size:.1f} ms per image "
    f"({1000 * min(seconds) / batch_size:.1f}-"
    f"{1000 * max(seconds[1:]) / batch_size:.1f}), {planned:.1f} MB temporary"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder")
  parser.add_argument("--transform", action="append", choices=tuple(SETTINGS))
  parser.add_argument("--turns", type=int, default=5)
  parser.add_argument("--code", action="append", default=[])
  parser.add_argument("--batch", type=int, default=0)
  options = parser.parse_args()
  folder = str(pathlib.Path(options.folder).resolve())
  for transform in options.transform or list(SETTINGS):
    case = dict(folder=folder, code=str(ROOT), transform=transform)
    cases = {
      name: case | dict(pipeline=name)
      for name in ("host", "device", "decoding")
    }
    for code in options.code:
      path = str(pathlib.Path(code).resolve())
      cases[code] = cases["host"] | dict(code=path)
    workers = {name: Worker(value) for name, value in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(options.turns):
      for name, worker in workers.items():
        times[name].append(worker.milliseconds())
    print(f"{transform}, {workers['host'].images} images")
    for name, values in times.items():
      middle = statistics.median(values)
      ratio = statistics.median(
        host / own for host, own in zip(times["host"], values, strict=True)
      )
      print(
        f"  {name:24} {middle:7.2f} ms ({min(values):.2f}-{max(values):.2f}) "
        f"{1000 / middle:7.0f} images/s  {ratio:6.2f} x"
      )
    if options.batch:
      print(on_device(folder, transform, options.batch, options.turns))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--serve"]:
    serve(json.loads(sys.argv[2]))
  else:
    main()
