"""Parts of a training run: setup, state, optimiser and the compiled step."""
