"""Weights from and to other code bases: --mode=import and --mode=export."""

import json
import pathlib

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from attmask_jax import atomic, checkpoint, weights
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.torch_io import checkpoints, export


def import_weights(config: ml_collections.ConfigDict, output: str) -> None:
  """Writes a .pth or .safetensors file as a checkpoint of this program.

  Args:
    config: weights, heads and allow_missing are read.
    output: a new directory; it can then be named as `config.weights`.

  Raises:
    InputError: see `checkpoints.load`; or the directory is not empty.
  """
  if not checkpoints.is_file(config.weights):
    raise InputError(
      f'weights "{config.weights}" are no file: --mode=import reads .pth and '
      ".safetensors files, and run directories need no import"
    )
  folder = pathlib.Path(output).expanduser()
  if folder.exists() and any(folder.iterdir()):
    raise InputError(f"{folder} is not empty: give a new directory")
  file = checkpoints.read(config.weights)
  options = dict(heads=config.heads, allow_missing=config.allow_missing)
  found = {
    name: checkpoints.load(file, name, **options)
    for name in ("student", "teacher")
  }
  items = {"params": found["student"].params}
  if found["teacher"].name == "teacher":
    items["teacher"] = found["teacher"].params
  aux = found["student"].aux | file.centers
  checkpoint.check_workdir(output)
  step = file.epoch
  root = folder.resolve() / "checkpoints" / str(step)
  for name, tree in items.items():
    with ocp.StandardCheckpointer() as writer:
      writer.save(root / name, tree)
  if aux:
    with ocp.PyTreeCheckpointer() as writer:
      writer.save(root / "train", {"aux": aux})
  told = checkpoint.flat_config(found["student"].config)
  with atomic.replaced(folder / "config.json") as temporary:
    temporary.write_text(json.dumps(told, indent=2) + "\n")
  layout = found["student"].layout
  names = ", ".join(sorted(items))
  print(
    f"{file.path.name}: {layout.kind}, ViT {layout.variant} with patches of "
    f"{layout.patch_size} and images of {layout.image_size} pixels\n"
    f"written to {folder}: {names}"
  )


def export_weights(
  config: ml_collections.ConfigDict,
  output: str,
  *,
  format: str,
  dtype: str,
  backbone_only: bool,
) -> None:
  """Writes weights for another code base, see `export.export`.

  Args:
    config: weights, network, heads and allow_missing are read; the networks
      of formats with one are `config.network`.
    output: .pth or .safetensors file; must not exist.
    format: one of `export.FORMATS`.
    dtype: one of `export.DTYPES`.
    backbone_only: leave heads, decoder and predictor out.

  Raises:
    InputError: see `weights.load` and `export.export`.
  """
  if pathlib.Path(output).expanduser().exists():
    raise InputError(f"{output} exists: give another file, or remove it")
  mesh = meshes.make_mesh()
  load = lambda network: weights.load(
    config.weights,
    network=network,
    mesh=mesh,
    heads=config.heads,
    allow_missing=config.allow_missing,
  )
  main = load(config.network)
  student = load("student") if main.network == "teacher" else main
  written = export.export(
    output,
    student,
    main,
    format=format,
    dtype=dtype,
    backbone_only=backbone_only,
    centers=_centers(config.weights, main),
    epoch=_epoch(config.weights, main),
  )
  logging.info("%d tensors in %s", len(written), output)
  size = pathlib.Path(output).expanduser().stat().st_size
  print(f"{output}: {len(written)} tensors, {dtype}, {size / 2**20:.1f} MiB")


def _centers(where: str, source: weights.Weights) -> dict[str, np.ndarray]:
  """The loss centres beside these weights, {} where there are none."""
  if source.run_dir is None:
    return checkpoints.read(where).centers
  if not hasattr(source.method, "teacher_head"):
    return {}
  return jax.device_get(weights.load_centers(source))


def _epoch(where: str, source: weights.Weights) -> int:
  """Completed epochs; an imported checkpoint counts them as steps."""
  if source.run_dir is None:
    return checkpoints.read(where).epoch
  config = source.config
  images = config.get("data", {}).get("images", 0)
  batch = config.get("data", {}).get("batch_size", 0)
  if not images or not batch:
    return source.step
  return source.step // max(images // batch, 1)
