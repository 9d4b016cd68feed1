"""Agreement of prototype assignments with class labels.

Source: the per-epoch scores of train_one_epoch in AttMask main_attmask.py, and
its stand-alone evaluation of unsupervised classification.
"""

import numpy as np


def cluster_scores(
  labels: np.ndarray, assignments: np.ndarray
) -> dict[str, float]:
  """Agreement of two partitions, which may differ in their number of parts.

  Args:
    labels: [n] int, class of each image, < 0 = none: the row is ignored.
    assignments: [n] int, cluster (arg-max prototype) of each image.

  Returns:
    nmi: normalised mutual information, arithmetic mean, 0 to 1.
    ari: adjusted Rand index, -0.5 to 1, 0 by chance.
    fscore: Fowlkes-Mallows index, 0 to 1.
    Empty when no row has a label.
  """
  from sklearn import metrics  # slow import, only needed here

  labels, assignments = _labelled(labels, assignments)
  if not len(labels):
    return {}
  return {
    "nmi": float(metrics.normalized_mutual_info_score(labels, assignments)),
    "ari": float(metrics.adjusted_rand_score(labels, assignments)),
    "fscore": float(metrics.fowlkes_mallows_score(labels, assignments)),
  }


def hungarian_accuracy(labels: np.ndarray, assignments: np.ndarray) -> float:
  """Accuracy, 0 to 1, under the best one-to-one map of clusters to classes.

  Images of a cluster that gets no class count as wrong.

  Args:
    labels: [n] int, < 0 = none: the row is ignored.
    assignments: [n] int.

  Returns:
    The accuracy; nan when no row has a label.
  """
  from scipy import optimize  # slow import, only needed here

  labels, assignments = _labelled(labels, assignments)
  if not len(labels):
    return float("nan")
  classes, row = np.unique(labels, return_inverse=True)
  clusters, column = np.unique(assignments, return_inverse=True)
  counts = np.zeros((len(classes), len(clusters)), np.int64)
  np.add.at(counts, (row, column), 1)
  picks = optimize.linear_sum_assignment(counts, maximize=True)
  return float(counts[picks].sum() / len(labels))


def _labelled(
  labels: np.ndarray, assignments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The rows of labels [n] and assignments [n] that have a label."""
  labels, assignments = np.asarray(labels), np.asarray(assignments)
  known = labels >= 0
  return labels[known], assignments[known]
