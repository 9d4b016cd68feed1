"""Helpers of the recipes.

A recipe starts from `setup.default_config(method, transform)`, or from the
config of an evaluation, and sets the keys that differ. docs/config.md lists
every key with its default and meaning.
"""

from typing import Any


def choose(options: dict[str, Any], arg: str) -> Any:
  """The option that a recipe's argument names.

  Raises:
    ValueError: there is no such option; the message lists the options.
  """
  if arg not in options:
    raise ValueError(
      f'unknown config argument "{arg}": use one of {", ".join(options)}'
    )
  return options[arg]
