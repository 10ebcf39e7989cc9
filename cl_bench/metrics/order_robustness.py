"""Robustness to the order of the tasks, in percentage points; smaller is better (Yoon et al., ICLR 2020, section 4).

They compare R runs that differ only in the order of the same tasks. A task is identified by its set of classes, not by
its position.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cl_bench.core.record import Matrix

Classes = frozenset[int]
"""A task: the class ids of the data set."""


def final_accuracies(matrix: Matrix, tasks: Sequence[Collection[int]]) -> dict[Classes, float]:
    """P_t: accuracy on each task after the last one; ``tasks`` are the class ids of the matrix's tasks, in order."""
    return {frozenset(task): float(p) for task, p in zip(tasks, matrix.accuracy[-1], strict=True)}


def order_disparity(runs: Sequence[Mapping[Classes, float]]) -> dict[Classes, float]:
    """OPD_t = max_r P_t^(r) - min_r P_t^(r) of each task, over the runs r; nan if a run has no accuracy on the task.

    Args:
        runs: :func:`final_accuracies` of two or more runs of the same tasks.
    """
    if len(runs) < 2 or any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("order disparity is defined for two or more runs of the same tasks")
    return {task: float(np.ptp([run[task] for run in runs])) for task in runs[0]}


def average_order_disparity(runs: Sequence[Mapping[Classes, float]]) -> float:
    """AOPD: mean of OPD_t over the tasks."""
    return float(np.mean(list(order_disparity(runs).values())))


def maximum_order_disparity(runs: Sequence[Mapping[Classes, float]]) -> float:
    """MOPD: maximum of OPD_t over the tasks."""
    return float(np.max(list(order_disparity(runs).values())))
