"""Whether a network has collapsed: its outputs say nothing about the image.

Each measure has a limit, the value that it takes when all images are alike to
the network. A run that comes next to a limit is told so, with the remedy. The
bounds are explained in docs/training.md.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from attmask_jax.runs import metric_names, records

RANK = 1.5  # RankMe
UNIFORMITY = -0.01  # mean squared distance of unit features 0.005
ENTROPY = 0.01  # of log(out_dim), from either limit
# Of log(out_dim). Centring may give images with the same most probable
# prototype different targets: then the teacher's entropy is above this.
CERTAIN = 0.1

_SLOWER = (
  "lower optim.lr_per_256 or, if there is a teacher, raise "
  "optim.teacher_momentum"
)
_CENTRE = (
  "lower optim.lr_per_256, raise optim.teacher_momentum or "
  "method.teacher_temp, and keep method.center_momentum below 1"
)


class Sign(NamedTuple):
  """A sign of a collapse.

  Attributes:
    metric: its logged name, without the phase.
    limit: its value when all images are alike.
    bound: this value and those between it and the limit are a sign.
    meaning: of the limit.
    remedy: what to change.
    certain: largest entropy of the teacher with which it is a sign, nats.
  """

  metric: str
  limit: float
  bound: float
  meaning: str
  remedy: str
  certain: float | None = None


def signs(config: Mapping[str, Any]) -> tuple[Sign, ...]:
  """All signs, those that say most first.

  Args:
    config: of the run, flat; may be empty.
  """
  alike = "that all images have the same features"
  found = [
    Sign("label_free/rankme", 1, RANK, alike, _SLOWER),
    Sign("label_free/uniformity", 0, UNIFORMITY, alike, _SLOWER),
  ]
  if (prototypes := records.count(config, "method.out_dim")) > 1:
    most = math.log(prototypes)
    near = ENTROPY * most
    found += [
      Sign(
        "label_free/prototypes_used", 1, 1,
        "that all images have the same prototype", _CENTRE, CERTAIN * most,
      ),
      Sign(
        "teacher_entropy", most, most - near,
        "that the teacher gives all prototypes the same share for every image",
        "lower method.teacher_temp",
      ),
      Sign(
        "teacher_entropy", 0, near,
        "that the teacher is certain of one prototype for every image",
        "raise method.teacher_temp, and keep method.center_momentum below 1",
      ),
    ]  # fmt: skip
  return tuple(found)


def sentence(
  now: Mapping[str, float],
  start: Mapping[str, float],
  config: Mapping[str, Any],
) -> str:
  """What has collapsed and what to do, in one sentence; "" = nothing has.

  A measure that was as near its limit before the first step, as that of few
  similar images may be, is no sign: training has not brought it there.

  Args:
    now: last value of each measure by its logged name.
    start: values before the first step, of the measures that have one.
    config: of the run, flat; may be empty.
  """
  plain = {metric_names.key(name): name for name in now}
  entropy = now.get(plain.get("teacher_entropy", ""), math.inf)
  for sign in signs(config):
    if sign.metric not in plain:
      continue
    name = plain[sign.metric]
    value = now[name]
    distance = lambda x, limit=sign.limit: abs(x - limit)
    if not distance(value) <= distance(sign.bound):
      continue
    if sign.certain is not None and not entropy <= sign.certain:
      continue
    if name in start and distance(start[name]) <= distance(value):
      continue
    return (
      f"Collapse: {name} is {value:.4g}, and {sign.limit:.4g} means "
      f"{sign.meaning}: {sign.remedy}."
    )
  return ""
