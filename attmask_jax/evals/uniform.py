"""Attention that hardly differs between patches.

A colour scale from the least to the most attended patch would magnify its
rounding: pictures draw it pale and say so.
"""

import numpy as np

# Nats below log N. Such attention varies by at most about 14 % of its mean
# (standard deviation): the deficit is half the squared relative deviation.
TOLERANCE = 0.01
CAPTION = "Numbers: ends of the colour scale, 1 = uniform attention."
CAPTION_UNIFORM = f"Pale: uniform, entropy within {TOLERANCE:g} nats of log N."


def entropy(attention: np.ndarray) -> float:
  """Entropy in nats of attention [N] scaled to sum 1: 0 to log N."""
  p = np.asarray(attention, np.float64)
  p = p[p > 0] / p.sum()
  return float(-(p * np.log(p)).sum())


def is_uniform(attention: np.ndarray) -> bool:
  """Whether attention [...], >= 0, is the same everywhere but for noise.

  So is attention that is 0 everywhere.
  """
  flat = np.asarray(attention, np.float64).ravel()
  if not flat.any():
    return True
  return bool(np.log(flat.size) - entropy(flat) < TOLERANCE)


def ends(attention: np.ndarray) -> str:
  """Least and greatest attention as multiples of uniform: "0.4–2.5"."""
  flat = np.asarray(attention, np.float64).ravel()
  if not flat.any():
    return "0"
  low, high = flat.min() / flat.mean(), flat.max() / flat.mean()
  text = f"{low:.2f}–{high:.2f}"
  return f"uniform, {text}" if is_uniform(flat) else text


def caption(*maps: np.ndarray) -> str:
  """What the numbers and the pale maps of a figure mean."""
  pale = any(is_uniform(attention) for attention in maps)
  return f"{CAPTION} {CAPTION_UNIFORM}" if pale else CAPTION
