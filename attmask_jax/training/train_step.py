"""The train state and the compiled train step.

One step is one program: teacher, masks, student, losses, gradients, clip,
optimiser, centres and the teacher's moving average.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec

from attmask_jax import Batch, Params, trees
from attmask_jax import mesh as meshes
from attmask_jax.methods import base
from attmask_jax.methods.base import LossOutput, Method
from attmask_jax.training import optim


class TrainState(struct.PyTreeNode):
  """Everything an optimiser step changes.

  Attributes:
    step: [] int32, completed steps.
    params: what is trained.
    teacher: its moving average.
    aux: other state, such as centres.
    opt: optimiser state.
  """

  step: jax.Array
  params: Params
  teacher: Params
  aux: Params
  opt: Any

  def items(self) -> dict[str, Params]:
    """The state as checkpoint items."""
    train = {
      "step": self.step,
      "aux": self.aux,
      "opt": dict(enumerate_leaves(self.opt)),
    }
    return {"params": self.params, "teacher": self.teacher, "train": train}

  def from_items(self, items: dict[str, Params]) -> "TrainState":
    """A state of this structure with the values of `items()`."""
    train = items["train"]
    names = [name for name, _ in enumerate_leaves(self.opt)]
    leaves = [train["opt"][name] for name in names]
    opt = jax.tree.unflatten(jax.tree.structure(self.opt), leaves)
    return TrainState(
      train["step"], items["params"], items["teacher"], train["aux"], opt
    )


def enumerate_leaves(tree: Any) -> list[tuple[str, jax.Array]]:
  """Leaves with readable, unique names without slashes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: re.sub(r"\W+", ".", jax.tree_util.keystr(path)).strip(".")
  return [(name(path), leaf) for path, leaf in leaves]


class StepResult(NamedTuple):
  """Result of one optimiser step.

  Attributes:
    state: the next state.
    metrics: name -> [] float32, over the global batch.
    per_image: name -> [B] int32, split over the devices like the batch.
  """

  state: TrainState
  metrics: dict[str, jax.Array]
  per_image: Batch


Augment = Callable[[Batch], Batch]
# (state, batch, scalars) -> result; the state is donated.
Step = Callable[[TrainState, Batch, dict[str, jax.Array]], StepResult]


def _maker(
  method: Method, tx: optax.GradientTransformationExtraArgs, seed: int
) -> Callable[[], TrainState]:
  def make() -> TrainState:
    rng, _ = base.split_key(seed)
    start = method.init(rng)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, *start, tx.init(start.params))

  return make


def abstract_state(
  method: Method,
  tx: optax.GradientTransformationExtraArgs,
  mesh: jax.sharding.Mesh,
  *,
  seed: int,
) -> TrainState:
  """Shapes, types and shardings of a state, without allocating it."""
  shapes = jax.eval_shape(_maker(method, tx, seed))
  place = lambda x, sharding: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=sharding
  )
  return jax.tree.map(place, shapes, meshes.param_shardings(mesh, shapes))


def init_state(
  method: Method,
  tx: optax.GradientTransformationExtraArgs,
  mesh: jax.sharding.Mesh,
  *,
  seed: int,
) -> tuple[TrainState, TrainState]:
  """Initial state on the mesh, and its shardings."""
  make = _maker(method, tx, seed)
  shardings = meshes.param_shardings(mesh, jax.eval_shape(make))
  return jax.jit(make, out_shardings=shardings)(), shardings


def overlay(state: TrainState, start: dict[str, Params]) -> TrainState:
  """Replaces initial values by given ones, with the same shardings.

  Args:
    state: initial state.
    start: trees below "params", "teacher" or "aux"; each leaf's path exists in
      the state, with the same shape.
  """

  def replace(tree: Params, given: Params) -> Params:
    values = {trees.path_name(p): x for p, x in _leaves(given)}

    def place(name: str, old: jax.Array) -> jax.Array:
      if name not in values:
        return old
      new = values.pop(name)
      if new.shape != old.shape:
        raise ValueError(f"{name}: {new.shape} given for {old.shape}")
      # A copy: the state is donated, but the caller's arrays must not be.
      return jax.device_put(new, old.sharding, may_alias=False)

    tree = trees.map_named(place, tree)
    if values:
      raise ValueError(f"no such parameters: {sorted(values)}")
    return tree

  parts = {name: replace(getattr(state, name), x) for name, x in start.items()}
  return state.replace(**parts)


def at_step(state: TrainState, step: int) -> TrainState:
  """The state with its count of completed steps set to `step`."""
  count = np.asarray(step, state.step.dtype)
  return state.replace(step=jax.device_put(count, state.step.sharding))


@jax.jit
def not_finite(state: TrainState) -> dict[str, jax.Array]:
  """Which parts of a state hold NaN or infinite values: name -> [] bool."""

  def bad(tree: Params) -> jax.Array:
    floats = [
      x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return jnp.any(jnp.array([~jnp.isfinite(x).all() for x in floats], bool))

  return {
    "parameters": bad(state.params),
    "teacher": bad(state.teacher),
    "centres": bad(state.aux),
    "optimiser": bad(state.opt),
  }


def _leaves(tree: Params) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_leaves_with_path(tree)


def make_step(
  method: Method,
  tx: optax.GradientTransformationExtraArgs,
  mesh: jax.sharding.Mesh,
  shardings: TrainState,
  *,
  seed: int,
  accumulate: int = 1,
  augment: Augment = lambda batch: batch,
) -> Step:
  """Compiles one optimiser step.

  Args:
    method: whose loss is minimised.
    tx: optimiser, see `optim.Optimizer.build`.
    mesh: all devices.
    shardings: of the state.
    seed: of the run; the step's key is folded from it and the step's number.
    accumulate: micro-batches per step.
    augment: makes the views of a batch, see `augment.device`; by default they
      are there.

  Returns:
    (state, batch, scalars) -> StepResult. The state is donated; `scalars` holds
    `Schedules.at` and `method.at` of the step, traced.
  """

  def train_step(
    state: TrainState, batch: Batch, scalars: dict[str, jax.Array]
  ) -> StepResult:
    _, rng = base.split_key(seed)
    rng = jax.random.fold_in(rng, state.step)
    momentum = scalars["momentum"]
    teacher = state.teacher
    if method.teacher_first:
      teacher = optim.ema(teacher, state.params, momentum)
    # Left to itself, the compiler moves activations to split parameters.
    whole = meshes.gathered(mesh, (state.params, teacher, state.aux))

    def loss(params: Params, rows: Batch) -> tuple[jax.Array, LossOutput]:
      out = method.loss(params, *whole[1:], rows, rng, scalars)
      return out.loss, out

    def compute(rows: Batch) -> tuple[Params, LossOutput]:
      grads, out = jax.grad(loss, has_aux=True)(whole[0], augment(rows))
      return grads, out

    shared = mesh.shape["fsdp"] > 1 and not method.batch_coupled
    if accumulate > 1 or shared:
      grads, out = _per_device(compute, batch, accumulate, mesh)
    else:
      grads, out = compute(batch)
    grads = jax.lax.with_sharding_constraint(grads, shardings.params)
    grads = optim.without(grads, method.untrained)

    aux = method.update_aux(state.aux, out.stats)
    updates, opt = tx.update(
      grads,
      state.opt,
      state.params,
      lr=scalars["lr"],
      wd=scalars["wd"],
      frozen=scalars["frozen"],
    )
    params = optax.apply_updates(state.params, updates)
    if not method.teacher_first:
      teacher = optim.ema(teacher, params, momentum)
    metrics = out.metrics | {"grad_norm": optax.tree.norm(grads)}
    state = TrainState(state.step + 1, params, teacher, aux, opt)
    return StepResult(state, metrics, out.per_image)

  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=StepResult(
      shardings, meshes.replicated(mesh), meshes.batch_sharding(mesh)
    ),
  )


def _per_device(
  compute: Callable[[Batch], tuple[Params, LossOutput]],
  batch: Batch,
  micro_batches: int,
  mesh: jax.sharding.Mesh,
) -> tuple[Params, LossOutput]:
  """Means of gradients, statistics and metrics over devices and micro-batches.

  Every device adds up those of its own rows, and the devices add theirs up once
  per step. That is the mean over the batch unless the loss couples its images.
  Left to the compiler, they would add up after every micro-batch.

  Args:
    compute: rows -> gradients, output of the loss; its parameters are whole.
    batch: leaves [B, ...].
    micro_batches: divides B on every device.
    mesh: all devices.
  """

  def local(rows: Batch) -> tuple[tuple[Params, LossOutput], Batch]:
    means, per_image = _local_means(compute, rows, micro_batches)
    return jax.lax.pmean(means, meshes.BATCH_AXES), per_image

  rows = PartitionSpec(meshes.BATCH_AXES)
  (grads, out), per_image = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=rows,
    out_specs=(PartitionSpec(), rows),
    check_vma=False,
  )(batch)
  return grads, out._replace(per_image=per_image)


def _local_means(
  compute: Callable[[Batch], tuple[Params, LossOutput]], batch: Batch, n: int
) -> tuple[tuple[Params, LossOutput], Batch]:
  """Means over n micro-batches, and `per_image` of all rows in their order.

  Each micro-batch takes every n-th row, so that rows that are split over
  devices stay there; contiguous slices would move between them.
  """
  if n == 1:
    grads, out = compute(batch)
    return (grads, out._replace(per_image={})), out.per_image
  split = lambda x: jnp.moveaxis(
    x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0
  )
  rows = jax.tree.map(split, batch)

  def micro_step(rows: Batch) -> tuple[Params, Batch]:
    grads, out = compute(rows)
    return (grads, out._replace(per_image={})), out.per_image

  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype),
    jax.eval_shape(micro_step, jax.tree.map(lambda x: x[0], rows))[0],
  )

  def body(total: Params, rows: Batch) -> tuple[Params, Batch]:
    part, per_image = micro_step(rows)
    return jax.tree.map(lambda a, b: a + b / n, total, part), per_image

  means, per_image = jax.lax.scan(body, zeros, rows)
  merge = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
  return means, jax.tree.map(merge, per_image)
