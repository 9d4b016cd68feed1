"""Config of a run: top-level and run.* keys, config.json, older versions.

config.json holds {"data.batch_size": 256, ...}: flat, for people and for
`check_config`. Every reader applies `upgrade`, so that the rest of the program
only knows the current keys.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_collections

from attmask_jax import atomic, schema
from attmask_jax.errors import InputError
from attmask_jax.runs import checkpoint, saved_items

# Sections and keys that may change when a run continues.
FREE_KEYS = (
  "run.", "evals.", "data.path", "data.eval_resample", "data.max_broken",
  "weights", "probe", "init_", "num_heads", "allow_missing", "tensor_prefix",
)  # fmt: skip
IMAGES = "data.images"  # size of the training set, in config.json only

# Keys that had another name in version 0.1.
RENAMED = {
  "heads": "num_heads",
  "method.heads": "method.num_heads",  # in imported weights
  "method.decoder_heads": "method.decoder_num_heads",
  "evals.ks": "evals.knn_ks",
  "evals.k": "evals.knn_k",
  "evals.temp": "evals.knn_temp",
}
# By `avgpool` of version 0.1.
POOLS = {0: "cls", 1: "mean", 2: "cls+mean", 3: "mean"}

# Networks of a run; "untrained" is the one before the first step.
NETWORKS = ("teacher", "student", "untrained")


@dataclasses.dataclass(frozen=True)
class InitKeys:
  """Start of a training run."""

  init_from: str = schema.key("", "weights to start from, see docs/pytorch.md")
  init_epoch: bool = schema.key(
    True, "continue after their epoch; only full AttMask checkpoints can"
  )
  init_resample: bool = schema.key(
    False, "resample their positions to the size of the images"
  )


@dataclasses.dataclass(frozen=True)
class WeightsKeys:
  """Weights to evaluate, import or export."""

  weights: str = schema.key(
    "", "run directory, checkpoint, .pth or .safetensors file"
  )
  network: str = schema.key(
    "",
    '"" = teacher, but the student for a fine-tuned network, reconstruct and '
    "finetune_extrema",
    choices=("", *NETWORKS),
  )
  probe: str = schema.key(
    "",
    "linear probe for masked, backgrounds, tokens, rollout with "
    "evals.explain=class, and export",
  )


@dataclasses.dataclass(frozen=True)
class FileKeys:
  """Weight files of other code bases."""

  num_heads: int = schema.key(
    0, "attention heads of a weight file, 0 = by its width", low=0
  )
  allow_missing: str = schema.key(
    "", "A,B: names or prefixes of tensors that may be missing or left over"
  )
  tensor_prefix: str = schema.key(
    "", "what stands in front of the network's tensors, if there are several"
  )


@dataclasses.dataclass(frozen=True)
class WandbKeys:
  """Weights & Biases."""

  project: str = schema.key("", 'project to log to; "" = off')
  name: str = schema.key("", 'name of the run; "" = chosen by wandb')


@dataclasses.dataclass(frozen=True)
class RunKeys:
  """How a run is computed and logged; changes results by rounding at most."""

  fsdp: int = schema.key(
    1, "devices that share one copy of large parameters", low=1
  )
  accumulate: int = schema.key(1, "micro-batches per step", low=1)
  topology: str = schema.key(
    "",
    "of --mode=plan: devices to plan for, such as v5e:4x4, v5p:4x4x4, v6e:8x8 "
    "or cpu:8; other modes use the devices that there are",
  )
  matmul_precision: str = schema.key(
    "highest",
    "of float32 matrix products: highest, high, default, or an algorithm of "
    "jax.lax.DotAlgorithmPreset",
  )
  compilation_cache: str = schema.key(
    "auto",
    "folder for compiled programs, which the next start loads; auto = "
    "attmask_jax/xla in the user's cache folder, or none with several "
    'processes; "" = what JAX is set to, usually none; a folder that cannot be '
    "written is one warning",
  )
  distributed: bool = schema.key(False, "call jax.distributed.initialize()")
  log_steps: int = schema.key(10, "steps between lines of metrics.jsonl", low=1)
  save_steps: int = schema.key(
    0, "steps between saves, besides those after each epoch; 0 = none", low=0
  )
  keep_steps: int = schema.key(
    0, "keep checkpoints at multiples of this permanently, 0 = none", low=0
  )
  keep_epochs: int = schema.key(
    0, "the same in epochs: keep every Nth one permanently, 0 = none", low=0
  )
  break_lock: bool = schema.key(
    False, "train in a directory that another process seems to train in"
  )
  tensorboard: bool = schema.key(True, "write TensorBoard's event files")
  profile_steps: tuple[int, int] = schema.key(
    (0, 0), "write a trace of the steps from the first to the last; 0,0 = none"
  )
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
  """Converts a flat config of any version to the current keys.

  `avgpool` 0, 1, 2 and 3 and `raw` of version 0.1 become `pool` and
  `final_norm`: 1 was the mean patch without the final norm whatever `raw` said,
  3 the mean patch with it.
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


def read_flat(path: pathlib.Path) -> dict[str, Any]:
  """A config.json of any version, flat, with current keys.

  Raises:
    OSError: the file is missing.
    InputError: it is damaged.
  """
  try:
    flat = upgrade(json.loads(path.read_text()))
    nested_config(flat)
  except OSError:
    raise
  except Exception as error:  # values of the wrong kinds cause many types
    raise InputError(
      f"{path} is damaged ({saved_items.first_line(error)}): restore it, or "
      "use another run directory"
    ) from error
  return flat


def read_config(run_dir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a run from its config.json, nested, with current keys.

  Raises:
    InputError: the file is missing or damaged.
  """
  path = run_dir / "config.json"
  try:
    return nested_config(read_flat(path))
  except OSError as error:
    raise InputError(
      f"{path} is missing: give a run directory, or a checkpoint inside one"
    ) from error


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
    defaults: of all keys; a key that an older run lacks is no difference if the
      new config leaves it at its default.

  Raises:
    InputError: names each differing key with both values.
  """
  path = workdir / "config.json"
  if not path.exists():
    _check_foreign(workdir)
    return
  old = read_flat(path)
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
  """Refuses a directory of something else, or a run without its config."""
  if (workdir / "results.json").exists():
    raise InputError(f"{workdir} holds an evaluation: use another --workdir")
  if checkpoint.steps(workdir):
    raise InputError(
      f"{workdir} holds checkpoints but no config.json, so what made them is "
      "unknown: restore it, or use another --workdir"
    )


def write_config(
  config: ml_collections.ConfigDict, workdir: pathlib.Path, *, images: int
) -> None:
  """Writes config.json, flat, for people and for `check_config`."""
  if jax.process_index() == 0:
    path, flat = workdir / "config.json", flat_config(config)
    flat[IMAGES] = images
    atomic.write_json(path, flat)
