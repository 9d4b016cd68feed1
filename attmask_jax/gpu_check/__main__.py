"""python -m attmask_jax.gpu_check, see command.py."""

import sys

from attmask_jax.gpu_check import command

sys.exit(command.main())
