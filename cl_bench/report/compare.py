"""Comparison of finished runs: rows over seeds, paired tests, published numbers, pictures, one page.

A row holds runs that differ in nothing but ``seed``: equal experiment, name and fingerprint. Rows that differ in
nothing but the order of the same tasks are also held against each other: their order robustness.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rich.box
import scipy.stats
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cl_bench.core.errors import ConfigError, require
from cl_bench.core.record import SETTINGS, TITLES
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.metrics.order_robustness import (
    Classes,
    average_order_disparity,
    final_accuracies,
    maximum_order_disparity,
    order_disparity,
)
from cl_bench.report import plots
from cl_bench.report.page import Picture, Run, Verdict, number, render, signed, verdicts

MAIN = "class_il.average_accuracy"
"""The number that orders the rows and that the paired tests look at, as ``section.name`` of ``summary.json``."""

MIN_SEEDS = 3
"""A pair of rows with fewer seeds in common is not tested."""

FREE = ("method", "backbone", "buffer", "optimizer", "schedule")
"""Groups of settings in which the rows of a comparison are meant to differ."""


ORDER_KEYS = ("scenario.class_order", "scenario.class_order_seed")
"""Settings in which rows may differ whose order robustness is measured."""

DISPARITIES = {"AOPD": average_order_disparity, "MOPD": maximum_order_disparity}
"""Columns of the table of order robustness, in each setting."""


@dataclass(frozen=True)
class Column:
    """A number of the tables: where it stands in ``summary.json``, how its column is called and written."""

    key: str
    title: str
    unit: float = 1.0
    decimals: int = 2


ACCURACIES = (
    Column(MAIN, "Class-IL accuracy [%]"),
    Column("class_il.average_incremental_accuracy", "Class-IL avg. incremental [%]"),
    Column("class_il.forgetting", "Class-IL forgetting [points]"),
    Column("task_il.average_accuracy", "Task-IL accuracy [%]"),
    Column("task_il.forgetting", "Task-IL forgetting [points]"),
)
"""Columns of the first table."""

COSTS = (
    Column("cost.parameters", "parameters [millions]", unit=1e6, decimals=3),
    Column("cost.buffer_bytes", "buffer [MiB]", unit=2.0**20),
    Column("cost.method_bytes", "masks and copies [MiB]", unit=2.0**20),
    Column("cost.train_seconds", "training [s]", decimals=1),
    Column("cost.images_per_second", "images/s", decimals=1),
    Column("cost.peak_memory_bytes", "peak memory [MiB]", unit=2.0**20, decimals=0),
    Column("cost.energy_joules", "energy [kJ]", unit=1e3, decimals=1),
)
"""Columns of the table of costs."""


@dataclass(frozen=True)
class Stat:
    """A number over the seeds of a row; None where it is not defined.

    Attributes:
        n: seeds that have the number.
        mean, std: mean and sample standard deviation (ddof = 1).
        ci95: half width of the 95 % confidence interval of the mean (Student's t).
    """

    n: int
    mean: float | None
    std: float | None
    ci95: float | None

    @classmethod
    def of(cls, values: pd.Series) -> "Stat":
        """The statistics of the values of a row's seeds."""
        n = len(values)
        if n < 2:
            return cls(n, float(values.iloc[0]) if n else None, None, None)
        std = float(values.std(ddof=1))
        return cls(n, float(values.mean()), std, float(scipy.stats.t.ppf(0.975, n - 1)) * std / n**0.5)

    def text(self, column: Column, interval: bool) -> str:
        """``mean ± std (n)``, with the confidence interval on a second line if asked for; empty without a value."""
        if self.mean is None:
            return ""
        mean, std, ci95 = (_scaled(value, column) for value in (self.mean, self.std, self.ci95))
        text = f"{mean} ± {std} ({self.n})" if std else f"{mean} ({self.n})"
        return f"{text}\n95 % ± {ci95}" if interval and ci95 else text


@dataclass(frozen=True)
class Row:
    """Runs that differ only in ``seed``.

    Attributes:
        runs: by seed.
        label: the shortest name that no other row has.
        differs: settings that make this row unlike rows above it, with both values; ``reference`` for the first row.
    """

    runs: list[Run]
    label: str
    differs: str

    def values(self, key: str) -> pd.Series:
        """One number by seed, ``key`` being ``section.name`` of ``summary.json``; unknown ones are left out."""
        return _values(self.runs, key)

    def stat(self, key: str) -> Stat:
        """One number over the seeds."""
        return Stat.of(self.values(key))

    def mean(self, section: str, name: str) -> float | None:
        """Mean of one number over the seeds that have it."""
        return self.stat(f"{section}.{name}").mean


@dataclass(frozen=True)
class Orders:
    """Runs that differ only in ``seed`` and in the order of the same tasks.

    Attributes:
        label: experiment and name.
        places: of their rows in the tables.
        runs: by seed, an entry an order.
    """

    label: str
    places: list[int]
    runs: list[dict[int, Run]]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every order was run with."""
        return sorted(set.intersection(*(set(of_order) for of_order in self.runs)))

    def final(self, setting: str, seed: int) -> list[dict[Classes, float]]:
        """Final accuracies of each task, an entry an order."""
        runs = [of_order[seed] for of_order in self.runs]
        return [final_accuracies(run.record.get_matrix(setting), run.summary["tasks"]) for run in runs]

    def stat(self, setting: str, disparity: str) -> Stat:
        """AOPD or MOPD over the seeds in common."""
        values = [DISPARITIES[disparity](self.final(setting, seed)) for seed in self.seeds]
        return Stat.of(pd.Series(values, dtype=float).dropna())


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        rows: best Class-IL accuracy first.
        orders: runs whose order robustness can be told.
        pairs: paired tests, a line a pair of rows with enough seeds in common.
        published: label of the row and published number beside the row's mean.
        unfinished: run folders that were left out.
    """

    rows: list[Row]
    orders: list[Orders]
    pairs: pd.DataFrame
    published: list[tuple[str, Verdict]]
    unfinished: list[Path]


@dataclass(frozen=True)
class Table:
    """A table as text, for the terminal, Markdown and HTML alike.

    Attributes:
        title, note: what it shows, and how to read it.
        header: names of its columns.
        lines: its cells.
        numbers: columns to align to the right.
    """

    title: str
    note: str
    header: list[str]
    lines: list[list[str]]
    numbers: Sequence[int]


def compare(paths: Sequence[str]) -> Comparison:
    """Compare every finished run under ``paths``, each a run folder or a folder of them."""
    runs, unfinished = find_runs(paths)
    rows = make_rows(runs)
    published = [(row.label, verdict) for row in rows for verdict in verdicts(row.runs[0], row.mean)]
    return Comparison(rows, make_orders(rows), paired_tests(rows), published, unfinished)


def find_runs(paths: Sequence[str]) -> tuple[list[Run], list[Path]]:
    """The finished runs under ``paths``, each once, and the folders of the unfinished ones."""
    finished: dict[Path, Path] = {}  # resolved -> as reached first: paths may overlap
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
        found, begun = _scan(path)
        if not found:
            raise _nothing_in(text, begun)
        finished |= {folder.resolve(): folder for folder in found if folder.resolve() not in finished}
        unfinished |= {folder.resolve(): folder for folder in begun if folder.resolve() not in unfinished}
    return [Run.read(folder) for folder in finished.values()], list(unfinished.values())


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs that differ only in ``seed``, best Class-IL accuracy first, unknown accuracy last."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault(_identity(run), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.summary["seed"])
        for first, second in itertools.pairwise(group):
            _refuse_unlike(first, second)
    ordered = sorted(groups.items(), key=lambda item: (-_main_mean(item[1]), item[0]))
    labels = _labels([identity for identity, _ in ordered])
    members = [group for _, group in ordered]
    return [Row(group, labels[i], _differs(members, i)) for i, group in enumerate(members)]


def make_orders(rows: Sequence[Row]) -> list[Orders]:
    """Runs that differ only in seed and in the order of the same tasks, where two orders have a seed in common.

    A task is known by its set of classes; rows whose tasks share classes are left out, since they could not be told
    apart. Where one order was run twice with one seed, the run of the upper row counts.
    """
    groups: dict[tuple[str, str, str], dict[tuple[Classes, ...], list[int]]] = {}
    for place, row in enumerate(rows, start=1):
        run = row.runs[0]
        tasks = tuple(frozenset(task) for task in run.summary["tasks"])
        if len(set(tasks)) == len(tasks):
            alike = {key: value for key, value in settings(run).items() if key not in ORDER_KEYS}
            same = json.dumps([alike, sorted(map(sorted, tasks))], sort_keys=True)
            groups.setdefault((*_identity(run)[:2], same), {}).setdefault(tasks, []).append(place)
    found = []
    for (experiment, name, _), orders in groups.items():
        runs = [
            {run.summary["seed"]: run for place in reversed(places) for run in rows[place - 1].runs}
            for places in orders.values()
        ]
        found.append(Orders(f"{experiment}/{name}", sorted(itertools.chain(*orders.values())), runs))
    return [orders for orders in found if len(orders.runs) > 1 and orders.seeds]


def paired_tests(rows: Sequence[Row]) -> pd.DataFrame:
    """Paired t-tests on Class-IL average accuracy between rows with at least 3 seeds in common.

    Returns:
        A line a pair: ``first``, ``second``, ``seeds``, ``mean_difference`` (first minus second, percentage points),
        ``ci95_low``, ``ci95_high``, ``p``, ``p_holm`` (over all lines; nan where every seed has the same difference).
    """
    lines = []
    for first, second in itertools.combinations(rows, 2):
        both = pd.concat([first.values(MAIN), second.values(MAIN)], axis=1, join="inner")
        if len(both) >= MIN_SEEDS:
            lines.append({"first": first.label, "second": second.label, **paired_test(both)})
    names = ["first", "second", "seeds", "mean_difference", "ci95_low", "ci95_high", "p"]
    pairs = pd.DataFrame(lines, columns=names)
    return pairs.assign(p_holm=holm(pairs["p"].astype(float)))


def holm(p: pd.Series) -> pd.Series:
    """p-values corrected for the number of tests (Holm 1979); nan stays nan and is not counted."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0).reindex(p.index)


def show(comparison: Comparison) -> None:
    """Print the comparison on standard output."""
    show_tables(tables(comparison, interval=True), _notes(comparison))


def show_tables(shown: Sequence[Table], notes: Sequence[str]) -> None:
    """Print tables, and notes below them."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width of its own, and the usual 80 would break every cell
        console = Console(highlight=False, width=180)
    for table in shown:
        console.print(_for_terminal(table))
        console.print(Text(table.note, style="dim"), end="\n\n")
    for line in notes:
        console.print(Text(line))


def write(comparison: Comparison, out: Path, command: str) -> None:
    """Write ``table.md``, ``table.csv``, ``pairs.csv``, the pictures and ``compare.html`` into the folder ``out``.

    Also ``orders.csv`` where rows differ in nothing but the order of their tasks.

    Args:
        comparison: what to write.
        out: made if missing.
        command: the command as typed; the written files name it, and no date, so that it gives the same bytes again.
    """
    require(not out.is_file(), "--out", expected="a folder", got=f"{str(out)!r}, a file", fix="Name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    pictures = dict(_pictures(comparison))
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture.png)
    _frame(comparison.rows).to_csv(out / "table.csv", index=False, lineterminator="\n")
    comparison.pairs.to_csv(out / "pairs.csv", index=False, lineterminator="\n")
    if comparison.orders:
        _orders_frame(comparison.orders).to_csv(out / "orders.csv", index=False, lineterminator="\n")
    (out / "table.md").write_text(_markdown(comparison, command), encoding="utf-8")
    page = render(
        "compare.html.j2",
        runs=sum(len(row.runs) for row in comparison.rows),
        rows=len(comparison.rows),
        command=command,
        tables=tables(comparison, interval=True),
        notes=_notes(comparison),
        pictures=pictures.values(),
    )
    (out / "compare.html").write_text(page, encoding="utf-8")


def tables(comparison: Comparison, interval: bool) -> list[Table]:
    """The tables of a comparison; with ``interval``, a second line in each cell holds its confidence interval."""
    shown = [
        _accuracy_table(comparison, interval),
        _stat_table(comparison, "Cost", COSTS, interval),
    ]
    if comparison.orders:
        shown.append(_orders_table(comparison, interval))
    if comparison.published:
        shown.append(_published_table(comparison))
    if len(comparison.pairs):
        shown.append(_pairs_table(comparison))
    return shown


def _scan(path: Path) -> tuple[list[Path], list[Path]]:
    """Folders of finished runs and of begun ones at or below ``path``, in order."""
    finished = sorted(file.parent for file in path.rglob("summary.json"))
    begun = sorted(file.parent for file in path.rglob("env.json") if (file.parent / "config.yaml").is_file())
    return finished, [folder for folder in begun if folder not in finished]


def _nothing_in(text: str, unfinished: Sequence[Path]) -> ConfigError:
    got = f"{len(unfinished)} unfinished, the first being {unfinished[0]}" if unfinished else "no run at all"
    fix = "Finish it: the same command goes on where it stopped." if unfinished else "Name the folder of a run."
    return ConfigError("RUN_OR_FOLDER", expected=f"a finished run (summary.json) in {text!r}", got=got, fix=fix)


def _identity(run: Run) -> tuple[str, str, str]:
    return run.summary["experiment"], run.summary["name"], run.summary["fingerprint"]


def _refuse_unlike(first: Run, second: Run) -> None:
    """The runs of a row are one each seed and alike in all else, whatever their fingerprints say."""
    folders = f"{first.folder} and {second.folder}"
    require(
        first.summary["seed"] != second.summary["seed"],
        "seed",
        expected="each seed of a row once",
        got=f"seed {first.summary['seed']} in both {folders}",
        fix="Leave one of them out.",
    )
    both = (first.summary, second.summary)
    kept = [key for key in ("class_order", "tasks", "class_names", "data") if all(key in summary for summary in both)]
    keys = unlike(
        settings(first) | {key: first.summary[key] for key in kept},
        settings(second) | {key: second.summary[key] for key in kept},
    )
    names = [_only(*pair) for pair in (both, both[::-1])] if "class_names" in keys else []
    require(
        not keys,
        "fingerprint",
        expected="runs with one fingerprint to differ only in their seed",
        got=f"{', '.join(keys)} in {folders}{''.join(names)}",
        fix="Leave one of them out, or run it again with overwrite=true.",
    )


def _only(summary: dict[str, Any], other: dict[str, Any]) -> str:
    """The classes that the other run does not have."""
    names = [name for name in summary["class_names"] if name not in other["class_names"]]
    return f"; of one only: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


def settings(run: Run) -> dict[str, Any]:
    """What makes the run comparable with others: flat keys and values."""
    return run.summary["comparable"] | {key: run.summary[key] for key in ("scale", "evaluate_on")}


def unlike(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Keys with unlike values, in order."""
    missing = object()
    keys = sorted(first.keys() | second.keys())
    return [key for key in keys if first.get(key, missing) != second.get(key, missing)]


def _values(runs: Sequence[Run], key: str) -> pd.Series:
    section, name = key.split(".")
    seeds = [run.summary["seed"] for run in runs]
    return pd.Series([run.value(section, name) for run in runs], index=seeds, dtype=float).dropna()


def _main_mean(runs: Sequence[Run]) -> float:
    mean = Stat.of(_values(runs, MAIN)).mean
    return -np.inf if mean is None else mean


def _labels(identities: Sequence[tuple[str, str, str]]) -> list[str]:
    """For each row the shortest of its names that no other row has."""
    forms = [
        [name, f"{experiment}/{name}", f"{name}-{fingerprint}", f"{experiment}/{name}-{fingerprint}"]
        for experiment, name, fingerprint in identities
    ]
    counts = pd.Series([text for form in forms for text in form]).value_counts()
    return [next((text for text in form if counts[text] == 1), form[-1]) for form in forms]


def _differs(groups: Sequence[list[Run]], this: int) -> str:
    """What makes a row unlike the first one, and unlike the first one of the same experiment and name."""
    if this == 0:
        return "reference"
    run = groups[this][0]
    namesake = next((i for i in range(this) if _identity(groups[i][0])[:2] == _identity(run)[:2]), None)
    parts = []
    if namesake != 0:
        first = groups[0][0]
        parts = _both_values([key for key in unlike(settings(first), settings(run)) if not _free(key)], run, first, 1)
    if namesake is not None:
        other, place = groups[namesake][0], namesake + 1
        keys = unlike(settings(other), settings(run))
        parts += _both_values(keys, run, other, place) or [f"row {place}: in the fingerprint, though in no listed key"]
    return "; ".join(parts) or "-"


def _free(key: str) -> bool:
    return key.split(".")[0] in FREE


def _both_values(keys: Sequence[str], run: Run, other: Run, place: int) -> list[str]:
    """One text that names the other's row and, of each key, the run's value and (in brackets) the other's."""
    mine, theirs = settings(run), settings(other)
    said = ", ".join(f"{key} = {_brief(mine, theirs, key)} ({_brief(theirs, mine, key)})" for key in keys)
    return [f"row {place}: {said}"] if keys else []


def _brief(values: dict[str, Any], others: dict[str, Any], key: str) -> str:
    """A value in at most 40 characters, from shortly before the place where it parts from the other one."""
    if key not in values:
        return "absent"
    text, other = json.dumps(values[key]), json.dumps(others.get(key))
    if len(text) <= 40:
        return text
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, other)))
    start = max(0, same - 10)
    return ("…" if start else "") + text[start : start + 38] + ("…" if start + 38 < len(text) else "")


def paired_test(both: pd.DataFrame) -> dict[str, float]:
    """Paired t-test of the first column against the second: ``seeds``, ``mean_difference``, ``ci95_*``, ``p``."""
    difference = both.iloc[:, 0] - both.iloc[:, 1]
    mean = float(difference.mean())
    line = {"seeds": len(both), "mean_difference": mean}
    if np.ptp(difference) < 1e-9:  # no spread to hold the mean against: t would be infinite or undefined
        return line | {"ci95_low": mean, "ci95_high": mean, "p": np.nan}
    test = scipy.stats.ttest_rel(both.iloc[:, 0], both.iloc[:, 1])
    low, high = test.confidence_interval(0.95)
    return line | {"ci95_low": float(low), "ci95_high": float(high), "p": float(test.pvalue)}


def _scaled(value: float | None, column: Column) -> str:
    return "" if value is None else f"{round(value / column.unit, column.decimals) + 0.0:,.{column.decimals}f}"


def _accuracy_table(comparison: Comparison, interval: bool) -> Table:
    table = _stat_table(comparison, "Accuracy", ACCURACIES, interval)
    note = (
        f"{table.note} Forgetting: larger is worse. Differs in: settings outside {', '.join(FREE)} that are unlike "
        "those of the row named, its values in brackets; all settings, where experiment and name are the same."
    )
    lines = [[*line, row.differs] for line, row in zip(table.lines, comparison.rows)]
    return replace(table, note=note, header=[*table.header, "differs in"], lines=lines)


def _stat_table(comparison: Comparison, title: str, columns: Sequence[Column], interval: bool) -> Table:
    lines = [
        [
            str(place),
            row.label,
            str(len(row.runs)),
            *(row.stat(column.key).text(column, interval) for column in columns),
        ]
        for place, row in enumerate(comparison.rows, start=1)
    ]
    header = ["row", "run", "n", *(column.title for column in columns)]
    note = "Mean ± sample standard deviation over seeds (number of seeds)"
    note += "; 95 % ±: half width of the confidence interval of the mean (Student's t)." if interval else "."
    note += " An empty cell was not measured or is not defined."
    return Table(title, note, header, lines, [0, *range(2, len(columns) + 3)])


def _orders_table(comparison: Comparison, interval: bool) -> Table:
    columns = [(setting, disparity) for setting in SETTINGS for disparity in DISPARITIES]
    lines = [
        [
            orders.label,
            ", ".join(map(str, orders.places)),
            str(len(orders.runs)),
            str(len(orders.seeds)),
            *(orders.stat(*column).text(Column("", ""), interval) for column in columns),
        ]
        for orders in comparison.orders
    ]
    titles = [f"{TITLES[setting]} {disparity} [points]" for setting, disparity in columns]
    header = ["run", "rows", "orders", "seeds in common", *titles]
    note = (
        "Rows that differ only in the order of the same tasks. The disparity of a task is its highest minus its lowest "
        "final accuracy over the orders, a task being known by its set of classes; AOPD is its mean and MOPD its "
        "maximum over the tasks. Smaller is better; more orders make it larger. Mean ± sample standard deviation over "
        "the seeds that every order was run with."
    )
    return Table("Order robustness", note, header, lines, range(2, len(header)))


def _published_table(comparison: Comparison) -> Table:
    lines = []
    for label, verdict in comparison.published:
        within = {None: "-", True: "yes", False: "no"}[verdict.within]
        numbers = [
            number(verdict.published),
            number(verdict.ours),
            signed(verdict.difference),
            number(verdict.tolerance),
        ]
        source = f"{verdict.source} ({verdict.note})" if verdict.note else verdict.source
        lines.append([label, verdict.metric, *numbers, within, source])
    header = ["run", "metric", "published", "ours", "difference", "tolerance", "within", "source"]
    note = "Ours: mean over seeds. Within: the difference, up or down, is at most the tolerance. Percent and points."
    return Table("Published numbers", note, header, lines, range(2, 6))


def _pairs_table(comparison: Comparison) -> Table:
    lines = [
        [
            pair["first"],
            pair["second"],
            str(pair["seeds"]),
            signed(pair["mean_difference"]),
            f"{signed(pair['ci95_low'])} to {signed(pair['ci95_high'])}",
            _p_text(pair["p"]),
            _p_text(pair["p_holm"]),
        ]
        for pair in comparison.pairs.to_dict("records")
    ]
    header = ["first", "second", "seeds in common", "first - second [points]", "95 % CI", "p", "p (Holm)"]
    note = "Paired t-tests on Class-IL accuracy over the seeds in common, corrected for their number (Holm)."
    return Table("Paired tests", note, header, lines, range(2, 7))


def _p_text(p: float) -> str:
    return "-" if np.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _notes(comparison: Comparison) -> list[str]:
    return [f"Left out because it has not finished: {folder}" for folder in comparison.unfinished]


def _for_terminal(table: Table) -> RichTable:
    # cells are Text, since a "[" in a plain string would be markup
    shown = RichTable(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, show_lines=False)
    for i, name in enumerate(table.header):
        shown.add_column(Text(name), justify="right" if i in table.numbers else "left", overflow="fold")
    for line in table.lines:
        shown.add_row(*(Text(cell) for cell in line))
    return shown


def _markdown(comparison: Comparison, command: str) -> str:
    parts = [f"Made by `{command}`."]
    for table in tables(comparison, interval=False):
        parts += [f"## {table.title}", markdown(table), table.note]
    return "\n\n".join(parts + _notes(comparison)) + "\n"


def markdown(table: Table) -> str:
    """The table in Markdown, without its title and note."""
    rule = ["---:" if i in table.numbers else ":---" for i in range(len(table.header))]
    return "\n".join(map(_markdown_line, [table.header, rule, *table.lines]))


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(" ".join(cell.split()) for cell in escaped) + " |"


def _frame(rows: Sequence[Row]) -> pd.DataFrame:
    """``table.csv``: a line a row; of each number n, mean, std, ci95 and the value of each seed; empty is unknown."""
    lines: list[dict[str, Any]] = []
    columns = [*ACCURACIES, *COSTS]
    seeds = sorted({run.summary["seed"] for row in rows for run in row.runs})
    for place, row in enumerate(rows, start=1):
        experiment, name, fingerprint = _identity(row.runs[0])
        line: dict[str, Any] = {
            "row": place,
            "label": row.label,
            "experiment": experiment,
            "name": name,
            "fingerprint": fingerprint,
        }
        line |= {key: row.runs[0].summary[key] for key in ("method", "backbone", "scenario", "buffer", "scale")}
        line |= {"evaluate_on": row.runs[0].summary["evaluate_on"], "n": len(row.runs), "differs_in": row.differs}
        for key in (column.key for column in columns):
            stat, values = row.stat(key), row.values(key)
            line |= {f"{key}_{part}": getattr(stat, part) for part in ("n", "mean", "std", "ci95")}
            line |= {f"{key}_seed{seed}": values.get(seed) for seed in seeds}
        lines.append(line)
    return pd.DataFrame(lines)


def _orders_frame(groups: Sequence[Orders]) -> pd.DataFrame:
    """``orders.csv``: a line a seed, setting and task: lowest and highest final accuracy over the orders."""
    lines: list[dict[str, Any]] = []
    for orders in groups:
        for seed, setting in itertools.product(orders.seeds, SETTINGS):
            final = orders.final(setting, seed)
            for task, disparity in order_disparity(final).items():
                line = {"label": orders.label, "rows": " ".join(map(str, orders.places)), "orders": len(orders.runs)}
                line |= {"seed": seed, "setting": setting, "classes": " ".join(map(str, sorted(task)))}
                values = [run[task] for run in final]
                lines.append(line | {"lowest": np.min(values), "highest": np.max(values), "disparity": disparity})
    return pd.DataFrame(lines)


def _pictures(comparison: Comparison) -> Iterator[tuple[str, Picture]]:
    rows = comparison.rows
    figure = plots.dots(
        {row.label: row.values(MAIN).tolist() for row in rows},
        {row.label: row.stat(MAIN).ci95 for row in rows},
        "Class-IL average accuracy after the last task [%]",
    )
    if figure is not None:
        caption = (
            "A dot a seed, a bar at the mean, a line over its 95 % confidence interval. The axis need not begin at 0."
        )
        yield "final_accuracy", Picture.of(figure, "Final accuracy", caption)
    figure = plots.accuracy_by_row({setting: _curves(rows, setting) for setting in SETTINGS})
    if figure is not None:
        caption = "Mean over seeds and, where there are several, a band of one standard deviation either way."
        yield "accuracy_over_tasks", Picture.of(figure, "Accuracy over tasks", caption)


def _curves(rows: Sequence[Row], setting: str) -> dict[str, np.ndarray]:
    """Label -> (S, T) average accuracy on the tasks seen, of the rows that this setting was measured for."""
    curves = {
        row.label: np.array([plots.over_tasks(average_accuracy, run.record.get_matrix(setting)) for run in row.runs])
        for row in rows
    }
    return {label: values for label, values in curves.items() if not np.isnan(values).all()}
