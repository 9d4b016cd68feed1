"""PyTorch's files without PyTorch: round trips, and files that mean harm."""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from attmask_jax.errors import InputError
from attmask_jax.weights.torch_io import lazy, pickling, pth, tensors

RNG = np.random.default_rng(0)
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64,
          np.int32, np.int16, np.int8, np.uint8, np.bool_)  # fmt: skip


def some_tree():
  values = RNG.normal(size=(4, 6)) * 50
  return {
    "by type": {np.dtype(d).name: values.astype(d) for d in DTYPES},
    "transposed": values.astype("f4").T,
    "every second": values.astype("f4")[:, ::2],
    "number": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "plain": [1, -2, 2**31, -(2**40), 2.5, "name ä", None, True, (1, ())],
  }


def same(got, want):
  if isinstance(want, dict):
    assert list(got) == list(want)
    for key in want:
      same(got[key], want[key])
  elif isinstance(want, list | tuple):
    assert type(got) is type(want) and len(got) == len(want)
    for a, b in zip(got, want, strict=True):
      same(a, b)
  elif isinstance(want, np.ndarray):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.tobytes() == want.tobytes()  # C order
    assert got.flags.c_contiguous
  else:
    assert type(got) is type(want) and got == want


# Round trips ----------------------------------------------------------------


def test_pth_round_trip_is_bit_equal(tmp_path):
  tree = some_tree()
  pth.write(tmp_path / "new" / "a.pth", tree)
  same(pth.read(tmp_path / "new" / "a.pth"), tree)
  assert os.listdir(tmp_path / "new") == ["a.pth"]  # nothing left beside it
  pth.write(tmp_path / "b.pth", tree)
  again = (tmp_path / "b.pth").read_bytes()
  assert again == (tmp_path / "new" / "a.pth").read_bytes()
  with zipfile.ZipFile(tmp_path / "b.pth") as archive:
    for info in archive.infolist():
      start = info.header_offset + 30 + len(info.filename) + len(info.extra)
      assert start % 64 == 0


def test_safetensors_round_trip_is_bit_equal(tmp_path):
  flat = {"a." + np.dtype(d).name: RNG.normal(size=(3, 5)).astype(d)
          for d in DTYPES}  # fmt: skip
  flat |= {
    "transposed": RNG.normal(size=(3, 5)).astype("f4").T,
    "every second": RNG.normal(size=(3, 6)).astype("f4")[:, ::2],
    "number": np.array(3.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
  }
  tensors.write(tmp_path / "a.safetensors", flat, {"made": "here"})
  got, notes = tensors.read(tmp_path / "a.safetensors")
  assert notes == {"made": "here"} and set(got) == set(flat)
  for name in flat:
    same(got[name], flat[name])


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
  tree = some_tree()
  pth.write(tmp_path / "a.pth", tree)
  found = pth.read(tmp_path / "a.pth", lazy=True)
  kinds = {type(x) for x in found["by type"].values()}
  assert kinds == {lazy.Tensor} and found["plain"] == tree["plain"]
  whole = {
    k: np.asarray(v) for k, v in found.items() if k in ("number", "empty")
  }
  same(whole, {k: tree[k] for k in whole})
  flat = tree["by type"] | {"t": tree["transposed"].copy()}
  tensors.write(tmp_path / "a.safetensors", flat)
  given = tensors.read(tmp_path / "a.safetensors", lazy=True)[0]
  for got, want in ((found["by type"], tree["by type"]), (given, flat)):
    for name, value in want.items():
      assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype)
      same(np.asarray(got[name]), value)
  (tmp_path / "a.safetensors").write_bytes(b"cut")
  with pytest.raises(InputError, match="was changed or removed"):
    np.asarray(given["t"])


def test_nothing_is_kept_of_a_tensor_that_was_read(tmp_path):
  """A file may be larger than memory, and other parts of it are not read."""
  size = 2**20
  tree = {str(i): np.full(size, i, np.uint8) for i in range(20)}
  pth.write(tmp_path / "a.pth", tree)
  tensors.write(tmp_path / "a.safetensors", tree)
  del tree
  for read in (pth.read, lambda *x, **k: tensors.read(*x, **k)[0]):
    name = "a.pth" if read is pth.read else "a.safetensors"
    tracemalloc.start()
    found = read(tmp_path / name, lazy=True)
    assert tracemalloc.get_traced_memory()[1] < size
    total = sum(int(np.asarray(x)[0]) for x in found.values())
    assert total == 190
    assert tracemalloc.get_traced_memory()[1] < 3 * size
    tracemalloc.stop()


def test_what_cannot_be_written(tmp_path):
  for value in (np.zeros(2, complex), object(), {1, 2}, b"bytes"):
    with pytest.raises(InputError, match="cannot be written"):
      pth.write(tmp_path / "a.pth", {"x": value})
  circle = []
  circle.append(circle)
  for value in (circle, 2**70):
    with pytest.raises(InputError, match="cannot be written"):
      pth.write(tmp_path / "a.pth", {"x": value})
  (tmp_path / "file").write_text("")
  for write in (pth.write, tensors.write):
    with pytest.raises(InputError, match="cannot be written"):
      write(tmp_path / "file" / "a", {"x": np.zeros(2, "f4")})
  assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("family", ["attmask", "mae", "extrema"])
def test_golden_checkpoints_are_read(golden_root, family):
  found = pth.read(golden_root / family / "checkpoint.pth")
  key = {"attmask": "student", "mae": "model", "extrema": "state_dict"}[family]
  assert all(isinstance(v, np.ndarray) for v in found[key].values())
  assert isinstance(found["epoch"], int)
  if family == "mae":  # its rates are NumPy numbers
    rates = [group["lr"] for group in found["optimizer"]["param_groups"]]
    assert all(isinstance(rate, float) and 0 < rate < 1 for rate in rates)
  if "args" in found:
    assert found["args"].name == "argparse.Namespace"
    assert isinstance(found["args"].state, dict)


# Files that mean harm -------------------------------------------------------


def archive(path, program, members=None, *, root="archive", compress=False):
  """A .pth file by hand."""
  kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
  with zipfile.ZipFile(path, "w", kind) as file:
    file.writestr(f"{root}/data.pkl", program)
    for name, content in (members or {}).items():
      file.writestr(name, content)
  return path


def refused(path, match):
  with pytest.raises(InputError, match=match) as error:
    pth.read(path)
  assert "\n" not in str(error.value)


class Call:
  """Pickles as a call."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def test_nothing_of_the_file_is_run(tmp_path):
  mark = tmp_path / "ran"
  path = tmp_path / "a.pth"
  for call in (
    Call(os.system, f"touch {mark}"),
    Call(eval, f"open({str(mark)!r}, 'w')"),
    Call(getattr, os, "system"),
    Call(pathlib.Path.touch, mark),
    Call(shutil.copy, __file__, str(mark)),
  ):
    try:
      program = pickle.dumps({"model": call}, protocol=2)
    except (TypeError, pickle.PicklingError):
      continue
    refused(archive(path, program), "is not run|instruction")
  # What stands in for known classes takes a call and runs nothing.
  program = (
    b"\x80\x02cargparse\nNamespace\n(X\x01\x00\x00\x00aX\x01\x00\x00\x00btR"
    b"}X\x0c\x00\x00\x00__setstate__X\x01\x00\x00\x00xsb."
  )
  assert pth.read(archive(path, program)).name == "argparse.Namespace"
  for opcode in (b"(ios\nsystem\n.", b"(cos\nsystem\no.", b"\x82\x01."):
    refused(archive(path, b"\x80\x02" + opcode), "instruction|is not run")
  assert not mark.exists()


def tensor_program(numel, size, stride, *, key="0", offset=0):
  emit = lambda node: pickling.dump(node)[0][2:-1]
  return (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((" + emit("storage")
    + b"ctorch\nFloatStorage\n" + emit(key) + emit("cpu") + emit(numel)
    + b"tQ" + emit(offset) + emit(size) + emit(stride)
    + b"\x89ccollections\nOrderedDict\n)RtR."
  )  # fmt: skip


@pytest.mark.parametrize(
  "claim, match",
  [
    (dict(numel=4, size=(5,), stride=(1,)), r"size \(5,\) in 4 numbers"),
    (dict(numel=2**40, size=(2**40,), stride=(1,)), "claims .* which has 16"),
    (dict(numel=4, size=(2, 2), stride=(4, 1)), "in 4 numbers"),
    (dict(numel=4, size=(4,), stride=(1,), offset=1), "in 4 numbers"),
    (dict(numel=4, size=(2**62, 4), stride=(0, 0)), "twice its size"),
    (dict(numel=4, size=(-1,), stride=(1,)), "damaged"),
    (dict(numel=4, size=(2,), stride=(-1,)), "damaged"),
    (dict(numel=4, size=(2, 2), stride=(1,)), "damaged"),
    (dict(numel=4, size=(1,) * 70, stride=(1,) * 70), "damaged"),
    (dict(numel=4, size=(4,), stride=(1,), key="9"), "lacks its member"),
    (dict(numel=-4, size=(0,), stride=(1,)), "damaged"),
    (dict(numel=4, size=(2.0,), stride=(1,)), "damaged"),
  ],
)
def test_tensors_that_claim_more_than_there_is(tmp_path, claim, match):
  numbers = {"archive/data/0": np.arange(4, dtype="f4").tobytes()}
  path = archive(tmp_path / "a.pth", tensor_program(**claim), numbers)
  refused(path, match)


def test_many_views_of_few_numbers_do_not_fill_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(pth, "MAX_COPIED_BYTES", 10**6)
  view = tensor_program(10_000, (100, 100), (1, 100))[2:-1]
  program = b"\x80\x02](" + 50 * view + b"e."
  numbers = {"archive/data/0": np.zeros(10_000, "f4").tobytes()}
  refused(archive(tmp_path / "a.pth", program, numbers), "more than twice")


def test_archives_that_torch_never_writes(tmp_path):
  good, path = b"\x80\x02}.", tmp_path / "a.pth"
  assert pth.read(archive(path, good)) == {}
  for name in ("/etc/x", "../x", "archive/../../x", "C:\\x", "a\\..\\..\\x"):
    refused(archive(path, good, {name: b"x"}), "a member outside it")
  stamped = archive(path, good, root="ckpt_2024-01-01_12:30:00")
  assert pth.read(stamped) == {}
  refused(archive(path, good, {"b/data.pkl": good}), "but not a .pth file")
  bomb = archive(path, good, {"archive/data/0": bytes(10**7)}, compress=True)
  refused(bomb, "compressed")
  with pytest.warns(UserWarning, match="Duplicate"):
    twice = archive(path, good, {"archive/data.pkl": good})
  refused(twice, "twice")
  script = {"archive/constants.pkl": b"x"}
  refused(archive(path, good, script), "TorchScript")
  refused(archive(path, good, {"archive/byteorder": b"big"}), "big-endian")
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("readme.txt", "no weights")
  refused(path, "but not a .pth file")


def test_files_that_are_something_else(tmp_path):
  path = tmp_path / "a.pth"
  refused(path, "is not a file")
  refused(tmp_path, "is not a file")
  path.write_bytes(b"")
  refused(path, "is not a .pth file")
  path.write_text("<html>404</html>")
  refused(path, "is not a .pth file")
  path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
  refused(path, "before 1.6")


def test_memo_indices_reserve_no_memory(tmp_path):
  program = b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."
  assert pth.read(archive(tmp_path / "a.pth", program)) == {}


def nested(depth):
  return b"(" * depth + b"t" * depth


TEXT = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6
CALLED_OFTEN = b"q\x01" + 2000 * b"h\x00h\x01R" + b"t."


@pytest.mark.parametrize(
  "program, match",
  [
    (nested(200_000) + b".", "deeper than"),
    (b"}" + nested(200_000) + b"Ns.", "damaged"),  # its hash is recursive
    (b"}" + nested(9) + b"Ns.", "damaged"),
    (
      b"}(K\x01tq\x00" + b"0(h\x00h\x00tq\x00" * 30 + b"Ns.", "damaged",
    ),  # 2^30 parts
    (b"}(" + b"K\x01" * 2000 + b"tNs.", "damaged"),
    (b"ctorch\nfloat8_e4m3fn.system\n.", "is not run"),
    (b"]q\x00h\x00a.", "in a circle"),
    (
      b"]q\x00"
      + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
        for i in range(60)
      )
      + b".",
      "expands",
    ),  # 2^60 lists
    (b"(ctorch\nSize\nq\x00" + TEXT + b"\x85" + CALLED_OFTEN, "damaged"),
    (
      b"(c_codecs\nencode\nq\x00" + TEXT + b"X\x06\x00\x00\x00latin1\x86"
      + CALLED_OFTEN,
      "expands",
    ),
    (b"X\xff\xff\xff\xffa.", "damaged"),
    (b"cos\x1b[31m\n" + 10**5 * b"x" + b"\n.", r"os\\x1b\[31m.x{20,80}\.\.\."),
    (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x04tQ.",
     "not a tensor"),
    (b"", "damaged"), (b"t.", "damaged"), (b"0.", "damaged"),
    (b"R.", "damaged"), (b"h\x07.", "damaged"), (b"Q.", "damaged"),
  ],
)  # fmt: skip
def test_programs_that_fill_memory_or_crash(tmp_path, program, match):
  refused(archive(tmp_path / "a.pth", b"\x80\x02" + program), match)


@pytest.mark.parametrize(
  "name", ["torch FloatStorage", "torch._utils _rebuild_tensor_v2",
           "numpy.core.multiarray scalar", "collections OrderedDict"],
)  # fmt: skip
def test_a_file_sets_no_attributes_of_ours(tmp_path, name):
  """What stands for names of the file is new each time, and inert."""
  program = b"c" + name.replace(" ", "\n").encode() + b"\nN}X\x0c\x00\x00\x00"
  program += b"__defaults__K\x01s\x86b."
  path = archive(tmp_path / "a.pth", b"\x80\x02" + program)
  assert type(pth.read(path)) is pth.Opaque
  assert not hasattr(pth.Opaque, "__defaults__")
  assert np.dtype("f4").itemsize == 4
  numbers = {"archive/data/0": np.arange(4, dtype="f4").tobytes()}
  tensor = tensor_program(4, (4,), (1,))[:-1]
  for change in (
    b"(tb.",
    b"}b.",
    b"(K\x00K\x01ua.",
    b"K\x00K\x01s.",
    b"K\x00a.",
  ):
    refused(archive(path, tensor + change, numbers), "damaged")


def test_items_are_set_in_dicts_alone(tmp_path):
  numbers = {"archive/data/0": np.arange(4, dtype="f4").tobytes()}
  copied = tensor_program(4, (2, 2), (1, 2))[:-1]  # a writable array
  for start in (copied, b"\x80\x02](K\x01K\x02e"):
    path = archive(tmp_path / "a.pth", start + b"K\x00K\x07s.", numbers)
    refused(path, "wrong place")


def test_members_that_overlap(tmp_path):
  """A small file whose members are larger than itself in sum."""
  path = tmp_path / "a.pth"
  members = {f"archive/data/{i}": bytes(1000) for i in range(3)}
  content = bytearray(archive(path, b"\x80\x02}.", members).read_bytes())
  at = 0
  while (at := content.find(b"PK\x01\x02", at + 1)) > 0:
    content[at + 20 : at + 28] = struct.pack("<II", 2000, 2000)
  path.write_bytes(content)
  refused(path, "larger than itself")


def test_a_description_that_is_too_long(tmp_path, monkeypatch):
  monkeypatch.setattr(pth, "MAX_PICKLE_BYTES", 100)
  program = b"\x80\x02](" + 100 * b"K\x01" + b"e."
  refused(archive(tmp_path / "a.pth", program), "data.pkl of 206 bytes")


def test_plain_values_of_checkpoints(tmp_path):
  program = (
    b"\x80\x02(c__builtin__\nset\n](K\x01K\x02e\x85Rctorch\nSize\n(K\x03K\x04t"
    b"\x85Rctorch\ndevice\nX\x03\x00\x00\x00cpu\x85Rctorch\nfloat32\nt."
  )
  ones, size, device, dtype = pth.read(archive(tmp_path / "a.pth", program))
  assert ones == {1, 2} and size == (3, 4)
  assert (device.name, device.state) == ("torch.device", ("cpu",))
  assert (dtype.name, dtype.state) == ("torch.float32", None)


PLAIN = {
  "range": range(3),
  "frozen": frozenset({1, "x"}),
  "factory": collections.defaultdict(list, {"a": [1]}),
  "no factory": collections.defaultdict(None, {2: 3}),
  "empty bytes": b"",
  "bytes": b"ab\xff",
  "path": pathlib.PurePosixPath("a/b"),
  "windows": pathlib.PureWindowsPath("a"),
  "namespace": argparse.Namespace(lr=0.1),
  "keys": {(0, (1, ("a", 2.0))): 1, ((), ()): 2},
  "array": np.arange(3),
  "number": np.float32(0.5),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_arguments_are_plain_or_inert(tmp_path, protocol):
  program = pickle.dumps(PLAIN, protocol=protocol)
  found = pth.read(archive(tmp_path / "a.pth", program))
  for name in ("frozen", "empty bytes", "bytes", "keys", "number"):
    assert found[name] == PLAIN[name] and (
      type(found[name]) is type(PLAIN[name]) or name == "number"
    )
  assert found["factory"] == {"a": [1]} and found["no factory"] == {2: 3}
  assert type(found["factory"]) is dict
  for name in ("range", "path", "windows", "namespace", "array"):
    assert type(found[name]) is pth.Opaque
  assert found["range"].state == (0, 3, 1)


@pytest.mark.parametrize(
  "name",
  ["pathlib._local PosixPath", "pathlib PurePosixPath", "torch float8_e4m3fn",
   "torch uint16", "torch quint4x2", "torch complex64", "torch bool",
   "torch.serialization _get_layout"],
)  # fmt: skip
def test_names_that_are_inert(tmp_path, name):
  program = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n)R."
  found = pth.read(archive(tmp_path / "a.pth", program))
  assert type(found) is pth.Opaque and found.state == ()


def test_expanded_tensors_are_read(tmp_path):
  program = tensor_program(4, (3, 2), (0, 1), offset=1)
  numbers = {"archive/data/0": np.arange(4, dtype="f4").tobytes()}
  found = pth.read(archive(tmp_path / "a.pth", program, numbers))
  same(found, np.array([[1, 2]] * 3, np.float32))


def test_an_array_that_occurs_twice_is_written_once(tmp_path):
  weight = RNG.normal(size=(100, 10)).astype("f4")
  pth.write(tmp_path / "a.pth", {"a": weight, "b": [weight], "c": weight + 1})
  with zipfile.ZipFile(tmp_path / "a.pth") as file:
    assert sum("/data/" in name for name in file.namelist()) == 2
  found = pth.read(tmp_path / "a.pth")
  same(found, {"a": weight, "b": [weight], "c": weight + 1})


def test_single_changes_and_truncations(tmp_path):
  """Only our own error, or a file that reads; never a crash."""
  path = tmp_path / "a.pth"
  pth.write(path, {"w": np.arange(12, dtype="f4").reshape(3, 4), "n": [1, "x"]})
  good = path.read_bytes()
  read, errors = outcomes(pth.read, path, damaged(good))
  assert errors > 500 and read > 0


def damaged(good):
  """A file cut at many places, and with every single byte changed."""
  yield from (good[:n] for n in range(0, len(good), 7))
  rng = np.random.default_rng(1)
  for place in range(len(good)):
    for value in rng.integers(0, 256, 2).tolist():
      yield good[:place] + bytes([value]) + good[place + 1 :]


def outcomes(read, path, cases):
  """How many of the contents are read, and how many refused by us."""
  count = {True: 0, False: 0}
  for case in cases:
    path.write_bytes(case)
    try:
      read(path)
      count[True] += 1
    except InputError:
      count[False] += 1
  return count[True], count[False]


def test_changed_programs_with_right_checksums(tmp_path, golden_root):
  """What the archive's checksums would hide from the test above."""
  with zipfile.ZipFile(golden_root / "attmask" / "checkpoint.pth") as file:
    members = {name: file.read(name) for name in file.namelist()}
  name = next(n for n in members if n.endswith("/data.pkl"))
  root = name.removesuffix("/data.pkl")
  program = members.pop(name)
  path = archive(tmp_path / "a.pth", program, members, root=root)
  recorded = pth.read(golden_root / "attmask" / "checkpoint.pth")
  same(pth.read(path)["teacher"], recorded["teacher"])
  assert changes_refused(path, program, members, root=root) > 100


def changes_refused(path, program, members=None, **options):
  """How many of 300 programs with up to three other bytes are refused."""
  rng, errors = np.random.default_rng(2), 0
  for _ in range(300):
    changed = bytearray(program)
    for place in rng.integers(0, len(program), rng.integers(1, 4)):
      changed[place] = rng.choice([rng.integers(256), *b"(tRbQuesa0hqX.N}]"])
    try:
      pth.read(archive(path, bytes(changed), members, **options))
    except InputError:
      errors += 1
  return errors


def test_changed_calls_are_not_run_either(tmp_path):
  """A file that asks for a shell, and what is one step away from it."""
  mark = tmp_path / "ran"
  call = Call(os.system, f"touch {mark}")
  for protocol in (2, 4):
    program = pickle.dumps([call, argparse.Namespace(), {1}], protocol)
    assert changes_refused(tmp_path / "a.pth", program) > 250
    assert not mark.exists()
  pickle.loads(program)  # what a reader that runs it would do
  assert mark.exists()


def test_changed_numbers_are_noticed(tmp_path):
  path = tmp_path / "a.pth"
  pth.write(path, {"w": np.ones(100, "f4")})
  content = bytearray(path.read_bytes())
  content[content.index(np.ones(100, "f4").tobytes()) + 13] ^= 1
  path.write_bytes(content)
  refused(path, "damaged|not a .pth file")
  later = pth.read(path, lazy=True)
  with pytest.raises(InputError, match="damaged|not a .pth file"):
    np.asarray(later["w"])


def test_damaged_safetensors(tmp_path):
  path = tmp_path / "a.safetensors"
  with pytest.raises(InputError, match="is not a file"):
    tensors.read(path)
  tensors.write(path, {"w": np.ones(100, "f4")})
  good = path.read_bytes()
  for n in range(0, len(good), 11):
    path.write_bytes(good[:n])
    with pytest.raises(InputError, match="damaged"):
      tensors.read(path)
  path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
  with pytest.raises(InputError, match="damaged"):
    tensors.read(path)


def test_single_changes_of_safetensors(tmp_path):
  path = tmp_path / "a.safetensors"
  tensors.write(
    path, {"w": np.ones((3, 4), "f4"), "n": np.arange(2)}, {"a": "b"}
  )
  read, errors = outcomes(tensors.read, path, damaged(path.read_bytes()))
  assert errors > 100 and read > 50


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0", "F4", "X"])
def test_safetensors_of_types_that_numpy_lacks(tmp_path, dtype):
  size = 2 if dtype == "F4" else 4
  what = {"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}
  head = json.dumps(what).encode()
  path = tmp_path / "a.safetensors"
  path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(size))
  with pytest.raises(InputError, match="damaged|NumPy lacks"):
    tensors.read(path)


def test_safetensors_that_cannot_be_written(tmp_path):
  path, good = tmp_path / "a.safetensors", {"w": np.ones(2, "f4")}
  for given, notes in (
    (good, {"epoch": 1}), ({1: np.ones(2, "f4")}, None),
    ({"w": np.zeros(2, complex)}, None), ({"w": np.array(["x"])}, None),
  ):  # fmt: skip
    with pytest.raises(InputError, match="cannot be written"):
      tensors.write(path, given, notes)
  assert not os.listdir(tmp_path)


def test_without_the_safetensors_package(tmp_path, monkeypatch):
  for name in ("safetensors", "safetensors.numpy"):
    monkeypatch.setitem(sys.modules, name, None)
  path = tmp_path / "a.safetensors"
  path.write_bytes(b"x")
  with pytest.raises(InputError, match="pip install safetensors"):
    tensors.read(path)
  with pytest.raises(InputError, match="pip install safetensors"):
    tensors.write(path, {"w": np.ones(2, "f4")})


# Where torch is installed ---------------------------------------------------


def test_torch_reads_what_we_write(tmp_path):
  torch = pytest.importorskip("torch")
  tree = some_tree()
  pth.write(tmp_path / "a.pth", tree)
  for options in ({}, {"mmap": True}):
    found = torch.load(tmp_path / "a.pth", weights_only=True, **options)
    assert found["plain"] == tree["plain"]
    arrays = tree["by type"] | {
      k: tree[k] for k in ("transposed", "every second", "number", "empty")
    }
    for name, want in arrays.items():
      got = found["by type"].get(name, found.get(name))
      assert tuple(got.shape) == want.shape
      assert str(got.dtype).removeprefix("torch.") == want.dtype.name
      values = got.to(torch.float64).numpy()
      np.testing.assert_array_equal(values, want.astype(float))


def test_we_read_what_torch_writes(tmp_path):
  torch = pytest.importorskip("torch")
  base = torch.arange(24.0).reshape(4, 6)
  model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
  saved = {
    "whole": base,
    "transposed": base.T,
    "slice": base[1:3, ::2],
    "half": base.half(),
    "brain": base.bfloat16(),
    "parameter": torch.nn.Parameter(base[0]),
    "shared": [base, base[2]],
    "ordered": collections.OrderedDict(a=torch.ones(2, dtype=torch.int64)),
    "model": model.state_dict(),
    "args": argparse.Namespace(lr=0.1, path=pathlib.PosixPath("x")),
    "number": np.float64(0.25),
    "text": "epoch",
    "set": {1, 2},
    "expanded": base[:1].expand(5, 6),
    "flags": base > 3,
    "dtype": torch.bfloat16,
    "array": np.arange(3),
  }
  torch.save(saved, tmp_path / "a.pth")
  found = pth.read(tmp_path / "a.pth")
  for name in ("whole", "transposed", "slice", "parameter"):
    same(found[name], np.ascontiguousarray(saved[name].detach().numpy()))
  same(found["half"], base.half().numpy())
  same(found["brain"], base.numpy().astype(ml_dtypes.bfloat16))
  same(found["shared"][1], base[2].numpy())
  assert found["number"] == 0.25 and found["text"] == "epoch"
  assert found["args"].state["lr"] == 0.1
  assert found["set"] == {1, 2} and found["dtype"].name == "torch.bfloat16"
  assert found["array"].name.endswith("_reconstruct")
  same(found["flags"], (base > 3).numpy())
  same(found["expanded"], np.ascontiguousarray(saved["expanded"].numpy()))
  for name, value in model.state_dict().items():
    same(found["model"][name], value.numpy())
  torch.save(base, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
  refused(tmp_path / "old.pth", "before 1.6")
  buffer = io.BytesIO()
  torch.jit.save(torch.jit.script(model), buffer)
  (tmp_path / "script.pth").write_bytes(buffer.getvalue())
  refused(tmp_path / "script.pth", "TorchScript|compressed")
