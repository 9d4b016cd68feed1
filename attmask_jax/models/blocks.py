"""Stacked transformer blocks: one set of parameters with a leading layer axis.

Scanned, they compile once for any depth; unrolled, every block is compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attmask_jax import Params
from attmask_jax.models import layers, ops

# What the backward pass recomputes: policies of what is kept instead.
REMAT = {
  "auto": None,  # see `recomputed`
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "elementwise": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ops.KEPT),
  ),
}


def recomputed(remat: str, *, scan: bool, platform: str = "") -> str:
  """The policy that "auto" stands for, else `remat` itself.

  On a CPU, writing what a scan keeps takes longer than computing norms and
  activations again. Other devices and unrolled blocks keep everything.

  Args:
    remat: one of REMAT.
    scan: whether the blocks are scanned.
    platform: of the devices, "" = that of this process.
  """
  if remat != "auto":
    return remat
  platform = platform or jax.default_backend()
  return "elementwise" if scan and platform == "cpu" else "none"


def branch_scales(drop_path_noise: jax.Array, drop_path: float) -> jax.Array:
  """Factors of stochastic depth on residual branches: 0 or 1 / (1 - rate).

  Args:
    drop_path_noise: [depth, 2, R] uniform in [0, 1).
    drop_path: rate of the last block, see `apply`.

  Returns:
    [depth, 2, R] float32; the mean over draws is 1.
  """
  rates = np.linspace(0, drop_path, len(drop_path_noise), dtype=np.float32)
  rates = jnp.asarray(rates)[:, None, None]
  return jnp.where(drop_path_noise >= rates, 1 / (1 - rates), 0.0)


def apply(
  module: nn.Module,
  block: layers.Block,
  x: jax.Array,
  *,
  depth: int,
  drop_path: float = 0.0,
  drop_path_noise: jax.Array | None = None,
  last: int = 1,
  return_attention: str = "none",
  logit_bias: jax.Array | None = None,
  attn_drop_keys: jax.Array | None = None,
  scan: bool = True,
  remat: str = "auto",
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
  """Runs `depth` blocks whose parameters are `module`'s "blocks".

  Args:
    module: the module being called, which holds the parameters.
    block: module of a single block, without a parent.
    x: [R, L, D] float32.
    depth: number of blocks.
    drop_path: stochastic-depth rate of the last block; block i of n uses
      `drop_path * i / (n - 1)`.
    drop_path_noise: [depth, 2, R] uniform in [0, 1), or None for no stochastic
      depth.
    last: how many block outputs to return, 1 to depth; those blocks are
      unrolled, since their outputs are kept.
    return_attention: attention of the last block, see `layers.Attention`; "all"
      is "full" of every block, which unrolls them.
    logit_bias: [depth, R, A, L, L] or None, see `layers.Attention`.
    attn_drop_keys: [depth, R] keys or None, see `layers.Attention`.
    scan: scan over the other blocks, or unroll them.
    remat: one of REMAT, what the backward pass recomputes.

  Returns:
    The last `last` outputs, each [R, L, D], oldest first, and the attention,
    for "all" [depth, R, A, L, L].
  """

  def init(key: jax.Array) -> Params:
    init_block = lambda key: block.init(key, x[:1])["params"]
    return jax.vmap(init_block)(jax.random.split(key, depth))

  if not 1 <= last <= depth:
    raise ValueError(f"last {last} must lie between 1 and depth {depth}")
  weights = module.param("blocks", init)
  keep = None
  if drop_path_noise is not None and drop_path > 0:
    keep = branch_scales(drop_path_noise, drop_path)

  def body(x: jax.Array, layer: tuple[Params, *tuple[jax.Array | None, ...]]):
    return block.apply({"params": layer[0]}, x, *layer[1:])[0], None

  remat = recomputed(remat, scan=scan)
  if remat != "none":
    body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not scan)
  stacked = (weights, keep, logit_bias, attn_drop_keys)
  scanned = depth - last
  if not scan or return_attention == "all":
    scanned = 0
  if scanned:
    first = jax.tree.map(lambda a: a[:scanned], stacked)
    x, _ = jax.lax.scan(body, x, first)
  outputs, attention = [], []
  for i in range(scanned, depth):
    layer = jax.tree.map(lambda a, i=i: a[i], stacked)
    if return_attention == "all" or (
      i == depth - 1 and return_attention != "none"
    ):
      kind = "full" if return_attention == "all" else return_attention
      x, probs = block.apply(
        {"params": layer[0]}, x, *layer[1:], return_attention=kind
      )
      attention.append(probs)
    else:
      x, _ = body(x, layer)
    outputs.append(x)
  if return_attention == "all":
    return tuple(outputs[-last:]), jnp.stack(attention)
  return tuple(outputs[-last:]), attention[0] if attention else None
