"""What a run evaluates on its own teacher: k-NN, and where its masks fall."""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging

from attmask_jax import Params, data
from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError
from attmask_jax.evals import (
  features,
  inputs,
  knn,
  pictures,
  reconstruct,
  visualize,
)
from attmask_jax.methods import masking
from attmask_jax.models import vit


def enabled(
  config: ml_collections.ConfigDict, val_source: data.Source | None
) -> bool:
  """Whether online k-NN runs: asked for, and the images have labels."""
  return bool(
    config.evals.knn and val_source is not None and val_source.class_names
  )


def check(
  config: ml_collections.ConfigDict,
  method: Any,
  train_source: data.Source,
  val_source: data.Source | None,
) -> None:
  """Refuses evaluations that would fail after the first epoch.

  Raises:
    InputError: k beyond the bank, other classes in the validation set, or a
      period that is not positive.
  """
  evals = config.evals
  if evals.eval_epochs < 1:
    raise InputError(
      f"evals.eval_epochs {evals.eval_epochs} must be at least 1"
    )
  network = method.backbone
  features.check(evals, depth=network.depth, class_token=network.class_token)
  if not enabled(config, val_source):
    return
  if len(train_source.class_names) < 2:
    raise InputError(
      f"{train_source.name} has one class, so there is nothing to vote on: "
      "set evals.knn=False"
    )
  bank = len(pictures.spread(len(train_source), evals.knn_bank))
  if (
    not evals.knn_ks or not 1 <= min(evals.knn_ks) <= max(evals.knn_ks) <= bank
  ):
    raise InputError(
      f"evals.knn_ks {tuple(evals.knn_ks)} must lie between 1 and the k-NN "
      f"bank's {bank} images: lower k or enlarge the bank"
    )
  inputs.same_classes(train_source, val_source)


class Evaluator:
  """Evaluates the teacher of a pretraining run; compiles once.

  Attributes:
    best: the number whose maximum marks the best checkpoint, "" = none.
    shown: what the log calls it.
  """

  shown = "k-NN top-1"

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    method: Any,
    train_source: data.Source,
    val_source: data.Source | None,
    mesh: jax.sharding.Mesh,
  ) -> None:
    self._config, self._method, self._mesh = config, method, mesh
    self._train, self._val = train_source, val_source
    self.best = "knn/top1" if enabled(config, val_source) else ""
    evals = config.evals
    self._embed = jax.jit(
      lambda weights, images: vit.embed(
        functools.partial(method.features, weights),
        images,
        last=evals.last_blocks,
        pool=evals.pool,
        final_norm=evals.final_norm,
      )
    )
    if config.evals.knn and val_source and not val_source.class_names:
      logging.warning(
        "online k-NN is off: %s has no labels", config.data.source
      )

  def before(self, state: Any) -> dict[str, float]:
    """Of the untrained network: k-NN, see `knn`."""
    return self.scores(state)

  def scores(self, state: Any) -> dict[str, float]:
    """After an epoch: k-NN, see `knn`."""
    return self.knn(state.teacher or state.params)

  def figures(self, state: Any, folder: pathlib.Path) -> dict[str, float]:
    """Draws folder/masks.png, see `masks`, and reconstructions.png.

    The latter where the method reconstructs. At every evaluation, so that a
    run shows what it does while it runs.
    """
    if self._method.reconstructs:
      self._reconstruct(state, folder / "reconstructions.png")
    return self.masks(state, folder / "masks.png")

  def _reconstruct(self, state: Any, path: pathlib.Path) -> None:
    """Draws what the decoder paints of the first images of the gallery."""
    count, source = self._config.evals.mask_images, self._val or self._train
    if not count:
      return
    params, guide = meshes.to_host(self._mesh, (state.params, state.teacher))
    if jax.process_index():
      return
    chosen = pictures.spread(len(source), count)
    shown = pictures.crops(source, chosen, self._config.data.image_size)
    images = np.stack([picture.image for picture in shown])
    method = self._method
    painted = reconstruct.paint(method, params, guide, images, seed=0)
    reconstruct.draw(
      path,
      images,
      painted,
      labels=[picture.name for picture in shown],
      title=f"{method.n_hidden} of {method.num_patches} patches hidden",
      note=reconstruct.note_of(method),
    )

  def knn(self, weights: Params) -> dict[str, float]:
    """Weighted k-NN of validation on training images, in percent.

    Returns:
      "knn/k10/top1" and "knn/k10/top5" for every k of `evals.knn_ks`, and
      "knn/top1", "knn/top5" for the first; {} where k-NN is off.
    """
    config = self._config
    if not enabled(config, self._val):
      return {}
    bank = self._features(weights, self._train, config.evals.knn_bank)
    queries = self._features(weights, self._val, config.evals.knn_queries)
    temp = config.evals.knn_temp or self._method.knn_temp
    scores = knn.knn(
      bank.features,
      bank.labels,
      queries.features,
      queries.labels,
      ks=config.evals.knn_ks,
      temp=temp,
      num_classes=len(self._train.class_names),
      mesh=self._mesh,
    )
    first = f"k{config.evals.knn_ks[0]}/"
    scores |= {k: scores[first + k] for k in ("top1", "top5")}
    return {f"knn/{k}": float(v) for k, v in scores.items()}

  def masks(
    self, state: Any, path: pathlib.Path | None = None
  ) -> dict[str, float]:
    """Measures where the masks fall, and draws the mask gallery.

    Args:
      state: of the run; its teacher, or without one the encoder, attends.
      path: the PNG to write; None draws nothing.

    Returns:
      "overlap/POLICY": share of the hidden area that lies on the object, and
      "overlap/object": share of the image the object covers; {} for images
      without object masks.
    """
    evals = self._config.evals
    source = self._val or self._train
    count = evals.mask_images if path else 0
    if hasattr(source, "object_mask"):
      count = max(count, evals.overlap_images)
    if not count:
      return {}
    # Every process takes part.
    weights = meshes.to_host(self._mesh, state.teacher or state.params)
    if jax.process_index():
      return {}
    indices = pictures.spread(len(source), count)
    shown = pictures.crops(source, indices, self._config.data.image_size)
    images = np.stack([picture.image for picture in shown])
    objects = None
    if hasattr(source, "object_mask"):
      objects = np.stack([picture.object_mask for picture in shown])
    attention = np.asarray(self._attention(weights, images))
    grid = (self._method.backbone.grid,) * 2
    hidden = pictures.policy_masks(
      attention,
      grid,
      ratio=self._method.picture_mask_ratio,
      show_max=self._method.picture_show_max,
      policies=(*masking.ATTENTION_POLICIES, "random"),
      refill=self._method.refills_hints,
    )
    if path and evals.mask_images:
      teacher = bool(state.teacher)
      self._draw(path, images, attention, hidden, objects, teacher=teacher)
    if objects is None:
      return {}
    overlap = {
      f"overlap/{name}": visualize.mask_overlap(mask, objects, grid=grid)[
        "precision"
      ]
      for name, mask in hidden.items()
    }
    return overlap | {"overlap/object": float(objects.mean())}

  def _draw(
    self,
    path: pathlib.Path,
    images: np.ndarray,
    attention: np.ndarray,
    hidden: dict[str, np.ndarray],
    objects: np.ndarray | None,
    *,
    teacher: bool,
  ) -> None:
    """Writes the gallery of the first `evals.mask_images` images."""
    n = self._config.evals.mask_images
    token = self._method.backbone.class_token != "none"
    whose = "of the class token" if token else "that patches receive"
    visualize.mask_gallery(
      path,
      images[:n],
      attention[:n],
      {name: mask[:n] for name, mask in hidden.items()},
      patch_size=self._method.backbone.patch_size,
      object_masks=None if objects is None else objects[:n],
      title=f"Attention {whose}, and what each policy hides "
      f"at {pictures.percent(self._method.picture_mask_ratio)} %",
      network="Teacher" if teacher else "Encoder",
    )

  def _attention(self, weights: Params, images: np.ndarray) -> jax.Array:
    """[n, H, W, 3] -> [n, N], mean over heads. On one device."""
    attend = jax.jit(self._method.attention)
    return jnp.mean(attend(weights, jnp.asarray(images)), axis=1)

  def _features(
    self, weights: Params, source: data.Source, limit: int
  ) -> features.Features:
    """Features of at most `limit` images, spread over the source."""
    chosen = pictures.spread(len(source), limit)
    batches, _ = inputs.batches(source, self._config, chosen)
    embed_images = functools.partial(self._embed, weights)
    with contextlib.closing(batches):
      return features.extract(embed_images, batches, mesh=self._mesh)
