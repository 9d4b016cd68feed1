"""Position tables taken over by another network."""

import jax.numpy as jnp
import numpy as np
import pytest

from attmask_jax.models import positions, vit

WIDTH, GRID = 8, 2


def network(class_token, order="learned"):
  return vit.ViT(
    WIDTH, 1, 2, patch_size=4, image_size=4 * GRID, class_token=class_token,
    positions=order,
  )  # fmt: skip


def fixed(order):
  """Each value by its formula: sines and cosines of each axis in turn."""
  table = np.zeros((GRID * GRID, WIDTH))
  for y in range(GRID):
    for x in range(GRID):
      coordinates = {"y": y, "x": x}
      for i, axis in enumerate(order):
        for k in range(WIDTH // 4):
          angle = coordinates[axis] / 10000 ** (k / (WIDTH // 4))
          first = i * WIDTH // 2 + k
          table[y * GRID + x, first] = np.sin(angle)
          table[y * GRID + x, first + WIDTH // 4] = np.cos(angle)
  return table


def test_learned_positions_with_the_same_class_token_stay():
  table = jnp.arange(5.0 * WIDTH).reshape(1, 5, WIDTH)
  assert positions.adapt(table, network("input"), num_prefix_tokens=1) is table


def test_the_position_of_a_class_token_is_left_out():
  table = jnp.arange(5.0 * WIDTH).reshape(1, 5, WIDTH)
  got = positions.adapt(table, network("input"), num_prefix_tokens=0)
  np.testing.assert_array_equal(got, np.arange(40.0).reshape(1, 5, 8)[:, 1:])


def test_a_class_token_without_a_position_gets_zero():
  table = 1 + jnp.arange(4.0 * WIDTH).reshape(1, 4, WIDTH)
  got = positions.adapt(table, network("readout"), num_prefix_tokens=1)
  assert got.shape == (1, 5, WIDTH)
  np.testing.assert_array_equal(got[0, 0], np.zeros(WIDTH))
  np.testing.assert_array_equal(got[0, 1:], table[0])


@pytest.mark.parametrize("order", ["yx", "xy"])
@pytest.mark.parametrize("class_token", ["input", "none"])
@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_fixed_positions_are_computed(order, class_token, num_prefix_tokens):
  got = positions.adapt(
    None, network(class_token, order), num_prefix_tokens=num_prefix_tokens
  )
  zeros = np.zeros((num_prefix_tokens, WIDTH))
  want = np.concatenate([zeros, fixed(order)])[None]
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=1e-6)
