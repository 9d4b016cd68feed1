"""Networks: the Vision Transformer, its heads, MAE's decoder; flax modules."""
