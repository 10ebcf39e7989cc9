"""What several metrics of a curve share."""

import math

import numpy as np

from cl_bench.core.record import Curve


def find_minima(curve: Curve) -> np.ndarray:
    """(T - 1,) the lowest accuracy of each earlier task at the evaluations after the task was learned.

    These are the evaluations while a later task is learned, and right after it. nan if one of them has no answer.
    """
    accuracy, learning = curve.accuracy, np.array(curve.learning)
    later = [accuracy[learning > task, task] for task in range(curve.num_tasks - 1)]
    return np.array([values.min() if len(values) else math.nan for values in later])
