"""Messages of small programs, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from attmask_jax import mesh as meshes
from attmask_jax.planning import program
from attmask_jax.planning.collectives import (
  Collective,
  collectives,
  unexpected,
)

WHOLE = PartitionSpec()
ROWS = PartitionSpec(("data", "fsdp"))


def messages(f, *shapes, fsdp=1, out_specs=WHOLE):
  """Of `f` on the shards of arrays that are split over 8 devices."""
  mesh = meshes.make_mesh(fsdp=fsdp)
  sharding = meshes.batch_sharding(mesh)
  step = jax.shard_map(
    f, mesh=mesh, in_specs=ROWS, out_specs=out_specs, check_vma=False
  )
  arguments = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for shape, dtype in shapes
  ]
  text = jax.jit(step).lower(*arguments).compile().as_text()
  return collectives(program.parse(text), devices=8)


def test_one_sum_over_all_devices():
  (found,) = messages(
    lambda x: jax.lax.psum(x, ("data", "fsdp")), ((8, 16), "float32")
  )
  # Each device holds one row of 16 floats.
  assert found == Collective("all-reduce", 8, 1, 1, 64, {"f32": 64})
  assert found.sent == 2 * 64 * 7 / 8


def test_a_sum_in_a_loop_counts_once_per_iteration():
  def f(x):
    def body(total, row):
      return total + jax.lax.psum(row * total, ("data", "fsdp")), None

    return jax.lax.scan(body, jnp.ones(16), x)[0]

  (found,) = messages(f, ((8 * 5, 16), "float32"))  # 5 rows per device
  assert found == Collective("all-reduce", 8, 5, 5, 5 * 64, {"f32": 5 * 64})


def test_loops_within_loops_multiply():
  def f(x):
    inner = lambda t, row: (jnp.sin(jax.lax.psum(t * row, "data")), None)
    outer = lambda t, _: (jax.lax.scan(inner, t, x)[0], None)
    return jax.lax.scan(outer, jnp.ones(4), None, length=3)[0]

  (found,) = messages(f, ((8 * 2, 4), "float32"), fsdp=2)
  assert (found.kind, found.group, found.count) == ("all-reduce", 4, 3 * 2)


@pytest.mark.parametrize("fsdp, axes, group", [(1, "data", 8), (2, "fsdp", 2)])
def test_gathered_rows_count_with_what_arrives(fsdp, axes, group):
  (found,) = messages(
    lambda x: jax.lax.all_gather(x, axes, tiled=True),
    ((8, 16), "int32"),
    fsdp=fsdp,
    out_specs=WHOLE if group == 8 else PartitionSpec("data"),
  )
  assert found.kind == "all-gather" and found.group == group
  assert found.bytes == group * 16 * 4
  assert found.sent == (group - 1) * 16 * 4  # a ring passes on all but one


def test_scattered_sums_count_with_what_is_added_up():
  (found,) = messages(
    lambda x: jax.lax.psum_scatter(x[0], "data", tiled=True),
    ((8, 16), "float32"),
    out_specs=PartitionSpec("data"),
  )
  assert found.kind == "reduce-scatter"
  assert (found.bytes, found.sent) == (64, 64 * 7 / 8)


def test_rows_passed_on():
  ring = [(i, (i + 1) % 8) for i in range(8)]
  (found,) = messages(
    lambda x: jax.lax.ppermute(x, "data", ring),
    ((8, 16), "float32"),
    out_specs=PartitionSpec("data"),
  )
  assert found.kind == "collective-permute"
  assert (found.group, found.bytes, found.sent) == (2, 64, 64)


def test_a_program_of_one_device_sends_nothing():
  text = jax.jit(jnp.sin).lower(np.ones(8, np.float32)).compile().as_text()
  assert collectives(program.parse(text), devices=1) == []


# As libtpu writes it: asynchronous, tuples, tiles, axes of a mesh, and a loop
# whose length stands in its condition.
TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%condition (t: (s32[], bf16[8,4])) -> pred[] {
  %t = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %end = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %r = (bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/bf16[8,4]{1,0}) all-reduce(%x, %x), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add, backend_config={"estimated_cycles":"9223372036854775807"}
  %y = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%r), index=0, backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %n = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%i, %y)
}

ENTRY %main (p: bf16[8,4], q: f32[2,8]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f32[2,8]{1,0:T(2,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %g = (f32[2,8]{1,0:T(2,128)}, f32[8,8]{1,0:T(8,128)}) all-gather-start(%q), replica_groups=[2,4]<=[8], dimensions={0}
  %h = f32[8,8]{1,0:T(8,128)} all-gather-done(%g), backend_config={"window_config":{"estimated_cycles":"7"}}
  %start = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) tuple(%zero, %p)
  %w = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_the_text_of_libtpu():
  read = program.parse(TPU)
  gather, reduce = collectives(read, devices=8)
  assert gather == Collective("all-gather", 4, 1, 1, 256, {"f32": 256})
  assert reduce == Collective(
    "all-reduce", 4, 11, 22, 11 * 128, {"bf16": 11 * 128}
  )
  assert program.cycles(read) == 7 + 11 * 10


def test_no_program():
  with pytest.raises(ValueError, match="no ENTRY"):
    program.parse("HloModule nothing")


def test_what_a_sharding_needs():
  one = lambda kind, count=1: Collective(kind, 8, count, 1, 4, {"f32": 4})
  reduce, gather = one("all-reduce"), one("all-gather")
  plain = dict(fsdp=1, batch_coupled=False)
  assert unexpected([reduce], **plain) == []
  assert unexpected([reduce, gather], **plain) == ["all-gather"]
  coupled = dict(fsdp=1, batch_coupled=True)
  assert unexpected([reduce, gather], **coupled) == []
  twice = [reduce, one("all-gather", 2)]
  assert unexpected(twice, **coupled) == ["all-gather"]
  shared = dict(fsdp=2, batch_coupled=False)
  assert unexpected([*twice, one("reduce-scatter")], **shared) == []
  assert unexpected([one("all-to-all")], **shared) == ["all-to-all"]
