"""File names and other foreign text, as it may be printed."""

import re

# Control characters, and what Python makes of bytes that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
  """Text with backslash escapes for what no file or terminal takes.

  A name on the disk is any bytes: Python gives those that are no UTF-8 as lone
  surrogates, which neither a log in UTF-8 nor a font can hold.
  """
  return _UNPRINTABLE.sub(lambda hit: _escape(hit[0]), text)


def _escape(character: str) -> str:
  code = ord(character)
  byte = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
  return f"\\x{byte:02x}" if byte < 256 else f"\\u{code:04x}"
