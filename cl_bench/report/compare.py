"""The comparison of finished runs: tables, paired tests, published numbers, pictures, one page."""

import base64
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cl_bench.core.errors import require
from cl_bench.core.record import SETTINGS, name_measure
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.metrics.order_robustness import order_disparity
from cl_bench.report import plots
from cl_bench.report.imports import read_imports
from cl_bench.report.labels import describe_common
from cl_bench.report.page import Picture, Verdict, judge, render
from cl_bench.report.rows import (
    MAIN,
    LeftOut,
    Orders,
    Row,
    describe_differences,
    find_runs,
    identify,
    make_orders,
    make_rows,
)
from cl_bench.report.selection import Selection, arrange_rows, choose_runs, find_metrics, find_reference
from cl_bench.report.statistics import run_paired_tests
from cl_bench.report.tables import (
    ACCURACIES,
    COSTS,
    PRECISIONS,
    Column,
    Table,
    drop_column,
    format_latex,
    format_markdown,
    make_accuracy_table,
    make_column,
    make_difference_table,
    make_imports_table,
    make_orders_table,
    make_pairs_table,
    make_published_table,
    make_stat_table,
    show_tables,
)

MOST_ROWS_PAIRED = 30
"""With more rows each is tested against the first one only: the number of pairs grows with the square."""

MOST_ROWS_DRAWN = 40
"""With more rows the pictures show the first ones."""


DOTS = "final_accuracy"
DOTS_TITLE = "Class-IL average accuracy after the last task [%]"
"""The picture of final accuracies: name of its file, and title of its axis."""


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        rows: in the order asked for; best Class-IL accuracy first by default.
        orders: runs whose order robustness is known.
        pairs: paired tests, one line per pair of rows with enough seeds in common.
        published: label of a row, and a published number beside the row's mean.
        left_out: the runs that are not finished.
        columns: the metrics of the first table; accuracies or average precisions unless others were asked for.
        reference: the position of the row that the others are compared with, if one was named.
        group: the key that the rows are grouped by.
    """

    rows: list[Row]
    orders: list[Orders]
    pairs: pd.DataFrame
    published: list[tuple[str, Verdict]]
    left_out: list[LeftOut]
    columns: Sequence[Column] = ACCURACIES
    reference: int | None = None
    group: str | None = None

    @property
    def common(self) -> str:
        """What all rows have in common, as one sentence."""
        runs = [row.runs for row in self.rows]
        return describe_common([first.summary for first, *_ in runs], [[r.summary["seed"] for r in of] for of in runs])

    @property
    def measure(self) -> str:
        """The word for what was measured in all rows, e.g. ``accuracy``."""
        return " or ".join(sorted({row.runs[0].measure for row in self.rows}))

    @property
    def all_columns(self) -> Sequence[Column]:
        """The metrics of all tables."""
        return [*self.columns, *COSTS] if self.by_default else self.columns

    @property
    def by_default(self) -> bool:
        """Whether no metrics were asked for."""
        return self.columns in (ACCURACIES, PRECISIONS)


def compare(paths: Sequence[str], selection: Selection | None = None, imports: Sequence[str] = ()) -> Comparison:
    """Compare the finished runs under ``paths``, each a run folder or a folder of them.

    Args:
        paths: as typed.
        selection: which runs and metrics, and in which order; by default all runs, and the best first.
        imports: files of other programs (:func:`~cl_bench.report.imports.read_imports`).

    Raises:
        ConfigError: there is nothing to compare, or an option names what no run has.
    """
    selection = selection or Selection()
    found, left_out = find_runs(paths)
    imported, left_out_imports = read_imports(imports)
    found, left_out = [*found, *imported], [*left_out, *left_out_imports]
    runs = choose_runs(found, selection.where)
    rows = arrange_rows(make_rows(runs), selection)
    names = find_metrics(runs, selection.metrics)
    reference = None if selection.reference is None else find_reference(rows, selection.reference)
    if reference is not None:
        _require_common_seeds(rows, reference)
    rows = describe_differences(rows, reference or 0)
    published = [(row.label, verdict) for row in rows for verdict in judge(row.runs[0], row.mean)]
    own = [row for row in rows if not row.imported]
    tested_against = 0 if len(rows) > MOST_ROWS_PAIRED else None
    if reference is not None:
        tested_against = own.index(rows[reference])
    pairs = run_paired_tests([(row.label, row.values(MAIN)) for row in own], tested_against)
    detection = all(row.runs[0].measure == "AP" for row in rows)
    columns = [make_column(name) for name in names] or (PRECISIONS if detection else ACCURACIES)
    return Comparison(rows, make_orders(rows), pairs, published, left_out, columns, reference, selection.group)


def _require_common_seeds(rows: Sequence[Row], reference: int) -> None:
    seeds = [row.seeds for row in rows]
    known = ", ".join(map(str, sorted(seeds[reference]))) or "of another program"
    others = [i for i, row in enumerate(rows) if i != reference and not row.imported]
    require(
        any(seeds[i] & seeds[reference] for i in others) or not (others or rows[reference].imported),
        "--reference",
        expected="a row that has a seed in common with another one",
        got=f"{rows[reference].label} with the seeds {known}",
        fix="Run it with the seeds of the others, or name another row.",
    )


def show(comparison: Comparison, form: str = "text") -> None:
    """Print the comparison on standard output, in one of :data:`FORMATS`."""
    if form == "text":
        show_tables(make_tables(comparison, interval=True), _list_left_out(comparison), comparison.common)
    else:
        print(FORMATS[form](comparison), end="")


def write(comparison: Comparison, out: Path, command: str) -> None:
    """Write ``table.md``, ``table.csv``, ``pairs.csv``, the pictures and ``compare.html`` into the folder ``out``.

    Also ``orders.csv`` if rows differ only in the order of their tasks.

    Args:
        comparison: what to write.
        out: made if missing.
        command: the command as typed. The files name it and no date, so the same command gives the same bytes again.
    """
    require(not out.is_file(), "--out", expected="a folder", got=f"{str(out)!r}, a file", fix="Name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    pictures = dict(_draw_pictures(comparison))
    for name, picture in pictures.items():
        (out / f"{name}.png").write_bytes(picture.png)
    make_frame(comparison).to_csv(out / "table.csv", index=False, lineterminator="\n")
    comparison.pairs.to_csv(out / "pairs.csv", index=False, lineterminator="\n")
    if comparison.orders:
        _make_orders_frame(comparison.orders).to_csv(out / "orders.csv", index=False, lineterminator="\n")
    (out / "table.md").write_text(f"Made by `{command}`.\n\n{make_markdown(comparison)}", encoding="utf-8")
    dots = None
    if DOTS in pictures:
        title = name_measure(DOTS_TITLE, comparison.measure)
        dots = make_dots(comparison.rows[:MOST_ROWS_DRAWN], pictures[DOTS].title, title, pictures[DOTS].caption)
    script = (Path(__file__).parent / "compare.js").read_text(encoding="utf-8")
    page = render(
        "compare.html.j2",
        runs=sum(len(row.runs) for row in comparison.rows),
        rows=len(comparison.rows),
        command=command,
        tables=make_tables(comparison, interval=True),
        common=comparison.common,
        notes=_list_left_out(comparison),
        left_out=Counter(run.state for run in comparison.left_out),
        pictures=[picture for name, picture in pictures.items() if name != DOTS],
        dots=dots,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    (out / "compare.html").write_text(page, encoding="utf-8")


def make_tables(comparison: Comparison, interval: bool) -> list[Table]:
    """The tables of a comparison; with ``interval``, a second line in each cell holds its confidence interval."""
    rows, group = comparison.rows, comparison.group
    shown = [make_accuracy_table(rows, interval, comparison.columns, group)]
    if comparison.reference is not None:
        shown.append(make_difference_table(rows, comparison.reference, comparison.columns))
    if comparison.by_default:
        shown.append(make_stat_table(rows, "Cost", COSTS, interval, group))
    if any(row.imported for row in rows):
        shown.append(make_imports_table(rows))
    if comparison.orders:
        shown.append(make_orders_table(comparison.orders, interval))
    if comparison.published:
        shown.append(make_published_table(comparison.published))
    if len(comparison.pairs):
        few = comparison.reference is None and len(rows) > MOST_ROWS_PAIRED
        note = f"Of more than {MOST_ROWS_PAIRED} rows each is tested against the first only." if few else ""
        shown.append(make_pairs_table(comparison.pairs, note))
    return [_reword(table, comparison.measure) for table in shown]


def _reword(table: Table, measure: str) -> Table:
    title, note, *header = (name_measure(text, measure) for text in (table.title, table.note, *table.header))
    return replace(table, title=title, note=note, header=header)


def _list_left_out(comparison: Comparison) -> list[str]:
    return [
        f"Left out, {run.state}{f' ({run.why})' if run.why else ''}: {run.folder}"
        for run in sorted(comparison.left_out, key=lambda run: (run.state, run.folder))
    ]


def make_markdown(comparison: Comparison) -> str:
    """The tables in Markdown."""
    parts = [comparison.common] if comparison.common else []
    for table in make_tables(comparison, interval=False):
        parts += [f"## {table.title}", format_markdown(table), table.note]
    return "\n\n".join(parts + _list_left_out(comparison)) + "\n"


def make_latex(comparison: Comparison) -> str:
    """The tables for LaTeX, without the column that lists settings, which no page is wide enough for."""
    tables = [drop_column(table, "differs in") for table in make_tables(comparison, interval=False)]
    notes = [f"% {line}" for line in filter(None, [comparison.common, *_list_left_out(comparison)])]
    return "\n\n".join(["% \\usepackage{booktabs}", *notes, *map(format_latex, tables)]) + "\n"


def make_csv(comparison: Comparison) -> str:
    """The numbers of each row, at full precision."""
    return make_frame(comparison).to_csv(index=False, lineterminator="\n")


def make_json(comparison: Comparison) -> str:
    """The numbers of each row at full precision, the paired tests, and the runs left out; null if unknown."""
    frames = {"rows": make_frame(comparison), "pairs": comparison.pairs}
    content = {name: _list_records(frame) for name, frame in frames.items()}
    left_out = [{"folder": str(run.folder), "state": run.state, "why": run.why} for run in comparison.left_out]
    return json.dumps({"common": comparison.common, **content, "left_out": left_out}, indent=2) + "\n"


def _list_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    records = frame.to_dict("records")
    return [{str(k): None if pd.isna(value) else value for k, value in record.items()} for record in records]


FORMATS = {"markdown": make_markdown, "latex": make_latex, "csv": make_csv, "json": make_json}
"""What ``--format`` offers beside ``text``."""


def make_frame(comparison: Comparison) -> pd.DataFrame:
    """``table.csv``: one line per row; for each number n, mean, std, ci95 and each seed's value; empty if unknown.

    Also the mean difference from the reference row, if one was named, and the value of the key to group by.
    """
    lines: list[dict[str, Any]] = []
    rows = comparison.rows
    seeds = sorted({run.summary["seed"] for row in rows for run in row.runs})
    for rank, row in enumerate(rows, start=1):
        experiment, name, fingerprint = identify(row.runs[0])
        line: dict[str, Any] = {
            "row": rank,
            "label": row.label,
            "experiment": experiment,
            "name": name,
            "fingerprint": fingerprint,
        }
        line |= {key: row.runs[0].summary[key] for key in ("method", "backbone", "scenario", "buffer", "scale")}
        line |= {"evaluate_on": row.runs[0].summary["evaluate_on"], "n": len(row.runs), "differs_in": row.differs}
        if any(row.imported for row in rows):
            line["imported"] = row.imported
        if comparison.group is not None:
            line[comparison.group] = row.group
        for key in (column.key for column in comparison.all_columns):
            stat, values = row.stat(key), row.values_by_seed(key)
            line |= {f"{key}_{part}": getattr(stat, part) for part in ("n", "mean", "std", "ci95")}
            line |= {f"{key}_seed{seed}": values.get(seed) for seed in seeds}
            if comparison.reference is not None:
                line[f"{key}_difference"] = row.stat_minus(rows[comparison.reference], key).mean
        lines.append(line)
    return pd.DataFrame(lines)


def _make_orders_frame(groups: Sequence[Orders]) -> pd.DataFrame:
    """``orders.csv``: one line per seed, setting and task: lowest and highest final accuracy over the orders."""
    lines: list[dict[str, Any]] = []
    for orders in groups:
        for seed, setting in itertools.product(orders.seeds, SETTINGS):
            final = orders.final(setting, seed)
            for task, disparity in order_disparity(final).items():
                line = {"label": orders.label, "rows": " ".join(map(str, orders.ranks)), "orders": len(orders.runs)}
                line |= {"seed": seed, "setting": setting, "classes": " ".join(map(str, sorted(task)))}
                values = [run[task] for run in final]
                lines.append(line | {"lowest": np.min(values), "highest": np.max(values), "disparity": disparity})
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Dots:
    """The plot of final accuracies on a page, where it is made of text and SVG, so that it fits any width.

    Attributes:
        heading: of its part of the page.
        title: what is shown, with its unit.
        caption: how to read it.
        ticks: positions on the axis, in percent of its length, and their texts.
        rows: label, positions of the seeds, of the mean, and of the ends of its confidence interval, or None.
    """

    heading: str
    title: str
    caption: str
    ticks: list[tuple[float, str]]
    rows: list[tuple[str, list[float], float, tuple[float, float] | None]]


def make_dots(rows: Sequence[Row], heading: str, title: str, caption: str) -> Dots:
    """The plot of the rows that have a Class-IL accuracy; at least one has."""
    values = {row.label: row.values(MAIN).tolist() for row in rows}
    shown = [row for row in rows if values[row.label]]
    spans = {row.label: (np.mean(values[row.label]), row.stat(MAIN).ci95 or 0.0) for row in shown}
    ends = [end for mean, half in spans.values() for end in (mean - half, mean + half)]
    ends += [value for row in shown for value in values[row.label]]
    low, high = float(min(ends)), float(max(ends))

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / ((high - low) or 1.0), 2)  # a dot at an end is not cut

    lines = []
    for row in shown:
        mean, half = spans[row.label]
        interval = (place(mean - half), place(mean + half)) if half else None
        lines.append((row.label, [place(value) for value in values[row.label]], place(mean), interval))
    return Dots(heading, title, caption, [(place(tick), f"{tick:g}") for tick in plots.choose_ticks(low, high)], lines)


def _draw_pictures(comparison: Comparison) -> Iterator[tuple[str, Picture]]:
    rows = comparison.rows[:MOST_ROWS_DRAWN]
    few = "" if len(rows) == len(comparison.rows) else f" The first {len(rows)} rows only."
    figure = plots.draw_dots(
        {row.label: row.values(MAIN).tolist() for row in rows},
        {row.label: row.stat(MAIN).ci95 for row in rows},
        name_measure(DOTS_TITLE, comparison.measure),
    )
    if figure is not None:
        caption = (
            "One dot per seed, a bar at the mean, a line over its 95 % confidence interval. "
            f"The axis does not always begin at 0.{few}"
        )
        yield DOTS, Picture.of(DOTS, figure, name_measure("Final accuracy", comparison.measure), caption)
    curves = {setting: _make_curves(rows, setting) for setting in SETTINGS}
    figure = plots.draw_accuracy_by_row(curves, comparison.measure)
    if figure is not None:
        caption = f"Mean over seeds; with several seeds, a band of one standard deviation up and down.{few}"
        name, title = "accuracy_over_tasks", name_measure("Accuracy over tasks", comparison.measure)
        yield name, Picture.of(name, figure, title, caption, plots.make_legend(curves))


def _make_curves(rows: Sequence[Row], setting: str) -> dict[str, np.ndarray]:
    """Label -> (S, T) average accuracy on the tasks seen, without rows for which this setting was not measured."""
    curves = {
        row.label: np.array(
            [plots.compute_over_tasks(average_accuracy, run.record.get_matrix(setting)) for run in row.runs]
        )
        for row in rows
    }
    return {label: values for label, values in curves.items() if not np.isnan(values).all()}
