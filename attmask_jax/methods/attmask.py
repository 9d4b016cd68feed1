"""AttMask (arXiv:2203.12719): masks what the teacher attends to.

The teacher sees whole global views; the attention of its class token ranks the
patches. The student sees these views masked by rank, and predicts the teacher's
class-token distribution across views and its patch distributions where masked.
Random or block-wise masks make it iBOT (arXiv:2111.07832); no masks and no
patch loss make it DINO (arXiv:2104.14294).

Source: the AttMask release (train_one_epoch, iBOTLoss, AttMask). Differs:
- crops are flattened image-major, which keeps a sharded batch in place;
- random draws are per image and view, and do not depend on the device count;
- prototype logits of patches are computed for masked ones only.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from attmask_jax import Batch, Params, schema
from attmask_jax.augment.transforms import MultiCrop
from attmask_jax.errors import InputError
from attmask_jax.methods import clustering, losses, masking
from attmask_jax.methods.base import InitialState, LossOutput, Scalars
from attmask_jax.methods.temperature import ShareKeys, warmup_table
from attmask_jax.methods.view_masks import ViewMasks
from attmask_jax.models import heads, noise, vit
from attmask_jax.rows import flatten, gather, row_ids, unflatten


class TeacherOutput(NamedTuple):
  """Teacher outputs of R rows.

  Attributes:
    z: [R, L, E]; without a patch loss L = 1, the class token.
    logits: [R, K] of the class token.
    attention: [R, N], mean over heads, or None if the mask does not use it.
  """

  z: jax.Array
  logits: jax.Array
  attention: jax.Array | None


class StudentOutput(NamedTuple):
  """Class-token logits [B, V, K], and z [R, M, E] of masked patches."""

  logits: jax.Array
  z: jax.Array | None


@dataclasses.dataclass(frozen=True)
class AttMask(ViewMasks):
  """Masks, losses and temperatures of AttMask, iBOT and DINO.

  Attributes:
    head, teacher_head: projection heads of student and teacher.
    epochs, steps_per_epoch: length of the run; S.
    local_crops: V - G.
    patch_loss_chunks: number of chunks that the patch loss is computed in.
  """

  head: heads.Head
  teacher_head: heads.Head
  epochs: int
  steps_per_epoch: int
  local_crops: int = MultiCrop.local_crops
  patch_loss_chunks: int = losses.ComputeKeys.patch_loss_chunks
  norm_last_layer: bool = schema.key(
    False, "keep the gains of the student's prototypes at 1"
  )
  cls_weight: float = schema.key(1.0, "weight of the class-token loss")
  patch_weight: float = schema.key(1.0, "weight of the patch loss, 0 = none")
  student_temp: float = schema.key(0.1, "student temperature", low=1e-6)
  teacher_temp: tuple[float, float] = schema.key(
    (0.04, 0.07),
    "teacher temperature of class tokens: at the start, after warm-up",
    low=1e-6,
  )
  teacher_patch_temp: tuple[float, float] = schema.key(
    (0.04, 0.07), "the same for patch tokens", low=1e-6
  )
  temp_warmup_epochs: int = schema.key(
    30, "warm-up epochs of both teacher temperatures", low=0
  )
  center_momentum: float = schema.key(
    0.9, "momentum of the centres of teacher logits", low=0, high=1
  )

  config_parts = (vit.BackboneKeys, vit.InitKeys, heads.HeadKeys, ShareKeys)
  frozen_at_start = "head/last_layer"
  per_image = ("assignment",)
  assigns_prototypes = True

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Builds the method from the sections method, data, optim and run.

    Raises:
      InputError: a value out of range or values that do not fit together.
    """
    m, data = config.method, config.data
    backbone = vit.from_config(config)  # rejects an unknown variant first
    head, teacher_head = heads.from_config(m)
    schema.check("method", m, vit.InitKeys)
    init = m.get("init", vit.InitKeys.init)  # absent from older runs
    if data.local_crops:
      schema.check_multiple(
        "data.local_size", data.local_size, m.patch_size, "method.patch_size"
      )
    return cls(
      backbone=backbone.clone(initial=init),
      head=head.clone(initial=init),
      teacher_head=teacher_head.clone(initial=init),
      epochs=config.optim.epochs,
      steps_per_epoch=steps_per_epoch,
      global_crops=data.global_crops,
      local_crops=data.local_crops,
      patch_loss_chunks=config.run.patch_loss_chunks,
      **schema.take(cls, m),
    )

  def __post_init__(self) -> None:
    schema.check("method", vars(self), type(self))
    self._check_ratios()
    g, local = self.global_crops, self.local_crops
    if g < 1 or local < 0 or g + local < 2:
      raise InputError(
        f"data.global_crops {g} and data.local_crops {local} leave no other "
        "view to predict: use at least two global crops, or one and local ones"
      )
    _ = self.temperatures  # raises if the warm-up is too long

  @property
  def knn_temp(self) -> float:
    """The teacher's class temperature after warm-up.

    quirk: the release uses it for k-NN during training.
    """
    return self.teacher_temp[1]

  @property
  def uses_patches(self) -> bool:
    """Whether there is a patch loss."""
    return self.patch_weight != 0 and self.mask != "none"

  @property
  def untrained(self) -> str | None:
    """Regex of leaves in `params` that are never updated, or None."""
    return "head/last_layer2?/weight_g" if self.norm_last_layer else None

  def init(self, rng: jax.Array) -> InitialState:
    """Initial params, teacher (a copy of the student) and aux (centres)."""
    rng_backbone, rng_head = jax.random.split(rng)
    side, n = self.backbone.image_size, self.num_patches
    images = jnp.zeros((1, side, side, 3))
    has_token = self.mask_input and self.mask != "none"
    mask = jnp.zeros((1, n), bool) if has_token else None
    tokens = jnp.zeros((1, 1 + n, self.backbone.width))
    params = {
      "backbone": self.backbone.init(rng_backbone, images, mask)["params"],
      "head": self.head.init(rng_head, tokens)["params"],
    }
    backbone, head = dict(params["backbone"]), dict(params["head"])
    backbone.pop("mask_token", None)
    if self.head.patch_out_dim and not self.teacher_head.patch_out_dim:
      # quirk: the teacher's only layer starts as the student's patch layer
      # (copied last) and then tracks its class-token layer (iBOT).
      head["last_layer"] = head.pop("last_layer2")
    teacher = jax.tree.map(jnp.copy, {"backbone": backbone, "head": head})
    aux = {"center": jnp.zeros(self.head.out_dim)}
    if self.uses_patches:
      width = self.head.patch_out_dim or self.head.out_dim
      aux["center_patch"] = jnp.zeros(width)
    return InitialState(params, teacher, aux)

  def at(self, step: int) -> dict[str, np.generic]:
    """Scalars of a step, from (seed, step): float64 on the host."""
    epoch = min(step // self.steps_per_epoch, self.epochs - 1)
    temp, patch_temp = self.temperatures
    return {
      "teacher_temp": np.float32(temp[epoch]),
      "teacher_patch_temp": np.float32(patch_temp[epoch]),
    } | self.mask_counts(step, epoch)

  @functools.cached_property
  def temperatures(self) -> tuple[np.ndarray, np.ndarray]:
    """Teacher temperatures of class tokens and of patches: [epochs] each."""
    table = functools.partial(
      warmup_table, warmup=self.temp_warmup_epochs, total=self.epochs
    )
    # The patch warm-up begins when masking does.
    patch = table(*self.teacher_patch_temp, delay=self.mask_start_epoch)
    return table(*self.teacher_temp), patch

  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: Scalars,
  ) -> LossOutput:
    """Class-token and patch losses of one batch.

    Args:
      params, teacher, aux: student, teacher, centres.
      batch: images [B, G, H, W, 3], local_images [B, V - G, h, w, 3] if any,
        masks [B, G, N] for host-side policies, position [B].
      rng: key of this step.
      scalars: `at(step)`.

    Returns:
      stats: center [K] and center_patch [K], means of raw teacher logits.
      per_image: assignment [B] int32, the teacher's prototype of view 0.
    """
    rng_mask, rng_global, rng_local = jax.random.split(rng, 3)
    images = vit.normalize_images(batch["images"])
    teacher_out = self.teacher_forward(teacher, flatten(images))
    hidden = self.select_masks(teacher_out.attention, batch, rng_mask, scalars)
    student_out = self.student_forward(
      params, images, batch, hidden, (rng_global, rng_local)
    )
    logits = unflatten(teacher_out.logits, images.shape[0])  # [B, G, K]
    probs = losses.teacher_probs(
      logits, aux["center"], temp=scalars["teacher_temp"]
    )
    cls_loss = self.cls_weight * losses.cls_cross_entropy(
      probs, student_out.logits, temp=self.student_temp
    )
    patch_loss = self.patch_weight * self.patch_loss(
      params, teacher, aux, student_out, teacher_out, hidden, scalars
    )
    assignment = jnp.argmax(logits[:, 0], axis=-1)
    # quirk: compared with the student's masked second view (train_acc).
    agrees = assignment == jnp.argmax(student_out.logits[:, 1], axis=-1)
    metrics = {
      "loss": cls_loss + patch_loss,
      "cls": cls_loss,
      "patch": patch_loss,
      "teacher_entropy": losses.entropy(probs),
      "center_norm": jnp.linalg.norm(aux["center"]),
      "agreement": jnp.mean(agrees.astype(jnp.float32)),
    }
    metrics |= {} if hidden is None else hidden.metrics()
    return LossOutput(
      cls_loss + patch_loss,
      metrics,
      self.center_stats(teacher, teacher_out),
      {"assignment": assignment.astype(jnp.int32)},
    )

  def update_aux(self, aux: Params, stats: Params) -> Params:
    """Moves the centres, [K] each, towards the batch's mean teacher logits."""
    return {
      name: losses.update_center(
        aux[name], stats[name], momentum=self.center_momentum
      )
      for name in aux
    }

  def center_stats(
    self, teacher: Params, teacher_out: TeacherOutput
  ) -> dict[str, jax.Array]:
    """Mean raw teacher logits of the batch: center [K], center_patch [K]."""
    stats = {"center": jnp.mean(teacher_out.logits, axis=0)}
    if self.uses_patches:
      # The layer is linear: the mean logit is the logit of the mean vector.
      mean = jnp.mean(teacher_out.z[:, 1:], axis=(0, 1))
      stats["center_patch"] = self._patch_logits(
        self.teacher_head, teacher, mean
      )
    return stats

  def epoch_scores(
    self, labels: np.ndarray, per_image: dict[str, np.ndarray]
  ) -> dict[str, float]:
    """NMI, ARI and F of the teacher's assignments against the classes."""
    return clustering.cluster_scores(labels, per_image["assignment"])

  def assignments(self, weights: Params, images: jax.Array) -> jax.Array:
    """Arg-max prototype of the class token: [B, H, W, 3] -> [B] int32."""
    out = self.teacher_forward(weights, vit.normalize_images(images))
    return jnp.argmax(out.logits, axis=-1).astype(jnp.int32)

  def teacher_forward(self, teacher: Params, rows: jax.Array) -> TeacherOutput:
    """Teacher outputs of whole images [R, H, W, 3], without drop path."""
    out = self.backbone.apply(
      {"params": teacher["backbone"]},
      rows,
      return_attention="cls" if self.by_attention else "none",
    )
    tokens = out.tokens if self.uses_patches else out.tokens[:, :1]
    head = {"params": teacher["head"]}
    z = self.teacher_head.apply(head, tokens, method="project")
    logits = self.teacher_head.apply(head, z[:, 0], method="cls_logits")
    attention = None
    if self.by_attention:
      attention = jnp.mean(out.attention, axis=1)  # over heads
    return TeacherOutput(z, logits, attention)

  def student_forward(
    self,
    params: Params,
    images: jax.Array,
    batch: Batch,
    hidden: masking.Hidden | None,
    rngs: tuple[jax.Array, jax.Array],
  ) -> StudentOutput:
    """Student outputs of masked global [B, G, H, W, 3] and local views."""
    b, head = images.shape[0], {"params": params["head"]}
    mask = hidden.mask if hidden is not None and self.mask_input else None
    tokens = self._tokens(params, images, mask, batch, rngs[0])
    selected = tokens[:, :1]
    if self.uses_patches:
      masked = gather(tokens[:, 1:], hidden.ids)
      selected = jnp.concatenate([selected, masked], axis=1)
    z = self.head.apply(head, selected, method="project")
    views = [unflatten(z[:, 0], b)]
    if self.local_crops:
      local = vit.normalize_images(batch["local_images"])
      tokens = self._tokens(params, local, None, batch, rngs[1])
      local_z = self.head.apply(head, tokens[:, 0], method="project")
      views.append(unflatten(local_z, b))
    views = jnp.concatenate(views, axis=1)  # [B, V, E]
    logits = self.head.apply(head, views, method="cls_logits")
    return StudentOutput(logits, z[:, 1:] if self.uses_patches else None)

  def _tokens(
    self,
    params: Params,
    images: jax.Array,
    mask: jax.Array | None,
    batch: Batch,
    rng: jax.Array,
  ) -> jax.Array:
    """Tokens of the student's backbone: [B, V, H, W, 3] -> [B * V, L, D]."""
    rows = row_ids(batch["position"], images.shape[1])
    drawn = noise.sample(self.backbone, rng, rows)
    backbone = {"params": params["backbone"]}
    return self.backbone.apply(backbone, flatten(images), mask, **drawn).tokens

  def patch_loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    student_out: StudentOutput,
    teacher_out: TeacherOutput,
    hidden: masking.Hidden | None,
    scalars: Scalars,
  ) -> jax.Array:
    """Cross-entropy at masked patches: mean per row, then over rows.

    Returns:
      [] float32, 0 without a patch loss. quirk: rows without a mask add 0 and
      still count (iBOT).
    """
    if not self.uses_patches:
      return jnp.zeros(())

    def chunk(
      student_z: jax.Array, teacher_z: jax.Array, valid: jax.Array
    ) -> jax.Array:
      probs = losses.teacher_probs(
        self._patch_logits(self.teacher_head, teacher, teacher_z),
        aux["center_patch"],
        temp=scalars["teacher_patch_temp"],
      )
      logits = self._patch_logits(self.head, params, student_z)
      return losses.masked_cross_entropy(
        probs, logits, valid, temp=self.student_temp
      )

    total = losses.in_chunks(
      chunk,
      student_out.z,
      gather(teacher_out.z[:, 1:], hidden.ids),
      hidden.valid,
      chunks=self.patch_loss_chunks,
    )
    count = jnp.sum(hidden.mask, axis=-1).astype(jnp.float32)
    return jnp.mean(total / jnp.maximum(count, 1.0))

  def _patch_logits(
    self, head: heads.Head, weights: Params, z: jax.Array
  ) -> jax.Array:
    """[..., E] -> [..., K] by the patch prototypes of `weights`."""
    return head.apply({"params": weights["head"]}, z, method="patch_logits")
