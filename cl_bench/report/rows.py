"""Rows of finished runs, and rows that differ only in the order of the same tasks.

A row holds runs that differ in nothing but ``seed``: equal experiment, name and fingerprint.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cl_bench.core.errors import ConfigError, require
from cl_bench.metrics.order_robustness import (
    Classes,
    average_order_disparity,
    final_accuracies,
    maximum_order_disparity,
)
from cl_bench.report.folders import LeftOut, scan
from cl_bench.report.labels import make_labels
from cl_bench.report.page import Run
from cl_bench.report.statistics import Stat

MAIN = "class_il.average_accuracy"
"""The number that orders the rows and that the paired tests compare, as ``section.name`` of ``summary.json``."""

FREE = ("method", "backbone", "buffer", "optimizer", "schedule")
"""Groups of settings in which the rows of a comparison differ on purpose."""

ORDER_KEYS = ("scenario.class_order", "scenario.class_order_seed")
"""Settings in which rows may differ if their order robustness is measured."""

DISPARITIES = {"AOPD": average_order_disparity, "MOPD": maximum_order_disparity}
"""Columns of the table of order robustness, in each setting."""


@dataclass(frozen=True)
class Row:
    """Runs that differ only in ``seed``.

    Attributes:
        runs: by seed.
        label: what tells it from the other rows (:func:`~cl_bench.report.labels.make_labels`).
        differs: settings that differ from rows above, with both values; ``reference`` for the first row.
        group: its value of the key that the rows are grouped by.
    """

    runs: list[Run]
    label: str
    differs: str
    group: str = ""
    _stats: dict[str, Stat] = field(default_factory=dict, repr=False, compare=False)

    @property
    def imported(self) -> str:
        """The program and the file of a row that was imported; empty for ours."""
        return self.runs[0].summary.get("imported", "")

    @property
    def seeds(self) -> set[int]:
        """The seeds by which it is paired with other rows: none if it was imported, because they draw other numbers."""
        return set() if self.imported else {run.summary["seed"] for run in self.runs}

    def values(self, key: str) -> pd.Series:
        """One number by seed, without unknown ones; ``key`` is ``section.name`` of ``summary.json``."""
        return pd.Series(self.values_by_seed(key), dtype=float)

    def values_by_seed(self, key: str) -> dict[int, float]:
        """The same as a dictionary."""
        return _collect(self.runs, key)

    def stat(self, key: str) -> Stat:
        """One number over the seeds."""
        if key not in self._stats:
            self._stats[key] = Stat.of(list(_collect(self.runs, key).values()))
        return self._stats[key]

    def stat_minus(self, other: "Row", key: str) -> Stat:
        """This row's number minus the other row's, over the seeds that have it in both."""
        ours, theirs = _collect(self.runs, key), _collect(other.runs, key)
        common = self.seeds & other.seeds
        return Stat.of([value - theirs[seed] for seed, value in ours.items() if seed in theirs and seed in common])

    def mean(self, section: str, name: str) -> float | None:
        """Mean of one number over the seeds that have it."""
        return self.stat(f"{section}.{name}").mean


@dataclass(frozen=True)
class Orders:
    """Runs that differ only in ``seed`` and in the order of the same tasks.

    Attributes:
        label: experiment and name.
        ranks: numbers of their rows in the tables.
        runs: by seed, one entry per order.
    """

    label: str
    ranks: list[int]
    runs: list[dict[int, Run]]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every order was run with."""
        return sorted(set.intersection(*(set(of_order) for of_order in self.runs)))

    def final(self, setting: str, seed: int) -> list[dict[Classes, float]]:
        """Final accuracies of each task, one entry per order."""
        runs = [of_order[seed] for of_order in self.runs]
        return [final_accuracies(run.record.get_matrix(setting), run.summary["tasks"]) for run in runs]

    def stat(self, setting: str, disparity: str) -> Stat:
        """AOPD or MOPD over the seeds in common."""
        values = [DISPARITIES[disparity](self.final(setting, seed)) for seed in self.seeds]
        return Stat.of(pd.Series(values, dtype=float).dropna())


def find_runs(paths: Sequence[str]) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs under ``paths``, each once, and the runs that are not finished."""
    finished: dict[Path, Path] = {}  # resolved path -> path as given: paths may overlap
    unfinished: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        require(
            path.is_dir(),
            "RUN_OR_FOLDER",
            expected="a run folder or a folder of runs",
            got=f"{text!r}, which is {'a file' if path.exists() else 'not there'}",
            fix="Name a folder, e.g. results/.",
        )
        found, begun = scan(path)
        if not found:
            raise _explain_nothing(text, begun)
        for folders, all_folders in ((found, finished), (begun, unfinished)):
            for folder in folders:
                all_folders.setdefault(folder.resolve(), folder)
    return [Run.read(folder) for folder in finished.values()], list(map(LeftOut.of, unfinished.values()))


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs that differ only in ``seed``: best Class-IL accuracy first, unknown accuracy last."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(identify(run), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.summary["seed"])
        for first, second in itertools.pairwise(group):
            _refuse_differences(first, second)
    ordered = sorted(groups.items(), key=lambda item: (-_get_main_mean(item[1]), item[0]))
    labels = make_labels([group[0].summary for _, group in ordered])
    return describe_differences([Row(group, label, "") for label, (_, group) in zip(labels, ordered)])


def describe_differences(rows: Sequence[Row], reference: int = 0) -> list[Row]:
    """The rows, saying how each differs from the reference and from the first row of its experiment and name.

    Imported rows have other settings than ours: they only say where they are from, and are no reference.
    """
    own = [i for i, row in enumerate(rows) if not row.imported]
    reference = reference if reference in own or not own else own[0]
    firsts = {identify(row.runs[0])[:2]: reference for row in rows[reference : reference + 1]}
    described = []
    for i, row in enumerate(rows):
        namesake = firsts.setdefault(identify(row.runs[0])[:2], i)
        differs = row.imported or _describe_differences(rows, i, reference, namesake)
        described.append(replace(row, differs=differs))
    return described


def make_orders(rows: Sequence[Row]) -> list[Orders]:
    """Runs that differ only in seed and in the order of the same tasks, if two orders have a seed in common.

    A task is identified by its set of classes. Rows with two equal tasks are left out, because these could not be told
    apart. If one order was run twice with one seed, the run of the upper row counts.
    """
    groups: dict[tuple[str, str, str], dict[tuple[Classes, ...], list[int]]] = {}
    for rank, row in enumerate(rows, start=1):
        run = row.runs[0]
        tasks = tuple(frozenset(task) for task in run.summary["tasks"])
        if len(set(tasks)) == len(tasks):
            alike = {key: value for key, value in get_settings(run).items() if key not in ORDER_KEYS}
            same = json.dumps([alike, sorted(map(sorted, tasks))], sort_keys=True)
            groups.setdefault((*identify(run)[:2], same), {}).setdefault(tasks, []).append(rank)
    found = []
    for (experiment, name, _), orders in groups.items():
        runs = [
            {run.summary["seed"]: run for rank in reversed(ranks) for run in rows[rank - 1].runs}
            for ranks in orders.values()
        ]
        found.append(Orders(f"{experiment}/{name}", sorted(itertools.chain(*orders.values())), runs))
    return [orders for orders in found if len(orders.runs) > 1 and orders.seeds]


def identify(run: Run) -> tuple[str, str, str]:
    """Experiment, name and fingerprint: what the runs of a row have in common."""
    return run.summary["experiment"], run.summary["name"], run.summary["fingerprint"]


def get_settings(run: Run) -> dict[str, Any]:
    """The settings by which the run is compared with others: flat keys and values."""
    return run.summary["comparable"] | {key: run.summary[key] for key in ("scale", "evaluate_on")}


def find_differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Keys with different values, sorted."""
    missing = object()
    keys = sorted(first.keys() | second.keys())
    return [key for key in keys if first.get(key, missing) != second.get(key, missing)]


def _explain_nothing(text: str, unfinished: Sequence[Path]) -> ConfigError:
    got = f"{len(unfinished)} unfinished, the first being {unfinished[0]}" if unfinished else "no run at all"
    fix = "Finish it: the same command resumes it." if unfinished else "Name the folder of a run."
    return ConfigError("RUN_OR_FOLDER", expected=f"a finished run (summary.json) in {text!r}", got=got, fix=fix)


def _refuse_differences(first: Run, second: Run) -> None:
    """Refuse two runs of a row with the same seed, or with other differences than the seed."""
    folders = f"{first.folder} and {second.folder}"
    require(
        first.summary["seed"] != second.summary["seed"],
        "seed",
        expected="each seed of a row once",
        got=f"seed {first.summary['seed']} in both {folders}",
        fix="Leave one of them out.",
    )
    both = (first.summary, second.summary)
    by_seed = all(summary.get("follows_seed") for summary in both)  # the seed draws their tasks
    identical = ("class_names", "data") if by_seed else ("class_order", "tasks", "class_names", "data")
    kept = [key for key in identical if all(key in summary for summary in both)]
    keys = find_differences(
        get_settings(first) | {key: first.summary[key] for key in kept},
        get_settings(second) | {key: second.summary[key] for key in kept},
    )
    names = [_list_missing_classes(*pair) for pair in (both, both[::-1])] if "class_names" in keys else []
    require(
        not keys,
        "fingerprint",
        expected="runs with one fingerprint to differ only in their seed",
        got=f"{', '.join(keys)} in {folders}{''.join(names)}",
        fix="Leave one of them out, or run it again with overwrite=true.",
    )


def _list_missing_classes(summary: dict[str, Any], other: dict[str, Any]) -> str:
    """The classes that only the first run has, as a part of a message."""
    names = [name for name in summary["class_names"] if name not in other["class_names"]]
    return f"; of one only: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


def _collect(runs: Sequence[Run], key: str) -> dict[int, float]:
    """Seed -> value, without unknown ones."""
    section, name = key.split(".")
    values = {run.summary["seed"]: run.value(section, name) for run in runs}
    return {seed: float(value) for seed, value in values.items() if value is not None}


def _get_main_mean(runs: Sequence[Run]) -> float:
    mean = Stat.of(list(_collect(runs, MAIN).values())).mean
    return -np.inf if mean is None else mean


def _describe_differences(rows: Sequence[Row], this: int, reference: int, namesake: int) -> str:
    if this == reference:
        return "reference"
    run = rows[this].runs[0]
    parts = []
    if namesake != reference:
        first = rows[reference].runs[0]
        keys = find_differences(get_settings(first), get_settings(run))
        parts = _format_both_values([key for key in keys if not _is_free(key)], run, first, reference + 1)
    if namesake != this:
        other, rank = rows[namesake].runs[0], namesake + 1
        keys = find_differences(get_settings(other), get_settings(run))
        unlisted = [f"row {rank}: in the fingerprint, though in no listed key"]
        parts += _format_both_values(keys, run, other, rank) or unlisted
    return "; ".join(parts) or "-"


def _is_free(key: str) -> bool:
    return key.split(".")[0] in FREE


def _format_both_values(keys: Sequence[str], run: Run, other: Run, rank: int) -> list[str]:
    """One text with the other's row and, for each key, the run's value and (in brackets) the other's."""
    mine, theirs = get_settings(run), get_settings(other)
    said = ", ".join(f"{key} = {_shorten(mine, theirs, key)} ({_shorten(theirs, mine, key)})" for key in keys)
    return [f"row {rank}: {said}"] if keys else []


def _shorten(values: dict[str, Any], others: dict[str, Any], key: str) -> str:
    """A value in at most 40 characters, from shortly before the position where it differs from the other one."""
    if key not in values:
        return "absent"
    text, other = json.dumps(values[key]), json.dumps(others.get(key))
    if len(text) <= 40:
        return text
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other)))
    start = max(0, same - 10)
    return ("…" if start else "") + text[start : start + 38] + ("…" if start + 38 < len(text) else "")
