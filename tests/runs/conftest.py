"""One uninterrupted run, to compare with."""

import pytest
import small

from attmask_jax import train


@pytest.fixture
def one_device(monkeypatch):
  """Meshes of one device."""
  small.use_devices(monkeypatch, 1)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """Folder of a run that was never stopped; nobody writes to it."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as monkeypatch:
    small.use_devices(monkeypatch, 1)
    train.train(small.config(), str(folder))
  return folder
