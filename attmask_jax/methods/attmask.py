"""AttMask (arXiv:2203.12719): hide what the teacher attends to.

A teacher sees whole global views; the attention of its class token says which
patches matter; the student sees the views with those hidden, predicts the
teacher's class distribution across views and its patch distributions where
patches are hidden. Random or block-wise masks make it iBOT (arXiv:2111.07832),
no mask and no patch loss DINO (arXiv:2104.14294).

Source: the AttMask release (train_one_epoch, iBOTLoss, AttMask). Differs:
- crops are flattened image-major, which keeps a sharded batch in place;
- random draws are per image and view, and do not depend on the device count;
- prototype logits of patches are computed where a patch can be hidden only.
"""

import dataclasses
import random
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from attmask_jax import Batch, Params, heads, losses, masking, vit
from attmask_jax.errors import InputError

Scalars = dict[str, np.generic]


class Teacher(NamedTuple):
  """Teacher outputs for R rows: z [R, L, C], logits [R, K], attention [R, N]."""

  z: jax.Array
  logits: jax.Array
  attention: jax.Array | None


class Student(NamedTuple):
  """Student outputs: class logits [B, V, K] and hidden patches' z [R, M, C]."""

  logits: jax.Array
  z: jax.Array | None


class Hidden(NamedTuple):
  """The mask [R, N] bool and its hidden patches: ids, valid [R, M]."""

  mask: jax.Array
  ids: jax.Array
  valid: jax.Array


@dataclasses.dataclass(frozen=True)
class AttMask:
  """The method. Fields are plain values; see configs/attmask_vits16.py.

  Attributes:
    backbone: the ViT of student and teacher.
    head: the student's head.
    teacher_head: the teacher's head.
    epochs: length of the run.
    steps_per_epoch: S.
    global_crops: G.
    local_crops: V - G.
    mask: one of `masking.POLICIES`.
    mask_ratio: ratios to draw from.
    mask_ratio_var: half-width of the uniform jitter of each ratio.
    mask_prob: a view keeps its attention mask with this probability.
    show_max: share of most attended patches that hints are chosen from.
    mask_start_epoch: no masks before this epoch.
    mask_input: False leaves the student's input whole; the mask then only
      says where the patch loss applies.
    norm_last_layer: keep the student's prototype gains fixed.
    cls_weight: weight of the class-token loss.
    patch_weight: weight of the patch loss; 0 leaves it out altogether.
    student_temp: temperature of the student.
    teacher_temp: (at the start, after warm-up) for class tokens.
    teacher_patch_temp: the same for patches.
    temp_warmup_epochs: length of both warm-ups.
    center_momentum: of both running centres.
    patch_loss_chunks: split the patch loss to save memory; no effect on it.
    seed: of masks and ratios.
  """

  backbone: vit.ViT
  head: heads.Head
  teacher_head: heads.Head
  epochs: int
  steps_per_epoch: int
  global_crops: int = 2
  local_crops: int = 10
  mask: str = "attmask_high"
  mask_ratio: tuple[float, ...] = (0.3,)
  mask_ratio_var: tuple[float, ...] = (0.2,)
  mask_prob: float = 0.5
  show_max: float = 0.1
  mask_start_epoch: int = 0
  mask_input: bool = True
  norm_last_layer: bool = False
  cls_weight: float = 1.0
  patch_weight: float = 1.0
  student_temp: float = 0.1
  teacher_temp: tuple[float, float] = (0.04, 0.07)
  teacher_patch_temp: tuple[float, float] = (0.04, 0.07)
  temp_warmup_epochs: int = 30
  center_momentum: float = 0.9
  patch_loss_chunks: int = 1
  seed: int = 0

  teacher_first = False  # the teacher moves after the student's update
  batch_coupled = False  # images meet in the centres only, which are means
  frozen_at_start = "head/last_layer"  # leaves held for optim.freeze_epochs

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, *, steps_per_epoch: int
  ) -> Self:
    """Builds the method from the sections method, data, optim and run.

    Raises:
      InputError: a value out of range or values that do not fit together.
    """
    m, data, run = config.method, config.data, config.run
    dtype = jnp.dtype(m.dtype)
    separate = 0 if m.shared_head else m.patch_out_dim
    teacher_separate = 0 if m.shared_head_teacher else m.patch_out_dim
    _check_heads(m)
    head = heads.Head(
      out_dim=m.out_dim,
      patch_out_dim=separate,
      hidden=m.head_hidden,
      bottleneck=m.head_bottleneck,
      act=m.head_act,
      norm=m.head_norm,
      dtype=dtype,
    )
    backbone = vit.build(
      variant=m.variant,
      patch_size=m.patch_size,
      image_size=data.image_size,
      drop_path=m.drop_path,
      dtype=dtype,
      scan=run.scan,
      remat=run.remat,
      attention=run.attention,
    )
    own = {f.name for f in dataclasses.fields(cls)} & set(m.keys())
    fields = {k: _plain(m[k]) for k in own}
    return cls(
      backbone=backbone,
      head=head,
      teacher_head=head.clone(patch_out_dim=teacher_separate),
      epochs=config.optim.epochs,
      steps_per_epoch=steps_per_epoch,
      global_crops=data.global_crops,
      local_crops=data.local_crops,
      patch_loss_chunks=run.patch_loss_chunks,
      **fields,
    )

  def __post_init__(self) -> None:
    if len(self.mask_ratio_var) == 1 < len(self.mask_ratio):
      spread = self.mask_ratio_var * len(self.mask_ratio)
      object.__setattr__(self, "mask_ratio_var", spread)
    _check_masks(self)
    _check_views(self)

  @property
  def patches(self) -> int:
    """N of a global view."""
    return self.backbone.grid**2

  @property
  def max_hidden(self) -> int:
    """M: no mask of this configuration hides more patches."""
    pairs = zip(self.mask_ratio, self.mask_ratio_var, strict=True)
    return max(1, *(int(self.patches * (r + v)) for r, v in pairs))

  @property
  def uses_patches(self) -> bool:
    """Whether there is a patch loss at all."""
    return self.patch_weight != 0 and self.mask != "none"

  @property
  def untrained(self) -> str | None:
    """Regex of leaves in `params` that never move, or None."""
    return "head/last_layer2?/weight_g" if self.norm_last_layer else None

  def init(self, rng: jax.Array) -> tuple[Params, Params, Params]:
    """Start values: params, teacher (a copy of the student), aux (centres)."""
    rng_backbone, rng_head = jax.random.split(rng)
    side, n = self.backbone.image_size, self.patches
    images = jnp.zeros((1, side, side, 3))
    mask = jnp.zeros((1, n), bool) if self._has_mask_token else None
    tokens = jnp.zeros((1, 1 + n, self.backbone.width))
    params = {
      "backbone": self.backbone.init(rng_backbone, images, mask)["params"],
      "head": self.head.init(rng_head, tokens)["params"],
    }
    backbone = {k: v for k, v in params["backbone"].items() if k != "mask_token"}
    head = dict(params["head"])
    if self.head.patch_out_dim and not self.teacher_head.patch_out_dim:
      # quirk: the teacher's one layer starts as the student's patch layer
      # (copied last) and then follows its class layer (iBOT).
      head["last_layer"] = head.pop("last_layer2")
    teacher = jax.tree.map(jnp.copy, {"backbone": backbone, "head": head})
    aux = {"center": jnp.zeros(self.head.out_dim)}
    if self.uses_patches:
      width = self.head.patch_out_dim or self.head.out_dim
      aux["center_patch"] = jnp.zeros(width)
    return params, teacher, aux

  def at(self, step: int) -> Scalars:
    """What changes per step, from (seed, step): float64 on the host."""
    epoch = min(step // self.steps_per_epoch, self.epochs - 1)
    rng = random.Random(f"{self.seed}-ratio-{step}")
    ratio, hint_ratio = (self.ratio(rng, epoch) for _ in range(2))
    n_mask, n_show = masking.attention_counts(
      self.patches, ratio, hint_ratio, self.show_max
    )
    temp, patch_temp = self.temperatures()
    return {
      "teacher_temp": np.float32(temp[epoch]),
      "teacher_patch_temp": np.float32(patch_temp[epoch]),
      "n_mask": np.int32(n_mask),
      "n_show": np.int32(n_show),
    }

  def ratio(self, rng: random.Random, epoch: int) -> float:
    """One draw of the mask ratio; 0 before `mask_start_epoch`."""
    if self.mask == "none" or epoch < self.mask_start_epoch:
      return 0.0
    return masking.draw_ratio(rng, self.mask_ratio, self.mask_ratio_var)

  def temperatures(self) -> tuple[np.ndarray, np.ndarray]:
    """Teacher temperatures per epoch, for class tokens and patches: [epochs].

    The patch warm-up begins when masking does.
    """

    def table(start: float, end: float, lead: int) -> np.ndarray:
      warm = np.linspace(start, end, self.temp_warmup_epochs)
      rest = self.epochs - lead - self.temp_warmup_epochs
      return np.concatenate([np.full(lead, start), warm, np.full(rest, end)])

    return (
      table(*self.teacher_temp, 0),
      table(*self.teacher_patch_temp, self.mask_start_epoch),
    )

  def item_extras(self, epoch: int, index: int) -> dict[str, np.ndarray]:
    """Host-side masks of one image's global views: masks [G, N] bool."""
    if self.mask not in masking.HOST_POLICIES:
      return {}
    rng = random.Random(f"{self.seed}-mask-{epoch}-{index}")
    array_rng = np.random.RandomState([self.seed, epoch, index])
    grid = (self.backbone.grid, self.backbone.grid)
    masks = []
    for _ in range(self.global_crops):
      ratio = self.ratio(rng, epoch)
      if self.mask == "block":
        masks.append(masking.block_mask(rng, grid, ratio))
      else:
        masks.append(masking.random_mask(array_rng, grid, ratio))
    return {"masks": np.stack(masks).reshape(self.global_crops, -1)}

  def loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    batch: Batch,
    rng: jax.Array,
    scalars: dict[str, jax.Array],
  ) -> tuple[jax.Array, tuple[Params, dict[str, jax.Array], Batch]]:
    """One forward pass of both networks.

    Args:
      params: student.
      teacher: teacher.
      aux: centres.
      batch: images [B, G, H, W, 3], local_images [B, V - G, h, w, 3] if any,
        masks [B, G, N] for host-side policies, position [B].
      rng: key of this step.
      scalars: `at(step)`.

    Returns:
      loss [] and (stats for the centres, metrics, per-image results [B]).
    """
    rng_mask, rng_global, rng_local = jax.random.split(rng, 3)
    images = vit.normalize_images(batch["images"])
    position = batch["position"]
    whole = self._teacher(teacher, flatten(images))
    hidden = self._hide(whole.attention, batch, rng_mask, scalars)
    rng_drop = (rng_global, rng_local)
    student = self._student(params, images, batch, hidden, rng_drop)

    logits = unflatten(whole.logits, position)  # [B, G, K]
    probs = losses.teacher_probs(
      logits, aux["center"], temp=scalars["teacher_temp"]
    )
    cls = self.cls_weight * losses.cls_cross_entropy(
      probs, student.logits, temp=self.student_temp
    )
    stats = {"center": jnp.mean(logits, axis=(0, 1))}
    patch = jnp.zeros(())
    if self.uses_patches:
      patch = self.patch_weight * self._patch_loss(
        params, teacher, aux, student.z, whole.z[:, 1:], hidden, scalars
      )
      # The layer is linear: the mean logit is the logit of the mean vector.
      mean = jnp.mean(whole.z[:, 1:], axis=(0, 1))
      stats["center_patch"] = self._patch_logits(
        self.teacher_head, teacher, mean
      )
    assigned = jnp.argmax(logits[:, 0], axis=-1)
    # quirk: compared with the student's second view, masked (train_acc).
    agree = assigned == jnp.argmax(student.logits[:, 1], axis=-1)
    metrics = {
      "loss": cls + patch,
      "cls": cls,
      "patch": patch,
      "teacher_entropy": losses.entropy(probs),
      "center_norm": jnp.linalg.norm(aux["center"]),
      "agreement": jnp.mean(agree.astype(jnp.float32)),
      **_mask_metrics(hidden),
    }
    per_image = {"assignment": assigned.astype(jnp.int32)}
    return cls + patch, (stats, metrics, per_image)

  def update_aux(self, aux: Params, stats: Params) -> Params:
    """Centres follow the mean teacher logits of the batch just seen."""
    return {
      name: losses.update_center(
        aux[name], stats[name], momentum=self.center_momentum
      )
      for name in aux
    }

  def features(
    self,
    weights: Params,
    images: jax.Array,
    *,
    last: int = 1,
    norm: bool = True,
  ) -> tuple[jax.Array, jax.Array]:
    """Frozen features of whole images.

    Args:
      weights: `params` or `teacher`.
      images: [B, H, W, 3], uint8 or normalised.
      last: class tokens of that many last blocks, oldest first.
      norm: apply the final norm.

    Returns:
      cls [B, last * D] and patches of the last block [B, N, D], float32.
    """
    images = vit.normalize_images(images)
    backbone = {"params": weights["backbone"]}
    out = self.backbone.apply(backbone, images, last=last)
    blocks = list(out.blocks)
    if norm:
      final = vit.layer_norm(None)
      scale = {"params": weights["backbone"]["norm"]}
      blocks = [final.apply(scale, x) for x in blocks]
    cls = jnp.concatenate([x[:, 0] for x in blocks], axis=-1)
    return cls, blocks[-1][:, 1:]

  def attention(self, weights: Params, images: jax.Array) -> jax.Array:
    """Class-token attention of the last block: [B, H, W, 3] -> [B, A, N]."""
    images = vit.normalize_images(images)
    backbone = {"params": weights["backbone"]}
    return self.backbone.apply(backbone, images, want="cls").attention

  @property
  def _has_mask_token(self) -> bool:
    return self.mask_input and self.mask != "none"

  def _teacher(self, teacher: Params, rows: jax.Array) -> Teacher:
    """Whole images [R, H, W, 3] through the teacher, without drop path."""
    masks_by_attention = self.mask in masking.ATTENTION_POLICIES
    out = self.backbone.apply(
      {"params": teacher["backbone"]},
      rows,
      want="cls" if masks_by_attention else "none",
    )
    tokens = out.tokens if self.uses_patches else out.tokens[:, :1]
    head = {"params": teacher["head"]}
    z = self.teacher_head.apply(head, tokens, method="project")
    logits = self.teacher_head.apply(head, z[:, 0], method="cls_logits")
    attention = None
    if masks_by_attention:
      attention = jnp.mean(out.attention, axis=1)  # over heads
    return Teacher(z, logits, attention)

  def _hide(
    self,
    attention: jax.Array | None,
    batch: Batch,
    rng: jax.Array,
    scalars: dict[str, jax.Array],
  ) -> Hidden | None:
    """Chooses the hidden patches of every row, or None without masks."""
    if self.mask == "none":
      return None
    if self.mask in masking.HOST_POLICIES:
      mask = flatten(batch["masks"])
    else:
      rows = row_ids(batch["position"], self.global_crops)
      mask = masking.attention_mask(
        attention,
        policy=self.mask,
        n_mask=scalars["n_mask"],
        keys=masking.row_keys(rng, rows),
        probability=self.mask_prob,
        n_show=scalars["n_show"],
        n_eligible=int(self.patches * self.show_max),
      )
    return Hidden(mask, *masking.hidden_ids(mask, self.max_hidden))

  def _student(
    self,
    params: Params,
    images: jax.Array,
    batch: Batch,
    hidden: Hidden | None,
    rngs: tuple[jax.Array, jax.Array],
  ) -> Student:
    """Masked global views, then whole local ones: [B, G, H, W, 3] -> Student."""
    mask = hidden.mask if hidden is not None and self.mask_input else None
    tokens = self._student_tokens(params, images, mask, batch, rngs[0])
    head = {"params": params["head"]}
    wanted = tokens[:, :1]
    if self.uses_patches:
      picked = masking.gather(tokens[:, 1:], hidden.ids)
      wanted = jnp.concatenate([wanted, picked], axis=1)
    z = self.head.apply(head, wanted, method="project")
    views = [unflatten(z[:, 0], batch["position"])]
    if self.local_crops:
      local = vit.normalize_images(batch["local_images"])
      tokens = self._student_tokens(params, local, None, batch, rngs[1])
      local_z = self.head.apply(head, tokens[:, 0], method="project")
      views.append(unflatten(local_z, batch["position"]))
    views = jnp.concatenate(views, axis=1)  # [B, V, C]
    logits = self.head.apply(head, views, method="cls_logits")
    return Student(logits, z[:, 1:] if self.uses_patches else None)

  def _student_tokens(
    self,
    params: Params,
    images: jax.Array,
    mask: jax.Array | None,
    batch: Batch,
    rng: jax.Array,
  ) -> jax.Array:
    """[B, V, H, W, 3] through the student's backbone: [B * V, L, D]."""
    draws = None
    if self.backbone.drop_path:
      rows = row_ids(batch["position"], images.shape[1])
      draws = vit.drop_path_draws(rng, rows, depth=self.backbone.depth)
    backbone = {"params": params["backbone"]}
    return self.backbone.apply(
      backbone, flatten(images), mask, draws=draws
    ).tokens

  def _patch_loss(
    self,
    params: Params,
    teacher: Params,
    aux: Params,
    student_z: jax.Array,
    teacher_z: jax.Array,
    hidden: Hidden,
    scalars: dict[str, jax.Array],
  ) -> jax.Array:
    """Cross-entropy at the hidden patches: mean per row, then over rows.

    Args:
      params: student.
      teacher: teacher.
      aux: centres.
      student_z: [R, M, C], at the hidden patches.
      teacher_z: [R, N, C], at all patches.
      hidden: where the patches are.
      scalars: temperatures.

    Returns:
      [] float32. quirk: rows without a mask add 0 and count (iBOT).
    """

    def term(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
      z, whole_z, valid = chunk
      probs = losses.teacher_probs(
        self._patch_logits(self.teacher_head, teacher, whole_z),
        aux["center_patch"],
        temp=scalars["teacher_patch_temp"],
      )
      logits = self._patch_logits(self.head, params, z)
      return losses.masked_cross_entropy(
        probs, logits, valid, temp=self.student_temp
      )

    parts = (student_z, masking.gather(teacher_z, hidden.ids), hidden.valid)
    if self.patch_loss_chunks > 1:
      parts = jax.tree.map(self._chunk, parts)
      total = jnp.sum(jax.lax.map(jax.checkpoint(term), parts), axis=0)
    else:
      total = term(parts)
    count = jnp.sum(hidden.mask, axis=-1).astype(jnp.float32)
    return jnp.mean(total / jnp.maximum(count, 1.0))

  def _chunk(self, x: jax.Array) -> jax.Array:
    """[R, M, ...] -> [chunks, R, M / chunks, ...], zero-padded along M."""
    chunks = self.patch_loss_chunks
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, -x.shape[1] % chunks)
    x = jnp.pad(x, pad)
    x = x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def _patch_logits(
    self, head: heads.Head, weights: Params, z: jax.Array
  ) -> jax.Array:
    """[..., C] -> [..., K] by the patch prototypes of `weights`."""
    return head.apply({"params": weights["head"]}, z, method="patch_logits")


def flatten(x: jax.Array) -> jax.Array:
  """[B, V, ...] -> [B * V, ...], image-major."""
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unflatten(x: jax.Array, position: jax.Array) -> jax.Array:
  """[B * V, ...] -> [B, V, ...], with B from position [B]."""
  b = position.shape[0]
  return x.reshape(b, x.shape[0] // b, *x.shape[1:])


def row_ids(position: jax.Array, views: int) -> jax.Array:
  """Identity of each row in the global batch: [B] -> [B * V] int32."""
  view = jnp.arange(views, dtype=position.dtype)
  return (position[:, None] * views + view[None]).reshape(-1)


def _mask_metrics(hidden: Hidden | None) -> dict[str, jax.Array]:
  """Share of views that are masked, and share hidden among those."""
  if hidden is None:
    return {"mask_ratio": jnp.zeros(()), "masked_share": jnp.zeros(())}
  share = jnp.mean(hidden.mask.astype(jnp.float32), axis=-1)  # [R]
  masked = jnp.mean((share > 0).astype(jnp.float32))
  ratio = jnp.mean(share) / jnp.maximum(masked, 1e-12)
  return {"mask_ratio": ratio, "masked_share": masked}


def _plain(value: Any) -> Any:
  """Lists from the command line become tuples, which hash."""
  return tuple(value) if isinstance(value, list | tuple) else value


def _check_heads(m: ml_collections.ConfigDict) -> None:
  if m.head_norm not in heads.NORMS:
    raise InputError(
      f'method.head_norm "{m.head_norm}" is unknown: use '
      f"{' or '.join(heads.NORMS)}"
    )
  if m.head_act not in heads.ACTIVATIONS:
    raise InputError(
      f'method.head_act "{m.head_act}" is unknown: use '
      f"{' or '.join(heads.ACTIVATIONS)}"
    )
  if m.shared_head and not m.shared_head_teacher:
    raise InputError(
      "method.shared_head=True with method.shared_head_teacher=False leaves "
      "the teacher's patch layer without a student to follow: set both alike"
    )
  if (
    not m.shared_head
    and m.shared_head_teacher
    and m.patch_out_dim != m.out_dim
  ):
    raise InputError(
      f"a separate student head with method.patch_out_dim {m.patch_out_dim} "
      f"cannot follow a shared teacher head with method.out_dim {m.out_dim}: "
      "set both to one size, or method.shared_head_teacher=False"
    )


def _check_masks(method: AttMask) -> None:
  if method.mask not in masking.POLICIES:
    raise InputError(
      f'method.mask "{method.mask}" is unknown: use '
      f"{', '.join(masking.POLICIES)}"
    )
  if len(method.mask_ratio) != len(method.mask_ratio_var):
    raise InputError(
      f"method.mask_ratio has {len(method.mask_ratio)} values and "
      f"method.mask_ratio_var {len(method.mask_ratio_var)}: give one variance "
      "or as many as ratios"
    )
  for r, v in zip(method.mask_ratio, method.mask_ratio_var, strict=True):
    if r < v or r + v > 1 or v < 0:
      raise InputError(
        f"method.mask_ratio {r} with method.mask_ratio_var {v} leaves [0, 1]: "
        "the ratio must be at least its variance, and their sum at most 1"
      )
  for name in ("mask_prob", "show_max"):
    value = getattr(method, name)
    if not 0 <= value <= 1:
      raise InputError(f"method.{name} {value} must lie between 0 and 1")


def _check_views(method: AttMask) -> None:
  g, local = method.global_crops, method.local_crops
  if g < 1 or local < 0 or g + local < 2:
    raise InputError(
      f"data.global_crops {g} and data.local_crops {local} leave no other "
      "view to predict: use at least two global crops, or one and local ones"
    )
  warm = method.temp_warmup_epochs + method.mask_start_epoch
  if warm > method.epochs:
    raise InputError(
      f"method.temp_warmup_epochs {method.temp_warmup_epochs} and "
      f"method.mask_start_epoch {method.mask_start_epoch} are longer than "
      f"optim.epochs {method.epochs}: shorten them to {method.epochs} in all"
    )
