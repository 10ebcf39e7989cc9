"""Tables of a comparison as text, for the terminal, Markdown and HTML."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import rich.box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cl_bench.core.record import SETTINGS, TITLES
from cl_bench.report.imports import REPORTED
from cl_bench.report.page import Verdict, format_number, format_signed, to_words
from cl_bench.report.rows import DISPARITIES, FREE, MAIN, Orders, Row
from cl_bench.report.selection import is_greater_better
from cl_bench.report.statistics import Stat


@dataclass(frozen=True)
class Column:
    """A number of the tables: its key in ``summary.json``, its column's title and format."""

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

PRECISIONS = (
    ACCURACIES[0],
    *(Column(f"class_il.AP_{classes}", f"AP of {classes} classes [%]") for classes in ("all", "old", "new")),
    ACCURACIES[2],
)
"""The same where all rows are of detection, which has no Task-IL."""

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


MOST_LINES_SHOWN = 100
"""Of a longer table the terminal shows the first lines only."""


@dataclass(frozen=True)
class Table:
    """A table as text, for the terminal, Markdown and HTML alike.

    Attributes:
        title, note: what it shows, and how to read it.
        header: names of its columns.
        lines: its cells, row by row.
        numbers: columns to align to the right.
        best: line and column of each cell to be marked.
        fold: whether a page shows it only if asked.
    """

    title: str
    note: str
    header: list[str]
    lines: list[list[str]]
    numbers: Sequence[int]
    best: Collection[tuple[int, int]] = ()
    fold: bool = False

    @property
    def fixed(self) -> int:
        """The column that stays in view on a narrow page: the labels of the rows, or the first one."""
        return self.header.index("run") if "run" in self.header else 0


def show_tables(shown: Sequence[Table], notes: Sequence[str], common: str = "") -> None:
    """Print tables, what all their rows have in common above them, and notes below them."""
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width, and the default of 80 would break every cell
        console = Console(highlight=False, width=180)
    if common:
        console.print(Text(common), end="\n\n")
    for table in shown:
        console.print(_to_rich(replace(table, lines=table.lines[:MOST_LINES_SHOWN])))
        if len(table.lines) > MOST_LINES_SHOWN:
            console.print(Text(f"{len(table.lines) - MOST_LINES_SHOWN} more lines: see --format, --out or --where."))
        console.print(Text(table.note, style="dim"), end="\n\n")
    for line in notes:
        console.print(Text(line))


def format_markdown(table: Table) -> str:
    """The table in Markdown, without its title and note; the best values are bold."""
    rule = ["---:" if i in table.numbers else ":---" for i in range(len(table.header))]
    lines = [
        [f"**{cell}**" if (i, j) in table.best else cell for j, cell in enumerate(line)]
        for i, line in enumerate(table.lines)
    ]
    return "\n".join(map(_format_line, [table.header, rule, *lines]))


def format_latex(table: Table) -> str:
    """The table for LaTeX with the package booktabs; the best values are bold, the note is the caption."""
    columns = "".join("r" if i in table.numbers else "l" for i in range(len(table.header)))
    lines = [
        [
            f"\\textbf{{{_escape_latex(cell)}}}" if (i, j) in table.best else _escape_latex(cell)
            for j, cell in enumerate(line)
        ]
        for i, line in enumerate(table.lines)
    ]
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_escape_latex(table.title)}. {_escape_latex(table.note)}}}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            " & ".join(map(_escape_latex, table.header)) + " \\\\",
            "\\midrule",
            *(" & ".join(line) + " \\\\" for line in lines),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
        ]
    )


def drop_column(table: Table, name: str) -> Table:
    """The table without a column of text."""
    at = table.header.index(name) if name in table.header else len(table.header)
    cut = [[cell for i, cell in enumerate(cells) if i != at] for cells in (table.header, *table.lines)]
    return replace(table, header=cut[0], lines=cut[1:])


def make_column(key: str) -> Column:
    """The column of any metric; ``key`` is ``section.name`` of ``summary.json``."""
    known = {column.key: column for column in (*ACCURACIES, *COSTS)}
    section, _, name = key.partition(".")
    return known.get(key, Column(key, f"{TITLES.get(section, 'cost:')} {to_words(name)}"))


def make_accuracy_table(
    rows: Sequence[Row], interval: bool, columns: Sequence[Column] = ACCURACIES, group: str | None = None
) -> Table:
    """Accuracy and forgetting of each row, or other columns, and the settings in which it differs."""
    title = "Accuracy" if columns in (ACCURACIES, PRECISIONS) else "Metrics"
    table = make_stat_table(rows, title, columns, interval, group)
    note = (
        f"{table.note} Forgetting: larger is worse. Differs in: settings outside {', '.join(FREE)} that are unlike "
        "those of the row named, its values in brackets; all settings, where experiment and name are the same."
    )
    lines = [[*line, row.differs] for line, row in zip(table.lines, rows)]
    return replace(table, note=note, header=[*table.header, "differs in"], lines=lines)


def make_stat_table(
    rows: Sequence[Row], title: str, columns: Sequence[Column], interval: bool, group: str | None = None
) -> Table:
    """Each column's mean, standard deviation and number of seeds, one line per row.

    Args:
        rows: in their order; those of a group stand together.
        title: what it shows.
        columns: the metrics.
        interval: whether a second line of each cell gives the confidence interval.
        group: the key that the rows are grouped by.
    """
    before = [] if group is None else [group]
    lines = [
        [
            str(rank),
            *([] if group is None else [row.group]),
            row.label,
            str(len(row.runs)),
            *(format_stat(row.stat(column.key), column, interval) for column in columns),
        ]
        for rank, row in enumerate(rows, start=1)
    ]
    header = ["row", *before, "run", "n", *(column.title for column in columns)]
    first = len(header) - len(columns)
    note = "Mean ± sample standard deviation over seeds (number of seeds)"
    note += "; 95 % ±: half width of the confidence interval of the mean (Student's t)." if interval else "."
    note += " An empty cell was not measured or is not defined. Bold: the best mean of a column"
    note += "." if group is None else f" for each {group}."
    best = [(line, first + j) for j, column in enumerate(columns) for line in _find_best(rows, column)]
    return Table(title, note, header, lines, [0, *range(first - 1, len(header))], frozenset(best))


def make_difference_table(rows: Sequence[Row], reference: int, columns: Sequence[Column]) -> Table:
    """Each row minus the reference row, over the seeds that both have."""
    lines = []
    for rank, row in enumerate(rows, start=1):
        stats = [row.stat_minus(rows[reference], column.key) for column in columns]
        n = len(row.seeds & rows[reference].seeds)
        cells = ["reference" if rank == reference + 1 else format_difference(s, c) for s, c in zip(stats, columns)]
        lines.append([str(rank), row.label, str(n), *cells])
    header = ["row", "run", "seeds in common", *(column.title for column in columns)]
    note = (
        f"Each row minus row {reference + 1}, seed by seed: mean ± sample standard deviation over the seeds in common "
        "(their number)."
    )
    title = f"Differences from {rows[reference].label}"
    return Table(title, note, header, lines, [0, *range(2, len(header))])


def make_orders_table(groups: Sequence[Orders], interval: bool) -> Table:
    """AOPD and MOPD of each group of orders."""
    columns = [(setting, disparity) for setting in SETTINGS for disparity in DISPARITIES]
    lines = [
        [
            orders.label,
            ", ".join(map(str, orders.ranks)),
            str(len(orders.runs)),
            str(len(orders.seeds)),
            *(format_stat(orders.stat(*column), Column("", ""), interval) for column in columns),
        ]
        for orders in groups
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


def make_published_table(published: Sequence[tuple[str, Verdict]]) -> Table:
    """Published numbers beside ours."""
    lines = []
    for label, verdict in published:
        within = {None: "-", True: "yes", False: "no"}[verdict.within]
        numbers = [
            format_number(verdict.published),
            format_number(verdict.ours),
            format_signed(verdict.difference),
            format_number(verdict.tolerance),
        ]
        source = f"{verdict.source} ({verdict.note})" if verdict.note else verdict.source
        lines.append([label, verdict.metric, *numbers, within, source])
    header = ["run", "metric", "published", "ours", "difference", "tolerance", "within", "source"]
    note = "Ours: mean over seeds. Within: the difference, up or down, is at most the tolerance. Percent and points."
    return Table("Published numbers", note, header, lines, range(2, 6))


def make_imports_table(rows: Sequence[Row]) -> Table:
    """Imported rows with forgetting by each definition, and as the other program reported it."""
    names = ("forgetting", "forgetting_first_last", "forgetting_clipped", REPORTED)
    lines = []
    for rank, row in enumerate(rows, start=1):
        for setting in SETTINGS if row.imported else ():
            if row.stat(f"{setting}.average_accuracy").n:
                stats = [format_stat(row.stat(f"{setting}.{name}"), Column("", ""), interval=False) for name in names]
                tasks = str(len(row.runs[0].summary["tasks"]))
                lines.append([str(rank), row.label, TITLES[setting], tasks, *stats, row.imported])
    header = ["row", "run", "setting", "tasks", "forgetting here", "first - last", "clipped", "as reported", "from"]
    note = (
        "Accuracies are those of the other program, and everything is computed from them by the same formulas as ours. "
        "Forgetting here and in all other tables: the best accuracy before the last task minus the last one, mean over "
        "the earlier tasks (Chaudhry et al. 2018). First - last: the accuracy right after a task minus the last one "
        "(Avalanche). Clipped: the best accuracy, the last one included, minus the last one (Mammoth and "
        "PyCIL). As reported: what the other program wrote. Whether its data, network and schedule are those "
        "of our rows is not known; so it takes no part in paired tests and differences."
    )
    return Table("Imported runs", note, header, lines, [0, *range(3, 8)])


def make_pairs_table(pairs: pd.DataFrame, note: str = "") -> Table:
    """The paired tests of :func:`~cl_bench.report.statistics.run_paired_tests`; ``note`` says which were made."""
    lines = [
        [
            pair["first"],
            pair["second"],
            str(pair["seeds"]),
            format_signed(pair["mean_difference"]),
            f"{format_signed(pair['ci95_low'])} to {format_signed(pair['ci95_high'])}",
            _format_p(pair["p"]),
            _format_p(pair["p_holm"]),
        ]
        for pair in pairs.to_dict("records")
    ]
    header = ["first", "second", "seeds in common", "first - second [points]", "95 % CI", "p", "p (Holm)"]
    text = "Paired t-tests on Class-IL accuracy over the seeds in common, corrected for their number (Holm)."
    return Table("Paired tests", " ".join(filter(None, [text, note])), header, lines, range(2, 7), fold=True)


def format_stat(stat: Stat, column: Column, interval: bool) -> str:
    """``mean ± std (n)``, with the confidence interval on a second line if asked for; empty without a value."""
    if stat.mean is None:
        return ""
    mean, std, ci95 = (_scale(value, column) for value in (stat.mean, stat.std, stat.ci95))
    text = f"{mean} ± {std} ({stat.n})" if std else f"{mean} ({stat.n})"
    return f"{text}\n95 % ± {ci95}" if interval and ci95 else text


def format_difference(stat: Stat, column: Column) -> str:
    """The same of a difference, with its sign."""
    text = format_stat(stat, column, interval=False)
    return f"+{text}" if text and (stat.mean or 0.0) >= 0 and not text.startswith("-") else text


def _find_best(rows: Sequence[Row], column: Column) -> list[int]:
    """The lines with the best mean, as it is shown, of each group; none in a group whose means are all the same."""
    groups: dict[str, dict[int, float]] = {}
    for line, row in enumerate(rows):
        mean = row.stat(column.key).mean
        if mean is not None:
            groups.setdefault(row.group, {})[line] = round(mean / column.unit, column.decimals)
    choose = max if is_greater_better(column.key) else min
    bests = [(values, choose(values.values())) for values in groups.values() if len(set(values.values())) > 1]
    return [line for values, best in bests for line, value in values.items() if value == best]


def _scale(value: float | None, column: Column) -> str:
    return "" if value is None else f"{round(value / column.unit, column.decimals) + 0.0:,.{column.decimals}f}"


def _format_p(p: float) -> str:
    return "-" if np.isnan(p) else "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _to_rich(table: Table) -> RichTable:
    # cells are Text, because a "[" in a plain string would be markup
    shown = RichTable(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD, show_lines=False)
    for i, name in enumerate(table.header):
        shown.add_column(Text(name), justify="right" if i in table.numbers else "left", overflow="fold")
    for i, line in enumerate(table.lines):
        shown.add_row(*(Text(cell, style="bold" if (i, j) in table.best else "") for j, cell in enumerate(line)))
    return shown


def _format_line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(" ".join(cell.split()) for cell in escaped) + " |"


_LATEX = {
    "\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "…": r"\dots{}", "<": "$<$", ">": "$>$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
