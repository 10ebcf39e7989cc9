"""The results of the benchmark: a table on the terminal, JSON, a table in Markdown, a picture."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from speed.common import Row

COLUMNS = ("part", "what", "median", "min - max", "wanted", "", "measured", "note")
SHOWN = 6
"""Columns that fit on a terminal; the rest was printed while it was measured, and is in the Markdown table."""


def format_cells(row: Row) -> list[str]:
    """A row as text."""
    sides = ", ".join(f"{name} {_format_briefly(values, row)}" for name, values in row.sides.items())
    mark = {None: "", True: "yes", False: "NO"}[row.reached]
    return [
        row.part, row.what, f"{_format_number(row.median)} {row.unit}",
        f"{_format_number(min(row.values))} - {_format_number(max(row.values))}",
        _format_goal(row), mark, sides, row.note,
    ]  # fmt: skip


def show(rows: list[Row], failures: dict[str, str], facts: dict[str, Any]) -> None:
    """The table on the terminal."""
    table = Table(title=_make_title(facts))
    for column in COLUMNS[:SHOWN]:
        table.add_column(column, overflow="fold", justify="right" if column in ("median", "min - max") else "left")
    for row in rows:
        table.add_row(*format_cells(row)[:SHOWN])
    console = Console()
    console.print(table)
    for part, reason in failures.items():
        console.print(f"{part}: {reason}", highlight=False)


def write_json(path: Path, rows: list[Row], failures: dict[str, str], facts: dict[str, Any]) -> None:
    """Every repetition of every row, versions and hardware."""
    listed = [asdict(row) | {"median": row.median, "reached": row.reached} for row in rows]
    content = {"facts": facts, "rows": listed, "not_measured": failures}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_all(folder: Path, rows: list[Row], failures: dict[str, str], facts: dict[str, Any]) -> None:
    """``benchmark.json``, ``table.md`` and ``benchmark.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "benchmark.json", rows, failures, facts)
    lines = [
        "# Speed", "",
        "Made by `python scripts/benchmark.py --out results/benchmark` (`make bench`). " + _make_title(facts) + ".",
        "Medians over repetitions in turn, the smallest and the largest; ratios are taken repetition by repetition.",
        "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in format_cells(row)) + " |" for row in rows), "",
        *(f"- {part}: {reason}" for part, reason in failures.items()),
    ]  # fmt: skip
    (folder / "table.md").write_text("\n".join(lines).rstrip() + "\n")
    draw(folder / "benchmark.png", rows, facts)


def draw(path: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    """Bars of the ratios, each with its goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "loop": ("our loop as a part of a bare torch step", [r for r in rows if r.part == "loop"]),
        "avalanche": ("images a second, ours / Avalanche's", [r for r in rows if r.part == "avalanche"]),
        "pieces": ("pieces, ours over image by image", [r for r in rows if r.part in ("data", "buffer")]),
        "sequence": ("task 50 over task 1", [r for r in rows if r.part in ("sequence", "memory") and r.unit == "x"]),
    }
    drawn = {name: panel for name, panel in panels.items() if panel[1]}
    if not drawn:
        return
    heights = [len(panel[1]) + 1.6 for panel in drawn.values()]
    figure, axes = plt.subplots(
        len(drawn), 1, figsize=(9, 0.32 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (title, chosen) in zip(axes[:, 0], drawn.values()):
        _draw_bars(axis, title, chosen)
    figure.suptitle(f"{_make_title(facts)}\nthick: what is wanted; thin: smallest to largest", fontsize=8, color="0.4")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_bars(axis: Any, title: str, rows: list[Row]) -> None:
    positions = range(len(rows), 0, -1)
    colours = {None: "0.65", True: "tab:blue", False: "tab:red"}
    for position, row in zip(positions, rows):
        axis.barh(position, row.median, height=0.62, color=colours[row.reached])
        axis.plot([min(row.values), max(row.values)], [position, position], color="black", linewidth=1)
        wanted = [value for value in (row.least, row.most) if value is not None]
        for value in wanted:
            axis.plot([value, value], [position - 0.42, position + 0.42], color="black", linewidth=2)
        axis.annotate(f"  {_format_number(row.median)}", (max(*row.values, *wanted), position), va="center", fontsize=8)
    axis.set_yticks(list(positions), [row.what for row in rows], fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlim(0, 1.12 * max(max(*row.values, row.least or 0, row.most or 0) for row in rows))
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _make_title(facts: dict[str, Any]) -> str:
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"GPU: {facts['gpu'] or 'none'}, torch {facts['packages']['torch']}"
    )


def _format_goal(row: Row) -> str:
    if row.least is not None:
        return f"at least {row.least:g}"
    return f"at most {row.most:g}" if row.most is not None else ""


def _format_number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _format_briefly(values: list[float], row: Row) -> str:
    middle = sorted(values)[len(values) // 2]
    return f"{middle:.0f} MiB" if row.part == "memory" else f"{_format_number(1e3 * middle)} ms"
