"""One program of bench_step.py in a process of its own: a step per input line.

python tests/bench/step_worker.py JSON

Answers each line with [seconds, processor seconds, peak memory in GB].
"""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent


def ours(case: dict) -> Callable[[], None]:
  """The train step of a config, by the code in the folder case["code"]."""
  sys.path[:0] = [case["code"]]

  from attmask_jax import recipes, runtime

  # After the package, or it would bring this checkout's.
  sys.path.append(str(HERE))
  import steps

  config = recipes.get(case["config"])
  config.update_from_flattened_dict(case["keys"])
  runtime.setup(config.run)
  return steps.build(config)


def main() -> None:
  case = json.loads(sys.argv[1])
  if "peer" in case:
    import peers

    step = peers.STEPS[case["peer"]](case["code"], case["batch"])
  else:
    step = ours(case)
  step()  # compiles, allocates
  print("ready", flush=True)
  for _ in sys.stdin:
    start, used = time.perf_counter(), time.process_time()
    step()
    measured = [time.perf_counter() - start, time.process_time() - used]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps([*measured, peak]), flush=True)


if __name__ == "__main__":
  main()
