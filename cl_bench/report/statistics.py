"""Statistics over the seeds of a row, and paired tests between rows."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.stats

MIN_SEEDS = 3
"""Rows with fewer seeds in common are not tested."""


@dataclass(frozen=True)
class Stat:
    """A number over the seeds of a row; None where it is not defined.

    Attributes:
        n: number of seeds that have it.
        mean, std: mean and sample standard deviation (ddof = 1).
        ci95: half width of the 95 % confidence interval of the mean (Student's t).
    """

    n: int
    mean: float | None
    std: float | None
    ci95: float | None

    @classmethod
    def of(cls, values: Sequence[float] | pd.Series) -> "Stat":
        """The statistics of the values of a row's seeds."""
        array = np.asarray(values, dtype=float)
        n = len(array)
        if n < 2:
            return cls(n, float(array[0]) if n else None, None, None)
        std = float(array.std(ddof=1))
        return cls(n, float(array.mean()), std, _get_quantile(n - 1) * std / n**0.5)


@functools.cache
def _get_quantile(freedom: int) -> float:
    return float(scipy.stats.t.ppf(0.975, freedom))


def run_paired_tests(rows: Sequence[tuple[str, pd.Series]], reference: int | None = None) -> pd.DataFrame:
    """Paired t-tests between all rows that have at least 3 seeds in common.

    Args:
        rows: label and values by seed.
        reference: the row with which every other row is compared; None compares each with each.

    Returns:
        One line per pair: ``first``, ``second``, ``seeds``, ``mean_difference`` (first minus second),
        ``ci95_low``, ``ci95_high``, ``p``, ``p_holm`` (over all lines; nan where every seed has the same difference).
    """
    lines = []
    others = [row for i, row in enumerate(rows) if i != reference]
    tested = itertools.combinations(rows, 2) if reference is None else zip(others, itertools.repeat(rows[reference]))
    for (first, its_values), (second, other_values) in tested:
        both = pd.concat([its_values, other_values], axis=1, join="inner")
        if len(both) >= MIN_SEEDS:
            lines.append({"first": first, "second": second, **run_paired_test(both)})
    names = ["first", "second", "seeds", "mean_difference", "ci95_low", "ci95_high", "p"]
    pairs = pd.DataFrame(lines, columns=names)
    return pairs.assign(p_holm=correct_by_holm(pairs["p"].astype(float)))


def run_paired_test(both: pd.DataFrame) -> dict[str, float]:
    """Paired t-test of the first column against the second: ``seeds``, ``mean_difference``, ``ci95_*``, ``p``."""
    difference = both.iloc[:, 0] - both.iloc[:, 1]
    mean = float(difference.mean())
    line = {"seeds": len(both), "mean_difference": mean}
    if np.ptp(difference) < 1e-9:  # all seeds differ by the same amount, so t is infinite or undefined
        return line | {"ci95_low": mean, "ci95_high": mean, "p": np.nan}
    test = scipy.stats.ttest_rel(both.iloc[:, 0], both.iloc[:, 1])
    low, high = test.confidence_interval(0.95)
    return line | {"ci95_low": float(low), "ci95_high": float(high), "p": float(test.pvalue)}


def correct_by_holm(p: pd.Series) -> pd.Series:
    """p-values corrected for the number of tests (Holm 1979); nan stays nan and is not counted."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).reindex(p.index)
