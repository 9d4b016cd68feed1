"""The lock of a run directory: one training at a time.

RUN/lock.json names the process that trains there: host, pid, its start time,
and the host's boot. Whether it still runs is known at once on its own host.
On a shared disk another host goes by the heartbeat: the holder renews the
time of the file every BEAT_SECONDS, and counts as dead after TIMEOUT_SECONDS
without.
Evaluations and exports read a run without its lock.
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
import uuid
from typing import Any, Self

import jax
from absl import logging

from attmask_jax import mesh as meshes
from attmask_jax.errors import InputError, SaveError

NAME = "lock.json"
BEAT_SECONDS, TIMEOUT_SECONDS = 30.0, 300.0
REFUSED = -1


class RunLock(contextlib.AbstractContextManager):
  """Holds a run directory from `with` to its end; one for all processes.

  Attributes:
    alone: True if no other process can be writing here, so that half-written
      files are left-overs. False if the directory was taken from a holder
      whose end is not proven.
  """

  def __init__(self, folder: pathlib.Path, *, break_lock: bool = False) -> None:
    """Prepares; `with` takes the lock.

    Args:
      folder: run directory; exists.
      break_lock: take it even from a holder that seems alive.
    """
    self._folder, self._path = folder, folder / NAME
    self._break = break_lock
    self._record: dict[str, Any] = process() | {"token": uuid.uuid4().hex}
    self._ended = threading.Event()
    self._beats: threading.Thread | None = None
    self.alone = True

  def __enter__(self) -> Self:
    """Takes the lock.

    Raises:
      InputError: another process holds it.
    """
    refusal: InputError | None = None
    if jax.process_index() == 0:
      try:
        self._acquire()
      except InputError as error:
        refusal = error
    if refusal is not None:
      meshes.from_first(REFUSED)
      raise refusal
    code = meshes.from_first(int(self.alone))
    if code == REFUSED:
      raise InputError(f"process 0 of this run did not get {self._path}")
    self.alone = bool(code)
    if jax.process_index() == 0:
      self._beats = threading.Thread(
        target=self._beat, name="run lock", daemon=True
      )
      self._beats.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    if self._beats is not None:
      self._beats.join()
      if self._held():
        self._path.unlink(missing_ok=True)

  def check(self) -> None:
    """Makes sure that nobody took the directory over in the meantime.

    Raises:
      SaveError: somebody did.
    """
    held = jax.process_index() != 0 or self._held()
    if not meshes.from_first(int(held)):
      raise SaveError(
        f"{self._folder} was taken over {_by(_read(self._path))}: this run "
        "stops here and saves nothing more"
      )

  def _acquire(self) -> None:
    try:
      # The holder may end, or two processes take over, between two lines here.
      while not self._held():
        try:
          self._create()
        except FileExistsError:
          with contextlib.suppress(FileNotFoundError):
            self._take_over()
    except OSError as error:
      raise InputError(
        f"{self._path} cannot be written ({error.strerror}): make room, or "
        "use another --workdir"
      ) from error

  def _create(self) -> None:
    with self._path.open("x") as file:
      try:
        self._write(file)
      except OSError:
        self._path.unlink()
        raise

  def _take_over(self) -> None:
    with self._path.open("r+") as file:
      with contextlib.suppress(OSError):  # a file system without flock
        fcntl.flock(file, fcntl.LOCK_EX)
      record, age = _read(self._path), _age(self._path)
      dead = ended(record)
      if not dead and age < TIMEOUT_SECONDS and not self._break:
        raise InputError(
          f"{self._folder} is being trained {_by(record)}: wait until it ends "
          "or stop it; if you know that it no longer runs, add "
          "--config.run.break_lock=True"
        )
      self.alone = dead
      logging.warning(
        "%s was being trained %s, which %s: taken over",
        self._folder,
        _by(record),
        "has ended" if dead else f"gave its last sign {age:.0f} s ago",
      )
      file.truncate(0)
      self._write(file)

  def _write(self, file: Any) -> None:
    file.write(json.dumps(self._record))
    file.flush()

  def _held(self) -> bool:
    return _read(self._path).get("token") == self._record["token"]

  def _beat(self) -> None:
    """Renews the time of the file until the end or until it is another's."""
    while not self._ended.wait(BEAT_SECONDS):
      try:
        if not self._held():
          return
        os.utime(self._path)
      except OSError as error:
        logging.warning("%s cannot be renewed: %s", self._path, error)


def process() -> dict[str, Any]:
  """What identifies this process among all that see the directory."""
  return {
    "host": socket.gethostname(),
    "boot": _boot(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
    "since": time.time(),
  }


def ended(record: dict[str, Any]) -> bool:
  """Whether the process of a record has surely ended.

  Only its own host knows: elsewhere, and in another container, False.
  """
  if record.get("host") != socket.gethostname() or not _boot():
    return False
  if record.get("boot") != _boot():
    return False
  return _started(int(record["pid"])) != record["started"]


def _boot() -> str:
  """Identifies this boot and, in a container, its process numbers."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # no Linux
    return ""


def _started(pid: int) -> int:
  """Clock ticks from boot to the start of a process, 0 if there is none."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return 0
  # Fields after the name, which is in parentheses and may hold spaces.
  state, *fields = stat.rpartition(")")[2].split()
  return 0 if state in "ZX" else int(fields[18])


def _read(path: pathlib.Path) -> dict[str, Any]:
  """The record; {} while it is being written, or where there is none."""
  try:
    return dict(json.loads(path.read_text()))
  except (OSError, ValueError, TypeError):
    return {}


def _age(path: pathlib.Path) -> float:
  """Seconds since the last beat, by the clock of the disk."""
  with tempfile.NamedTemporaryFile(dir=path.parent) as now:
    return os.stat(now.name).st_mtime - path.stat().st_mtime


def _by(record: dict[str, Any]) -> str:
  """The holder for a sentence."""
  if not record:
    return "by a process that left no name"
  since = datetime.datetime.fromtimestamp(record["since"]).astimezone()
  minutes = max(0.0, time.time() - record["since"]) / 60
  lasting = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
  return (
    f"by process {record['pid']} on {record['host']} since "
    f"{since:%Y-%m-%d %H:%M} ({lasting})"
  )
