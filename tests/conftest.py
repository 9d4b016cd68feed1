"""Eight CPU devices, strict broadcasting, and where recorded numbers lie."""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile many programs and run each a few times. Without the optimisers
# of XLA's CPU backend that takes a quarter of the time.
QUICK = (
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
  "--xla_cpu_use_fusion_emitters=false "
)
os.environ["XLA_FLAGS"] = (
  ("" if os.environ.get("ATTMASK_OPTIMISED") else QUICK)
  + os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


# The files that take longest, first: no worker is left with one at the end.
LONGEST = (
  "test_resume", "test_checkpoint", "test_evaluate", "test_interchange",
  "test_torch_models", "test_attmask", "test_train", "test_methods",
  "test_extrema", "test_rollout", "test_vit", "test_classify", "test_mesh",
  "test_runtime", "test_mae", "test_shape", "test_distributed",
)  # fmt: skip


def pytest_configure(config):
  config.option.loadscopereorder = False  # xdist: in the order from here


def pytest_collection_modifyitems(items):
  rank = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def same_precision():
  """The precision that a test's config sets is not that of the next test."""
  yield
  jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def start(monkeypatch, capsys):
  """start(command, *flags) -> exit code, stdout, stderr, in this process.

  `command` has `parse` and `main`.
  """
  from attmask_jax import cli

  monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)

  def start(command, *flags):
    argv = ["main.py", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
      try:
        code = command.main(command.parse(argv))
      except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()

  return start


@pytest.fixture(scope="session")
def golden_root():
  """Folder of the recorded numbers, $ATTMASK_GOLDEN if set."""
  import small  # after jax is set up, above

  return pathlib.Path(os.environ.get("ATTMASK_GOLDEN", small.GOLDEN))


@pytest.fixture(scope="session")
def golden(golden_root):
  """golden("attmask/head.npz") opens a file, under $ATTMASK_GOLDEN if set."""
  return lambda name: np.load(golden_root / name)


@pytest.fixture(scope="session")
def images_root():
  """Folder with the archives of real images, or a visible skip."""
  root = os.environ.get("ATTMASK_DATA")
  if not root:
    pytest.skip("ATTMASK_DATA names no folder of real images")
  return pathlib.Path(root)


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
  """Folder of compiled programs, which the workers of a session share."""
  folder = tmp_path_factory.getbasetemp()
  shared = "PYTEST_XDIST_WORKER" in os.environ
  return (folder.parent if shared else folder) / "programs"


@pytest.fixture(scope="session", autouse=True)
def keep_programs(programs):
  """See `small.keep_programs`; no process uses the folder of the user."""
  import small  # after jax is set up, above

  with small.keep_programs(programs), pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(programs))
    yield
