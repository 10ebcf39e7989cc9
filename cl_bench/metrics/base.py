"""What several metrics share."""

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from cl_bench.core.record import Curve

RECURRING = "a class has training images in several tasks"
"""Why a metric is null in a blurry stream, or where classes come back."""

Metric = TypeVar("Metric", bound=Callable[..., float])


def compare_before_and_after(metric: Metric) -> Metric:
    """Mark a metric that compares the accuracies before and after all images of a task.

    It is not defined if images of the task come in several tasks.
    """
    metric.disjoint_tasks = True  # type: ignore[attr-defined]
    return metric


def is_defined(metric: Callable[..., float], recurring: bool) -> bool:
    """Whether a metric is defined in a scenario; ``recurring``: its tasks share classes."""
    return not (recurring and getattr(metric, "disjoint_tasks", False))


def find_minima(curve: Curve) -> np.ndarray:
    """(T - 1,) the lowest accuracy of each earlier task at the evaluations after the task was learned.

    These are the evaluations while a later task is learned, and right after it. nan if one of them has no answer.
    """
    accuracy, learning = curve.accuracy, np.array(curve.learning)
    later = [accuracy[learning > task, task] for task in range(curve.num_tasks - 1)]
    return np.array([values.min() if len(values) else math.nan for values in later])
