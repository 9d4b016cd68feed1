"""The run directory: checkpoints, metrics, progress, report."""
