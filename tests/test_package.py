"""What the wheel holds, and that it works without the repository."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import attmask_jax

ROOT = pathlib.Path(__file__).parents[1]
BUILD = (
  "import sys; from setuptools import build_meta; "
  "build_meta.build_wheel(sys.argv[1])"
)
SOURCES = (
  *("attmask_jax", "configs", "pyproject.toml", "requirements.txt"),
  *("README.md", "LICENSE"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Path of the wheel, built from a copy: a build leaves files behind."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  source.mkdir()
  for name in SOURCES:
    (source / name).symlink_to(ROOT / name)
  subprocess.run(
    [sys.executable, "-c", BUILD, str(folder)],
    cwd=source,
    check=True,
    capture_output=True,
  )
  (path,) = folder.glob("*.whl")
  return path


def test_every_module_config_and_data_file_is_in_it(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    (entry,) = [n for n in names if n.endswith("entry_points.txt")]
    assert b"attmask-jax = attmask_jax.cli:entry" in archive.read(entry)
  modules = (ROOT / "attmask_jax").rglob("*.py")
  wanted = {str(path.relative_to(ROOT)) for path in modules}
  wanted |= {f"attmask_jax/configs/{p.name}" for p in ROOT.glob("configs/*.py")}
  wanted |= {"attmask_jax/py.typed"}
  wanted |= {"attmask_jax/data/labels/imagenet_classes.csv"}
  assert wanted <= names
  version = attmask_jax.__version__
  assert {name.split("/")[0] for name in names} == {
    "attmask_jax", f"attmask_jax-{version}.dist-info",
  }  # fmt: skip


def lines(name):
  """{package: "package>=1,<2"} of a requirements file, others left out."""
  text = (ROOT / name).read_text()
  words = [x.split("#")[0].strip() for x in text.splitlines()]
  words = [x for x in words if x and not x.startswith("-r")]
  return {re.match(r"[\w-]+", x)[0].lower(): x for x in words}


def test_what_it_needs(wheel):
  with zipfile.ZipFile(wheel) as archive:
    info = f"attmask_jax-{attmask_jax.__version__}.dist-info/"
    metadata = archive.read(info + "METADATA").decode()
  for method in ("AttMask", "iBOT", "DINO", "ExtreMA", "MAE"):
    assert re.search(rf"^Summary: .*\b{method}\b", metadata, re.M)
  needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
  assert {name.lower() for name in needs} == set(lines("requirements.txt"))
  extras = re.findall(r"^Provides-Extra: (\w+)", metadata, re.M)
  assert set(extras) == {"tpu", "cuda13", "torch", "wandb", "dev"}


def test_the_extra_for_development_is_its_requirements_file():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  dev = project["optional-dependencies"]["dev"]
  assert sorted(dev) == sorted(lines("requirements-dev.txt").values())


PARSE = """
import sys
from absl.testing import flagsaver
from attmask_jax import cli

for name in sys.argv[1:]:
  with flagsaver.flagsaver():
    cli.parse(["attmask-jax", f"--config={name}", "--workdir=W"])
    config = cli.flags.FLAGS.config
    print(config.method.name, config.data.batch_size)
"""
OWN = """
from configs import tiny

def get_config(arg="mae"):
  config = tiny.get_config(arg)
  config.data.batch_size = 24
  return config
"""


def test_the_command_reads_its_configs_in_any_folder(wheel, tmp_path):
  site = tmp_path / "site"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site)
  (tmp_path / "mine.py").write_text(OWN)
  names = ("tiny:extrema", "mine.py", "mine.py:hint", "nope")
  done = subprocess.run(
    [sys.executable, "-c", PARSE, *names],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(site)},
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == [
    "extrema", "64", "mae", "24", "attmask", "24",
  ], done.stderr  # fmt: skip
  assert done.returncode == 2
  for word in ("--config=nope", str(site), "cifar10"):
    assert word in done.stderr
