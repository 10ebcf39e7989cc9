"""Forgetting, in percentage points; larger is worse."""

import math
from collections.abc import Callable

import numpy as np

from cl_bench.core.record import Matrix
from cl_bench.metrics.base import compare_before_and_after


def forgetting(matrix: Matrix) -> float:
    """mean_{j<T-1} ( max_{j<=l<T-1} R[l][j] - R[T-1][j] ) (Chaudhry et al. 2018); may be negative; nan for T = 1."""
    return _compute_mean_drop(matrix, lambda column, j: column[j:-1].max())


@compare_before_and_after
def forgetting_first_last(matrix: Matrix) -> float:
    """mean_{j<T-1} ( R[j][j] - R[T-1][j] ), as Avalanche reports it; nan for T = 1."""
    return _compute_mean_drop(matrix, lambda column, j: column[j])


def forgetting_clipped(matrix: Matrix) -> float:
    """mean_{j<T-1} ( max_l R[l][j] - R[T-1][j] ), last row included, as Mammoth and PyCIL report it: never negative."""
    return _compute_mean_drop(matrix, lambda column, j: column[j:].max())


def _compute_mean_drop(matrix: Matrix, best: Callable[[np.ndarray, int], float]) -> float:
    accuracy, last = matrix.accuracy, matrix.num_tasks - 1
    if last == 0:
        return math.nan
    return float(np.mean([best(accuracy[:, j], j) - accuracy[last, j] for j in range(last)]))
