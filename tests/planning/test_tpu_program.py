"""The program that libtpu compiles for a slice of TPUs, without any."""

import re

import jax
import jax.numpy as jnp
import program_parts
import pytest
import small

from attmask_jax import mesh as meshes
from attmask_jax.models import layers
from attmask_jax.planning import (
  collectives,
  memory,
  program,
  step,
  topologies,
)  # fmt: skip

pytest.importorskip("libtpu", reason='needs pip install "jax[tpu]"')
pytestmark = pytest.mark.slow

CHIPS = 4
SIZES = {
  "method.variant": "128x3x2",
  "method.dtype": "bfloat16",
  "data.batch_size": 32,
  "run.topology": "v5e:2x2",
}
# float32 on purpose: resampled positions, and the loss over prototypes.
FLOAT32 = r"_positions|bgk,bvk->bgv"


def compiled(changes=None, *, arg):
  """The planned step, its executable and its text, parsed."""
  config = small.config(SIZES | (changes or {}), arg=arg)
  parts = step.build(config, topologies.find(config.run.topology))
  executable, _ = parts.compile(config.data.batch_size)
  return parts, executable, program.parse(executable.as_text())


@pytest.fixture(scope="module", params=["attmask", "mae", "extrema"])
def plain(request):
  return compiled(arg=request.param)


def messages(read):
  found = collectives.collectives(read, devices=CHIPS)
  return {x.kind: x for x in found}


def bytes_of(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_data_parallel_chips_only_add_up(plain):
  parts, _, read = plain
  found = messages(read)
  assert set(found) == {"all-reduce"} and found["all-reduce"].group == CHIPS
  # Gradients of matrix products travel in bfloat16; AttMask's backbone has two
  # backward passes, of whole views and of local ones.
  once = bytes_of(parts.state.params)
  assert once / 2 <= found["all-reduce"].bytes <= 2 * once


def test_matrix_products_are_in_bfloat16(plain):
  _, _, read = plain
  found = program_parts.products(read)
  wide = {
    x.source
    for x in found
    if any(factor.dtype == "f32" for factor in x.operands)
    and not re.search(FLOAT32, x.source)
  }
  assert not wide
  assert any("attn" in x.source and "transpose(" in x.source for x in found)


def test_q_k_and_v_are_not_rearranged_together_in_a_block():
  """Of a ViT-S: single arrays of the size of the tokens still are."""
  block = layers.Block(6, 4.0, jnp.bfloat16, "xla")
  device = topologies.find("v5e:1x1").devices[0]
  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device)
  )
  tokens = jax.ShapeDtypeStruct((32, 197, 384), jnp.float32)
  init = lambda key: block.init(key, jnp.zeros((1, 197, 384)))["params"]
  stack = lambda key: jax.vmap(init)(jax.random.split(key, 3))
  weights = jax.eval_shape(stack, jax.random.key(0))

  def loss(weights, x):
    body = lambda x, layer: (block.apply({"params": layer}, x)[0], None)
    return jnp.sum(jnp.square(jax.lax.scan(body, x, weights)[0]))

  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
    *jax.tree.map(place, (weights, tokens))
  )
  read = program.parse(lowered.compile().as_text())
  assert any("Block/attn" in x.source for x in program_parts.products(read))
  one = 32 * 197 * 384 * 2  # bytes in bfloat16
  assert not program_parts.rearranged(read, "Block/", smallest=one + 1)


def test_memory_is_that_of_the_parts(plain):
  parts, executable, _ = plain
  got = memory.measure(parts, 32, executable, 16e9)
  state = bytes_of(parts.state) + bytes_of(parts.batch(32)) // CHIPS
  plan = executable.memory_analysis()
  assert state <= plan.argument_size_in_bytes  # tiles of 8 x 128 are padded
  assert got.fits and state < got.total


def test_flops_are_those_of_the_plan():
  changes = {"run.scan": False}  # the compiler counts a loop's body once
  parts, executable, _ = compiled(changes, arg="mae")
  got = CHIPS * executable.cost_analysis()["flops"]
  assert got == pytest.approx(parts.flops(32), rel=0.1)


def test_micro_batches_are_added_up_before_the_chips_are():
  changes = {"run.accumulate": 2}
  parts, _, read = compiled(changes, arg="mae")
  found = messages(read)
  assert set(found) == {"all-reduce"}
  once = bytes_of(parts.state.params)
  assert once <= found["all-reduce"].bytes <= 1.01 * once


def test_split_parameters_are_gathered_once(monkeypatch):
  monkeypatch.setattr(meshes, "FSDP_MIN_SIZE", 2**10)
  parts, _, read = compiled({"run.fsdp": CHIPS}, arg="mae")
  found = messages(read)
  assert set(found) <= {"all-reduce", "all-gather", "reduce-scatter"}
  once = bytes_of(parts.state.params)
  assert 0.45 * once <= found["all-gather"].bytes <= 1.01 * once
  kinds = ("all-reduce", "reduce-scatter")
  added = sum(found[kind].bytes for kind in kinds if kind in found)
  assert once <= added <= 1.05 * once
