"""Transfer between tasks, in percentage points (Lopez-Paz and Ranzato 2017, GEM)."""

import math

import numpy as np

from cl_bench.core.record import Matrix
from cl_bench.metrics.base import compare_before_and_after


@compare_before_and_after
def backward_transfer(matrix: Matrix) -> float:
    """mean_{j<T-1} ( R[T-1][j] - R[j][j] ); nan for T = 1."""
    accuracy, last = matrix.accuracy, matrix.num_tasks - 1
    return float(np.mean((accuracy[last] - accuracy.diagonal())[:last])) if last else math.nan


@compare_before_and_after
def forward_transfer(matrix: Matrix) -> float:
    """mean_{j>=1} ( R[j-1][j] - b[j] ), b = accuracy of the untrained network; nan for T = 1 and in Class-IL."""
    accuracy, baseline = matrix.accuracy, matrix.baseline
    if matrix.num_tasks == 1:
        return math.nan
    return float(np.mean([accuracy[j - 1, j] - baseline[j] for j in range(1, matrix.num_tasks)]))
