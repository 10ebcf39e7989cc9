"""One picture of the open ends of memory tokens, from finished runs: docs/methods/memory_vit.md.

    python scripts/plot_memory.py [RUN_OR_FOLDER ...] [--out results/mini/memory_vit_open/open_ends.png]

Final accuracy against the number of memory tokens of a task, against the number that is read, and with exemplars; and
what each task gains if it sees the memories of earlier ones. Dots are seeds, lines join their means. Rows that are not
there yet are left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_bench.core.record import SETTINGS, TITLES
from cl_bench.report.plots import COLOURS, open_frame, render_png
from cl_bench.report.rows import Row, find_runs, make_rows

MINI = Path("results/mini")
RECORDS = [MINI / "pretrained/records/memory_vit_cifar100_10split", MINI / "memory_vit_open/records"]
USUAL = {"backbone.memory": 5, "backbone.attention": "extension", "backbone.reads": None, "buffer.capacity": 0}
"""The choices of the row that the others are compared with; each of them differs in one."""

USUAL |= {"backbone.class_token": True, "method.rehearsal": "all"}
HEAD = USUAL | {"backbone.memory": 0, "backbone.class_token": False}


def choose(row: Row) -> dict[str, Any]:
    """What a row chooses; a fingerprint leaves out keys that are at their default."""
    comparable = row.runs[0].summary["comparable"]
    return {key: comparable.get(key, usual) for key, usual in USUAL.items()}


def find_series(rows: Sequence[Row], key: str, usual: dict[str, Any]) -> dict[Any, Row]:
    """The rows that differ from ``usual`` in one key at most, by their value of it, in ascending order."""
    found = {choose(row)[key]: row for row in rows if choose(row) | {key: usual[key]} == usual}
    return dict(sorted(found.items(), key=lambda item: str(item[0]).zfill(3)))


def draw_accuracies(axes: Axes, series: dict[str, Row], head: Row | None) -> None:
    """Final accuracy of each row in both settings; a dashed line is the head alone."""
    for setting in SETTINGS:
        colour, means = COLOURS[setting], []
        for x, row in enumerate(series.values()):
            values = row.values(f"{setting}.average_accuracy").tolist()
            axes.plot([x] * len(values), values, "o", color=colour, ms=4, alpha=0.5, mew=0)
            means.append(np.mean(values))
        axes.plot(means, "_-", color=colour, ms=12, mew=2, label=TITLES[setting])
        if head is not None:
            axes.axhline(head.mean(setting, "average_accuracy") or 0.0, color=colour, ls="--", lw=1)
    axes.set_xticks(range(len(series)), list(series))
    axes.set(xlim=(-0.5, len(series) - 0.5), ylim=(0, 80))


def draw_gain(axes: Axes, extension: Row, concatenation: Row) -> None:
    """Task-IL accuracy with extension minus that without, on each task, after the last task.

    No task is forgotten, so it is what the task learned; a pair of runs has the same seed.
    """
    pairs = zip(extension.runs, concatenation.runs, strict=True)
    gains = np.stack([a.record.task_il.accuracy[-1] - b.record.task_il.accuracy[-1] for a, b in pairs])
    tasks = np.arange(1, gains.shape[1] + 1)
    for gain in gains:
        axes.plot(tasks, gain, "o", color=COLOURS["task_il"], ms=4, alpha=0.5, mew=0)
    axes.plot(tasks, gains.mean(axis=0), "_-", color=COLOURS["task_il"], ms=12, mew=2)
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set(title=f"extension minus concatenation: {gains.mean():+.1f} on average", xticks=tasks)


def draw(rows: Sequence[Row]) -> Figure:
    """The four panels."""
    figure = Figure((10, 7), layout="constrained")
    (cells, reads), (gain, rehearsal) = figure.subplots(2, 2)
    head = next((row for row in rows if choose(row) == HEAD), None)
    draw_accuracies(cells, {str(m): row for m, row in find_series(rows, "backbone.memory", USUAL).items()}, head)
    cells.set(title="number of memory tokens", xlabel="tokens of a task in each layer")
    read = find_series(rows, "backbone.reads", USUAL)
    named = {f"all {USUAL['backbone.memory']}" if k is None else str(k): row for k, row in read.items()}
    draw_accuracies(reads, named, head)
    reads.set(title="top-k reads", xlabel="tokens that an image reads in each layer")
    modes = find_series(rows, "backbone.attention", USUAL)
    if len(modes) > 1:
        draw_gain(gain, modes["extension"], modes["concatenation"])
    gain.set(xlabel="task", ylabel="Task-IL, what a task gains [points]")
    kinds: list[dict[str, Any]] = [
        {"buffer.capacity": 0},
        {"buffer.capacity": 100, "method.rehearsal": "new"},
        {"buffer.capacity": 100},
    ]
    by_kind = zip(("none", "100, new tokens", "100, all tokens"), kinds)
    found = {name: row for name, kind in by_kind for row in rows if choose(row) == USUAL | kind}
    draw_accuracies(rehearsal, found, head)
    rehearsal.set(title="exemplars beside memory tokens", xlabel="exemplars, and what they train")
    for axes in (cells, reads, rehearsal):
        axes.set_ylabel("final accuracy [%]")
    for axes in (cells, reads, gain, rehearsal):
        open_frame(axes)
    cells.plot([], [], "--", color="0.4", lw=1, label="the head alone")
    cells.legend(frameon=False, loc="center right")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", default=list(map(str, RECORDS)), metavar="RUN_OR_FOLDER")
    parser.add_argument("--out", type=Path, default=MINI / "memory_vit_open/open_ends.png")
    options = parser.parse_args(arguments)
    options.out.write_bytes(render_png(draw(make_rows(find_runs(options.runs)[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
