"""The parts of the check of a machine's accelerator, see command.py.

Each imports what it needs itself, so that a package that is missing stops only
the parts that use it.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

REPEATS = 5  # turns that are timed
# Recipe whose masks do not depend on attention, for the comparison; recipe for
# the times, and images per step, halved while memory is too small.
FAMILIES = {
  "attmask": ("attmask_vits16:random_20pct", "attmask_vits16:high_100", 128),
  "mae": ("mae:base_400e_gap", "mae:base_400e_gap", 256),
  "extrema": ("extrema:80x5", "extrema:80x5", 128),
}
# Attention of ViT-S on whole images and on local crops, of ViT-B's encoder in
# MAE: rows, tokens, heads, channels of a head.
SHAPES = ((64, 197, 6, 64), (256, 37, 6, 64), (128, 49, 12, 64))
SMALL_SHAPES = ((4, 17, 2, 16),)
SMALL = {
  "method.variant": "32x2x2",
  "method.patch_size": 8,
  "method.out_dim": 32,
  "method.head_hidden": 32,
  "method.head_bottleneck": 16,
  "method.decoder_width": 32,
  "method.decoder_depth": 1,
  "method.decoder_num_heads": 2,
  "data.image_size": 32,
  "data.local_size": 16,
  "data.local_crops": 2,
}
STUDY = {
  "study.policies": "high,random",
  "study.seeds": (1, 3),
  "study.steps": (120, 2000),
}
SMALL_STUDY = STUDY | {
  "study.networks": "16x2x2",
  "study.seeds": (1, 1),
  "study.steps": (8, 8),
  "method.out_dim": 16,
  "method.head_hidden": 32,
  "method.head_bottleneck": 16,
  "data.shapes_train": 64,
  "data.shapes_val": 48,
  "data.batch_size": 8,
  "evals.knn_ks": (5,),
  "linear.method.last_blocks": 1,
  "linear.optim.epochs": 1,
  "linear.data.batch_size": 16,
}


class Part(NamedTuple):
  """One part of the check.

  Attributes:
    name: of it.
    run: (small, seconds left) -> numbers for JSON; runs in the part's process.
    share: of the whole time, after which the process is ended.
  """

  name: str
  run: Callable[[bool, float], dict[str, Any]]
  share: float


def parts() -> list[Part]:
  """All parts, in their order; the study takes what is left."""
  listed = [Part("attention", _attention, 0.2)]
  for family in FAMILIES:
    compare = lambda small, _, family=family: _parity(family, small)
    speed = lambda small, _, family=family: _speed(family, small)
    listed += [
      Part(f"{family}: parity", compare, 0.2),
      Part(f"{family}: speed", speed, 0.2),
    ]
  return [*listed, Part("study", _study, 1.0)]


def _machine() -> dict[str, Any]:
  import jax

  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "backend": device.client.platform_version,
    "jax": jax.__version__,
    "python": sys.version.split()[0],
    "cores": os.cpu_count(),
  }


def _nvidia() -> bool:
  """Whether cuDNN's attention can be checked."""
  return _machine()["device"].startswith("NVIDIA")


def _attention(small: bool, _: float) -> dict[str, Any]:
  """Attention alone, and what this machine is."""
  from attmask_jax.gpu_check import parity

  shapes = SMALL_SHAPES if small else SHAPES
  checks = [c for s in shapes for c in parity.attention(s, cudnn=_nvidia())]
  return {"machine": _machine()} | _checked(checks)


def _checked(checks: Sequence[Any]) -> dict[str, Any]:
  """Comparisons for JSON, and whether all are within their tolerance."""
  rows = [check._asdict() | {"passed": check.passed} for check in checks]
  for row in rows:
    if not math.isfinite(row["error"]):  # which JSON does not know
      row["error"] = None
  return {"passed": all(row["passed"] for row in rows), "checks": rows}


def _config(recipe: str, small: bool, batch_size: int) -> Any:
  """A published recipe in bfloat16 on generated images, unlocked."""
  from attmask_jax import recipes

  config = recipes.get(recipe).unlock()
  config.method.dtype = "bfloat16"
  config.data.update(
    source="shapes", subset=0, shapes_train=max(batch_size, 64), shapes_val=64,
    batch_size=batch_size,
  )  # fmt: skip
  config.evals.knn = False
  for name, value in SMALL.items() if small else ():
    section, key = name.split(".")
    if key in config[section]:
      config[section][key] = value
  return config


def _parity(family: str, small: bool) -> dict[str, Any]:
  """Loss and gradients of a family in bfloat16, with and without cuDNN."""
  from attmask_jax.gpu_check import parity

  recipe, _, _ = FAMILIES[family]
  config = _config(recipe, small, batch_size=8)
  config.method.drop_path = 0.0
  if not small:  # half the depth, which compiles sooner
    config.method.variant = "384x6x6"
  return _checked(parity.method(config, cudnn=_nvidia()))


def _speed(family: str, small: bool) -> dict[str, Any]:
  """Step time and memory of a family; halves the batch where memory ends."""
  import jax

  from attmask_jax import benchmark, runtime
  from attmask_jax.training import setup

  _, recipe, batch_size = FAMILIES[family]
  batch_size = 8 if small else batch_size
  too_large = []
  while True:
    config = _config(recipe, small, batch_size)
    runtime.setup(config.run)
    try:
      results = benchmark.measure(
        setup.build(config), 1 if small else REPEATS, passes=False
      )
      return (
        results
        | {"recipe": recipe, "batch": batch_size}
        | ({"too_large": too_large} if too_large else {})
      )
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error) or batch_size < 16:
        raise
      too_large.append(batch_size)
      batch_size //= 2


def _study(small: bool, seconds: float) -> dict[str, Any]:
  """A study in a temporary folder; its three files are kept in this one."""
  from attmask_jax import recipes
  from attmask_jax.studies import runner

  config = recipes.get("study")
  config.update_from_flattened_dict(SMALL_STUDY if small else STUDY)
  sentence = runner.run(config, "study", seconds / 60)
  study = json.loads(pathlib.Path("study", "study.json").read_text())
  return {"sentence": sentence} | {k: study[k] for k in ("plan", "policies")}
