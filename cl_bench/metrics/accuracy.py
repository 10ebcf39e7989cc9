"""Accuracies, in percent."""

import math

import numpy as np

from cl_bench.core.record import Matrix
from cl_bench.metrics.base import compare_before_and_after


def average_accuracy(matrix: Matrix) -> float:
    """Mean over tasks after the last task, macro: mean_j R[T-1][j] (Lopez-Paz and Ranzato 2017, ACC)."""
    return float(matrix.accuracy[-1].mean())


def average_incremental_accuracy(matrix: Matrix) -> float:
    """Mean over the rows of the macro accuracy on the tasks seen: mean_i mean_{j<=i} R[i][j] (Rebuffi et al. 2017)."""
    accuracy = matrix.accuracy
    return float(np.mean([accuracy[i, : i + 1].mean() for i in range(matrix.num_tasks)]))


def average_incremental_accuracy_micro(matrix: Matrix) -> float:
    """The same, weighted by test images: mean_i (correct predictions on tasks 0..i) / (images of tasks 0..i)."""
    if not matrix.count.all():
        return math.nan
    rows = [matrix.correct[i, : i + 1].sum() / matrix.count[: i + 1].sum() for i in range(matrix.num_tasks)]
    return float(100.0 * np.mean(rows))


@compare_before_and_after
def learning_accuracy(matrix: Matrix) -> float:
    """Accuracy on each task right after learning it: mean_j R[j][j] (Riemer et al. 2019)."""
    return float(matrix.accuracy.diagonal().mean())
