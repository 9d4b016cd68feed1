"""One training per run directory: who holds it, and when it is taken over."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from attmask_jax.errors import InputError, SaveError
from attmask_jax.runs import lock

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from attmask_jax.runs import lock
with lock.RunLock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder):
  """Another process that holds the lock of a folder."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, folder],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.communicate()


def write(folder, *, seconds_ago=0.0, **changes):
  """A lock of this process but for `changes`, renewed some seconds ago."""
  path = folder / lock.NAME
  path.write_text(json.dumps(lock.process() | {"token": "x"} | changes))
  then = time.time() - seconds_ago
  os.utime(path, (then, then))
  return path


def taken(folder, **options):
  """Whether `folder` can be locked, and then `alone`."""
  with lock.RunLock(folder, **options) as held:
    return held.alone


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
  with holder(tmp_path) as process:
    before = (tmp_path / lock.NAME).read_bytes()
    with pytest.raises(InputError) as error:
      taken(tmp_path)
    message = str(error.value)
    assert f"process {process.pid} on " in message and "\n" not in message
    assert str(tmp_path) in message and "(0 min)" in message
    assert "run.break_lock=True" in message
    assert (tmp_path / lock.NAME).read_bytes() == before
    process.send_signal(signal.SIGKILL)  # leaves its lock behind
    process.wait()
    assert (tmp_path / lock.NAME).exists()
    assert taken(tmp_path) is True
  assert not (tmp_path / lock.NAME).exists()


def test_the_lock_is_released_after_an_error(tmp_path):
  with pytest.raises(ZeroDivisionError), lock.RunLock(tmp_path):
    assert (tmp_path / lock.NAME).exists()
    raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_number_of_a_dead_one_does_not_hold(tmp_path):
  write(tmp_path)
  with pytest.raises(InputError):
    taken(tmp_path)
  write(tmp_path, started=lock.process()["started"] - 1)
  assert taken(tmp_path) is True


@pytest.mark.parametrize("other", ["host", "boot"])
def test_a_process_elsewhere_holds_as_long_as_it_gives_signs(tmp_path, other):
  # No process here has this number: that says nothing of another host.
  elsewhere = {other: "elsewhere", "pid": 2**22 + 1, "started": 1}
  write(tmp_path, seconds_ago=lock.TIMEOUT_SECONDS - 60, **elsewhere)
  with pytest.raises(InputError):
    taken(tmp_path)
  write(tmp_path, seconds_ago=lock.TIMEOUT_SECONDS + 1, **elsewhere)
  assert taken(tmp_path) is False  # what it was writing is left alone


def test_a_lock_that_is_just_being_written_holds(tmp_path):
  path = write(tmp_path)
  path.write_text("")
  with pytest.raises(InputError, match="left no name"):
    taken(tmp_path)
  os.utime(path, (0, 0))
  assert taken(tmp_path) is False


def test_the_holder_renews_its_lock(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
  with lock.RunLock(tmp_path):
    path = tmp_path / lock.NAME
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 60
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert path.stat().st_mtime > time.time() - 600


def test_a_broken_lock_stops_the_former_holder(tmp_path):
  with lock.RunLock(tmp_path) as former:
    former.check()
    with lock.RunLock(tmp_path, break_lock=True) as new:
      assert new.alone is False
      with pytest.raises(SaveError, match=f"by process {os.getpid()} on "):
        former.check()
      former.__exit__()
      new.check()  # the former one leaves the lock of the new one alone
  assert not (tmp_path / lock.NAME).exists()


@pytest.mark.parametrize("left", [False, True])
def test_of_many_at_once_one_gets_the_lock(tmp_path, left):
  for _ in range(20):
    if left:
      write(tmp_path, started=1)
    count = 8
    start, end = threading.Barrier(count), threading.Barrier(count)
    held = []

    def race(start=start, end=end, held=held):
      start.wait()
      with contextlib.ExitStack() as stack:
        with contextlib.suppress(InputError):
          held.append(stack.enter_context(lock.RunLock(tmp_path)))
        end.wait()

    threads = [threading.Thread(target=race) for _ in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(held) == 1


def test_a_lock_that_cannot_be_written_is_one_sentence(tmp_path):
  with pytest.raises(InputError, match="lock.json cannot be written") as error:
    taken(tmp_path / "missing")
  assert "\n" not in str(error.value)
