"""Average accuracy at any time, in percent."""

import math

import numpy as np

from cl_bench.core.record import Curve


def anytime_average_accuracy(curve: Curve) -> float:
    """AAA = mean_e mean_{j<=k(e)} A[e][j]: evaluation e takes place while task k(e) is learned, or right after it.

    Source: the measure that Caccia et al. 2022 (ER-ACE) report, by its name in Soutif-Cormerais et al. 2023. Their
    released code averages the accuracy on the stream of tasks seen over the evaluations; with tasks of equal size this
    is the same. nan if a task seen was not answered at one of the evaluations.
    """
    accuracy = curve.accuracy
    rows = [accuracy[e, : task + 1].mean() for e, task in enumerate(curve.learning)]
    return float(np.mean(rows)) if rows else math.nan
