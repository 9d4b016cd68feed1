"""The config of a run: keys of its own, config.json, and configs of old runs.

config.json holds {"data.batch_size": 256, ...}: flat, for people and for
`check_config`. Whatever reads one goes through `upgrade`, so that the rest of
the program knows today's keys alone.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_collections

from attmask_jax import atomic, schema
from attmask_jax.errors import InputError
from attmask_jax.runs import checkpoint

# Sections and keys that may change when a run continues.
FREE_KEYS = (
  "run.", "evals.", "data.path", "data.eval_resample", "weights", "probe",
  "init_", "num_heads", "allow_missing", "tensor_prefix",
)  # fmt: skip
IMAGES = "data.images"  # beside the config's own keys: size of the training set

# Keys of version 0.1 under another name.
RENAMED = {
  "heads": "num_heads",
  "method.heads": "method.num_heads",  # of imported weights
  "method.decoder_heads": "method.decoder_num_heads",
  "evals.ks": "evals.knn_ks",
  "evals.k": "evals.knn_k",
  "evals.temp": "evals.knn_temp",
}
POOLS = {0: "cls", 1: "mean", 2: "cls+mean", 3: "mean"}  # by its `avgpool`


@dataclasses.dataclass(frozen=True)
class InitKeys:
  """Start of a training run."""

  init_from: str = schema.key("", "weights to start from, see docs/pytorch.md")
  init_epoch: bool = schema.key(
    True, "go on after their epoch: whole AttMask runs alone"
  )
  init_resample: bool = schema.key(
    False, "give their positions the size of our images"
  )


@dataclasses.dataclass(frozen=True)
class WeightsKeys:
  """Weights that are evaluated or moved."""

  weights: str = schema.key(
    "", "run directory, checkpoint, .pth or .safetensors file"
  )
  network: str = schema.key(
    "",
    'teacher, student or untrained; "" = teacher, of a fine-tuning the '
    "student. reconstruct and finetune_extrema take the student",
  )
  probe: str = schema.key(
    "",
    "of a linear probe: masked, backgrounds, tokens, rollout with "
    "evals.explain=class, and export",
  )


@dataclasses.dataclass(frozen=True)
class FileKeys:
  """Weight files of other code bases."""

  num_heads: int = schema.key(
    0, "of attention, where a weight file is of no known size", low=0
  )
  allow_missing: str = schema.key(
    "", "A,B: tensors of a weight file, or how they begin"
  )
  tensor_prefix: str = schema.key(
    "", "what stands in front of the network's tensors, if there are several"
  )


@dataclasses.dataclass(frozen=True)
class WandbKeys:
  """Weights & Biases."""

  project: str = schema.key("", 'where to log; "" = off')
  name: str = schema.key("", 'of the run there; "" = theirs')


@dataclasses.dataclass(frozen=True)
class RunKeys:
  """How a run is computed and logged; changes results by rounding at most."""

  fsdp: int = schema.key(
    1, "devices that share one copy of large parameters", low=1
  )
  accumulate: int = schema.key(1, "micro-batches per step", low=1)
  matmul_precision: str = schema.key(
    "highest", "of float32 products: highest, high or default"
  )
  compilation_cache: str = schema.key("", "folder that keeps compiled programs")
  distributed: bool = schema.key(False, "call jax.distributed.initialize()")
  log_steps: int = schema.key(10, "steps between lines of metrics.jsonl", low=1)
  save_steps: int = schema.key(
    0, "steps between saves besides every epoch's end, 0 = none", low=0
  )
  keep_steps: int = schema.key(
    0, "keep checkpoints at multiples of this for good, 0 = none", low=0
  )
  tensorboard: bool = schema.key(True, "write TensorBoard's event files")
  wandb: WandbKeys = schema.key(WandbKeys(), "Weights & Biases")


def flat_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """{"data.batch_size": 256, ...} with tuples as lists, as JSON has them."""
  plain = json.loads(config.to_json_best_effort())
  flat: dict[str, Any] = {}

  def walk(prefix: str, node: Any) -> None:
    if isinstance(node, dict):
      for key, value in node.items():
        walk(f"{prefix}{key}.", value)
    else:
      flat[prefix[:-1]] = node

  walk("", plain)
  return flat


def nested_config(flat: dict[str, Any]) -> ml_collections.ConfigDict:
  """The inverse of `flat_config`, with lists as tuples."""
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *sections, key = name.split(".")
    node = nested
    for section in sections:
      node = node.setdefault(section, {})
    node[key] = tuple(value) if isinstance(value, list) else value
  return ml_collections.ConfigDict(nested)


def upgrade(flat: dict[str, Any]) -> dict[str, Any]:
  """A flat config of any version with today's keys.

  `avgpool` 0, 1, 2 and 3 and `raw` of version 0.1 become `pool` and
  `final_norm`: 1 was the mean of patches without the final norm whatever `raw`
  said, 3 of patches with it.
  """
  new = {RENAMED.get(key, key): value for key, value in flat.items()}
  for section in ("method", "evals"):
    avgpool = new.pop(f"{section}.avgpool", None)
    raw = new.pop(f"{section}.raw", None)
    if avgpool is not None:
      new[f"{section}.pool"] = POOLS[avgpool]
    if avgpool is not None or raw is not None:
      forced = {1: False, 3: True}
      new[f"{section}.final_norm"] = forced.get(avgpool, not raw)
  return new


def read_config(run_dir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a run from its config.json, nested, with today's keys.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = run_dir / "config.json"
  try:
    flat = json.loads(path.read_text())
  except OSError as error:
    raise InputError(
      f"{path} is missing: give a run directory, or a checkpoint inside one"
    ) from error
  except ValueError as error:
    raise InputError(f"{path} is damaged ({error}): restore it") from error
  return nested_config(upgrade(flat))


def check_config(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  *,
  images: int,
  defaults: ml_collections.ConfigDict,
) -> None:
  """Refuses to continue a run whose results the new config would change.

  Args:
    config: the new config.
    workdir: run directory, with or without a run.
    images: size of the training set, which `data.path` may have changed.
    defaults: of the config's keys: what an older run does not know, and the
      new config leaves at that, is no difference.

  Raises:
    InputError: names each differing key with both values.
  """
  path = workdir / "config.json"
  if not path.exists():
    _check_foreign(workdir)
    return
  try:
    old = upgrade(json.loads(path.read_text()))
  except ValueError as error:
    raise InputError(
      f"{path} is damaged ({error}): restore it, or use another --workdir"
    ) from error
  new = flat_config(config) | {IMAGES: images}
  known = flat_config(defaults) | old
  differing = [
    f"{key} ({old.get(key, 'absent')} there, {new.get(key, 'absent')} here)"
    for key in sorted(old.keys() | new.keys())
    if not key.startswith((*FREE_KEYS, IMAGES))
    and (key not in known or key not in new or known[key] != new[key])
  ]
  if differing:
    raise InputError(
      f"{workdir} holds a run with another config: {'; '.join(differing)}; "
      "use the same values or another --workdir"
    )
  if old.get(IMAGES, images) != images:
    raise InputError(
      f"the training set has {images} images, and had {old[IMAGES]} when the "
      f"run in {workdir} began: restore it, or use another --workdir"
    )


def _check_foreign(workdir: pathlib.Path) -> None:
  """Refuses a directory of something else, or of a run that lost its config."""
  if (workdir / "results.json").exists():
    raise InputError(f"{workdir} holds an evaluation: use another --workdir")
  if checkpoint.steps(workdir):
    raise InputError(
      f"{workdir} holds checkpoints and no config.json, so that nobody knows "
      "what made them: restore it, or use another --workdir"
    )


def write_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, images: int
) -> None:
  """Writes config.json, flat, for people and for `check_config`."""
  if jax.process_index() == 0:
    path, flat = workdir / "config.json", flat_config(config)
    flat[IMAGES] = images
    with atomic.replaced(path) as temporary:
      temporary.write_text(json.dumps(flat, indent=2) + "\n")
