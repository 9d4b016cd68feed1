"""Trained weights: loading, start values, import and export."""
