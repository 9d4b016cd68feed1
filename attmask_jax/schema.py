"""Config keys: each is declared once, as a field of the dataclass that uses it.

  @dataclasses.dataclass(frozen=True)
  class AttMask(Method):
    show_max: float = key(0.1, "share of patches with hints", low=0)

The field holds the default, the type (its annotation), the range or the
choices and the meaning. `section` turns such classes into a ConfigDict, `check`
checks a config against them, `take` reads their fields back out of it, and
docs/config.md is generated from them. Rules between several keys are checked
where the keys are used.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections

from attmask_jax.errors import InputError

# Names, or a function that returns them (to break import cycles).
Choices = tuple[str, ...] | Callable[[], tuple[str, ...]]
_METADATA = "attmask_jax.key"


@dataclasses.dataclass(frozen=True)
class Key:
  """Declaration of one config key.

  Attributes:
    meaning: short description, including units.
    low: smallest value, None = no limit.
    above: the value must be larger than this, None = no limit.
    high: largest value, None = no limit.
    choices: allowed values of text; () = any.
    empty: a list may be empty.
    name: of the field; filled in by `keys`.
    type: annotation of the field; filled in by `keys`.
    default: of the field; filled in by `keys`.
  """

  meaning: str
  low: float | None = None
  above: float | None = None
  high: float | None = None
  choices: Choices = ()
  empty: bool = False
  name: str = ""
  type: Any = None
  default: Any = None

  @property
  def is_list(self) -> bool:
    """Whether it holds several values: a tuple, A,B on the command line."""
    return typing.get_origin(self.type) is tuple

  @property
  def item_type(self) -> type:
    """Type of the value, or of each value of a list."""
    return typing.get_args(self.type)[0] if self.is_list else self.type

  @property
  def length(self) -> int | None:
    """Number of values of a list of fixed length, else None."""
    args = typing.get_args(self.type)
    return len(args) if self.is_list and args[-1] is not ... else None

  @property
  def allowed(self) -> tuple[str, ...]:
    """The choices as a tuple."""
    return self.choices() if callable(self.choices) else self.choices


def key(
  default: Any,
  meaning: str,
  *,
  low: float | None = None,
  above: float | None = None,
  high: float | None = None,
  choices: Choices = (),
  empty: bool = False,
) -> Any:
  """A dataclass field that is a config key, see `Key`."""
  described = Key(meaning, low, above, high, choices, empty)
  return dataclasses.field(default=default, metadata={_METADATA: described})


def inherit(cls: type, name: str, default: Any) -> Any:
  """A field for a key that `cls` declares, with another default."""
  described = {f.name: f for f in dataclasses.fields(cls)}[name].metadata
  return dataclasses.field(default=default, metadata=described)


def keys(*classes: type) -> dict[str, Key]:
  """The config keys that dataclasses declare, by name, in their order."""
  declared: dict[str, Key] = {}
  for cls in classes:
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
      if _METADATA in field.metadata:
        declared[field.name] = dataclasses.replace(
          field.metadata[_METADATA],
          name=field.name,
          type=annotations[field.name],
          default=field.default,
        )
  return declared


def section(*classes: type, **changes: Any) -> ml_collections.ConfigDict:
  """A config section with the keys and defaults of dataclasses.

  A key that is itself a dataclass of keys becomes a section within it.

  Args:
    *classes: dataclasses with `key` fields.
    **changes: values that differ from the defaults, or further keys.
  """
  values: dict[str, Any] = {}
  for name, described in keys(*classes).items():
    nested = dataclasses.is_dataclass(described.type)
    values[name] = section(described.type) if nested else described.default
  return ml_collections.ConfigDict(values | changes)


def take(cls: type, *sections: ml_collections.ConfigDict) -> dict[str, Any]:
  """Arguments for a dataclass: values of the keys that it declares.

  A key that the sections lack, as those of older runs may, is left out and
  keeps the field's default.

  Args:
    cls: a dataclass with `key` fields.
    *sections: of a config; lists in them become tuples.
  """
  plain = lambda x: tuple(x) if isinstance(x, list | tuple) else x
  return {
    name: plain(values[name])
    for values in sections
    for name in keys(cls)
    if name in values
  }


def check(
  name: str, values: ml_collections.ConfigDict | dict[str, Any], *classes: type
) -> None:
  """Checks a config section against the declarations of its keys.

  A dataclass with `key` fields checks itself by
  `schema.check("method", vars(self), type(self))`.

  Args:
    name: of the section, "" for keys at the top of the config.
    values: the section; keys that no class declares are ignored.
    *classes: dataclasses with `key` fields.

  Raises:
    InputError: the first value of a wrong type, out of its range or not among
      its choices; names the key, the value and what is allowed.
  """
  for full_name, described, value in _pairs(name, values, classes):
    _check_type(full_name, described, value)
    _check_choices(full_name, described, value)
    _check_range(full_name, described, value)


def _pairs(
  name: str,
  values: ml_collections.ConfigDict | dict[str, Any],
  classes: tuple[type, ...],
) -> Iterator[tuple[str, Key, Any]]:
  """(full name, key, value) of each key, nested ones too."""
  prefix = f"{name}." if name else ""
  for short, described in keys(*classes).items():
    if short not in values:
      continue
    if dataclasses.is_dataclass(described.type):
      nested = (described.type,)
      yield from _pairs(prefix + short, values[short], nested)
    else:
      yield prefix + short, described, values[short]


def _items(value: Any) -> tuple[Any, ...]:
  return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_type(name: str, described: Key, value: Any) -> None:
  if isinstance(described.item_type, types.GenericAlias):
    return  # lists of lists are checked where they are used
  items = _items(value)
  fits = described.is_list == isinstance(value, list | tuple)
  if described.is_list:
    fits &= described.length in (None, len(items))
    fits &= bool(items) or described.empty
  if not fits or not all(_is_a(described.item_type, x) for x in items):
    value = tuple(value) if isinstance(value, list) else value
    example = f", written as --config.{name}=A,B" if described.is_list else ""
    raise InputError(f"{name} {value!r} must be {kind(described)}{example}")


def _is_a(item_type: type, value: Any) -> bool:
  """Whether a value has the type; whole numbers are numbers, too."""
  if isinstance(value, bool) or item_type is bool:
    return isinstance(value, bool) and item_type is bool
  return isinstance(value, (int, float) if item_type is float else item_type)


def _check_choices(name: str, described: Key, value: Any) -> None:
  for item in _items(value):
    if described.allowed and item not in described.allowed:
      raise InputError(
        f'{name} "{item}" is unknown: use {choices_text(described)}'
      )


def choices_text(described: Key) -> str:
  """The choices of a key in words, "" if it has none."""
  names = [name or '""' for name in described.allowed]
  return (" or " if len(names) == 2 else ", ").join(names)


def _check_range(name: str, described: Key, value: Any) -> None:
  limits = range_text(described)
  for item in _items(value) if limits else ():
    inside = (
      (described.low is None or item >= described.low)
      and (described.above is None or item > described.above)
      and (described.high is None or item <= described.high)
    )
    if not inside:
      raise InputError(f"{name} {value} must be {limits}")


def kind(described: Key) -> str:
  """The type of a key in words, such as "two numbers"."""
  names = {
    float: "number", int: "whole number", bool: "truth value", str: "text"
  }  # fmt: skip
  word = names.get(described.item_type, "list")
  if not described.is_list:
    special = {"truth value": "True or False", "text": "text"}
    return special.get(word, f"a {word}")
  if described.length == 2:
    return f"two {word}s"
  return f"one {word} or several" + ", or none" * described.empty


def range_text(described: Key) -> str:
  """The limits of a key in words, "" if it has none."""
  low, above, high = described.low, described.above, described.high
  if low is not None and high is not None:
    return f"between {_number(low)} and {_number(high)}"
  parts = []
  if low is not None:
    parts.append(f"at least {_number(low)}")
  if above is not None:
    parts.append(f"above {_number(above)}")
  if high is not None:
    parts.append(f"at most {_number(high)}")
  return " and ".join(parts)


def _number(x: float) -> str:
  """Whole numbers with all their digits."""
  return str(int(x)) if float(x).is_integer() else f"{x:g}"


def words(value: str | typing.Iterable[str]) -> tuple[str, ...]:
  """Splits "A,B", or a list of such texts, into words: ("A", "B").

  Keys with several words are declared as text, because the command line would
  turn a tuple into the single word "A,B".
  """
  parts = [value] if isinstance(value, str) else value
  split = (word.strip() for part in parts for word in part.split(","))
  return tuple(word for word in split if word)


def check_multiple(
  name: str, value: int, unit: int, unit_name: str, *, suffix: str = " pixels"
) -> None:
  """Rejects a size that is not a multiple of another.

  Args:
    name: of the key.
    value: its value.
    unit: what it must be a multiple of.
    unit_name: what that is called, such as "method.patch_size".
    suffix: unit of measurement.

  Raises:
    InputError: names the two nearest multiples.
  """
  if value < unit or value % unit:
    down = max(value // unit, 1) * unit
    raise InputError(
      f"{name} {value} is not a multiple of {unit_name} {unit}: choose {down} "
      f"or {down + unit}{suffix}"
    )
