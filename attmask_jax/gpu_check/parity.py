"""How far bfloat16 and fused attention are from float32, with tolerances.

Errors are relative: the root of the summed squares of all differences over that
of the float32 values. bfloat16 keeps 8 bits, so one rounding changes a value by
up to 0.4 %; errors of many values average, those of a chain of layers add up.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attmask_jax.models import ops

if TYPE_CHECKING:  # attention alone is checked with jax alone
  import ml_collections

# Of an attention and its gradients, and of a method's loss and its gradients.
# About four times what bfloat16 without fused kernels had on a CPU, at the
# published widths, or more.
FLOAT32 = {"output": 1e-5, "gradient": 1e-5}
ATTENTION = {"output": 1e-2, "gradient": 2e-2}
METHOD = {"loss": 1e-2, "gradient": 5e-2}

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Check(NamedTuple):
  """One comparison with float32.

  Attributes:
    name: of what is compared.
    error: relative.
    tolerance: the largest error that passes.
  """

  name: str
  error: float
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether the error is a number within the tolerance."""
    return self.error <= self.tolerance


def relative_error(got: Any, want: Any) -> float:
  """Root of summed squares of the differences of trees, over that of `want`."""
  squares = lambda trees: math.fsum(
    float(np.sum(np.square(np.asarray(x, np.float64))))
    for x in jax.tree.leaves(trees)
  )
  differences = jax.tree.map(
    lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64),
    got,
    want,
  )
  return math.sqrt(squares(differences) / squares(want))


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Attention as in the formula: [R, L, A, D / A], three times -> the same."""
  logits = jnp.einsum("rqac,rkac->raqk", q, k) / math.sqrt(q.shape[-1])
  return jnp.einsum("raqk,rkac->rqac", jax.nn.softmax(logits), v)


def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """cuDNN's: [R, L, A, D / A], three times -> the same; NVIDIA GPUs only."""
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def attention(
  shape: Sequence[int], *, cudnn: bool, seed: int = 0
) -> list[Check]:
  """Attention of this package and of cuDNN against the formula in float32.

  Args:
    shape: R, L, A, D / A of queries, keys and values.
    cudnn: whether to check cuDNN's, which needs an NVIDIA GPU.
    seed: of the values, which bfloat16 represents exactly.
  """
  keys = jax.random.split(jax.random.key(seed), 4)
  draw = lambda key: jax.random.normal(key, shape, jnp.bfloat16)
  # Products of width 64 make logits of standard deviation 2: sharper than flat.
  inputs = 2**0.5 * draw(keys[0]), 2**0.5 * draw(keys[1]), draw(keys[2])
  weight = draw(keys[3])

  def measured(attend: Attend, dtype: Any) -> tuple[jax.Array, Any]:
    total = lambda *x: jnp.sum(
      attend(*x).astype(jnp.float32) * weight.astype(jnp.float32)
    )
    given = [x.astype(dtype) for x in inputs]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    return jax.jit(attend)(*given), gradient(*given)

  with jax.default_matmul_precision("highest"):
    want = measured(plain_attention, jnp.float32)
    cases = {
      "float32": (ops.attention, jnp.float32, FLOAT32),
      "bfloat16": (ops.attention, jnp.bfloat16, ATTENTION),
    }
    if cudnn:
      cases["cudnn"] = (fused_attention, jnp.bfloat16, ATTENTION)
    return [
      check
      for name, (attend, dtype, tolerances) in cases.items()
      for check in _compared(
        f"{shape[1]} tokens, {name}",
        lambda attend=attend, dtype=dtype: measured(attend, dtype),
        want,
        tolerances,
      )
    ]


def _compared(
  name: str,
  measure: Callable[[], tuple[Any, Any]],
  want: tuple[Any, Any],
  tolerances: dict[str, float],
) -> list[Check]:
  """One check per tolerance; without an error if it cannot be measured."""
  try:
    errors = [*map(relative_error, measure(), want)]
  except Exception as problem:  # of any kernel: the other checks go on
    reason = str(problem).strip().split("\n")[0] or type(problem).__name__
    name, errors = f"{name} ({reason})", [math.nan] * len(tolerances)
  return [
    Check(f"{name}, {part}", error, tolerance)
    for (part, tolerance), error in zip(tolerances.items(), errors, strict=True)
  ]


def method(config: "ml_collections.ConfigDict", *, cudnn: bool) -> list[Check]:
  """A method's loss and gradients in bfloat16 against those in float32.

  Args:
    config: of a training run; its masks must not depend on attention, or
      rounding hides other patches.
    cudnn: whether to check cuDNN's attention, too.
  """
  from attmask_jax.training import setup

  run = setup.build(config)
  with contextlib.closing(run.pipeline.batches(0, 1)) as batches:
    batch = next(batches)
  first, second = jax.random.split(jax.random.key(config.method.seed))
  params, _, aux = jax.jit(run.method.init)(first)
  teacher = jax.jit(run.method.init)(second).teacher  # it is another network
  scalars = run.method.at(0)
  # As arguments: the compiler would try to fold constants of this size.
  rest = teacher, aux, batch, jax.random.key(0), scalars

  def measured(dtype: str, attention: str) -> tuple[jax.Array, Any]:
    changed = copy.deepcopy(config).unlock()
    changed.method.dtype, changed.run.attention = dtype, attention
    other = setup.build(changed).method
    loss = lambda params, *rest: other.loss(params, *rest).loss
    return jax.jit(jax.value_and_grad(loss))(params, *rest)

  with jax.default_matmul_precision("highest"):
    want = measured("float32", "xla")
    cases = {"bfloat16": "xla"} | ({"cudnn": "cudnn"} if cudnn else {})
    return [
      check
      for name, attention in cases.items()
      for check in _compared(
        name,
        lambda attention=attention: measured("bfloat16", attention),
        want,
        METHOD,
      )
    ]
