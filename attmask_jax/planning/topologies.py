"""Chips and slices to plan for, with the figures that their makers publish."""

import dataclasses
import importlib.util
import os
from typing import Any, NamedTuple

import jax

from attmask_jax.errors import InputError

EXAMPLE = "--config.run.topology=v5e:4x4"
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = (
  "2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
  "8x16x16", "16x16x16", "16x16x24",
)  # fmt: skip
# libtpu asks a cloud machine what it is, and logs to /tmp. Several processes
# may use it, as none of them opens a device.
_SETTINGS = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_LOG_DIR": "disabled",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one TPU chip.

  Attributes:
    peak_flops: bfloat16 operations per second.
    memory: bytes.
    memory_rate: bytes per second from and to memory.
    link_rate: bytes per second that a chip sends over all of its links to
      other chips; half of the published figure, which counts both directions.
    network_rate: bytes per second and chip between slices.
    clock: cycles per second. It is not published: the one at which the
      compiler's count for a product of two matrices of 8192 x 8192 in bfloat16
      is that of the published peak.
    shapes: slices that can be rented, the largest last.
    source: page with these figures, read in November 2026.
  """

  peak_flops: float
  memory: float
  memory_rate: float
  link_rate: float
  network_rate: float
  clock: float
  shapes: tuple[str, ...]
  source: str

  @property
  def largest(self) -> int:
    """Chips of the largest slice."""
    return chips(self.shapes[-1])


_PAGE = "https://cloud.google.com/tpu/docs/"
CHIPS = {
  # Network: 6.4 Tbit/s per pod of 256.
  "v5e": Chip(197e12, 16e9, 819e9, 200e9, 3.125e9, 1.71e9, _2D, _PAGE + "v5e"),
  # Network: 50 Gbit/s per chip.
  "v5p": Chip(
    459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, 1.94e9, _3D, _PAGE + "v5p"
  ),
  # Network: 25.6 Tbit/s per pod of 256.
  "v6e": Chip(918e12, 32e9, 1600e9, 400e9, 12.5e9, 2.49e9, _2D, _PAGE + "v6e"),
}


class Topology(NamedTuple):
  """What a step is compiled for.

  Attributes:
    name: as in run.topology.
    platform: "tpu" or "cpu".
    devices: of the whole slice; those of a TPU can only be compiled for.
    hosts: machines that feed them.
    chip: figures of each device, None of a CPU.
    memory: bytes of each device; of a CPU its share of this machine's.
  """

  name: str
  platform: str
  devices: list[jax.Device]
  hosts: int
  chip: Chip | None
  memory: float


def chips(shape: str) -> int:
  """Number of chips of a slice such as "4x4"."""
  count = 1
  for side in shape.split("x"):
    count *= int(side)
  return count


def find(name: str) -> Topology:
  """The devices of a topology such as "v5e:4x4" or "cpu:8".

  Raises:
    InputError: there is none of this name, or jax[tpu] is missing.
  """
  kind, colon, shape = name.partition(":")
  if not name:
    raise InputError(
      f"run.topology is not set: say what to plan for, such as {EXAMPLE}"
    )
  if not colon or kind not in (*CHIPS, "cpu"):
    raise InputError(
      f'run.topology "{name}" is unknown: use {", ".join(CHIPS)} or cpu, a '
      f"colon and the shape, such as {EXAMPLE} or cpu:8"
    )
  if kind == "cpu":
    return _virtual(name, shape)
  chip = CHIPS[kind]
  if shape not in chip.shapes:
    raise InputError(
      f'run.topology "{name}" does not exist: slices of {kind} are '
      f"{', '.join(chip.shapes)}"
    )
  devices = list(_tpu_devices(name, shape))
  hosts = len({x.process_index for x in devices})
  return Topology(name, "tpu", devices, hosts, chip, chip.memory)


def _virtual(name: str, shape: str) -> Topology:
  """Virtual devices of this machine's processor."""
  if not shape.isdigit() or not int(shape):
    raise InputError(
      f'run.topology "{name}" does not exist: write cpu: and a number of '
      "devices, such as cpu:8"
    )
  count = int(shape)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise InputError(
      f'run.topology "{name}" needs {count} devices, and this process has '
      f"{len(devices)} of the CPU: set JAX_NUM_CPU_DEVICES={count} before it "
      "starts"
    )
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return Topology(name, "cpu", devices[:count], 1, None, memory / count)


def use_cpu(name: str) -> None:
  """Keeps JAX off accelerators, and makes the devices of cpu:N.

  It has no effect once JAX has devices: then they are what there is.

  Args:
    name: of a topology.
  """
  kind, _, shape = name.partition(":")
  jax.config.update("jax_platforms", "cpu")
  flags = os.environ.get("XLA_FLAGS", "")
  chosen = jax.config.jax_num_cpu_devices > 0 or "device_count" in flags
  if kind == "cpu" and shape.isdigit() and int(shape) and not chosen:
    try:
      jax.config.update("jax_num_cpu_devices", int(shape))
    except RuntimeError:  # JAX has its devices; `find` counts them
      pass


def _tpu_devices(name: str, shape: str) -> Any:
  """Devices to compile for; loads libtpu."""
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      f'run.topology "{name}" needs the compiler for TPUs, which is not '
      'installed: pip install "jax[tpu]"; no TPU is needed'
    )
  from jax.experimental import topologies

  for key, value in _SETTINGS.items():
    os.environ.setdefault(key, value)
  # By default hosts have 2 x 2 chips, and there is no slice with fewer.
  single = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
  try:
    return topologies.get_topology_desc(name, platform="tpu", **single).devices
  except jax.errors.JaxRuntimeError as error:
    raise InputError(
      f'run.topology "{name}" cannot be compiled for: '
      f"{str(error).splitlines()[0]}"
    ) from error
