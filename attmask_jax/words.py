"""Lists of words on the command line."""

from collections.abc import Iterable


def split(value: str | Iterable[str]) -> tuple[str, ...]:
  """Words of "A,B", or of a list of such: ("A", "B").

  Their config keys have text as default: of a tuple the command line would make
  the one word "A,B".
  """
  parts = [value] if isinstance(value, str) else value
  words = (word.strip() for part in parts for word in part.split(","))
  return tuple(word for word in words if word)
