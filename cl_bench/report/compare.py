"""The comparison of finished runs: tables, paired tests, published numbers, pictures, one page."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cl_bench.core.errors import require
from cl_bench.core.record import SETTINGS
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.metrics.order_robustness import order_disparity
from cl_bench.report import plots
from cl_bench.report.page import Picture, Verdict, judge, render
from cl_bench.report.rows import MAIN, Orders, Row, find_runs, identify, make_orders, make_rows
from cl_bench.report.statistics import run_paired_tests
from cl_bench.report.tables import (
    ACCURACIES,
    COSTS,
    Table,
    format_markdown,
    make_accuracy_table,
    make_orders_table,
    make_pairs_table,
    make_published_table,
    make_stat_table,
    show_tables,
)


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        rows: best Class-IL accuracy first.
        orders: runs whose order robustness is known.
        pairs: paired tests, one line per pair of rows with enough seeds in common.
        published: label of a row, and a published number beside the row's mean.
        unfinished: run folders that were left out.
    """

    rows: list[Row]
    orders: list[Orders]
    pairs: pd.DataFrame
    published: list[tuple[str, Verdict]]
    unfinished: list[Path]


def compare(paths: Sequence[str]) -> Comparison:
    """Compare every finished run under ``paths``, each a run folder or a folder of them."""
    runs, unfinished = find_runs(paths)
    rows = make_rows(runs)
    published = [(row.label, verdict) for row in rows for verdict in judge(row.runs[0], row.mean)]
    pairs = run_paired_tests([(row.label, row.values(MAIN)) for row in rows])
    return Comparison(rows, make_orders(rows), pairs, published, unfinished)


def show(comparison: Comparison) -> None:
    """Print the comparison on standard output."""
    show_tables(make_tables(comparison, interval=True), _list_unfinished(comparison))


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
    _make_frame(comparison.rows).to_csv(out / "table.csv", index=False, lineterminator="\n")
    comparison.pairs.to_csv(out / "pairs.csv", index=False, lineterminator="\n")
    if comparison.orders:
        _make_orders_frame(comparison.orders).to_csv(out / "orders.csv", index=False, lineterminator="\n")
    (out / "table.md").write_text(_make_markdown(comparison, command), encoding="utf-8")
    page = render(
        "compare.html.j2",
        runs=sum(len(row.runs) for row in comparison.rows),
        rows=len(comparison.rows),
        command=command,
        tables=make_tables(comparison, interval=True),
        notes=_list_unfinished(comparison),
        pictures=pictures.values(),
    )
    (out / "compare.html").write_text(page, encoding="utf-8")


def make_tables(comparison: Comparison, interval: bool) -> list[Table]:
    """The tables of a comparison; with ``interval``, a second line in each cell holds its confidence interval."""
    shown = [
        make_accuracy_table(comparison.rows, interval),
        make_stat_table(comparison.rows, "Cost", COSTS, interval),
    ]
    if comparison.orders:
        shown.append(make_orders_table(comparison.orders, interval))
    if comparison.published:
        shown.append(make_published_table(comparison.published))
    if len(comparison.pairs):
        shown.append(make_pairs_table(comparison.pairs))
    return shown


def _list_unfinished(comparison: Comparison) -> list[str]:
    return [f"Left out because it has not finished: {folder}" for folder in comparison.unfinished]


def _make_markdown(comparison: Comparison, command: str) -> str:
    parts = [f"Made by `{command}`."]
    for table in make_tables(comparison, interval=False):
        parts += [f"## {table.title}", format_markdown(table), table.note]
    return "\n\n".join(parts + _list_unfinished(comparison)) + "\n"


def _make_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """``table.csv``: one line per row; for each number n, mean, std, ci95 and each seed's value; empty if unknown."""
    lines: list[dict[str, Any]] = []
    columns = [*ACCURACIES, *COSTS]
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
        for key in (column.key for column in columns):
            stat, values = row.stat(key), row.values(key)
            line |= {f"{key}_{part}": getattr(stat, part) for part in ("n", "mean", "std", "ci95")}
            line |= {f"{key}_seed{seed}": values.get(seed) for seed in seeds}
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


def _draw_pictures(comparison: Comparison) -> Iterator[tuple[str, Picture]]:
    rows = comparison.rows
    figure = plots.draw_dots(
        {row.label: row.values(MAIN).tolist() for row in rows},
        {row.label: row.stat(MAIN).ci95 for row in rows},
        "Class-IL average accuracy after the last task [%]",
    )
    if figure is not None:
        caption = (
            "One dot per seed, a bar at the mean, a line over its 95 % confidence interval. "
            "The axis does not always begin at 0."
        )
        yield "final_accuracy", Picture.of(figure, "Final accuracy", caption)
    figure = plots.draw_accuracy_by_row({setting: _make_curves(rows, setting) for setting in SETTINGS})
    if figure is not None:
        caption = "Mean over seeds; with several seeds, a band of one standard deviation up and down."
        yield "accuracy_over_tasks", Picture.of(figure, "Accuracy over tasks", caption)


def _make_curves(rows: Sequence[Row], setting: str) -> dict[str, np.ndarray]:
    """Label -> (S, T) average accuracy on the tasks seen, without rows for which this setting was not measured."""
    curves = {
        row.label: np.array(
            [plots.compute_over_tasks(average_accuracy, run.record.get_matrix(setting)) for run in row.runs]
        )
        for row in rows
    }
    return {label: values for label, values in curves.items() if not np.isnan(values).all()}
