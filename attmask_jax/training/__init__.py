"""What a training run is made of: its parts, the state, the compiled step."""
