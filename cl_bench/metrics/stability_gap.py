"""The stability gap, in percentage points; larger is worse.

De Lange, van de Ven and Tuytelaars (ICLR 2023) name the gap: when a new task begins, the accuracy of the earlier tasks
drops, and recovers while the task is learned. They show it in curves and give no formula for it alone; min-ACC contains
it together with what is not recovered. The formula here is ours.
"""

import math

import numpy as np

from cl_bench.core.record import Curve


def stability_gap(curve: Curve) -> float:
    """mean_{k>=1} mean_{j<k} ( min(before, after) - lowest ); never negative; nan for T = 1.

    ``before`` is A[e][j] at the last evaluation before task k, ``after`` at the last one of task k, and ``lowest`` is
    the lowest value from the one to the other. A drop that does not recover is forgetting and does not count.
    """
    accuracy, learning = curve.accuracy, np.array(curve.learning)
    gaps = []
    for task in range(1, curve.num_tasks):
        during = np.flatnonzero(learning == task)
        if not len(during) or not during[0]:
            return math.nan
        values = accuracy[during[0] - 1 : during[-1] + 1, :task]
        gaps.append((np.minimum(values[0], values[-1]) - values.min(axis=0)).mean())
    return float(np.mean(gaps)) if gaps else math.nan
