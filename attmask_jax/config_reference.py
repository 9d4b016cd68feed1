"""Prints docs/config.md: every config key, from its declaration.

python -m attmask_jax.config_reference > docs/config.md
"""

import dataclasses
import inspect
import pathlib

from attmask_jax import augment, evals, schema
from attmask_jax.data import keys as data_keys
from attmask_jax.methods import METHODS
from attmask_jax.methods import Keys as MethodKeys
from attmask_jax.models import vit
from attmask_jax.studies import plan
from attmask_jax.training import setup

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEAD = """# Config keys

Any key can be set on the command line as `--config.SECTION.KEY=VALUE`, lists as
`A,B`. A recipe in [configs/](../configs) overrides some of the defaults below.
This page is generated from the declarations of the keys:
`python -m attmask_jax.config_reference > docs/config.md`.

`method`, `data` and `optim` determine the result of a training run, `evals`
what is measured during training, and `run` how it is computed, which changes
results by rounding at most.
"""
STUDY = """## `study`

Of `configs/study.py` alone. Its sections `policies.POLICY` hold the keys of
`method` that differ between the runs, and `linear` is the config of the linear
probe, with all of its sections: `linear.optim.epochs`.
"""
COLUMNS = ("key", "type", "default", "allowed", "meaning")


def page() -> str:
  """The whole page, in Markdown."""
  training = setup.classes("attmask", "multi_crop")
  classifier = setup.classes("classify", "crop_flip")
  evaluation = setup.evaluation_classes()
  parts = [HEAD, "## Top of the config\n"]
  parts += tables("", training[""] + evaluation[""])
  parts.append("## `method`\n")
  parts += tables("method", (MethodKeys, vit.BackboneKeys))
  for name, method in METHODS.items():
    parts.append(f"### `method.name={name}`\n")
    own = (c for c in method.config_parts if c is not vit.BackboneKeys)
    parts += tables("method", (method, *own))
  parts.append("## `data`\n")
  recipes = tuple(augment.TRANSFORMS.values())
  shared = tuple(c for c in classifier["data"] if c not in recipes)
  parts += tables("data", shared)
  for name, recipe in augment.TRANSFORMS.items():
    parts.append(f"### `data.transform={name}`\n")
    parts += tables("data", (recipe,))
  parts.append("### Evaluations\n")
  parts += tables("data", (data_keys.OpenKeys,))
  parts.append("## `optim`\n")
  parts += tables("optim", training["optim"])
  parts.append("## `evals` of a training run\n")
  parts += tables("evals", (*training["evals"], setup.AccuracyKeys))
  parts.append("## `evals` of an evaluation\n")
  parts += tables("evals", (setup.EvaluationKeys,))
  for name in evals.NAMES:
    declared = evals.by_name(name).keys
    if schema.keys(*declared):
      parts.append(f"### `evals.name={name}`\n")
      parts += tables("evals", declared)
  parts.append("## `run`\n")
  parts += tables("run", training["run"])
  parts.append(STUDY)
  parts += tables("study", (plan.Keys,))
  return "\n".join(parts)


def tables(section: str, classes: tuple[type, ...]) -> list[str]:
  """A paragraph and a table for each class, without repeats."""
  lines: list[str] = []
  for cls in dict.fromkeys(classes):
    declared = schema.keys(cls)
    if not declared:
      continue
    file = pathlib.Path(inspect.getsourcefile(cls)).resolve()
    where = file.relative_to(ROOT).as_posix()
    summary = inspect.getdoc(cls).splitlines()[0]
    lines.append(f"{summary} ([{where}](../{where}))\n")
    lines.append(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    lines += rows(f"{section}." if section else "", declared)
    lines.append("")
  return lines


def rows(prefix: str, declared: dict[str, schema.Key]) -> list[str]:
  """One line of a table per key; those of a nested section one by one."""
  lines: list[str] = []
  for name, key in declared.items():
    if dataclasses.is_dataclass(key.type):
      lines += rows(f"{prefix}{name}.", schema.keys(key.type))
      continue
    allowed = schema.choices_text(key) or schema.range_text(key)
    cells = (f"`{prefix}{name}`", schema.kind(key), default_of(key), allowed)
    text = " | ".join((*cells, key.meaning))
    lines.append(f"| {text} |")
  return lines


def default_of(key: schema.Key) -> str:
  """The default as written on the command line."""
  value = key.default
  return "`" + (str(value) or '""') + "`"


if __name__ == "__main__":
  print(page(), end="")
