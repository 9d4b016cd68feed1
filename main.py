"""Command line: python main.py --config=configs/NAME.py --workdir=DIR."""

import logging as python_logging

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with its argument after a colon.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
flags.mark_flags_as_required(["config", "workdir"])

def main(argv):
  import jax
  from attmask_jax import train
  config = _CONFIG.value
  jax.config.update("jax_default_matmul_precision", config.run.matmul_precision)
  for h in python_logging.root.handlers + [logging.get_absl_handler()]:
    h.addFilter(lambda r: r.levelno >= 30 or "orbax" not in r.pathname)
  train.train(config, _WORKDIR.value)

if __name__ == "__main__":
  app.run(main)
