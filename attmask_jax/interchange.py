"""Converts weights of other code bases: --mode=import and --mode=export.

Import writes a file as one of our checkpoints, with the readers of
`weights/torch_io`; it is optional, since `config.weights` takes files too.
Export loads weights and writes them with `weights/export.py`.
"""

import os
import pathlib

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from attmask_jax import atomic, runtime
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.methods.attmask import AttMask
from attmask_jax.runs import checkpoint
from attmask_jax.runs import config as run_config
from attmask_jax.weights import classifier, export, loading
from attmask_jax.weights.torch_io import files


def import_weights(config: ml_collections.ConfigDict, output: str) -> None:
  """Writes a .pth or .safetensors file as a checkpoint of this program.

  Args:
    config: weights, num_heads, allow_missing and tensor_prefix are read.
    output: a new directory, for use as `config.weights`.

  Raises:
    InputError: see `files.load`, or the directory is not empty.
  """
  runtime.setup(config.run)
  if not files.is_file(config.weights):
    raise InputError(
      f'weights "{config.weights}" is not a file: --mode=import reads .pth and '
      ".safetensors files, and run directories need no import"
    )
  folder = pathlib.Path(output).expanduser()
  if folder.is_file():
    raise InputError(f"{folder} is a file: give a new directory")
  if folder.exists() and any(folder.iterdir()):
    raise InputError(f"{folder} is not empty: give a new directory")
  file = files.read(config.weights, config.tensor_prefix)
  options = dict(num_heads=config.num_heads, allow_missing=config.allow_missing)
  loaded = {
    name: files.load(file, name, **options) for name in ("student", "teacher")
  }
  items = {"params": loaded["student"].params}
  if loaded["teacher"].name == "teacher":
    items["teacher"] = loaded["teacher"].params
  aux = loaded["student"].aux | file.centers
  if loaded["student"].layout.kind == "attmask" and not file.centers:
    logging.warning("%s holds no loss centres", file.path)
  checkpoint.check_workdir(output)
  step = file.epoch
  root = folder.resolve() / "checkpoints" / str(step)
  for name, tree in items.items():
    with ocp.StandardCheckpointer() as writer:
      writer.save(root / name, tree)
  if aux:
    with ocp.PyTreeCheckpointer() as writer:
      writer.save(root / "train", {"aux": aux})
  flat = run_config.flat_config(loaded["student"].config)
  atomic.write_json(folder / "config.json", flat)
  layout = loaded["student"].layout
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
    config: weights, num_heads, allow_missing and tensor_prefix are read;
      network only where the file holds one network; probe, a trained one, for
      "attmask" (backbone and probe in one file), "timm" and "hf".
    output: .pth or .safetensors file; must not exist.
    format: one of `export.FORMATS`.
    dtype: one of `export.DTYPES`.
    backbone_only: leave heads, decoder and predictor out.

  Raises:
    InputError: see `loading.load` and `export.export`.
  """
  runtime.setup(config.run)
  if os.path.lexists(pathlib.Path(output).expanduser()):
    raise InputError(f"{output} exists: give another file, or remove it")
  if format in ("mae", "extrema") and config.probe:
    raise InputError(
      f'format "{format}" holds no linear probe ({config.probe}): use attmask, '
      "timm or hf, or leave --config.probe out"
    )
  mesh = meshes.make_mesh()
  load = lambda network: loading.load(
    config.weights,
    network=network,
    mesh=mesh,
    num_heads=config.num_heads,
    allow_missing=config.allow_missing,
    tensor_prefix=config.tensor_prefix,
  )
  student = main = load(config.network)
  single = config.probe or main.method.classifies
  if format in export.PAIRS and not single:
    student, main = (
      main if main.network == name else load(name)
      for name in ("student", "teacher")
    )
  if "backbone" not in main.params:
    raise InputError(
      f"{main.where} is a linear probe without a network: give the weights it "
      "was trained on with --config.weights, and the probe with --config.probe"
    )
  class_names = classifier.class_names(main)
  if config.probe:
    probe = classifier.load(config.probe, main, mesh=mesh)
    main = main._replace(method=probe.method, params=probe.params)
    class_names = probe.class_names
  written = export.export(
    output,
    student,
    main,
    format=format,
    dtype=dtype,
    backbone_only=backbone_only,
    centers=_centers(config, main),
    epoch=_epoch(config, main),
    class_names=class_names,
  )
  logging.info("%d tensors in %s", len(written), output)
  size = pathlib.Path(output).expanduser().stat().st_size
  print(f"{output}: {len(written)} tensors, {dtype}, {size / 2**20:.1f} MiB")


def _centers(
  config: ml_collections.ConfigDict, source: loading.Weights
) -> dict[str, np.ndarray]:
  """The loss centres saved with these weights, {} if there are none."""
  if source.run_dir is None:
    return files.read(config.weights, config.tensor_prefix).centers
  if not isinstance(source.method, AttMask):
    return {}
  return jax.device_get(loading.load_centers(source))


def _epoch(config: ml_collections.ConfigDict, source: loading.Weights) -> int:
  """Completed epochs; an imported checkpoint counts them as steps."""
  if source.run_dir is None:
    return files.read(config.weights, config.tensor_prefix).epoch
  config = source.config
  images = config.get("data", {}).get("images", 0)
  batch = config.get("data", {}).get("batch_size", 0)
  if not images or not batch:
    return source.step
  return source.step // max(images // batch, 1)
