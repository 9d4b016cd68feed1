"""Compares mask policies: python -m attmask_jax.study --config=study
--workdir=DIR --minutes=N.

Trains every policy of the config with the same steps and several seeds, each an
ordinary run in DIR/POLICY_SEED, and measures k-NN over the epochs and a linear
probe. The machine is measured first: the minutes decide network, steps and
seeds, see docs/training.md. The same command continues a study that was
stopped; nothing that is finished is repeated.

DIR/study.json holds all numbers, study.md the table and study.png the curves of
the runs that are finished. The last line that is printed says what they
support. --summary writes them again without training anything.

Exit codes: as of attmask-jax.
"""

import pathlib

from absl import app, flags

from attmask_jax import cli
from attmask_jax.errors import InputError

EXAMPLE = "--config=study --workdir=studies/objects --minutes=120"

_MINUTES = flags.DEFINE_float(
  "minutes", None, "Time for the whole study; its plan is made to fit."
)
_SUMMARY = flags.DEFINE_bool(
  "summary", False, "Write the results of what is finished, and end."
)


def main(argv: list[str]) -> int:
  """Runs or continues the study; returns the exit code."""
  from attmask_jax.studies import page, plan, runner  # a wrong flag needs none

  workdir = flags.FLAGS.workdir

  def work() -> None:
    cli.refuse_words(argv)
    config = flags.FLAGS.config
    plan.refuse_own_keys(config, flags.FLAGS["config"].override_values)
    if _SUMMARY.value:
      runner.redraw(workdir)
    elif _MINUTES.value is None:
      raise InputError(f"--minutes is missing, for example: {EXAMPLE}")
    else:
      runner.run(config, workdir, _MINUTES.value)
    print((pathlib.Path(workdir).expanduser() / page.TABLE).read_text(), end="")

  return cli.exit_code(work, workdir)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags; a wrong one ends the program with one sentence."""
  names = ("config", "workdir", "minutes", "summary")
  helps = "\n".join(f"  --{name}: {flags.FLAGS[name].help}" for name in names)
  return cli.parse(argv, usage=f"{__doc__}\nFlags:\n{helps}", example=EXAMPLE)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
