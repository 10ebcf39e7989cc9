"""The worst case of the average accuracy, in percent (De Lange, van de Ven and Tuytelaars, ICLR 2023)."""

import numpy as np

from cl_bench.core.record import Curve
from cl_bench.metrics.base import find_minima


def worst_case_accuracy(curve: Curve) -> float:
    """WC-ACC = 1/T A[last][T-1] + (1 - 1/T) min-ACC: the last task at the end, the earlier ones at their lowest."""
    return float(np.mean([*find_minima(curve), curve.accuracy[-1, -1]]))
