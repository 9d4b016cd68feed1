"""Initialisation of AttMask: see `vit.InitKeys`."""

import jax
import numpy as np
import pytest
import small

from attmask_jax.methods import attmask


@pytest.mark.parametrize("init", ["normal", "xavier"])
def test_initialisation_of_blocks_and_heads(init):
  """Standard deviations: 0.02, or sqrt(2 / (in + out)) of a uniform draw."""
  config = small.config({"method.init": init, "method.variant": "64x2x2"})
  method = attmask.AttMask.from_config(config, steps_per_epoch=8)
  params = method.init(jax.random.key(0)).params
  head = params["head"]["mlp"]
  kernels = {  # (64 or 256) x in, out
    (64, 192): params["backbone"]["blocks"]["attn"]["qkv"]["kernel"],
    (64, 256): params["backbone"]["blocks"]["mlp"]["fc1"]["kernel"],
    (256, 256): head["layer_1"]["kernel"],
  }
  for (rows, columns), kernel in kernels.items():
    assert kernel.shape[-2:] == (rows, columns)
    want = 0.02 if init == "normal" else (2 / (rows + columns)) ** 0.5
    # 10,000 draws and more: the spread of the estimate is 1 % at most.
    assert np.std(kernel) == pytest.approx(want, rel=0.04)
