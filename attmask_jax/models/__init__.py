"""Flax modules: the Vision Transformer, its heads, MAE's decoder."""
