"""Config keys: what a declaration gives, and what is refused."""

import dataclasses
import pathlib

import pytest

from attmask_jax import config_reference, schema
from attmask_jax.errors import InputError
from attmask_jax.evals import by_name
from attmask_jax.methods import METHODS
from attmask_jax.runs import config as run_config
from attmask_jax.training import setup
from configs import evals

ROOT = pathlib.Path(config_reference.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Inner:
  name: str = schema.key("", "a name")


@dataclasses.dataclass(frozen=True)
class Keys:
  own: int = 3  # no key
  share: float = schema.key(0.5, "a share", low=0, high=1)
  rate: float = schema.key(1.0, "a rate", above=0)
  count: int = schema.key(2, "a count", low=1)
  pair: tuple[float, float] = schema.key((0.1, 0.2), "two", low=0)
  several: tuple[int, ...] = schema.key((1,), "some", high=9)
  maybe: tuple[float, ...] = schema.key((), "some or none", empty=True)
  kind: str = schema.key("a", "a kind", choices=("a", "b", ""))
  either: str = schema.key("x", "of two", choices=lambda: ("x", "y"))
  switch: bool = schema.key(True, "a switch")
  inner: Inner = schema.key(Inner(), "a section")


DEFAULTS = dict(
  share=0.5, rate=1.0, count=2, pair=(0.1, 0.2), several=(1,), maybe=(),
  kind="a", either="x", switch=True, inner={"name": ""},
)  # fmt: skip


def test_a_section_holds_the_defaults_of_its_keys():
  assert schema.section(Keys).to_dict() == DEFAULTS
  config = schema.section(Keys, count=5, more=1).to_dict()
  assert config == DEFAULTS | {"count": 5, "more": 1}


def test_the_last_class_decides_and_a_default_may_change():
  @dataclasses.dataclass(frozen=True)
  class Other:
    share: float = schema.inherit(Keys, "share", 0.25)

  assert schema.section(Keys, Other).share == 0.25
  described = schema.keys(Other)["share"]
  assert (described.low, described.meaning) == (0, "a share")


def test_a_dataclass_takes_its_keys_and_no_others():
  config = schema.section(Keys, several=[4, 5], other=1)
  config.own = 9
  del config.rate  # as of a run from before there was one
  taken = schema.take(Keys, config)
  assert taken["several"] == (4, 5)
  assert taken.keys() == DEFAULTS.keys() - {"rate"}


@pytest.mark.parametrize(
  "changes",
  [
    dict(share=0), dict(share=1), dict(rate=1e-9), dict(count=1),
    dict(pair=[0, 1]), dict(several=(9, -9)), dict(maybe=(1, 2.5)),
    dict(kind=""), dict(either="y"), dict(switch=False), dict(other=None),
  ],
)  # fmt: skip
def test_what_is_declared_is_accepted(changes):
  schema.check("s", DEFAULTS | changes, Keys)


@pytest.mark.parametrize(
  "changes, sentence",
  [
    (dict(share=1.5), "s.share 1.5 must be between 0 and 1"),
    (dict(share=-0.1), "s.share -0.1 must be between 0 and 1"),
    (dict(share=float("nan")), "s.share nan must be between 0 and 1"),
    (dict(share="a"), "s.share 'a' must be a number"),
    (dict(share=(0.5,)), "s.share (0.5,) must be a number"),
    (dict(rate=0), "s.rate 0 must be above 0"),
    (dict(count=0), "s.count 0 must be at least 1"),
    (dict(count=2.0), "s.count 2.0 must be a whole number"),
    (dict(count=True), "s.count True must be a whole number"),
    (
      dict(pair=(0.1,)),
      "s.pair (0.1,) must be two numbers, written as --config.s.pair=A,B",
    ),
    (dict(pair=(0.1, -1)), "s.pair (0.1, -1) must be at least 0"),
    (
      dict(several=[1, 2.5]),
      "s.several (1, 2.5) must be one whole number or several, written as "
      "--config.s.several=A,B",
    ),
    (
      dict(several=()),
      "s.several () must be one whole number or several, written as "
      "--config.s.several=A,B",
    ),
    (dict(several=(1, 10)), "s.several (1, 10) must be at most 9"),
    (dict(kind="c"), 's.kind "c" is unknown: use a, b, ""'),
    (dict(either="z"), 's.either "z" is unknown: use x or y'),
    (dict(switch=1), "s.switch 1 must be True or False"),
    (dict(inner={"name": 1}), "s.inner.name 1 must be text"),
  ],
)
def test_what_is_refused(changes, sentence):
  with pytest.raises(InputError) as error:
    schema.check("s", DEFAULTS | changes, Keys)
  assert str(error.value) == sentence


@pytest.mark.parametrize("value", [10, 2, 0])
def test_sizes_that_patches_do_not_tile(value):
  schema.check_multiple("a.b", 8, 4, "c.d")
  near = "8 or 12" if value == 10 else "4 or 8"
  with pytest.raises(InputError) as error:
    schema.check_multiple("a.b", value, 4, "c.d")
  assert str(error.value) == (
    f"a.b {value} is not a multiple of c.d 4: choose {near} pixels"
  )


def declared(sections):
  """Flat names of all keys that dataclasses declare, by section."""
  names = set()
  for section, classes in sections.items():
    prefix = f"{section}." if section else ""
    names |= {prefix + name for name in schema.keys(*classes)}
  return names


@pytest.mark.parametrize(
  "method, transform",
  [
    ("attmask", "multi_crop"),
    ("extrema", "two_colours"),
    ("mae", "crop_flip"),
  ],
)
def test_every_key_of_a_training_config_is_declared(method, transform):
  config = setup.default_config(method, transform)
  names = set()
  for name, value in config.items():
    fields = hasattr(value, "items")
    names |= {f"{name}.{key}" for key in value} if fields else {name}
  assert names == declared(setup.classes(method, transform))
  assert set(METHODS) == {"attmask", "extrema", "mae", "classify"}


@pytest.mark.parametrize("name", evals.NAMES)
def test_every_key_of_an_evaluation_is_declared(name):
  config = evals.get_config(name)
  own = by_name(config.evals.name).keys
  trains = "method" in config
  names = declared(setup.evaluation_classes(*own, trains=trains))
  for section in ("evals", "data", "run", *(("method", "optim") * trains)):
    for key in config[section]:
      assert f"{section}.{key}" in names


def test_an_unknown_network():
  with pytest.raises(InputError, match='network "both" is unknown: use'):
    schema.check("", {"network": "both"}, run_config.WeightsKeys)


def test_the_page_of_keys_is_that_of_the_code():
  page = (ROOT / "docs" / "config.md").read_text()
  assert page == config_reference.page(), (
    "run python -m attmask_jax.config_reference > docs/config.md"
  )
  for name in declared(setup.classes("attmask", "multi_crop")):
    if name != "run.wandb":  # a section
      assert f"| `{name}` |" in page
  assert "| `run.wandb.project` |" in page
