"""Bytes per device, and the search for the largest batch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attmask_jax import mesh as meshes
from attmask_jax.planning import memory
from attmask_jax.planning.memory import Memory

CAPACITY = 1000


def of(size, *, per_image=10, fixed=100):
  """Memory of a program that needs `fixed` and `per_image` for each image."""
  total = fixed + per_image * size
  parts = dict(parameters=fixed, teacher=0, optimizer=0, other=0, program=0)
  return Memory(
    size,
    **parts,
    batch=size,
    temporaries=(per_image - 1) * size,
    total=total,
    fits=total <= CAPACITY,
  )


def search(first, at=of, *, unit=1, most=10**6):
  sizes = []

  def counted(size):
    sizes.append(size)
    return at(size)

  found = memory.largest_batch(at(first), CAPACITY, unit, counted, most=most)
  assert [x.batch_size for x in found] == [first, *sizes]
  assert len(found) <= 4
  assert len(set(x.batch_size for x in found)) == len(found)
  assert all(x.batch_size % unit == 0 for x in found)
  return memory.largest(found), len(found)


@pytest.mark.parametrize("first", [4, 40, 89, 90, 200, 5000])
def test_a_straight_line_is_found_at_once(first):
  largest, compilations = search(first)
  assert 85 <= largest <= 90  # 95 % of the memory is enough
  assert compilations <= 3


@pytest.mark.parametrize("first", [8, 64, 512])
def test_a_batch_is_a_multiple(first):
  assert search(first, unit=8)[0] == 88


@pytest.mark.parametrize("first", [4, 40, 400])
def test_memory_that_is_no_line(first):
  # The compiler saves memory where there is little: 4 images beyond the line.
  def at(size):
    saved = min(40, max(0, 10 * size - 800))
    x = of(size)
    total = x.total - saved
    return Memory(**(vars(x) | {"total": total, "fits": total <= CAPACITY}))

  assert 85 <= search(first, at)[0] <= 94


def test_a_compiler_that_does_not_say_how_much_it_needs():
  def at(size):
    x = of(size)
    return x if x.fits else Memory(**(vars(x) | {"total": 0}))

  largest, compilations = search(360, at)
  assert 45 <= largest <= 90 and compilations <= 4


def test_no_batch_fits():
  assert search(8, lambda size: of(size, fixed=2000), unit=4)[0] == 0


def test_no_batch_is_larger_than_the_data():
  assert search(16, unit=8, most=60) == (56, 2)


@pytest.mark.parametrize(
  "words, want",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (56.00G) exceeds available HBM (15.75G).",
      56 * 2**30,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M "
      "of 15.75G hbm. Exceeded hbm capacity by 1M.",
      512.5 * 2**20,
    ),
    ("RESOURCE_EXHAUSTED: too much", 0),
  ],
)
def test_what_the_compiler_says_it_needs(words, want):
  assert memory.needed(words) == want


def test_another_error_is_not_taken_for_a_lack_of_memory():
  with pytest.raises(RuntimeError, match="broken"):
    memory.too_large(None, 8, RuntimeError("INTERNAL: broken"))


def test_bytes_of_shards():
  mesh = meshes.make_mesh(fsdp=2)
  shape = lambda *s, dtype, sharding: jax.ShapeDtypeStruct(
    s, dtype, sharding=sharding
  )
  weights = shape(2**16, 4, dtype=np.float32, sharding=None)
  tree = {
    "whole": shape(3, 5, dtype=np.float32, sharding=meshes.replicated(mesh)),
    "rows": shape(16, 3, dtype=np.uint8, sharding=meshes.batch_sharding(mesh)),
    "split": shape(
      *weights.shape,
      dtype=np.float32,
      sharding=meshes.param_shardings(mesh, weights),
    ),
  }
  want = 3 * 5 * 4 + 2 * 3 + 2**15 * 4 * 4
  assert memory.bytes_per_device(tree) == want


def test_outputs_in_the_place_of_the_old_state_count_once():
  analysis = types.SimpleNamespace(
    argument_size_in_bytes=100,
    output_size_in_bytes=130,
    alias_size_in_bytes=90,
    temp_size_in_bytes=50,
    generated_code_size_in_bytes=7,
  )
  compiled = types.SimpleNamespace(memory_analysis=lambda: analysis)
  state = dict.fromkeys(("teacher", "opt", "aux", "step"), {})
  planned = types.SimpleNamespace(
    state=types.SimpleNamespace(params=jnp.zeros(15), **state),
    batch=lambda size: {},
  )
  got = memory.measure(planned, 8, compiled, 197.0)
  # 40 bytes of outputs are new; the parameters are 60.
  assert (got.total, got.temporaries, got.parameters) == (197, 90, 60)
  assert got.program == 197 - 90 - 60
  assert got.fits
  assert not memory.measure(planned, 8, compiled, 196.0).fits
