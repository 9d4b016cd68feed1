"""The command line of a source checkout, see attmask_jax/cli.py."""

from absl import app

from attmask_jax import cli

if __name__ == "__main__":
  app.run(cli.main, flags_parser=cli.parse)
