"""The lowest accuracy of earlier tasks, in percent (De Lange, van de Ven and Tuytelaars, ICLR 2023)."""

import math

import numpy as np

from cl_bench.core.record import Curve
from cl_bench.metrics.base import find_minima


def minimum_accuracy(curve: Curve) -> float:
    """min-ACC = mean_{j<T-1} min_{e: k(e)>j} A[e][j], k(e) the task that is learned at evaluation e; nan for T = 1.

    The minimum of a task begins after the last step of the task, as in the paper and in the authors' code.
    """
    minima = find_minima(curve)
    return float(np.mean(minima)) if len(minima) else math.nan
