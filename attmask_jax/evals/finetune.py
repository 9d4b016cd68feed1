"""Fine-tuning: accuracy of a network trained further with all its weights."""

from attmask_jax.evals import linear
from attmask_jax.evals.job import Eval

EVAL = Eval(linear.run, trains=True)
