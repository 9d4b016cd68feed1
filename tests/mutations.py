"""Changed files: other bytes, and other contents under right checksums."""

import io
import json
import struct
import zipfile
import zlib

import numpy as np

ODD_BYTES = (0, 1, 127, 128, 255)
ODD_VALUES = (
  None, True, "", "nan", "a" * 300, "../../a", -1, 0, 1, 2**31, 2**63, 10**30,
  0.5, -1e308, float("nan"), float("inf"), [], {}, [[]], {"a": {}}, [0, "a"],
)  # fmt: skip
# What a pickle would call to take over the process that reads it.
CALLS = (
  b"os\nsystem\n",
  b"builtins\neval\n",
  b"builtins\nexec\n",
  b"subprocess\nPopen\n",
  b"ctypes\nCDLL\n",
  b"torch\nload\n",
)


def changed(name, content, rng):
  """(how, bytes) of a file of this name after a change.

  Half of the changes to formats with checksums or lengths leave these right,
  so that they are read beyond them.
  """
  inner = {
    ".png": in_png, ".pth": in_zip, ".safetensors": in_header,
    ".json": in_json, ".jsonl": in_json_line, "": in_json,
  }.get(name[name.rfind(".") :] if "." in name else "")  # fmt: skip
  if inner and rng.integers(2):
    inside = inner(content, rng)
    if inside is not None:
      return "inside", inside
  return "bytes", other_bytes(content, rng)


def other_bytes(content, rng):
  """A few others, a piece cut out, doubled or put elsewhere, or an end."""
  new, n = bytearray(content), len(content)
  kind = rng.integers(6)
  start, stop = map(int, np.sort(rng.integers(0, n + 1, 2)))
  if kind <= 1:  # headers are where it hurts
    end = max(1, min(n, 200) if kind else n)
    for place in rng.integers(0, end, rng.integers(1, 20)) if n else ():
      new[place] = rng.choice([*ODD_BYTES, rng.integers(256)])
  elif kind == 2:
    del new[start:]
  elif kind == 3:
    del new[start:stop]
  elif kind == 4:
    new[stop:stop] = new[start:stop]
  else:
    piece = new[start:stop]
    del new[start:stop]
    place = rng.integers(len(new) + 1)
    new[place:place] = piece
  return bytes(new)


def in_png(content, rng):
  """Other bytes in one chunk, numbers of pixels among them."""
  chunks, place = [], 8
  while place < len(content):
    size, kind = struct.unpack_from(">I4s", content, place)
    chunks.append((kind, content[place + 8 : place + 8 + size]))
    place += 12 + size
  which = rng.integers(len(chunks))
  kind, data = chunks[which]
  if kind == b"IDAT" and rng.integers(2):
    data = zlib.compress(other_bytes(zlib.decompress(data), rng))
  else:
    data = other_bytes(data, rng)
  chunks[which] = (kind, data)
  parts = [content[:8]]
  for kind, data in chunks:
    total = zlib.crc32(kind + data)
    parts.append(struct.pack(">I4s", len(data), kind) + data)
    parts.append(struct.pack(">I", total))
  return b"".join(parts)


def in_zip(content, rng):
  """Another member: its bytes, its name, or what its pickle calls."""
  members = []
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    members = [[i.filename, archive.read(i)] for i in archive.infolist()]
  pickles = [m for m in members if m[0].endswith("data.pkl")]
  # There are many blocks of numbers and one pickle, which decides.
  member = (
    pickles[0] if rng.integers(3) else members[rng.integers(len(members))]
  )
  kind = rng.integers(4)
  if kind == 0:
    member[0] = str(rng.choice(["../a", "/a", member[0] + "0", members[-1][0]]))
  elif kind == 1 and member in pickles:
    member[1] = other_call(member[1], rng)
  else:
    member[1] = other_bytes(member[1], rng)
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, data in members:
      archive.writestr(zipfile.ZipInfo(name), data)
  return buffer.getvalue()


def other_call(program, rng):
  """A pickle in which one global name is that of another function."""
  starts = [i for i in range(len(program)) if program.startswith(b"c", i)]
  names = [i + 1 for i in starts if b"\n" in program[i : i + 60]]
  place = names[rng.integers(len(names))]
  end = program.index(b"\n", program.index(b"\n", place) + 1) + 1
  return program[:place] + CALLS[rng.integers(len(CALLS))] + program[end:]


def in_header(content, rng):
  """Another value, or other bytes, in the header of a .safetensors file."""
  size = int.from_bytes(content[:8], "little")
  change = in_json if rng.integers(2) else other_bytes
  header = change(content[8 : 8 + size], rng)
  return len(header).to_bytes(8, "little") + header + content[8 + size :]


def in_json(content, rng):
  """Another value somewhere in it, or one less; None for what is no JSON."""
  try:
    document = json.loads(content)
  except ValueError:
    return None
  places = list(_places([document], 0))
  parent, key = places[rng.integers(len(places))]
  if rng.integers(4):
    parent[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
  elif isinstance(parent, dict):
    del parent[key]
  else:
    parent.append(parent[key])
  return json.dumps(places[0][0][0]).encode()


def in_json_line(content, rng):
  """The same of one line."""
  lines = content.splitlines()
  which = rng.integers(len(lines))
  lines[which] = in_json(lines[which], rng)
  return b"\n".join(lines) + b"\n"


def _places(parent, key):
  """(container, key) of each value of a document, its own in a list first."""
  yield parent, key
  value = parent[key]
  inner = (
    value
    if isinstance(value, dict)
    else range(len(value))
    if (isinstance(value, list))
    else ()
  )
  for key in inner:
    yield from _places(value, key)
