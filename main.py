"""The command line of a source checkout, see attmask_jax/cli.py."""

from attmask_jax import cli

if __name__ == "__main__":
  cli.entry()
