"""What `pip install .` installs."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import attmask_jax

ROOT = pathlib.Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built from a copy of what it is made of."""
  pytest.importorskip("setuptools", minversion="77")
  copy = tmp_path_factory.mktemp("build") / "source"
  ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
  copy.mkdir()
  for name in ("attmask_jax", "configs"):
    shutil.copytree(ROOT / name, copy / name, ignore=ignored)
  for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, copy)
  subprocess.run(
    [sys.executable, "-W", "error", "-c", BUILD],
    cwd=copy,
    check=True,
    capture_output=True,
  )
  (path,) = (copy / "dist").glob("*.whl")
  with zipfile.ZipFile(path) as file:
    yield file


def test_all_modules_and_data_are_installed(wheel):
  wanted = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "attmask_jax").rglob("*")
    if path.is_file() and path.suffix not in (".pyc", ".so")
  }
  wanted |= {f"attmask_jax/configs/{p.name}" for p in ROOT.glob("configs/*.py")}
  info = f"attmask_jax-{attmask_jax.__version__}.dist-info/"
  installed = {n for n in wheel.namelist() if not n.startswith(info)}
  assert installed == wanted
  assert "attmask_jax/py.typed" in installed
  assert any(name.endswith("labels/imagenet_classes.csv") for name in installed)


def test_the_command_and_what_it_needs(wheel):
  info = f"attmask_jax-{attmask_jax.__version__}.dist-info/"
  points = wheel.read(info + "entry_points.txt").decode()
  assert "attmask-jax = attmask_jax.cli:entry" in points
  metadata = wheel.read(info + "METADATA").decode()
  for method in ("AttMask", "iBOT", "DINO", "ExtreMA", "MAE"):
    assert re.search(rf"^Summary: .*\b{method}\b", metadata, re.M)
  needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
  assert {name.lower() for name in needs} == set(lines("requirements.txt"))
  extras = re.findall(r"^Provides-Extra: (\w+)", metadata, re.M)
  assert set(extras) == {"tpu", "cuda13", "torch", "wandb", "dev"}


def test_the_extra_for_development_is_its_requirements_file():
  dev = PROJECT["optional-dependencies"]["dev"]
  assert sorted(dev) == sorted(lines("requirements-dev.txt").values())


def lines(name):
  """{package: "package>=1,<2"} of a requirements file, others left out."""
  text = (ROOT / name).read_text()
  words = [x.split("#")[0].strip() for x in text.splitlines()]
  words = [x for x in words if x and not x.startswith("-r")]
  return {re.match(r"[\w-]+", x)[0].lower(): x for x in words}
