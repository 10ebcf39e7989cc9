"""Area under the ROC curve, from scores instead of predictions: the measure of Yoon et al. (ICLR 2018) for DEN.

For one class against the others it is the probability that an image of the class has a higher score for this class than
an image of another class; ties count half (Hanley and McNeil 1982).
"""

import math

import numpy as np


def one_vs_rest(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the area of each class against the others, in [0, 1].

    Args:
        scores: (N, C), higher for a more likely class.
        labels: (N,) classes.

    Returns:
        nan if a score is nan, or if a class has all images or none.
    """
    if np.isnan(scores).any():
        return math.nan
    return float(np.mean([_compute_area(scores[:, c], labels == c) for c in range(scores.shape[1])]))


def _compute_area(score: np.ndarray, positive: np.ndarray) -> float:
    """Area by the rank sum of the positives; equal scores get their mean rank."""
    hits, misses = int(positive.sum()), int((~positive).sum())
    if not hits or not misses:
        return math.nan
    _, group, count = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[group]
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))
