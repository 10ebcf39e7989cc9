"""All runs below a folder, from their files only: finished, running, interrupted or failed.

cl_bench status RESULTS [--watch [SECONDS]]
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_bench.config.schema import select_comparable
from cl_bench.core.errors import require
from cl_bench.core.record import TITLES, get_measure
from cl_bench.loggers.pace import FILE as PACE
from cl_bench.report.folders import LeftOut, scan
from cl_bench.report.labels import make_labels

STATES = {"running": "cyan", "failed": "red", "interrupted": "yellow", "finished": "green"}
"""State -> its colour, in the order of the table."""

_WIDTH = 160  # columns if the output is no terminal
_TAIL = 4096  # bytes at the end of a file, more than its last line


@dataclass(frozen=True)
class Line:
    """A run: its row's label, its seed, its state, and its result, position or reason."""

    label: str
    seed: str
    state: str
    told: str
    folder: Path


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status: 0, or 2 if there is no run."""
    parser = argparse.ArgumentParser(
        prog="cl_bench status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RESULTS", help="a folder of runs")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=5.0, metavar="SECONDS", help="show it again and again (default: 5)"
    )
    options = parser.parse_args(arguments)
    seconds = options.watch
    require(seconds is None or seconds > 0, "--watch", expected="seconds above 0", got=seconds, fix="Leave it out.")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    while True:
        table = make_table(list_runs(options.folder))
        if seconds is not None:
            console.clear()
        console.print(table)
        if seconds is None:
            return 0
        time.sleep(seconds)


def list_runs(folder: Path) -> list[Line]:
    """A line per run below ``folder``; running ones first, then failed, interrupted and finished ones.

    Raises:
        ConfigError: the folder is not there, or has no run.
    """
    found = "a file" if folder.exists() else "not there"
    require(
        folder.is_dir(), "RESULTS", expected="a folder of runs", got=f"{folder}, which is {found}", fix="Name a folder."
    )
    finished, begun = scan(folder)
    require(
        bool(finished or begun),
        "RESULTS",
        expected="a folder with runs",
        got=f"no run in {folder}",
        fix="Name a folder of runs, e.g. results.",
    )
    summaries = {path: _read_summary(path) for path in finished}
    rows: dict[Path, dict[str, Any]] = {}  # folder of a row -> settings of its first run
    for path in [*finished, *begun]:
        if path.parent not in rows:
            rows[path.parent] = summaries.get(path) or _make_summary(path)
    labels = dict(zip(rows, make_labels(list(rows.values()))))
    lines = [_describe(path, labels[path.parent], summaries.get(path)) for path in [*finished, *begun]]
    return sorted(lines, key=lambda line: ([*STATES].index(line.state), line.label, line.folder))


def make_table(lines: Sequence[Line]) -> Table:
    """The table that is printed; its title counts the runs of each state."""
    counts = {state: sum(line.state == state for line in lines) for state in STATES}
    table = Table(title=", ".join(f"{count} {state}" for state, count in counts.items() if count))
    for name in ("run", "seed", "state", "result, position or reason"):
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(Text(line.label), line.seed, Text(line.state, style=STATES[line.state]), Text(line.told))
    return table


def _describe(folder: Path, label: str, summary: dict[str, Any] | None) -> Line:
    seed = folder.name.removeprefix("seed")
    if summary is not None:
        measure = get_measure(summary)
        of = "" if measure == "accuracy" else f" {measure}"
        accuracies = [(name, (summary[key] or {}).get("average_accuracy")) for key, name in TITLES.items()]
        told = ", ".join(f"{name}{of} {value:.2f}" for name, value in accuracies if value is not None)
        return Line(label, seed, "finished", told, folder)
    run = LeftOut.of(folder)
    if run.state == "interrupted" and (folder / "summary.json").exists():
        return Line(label, seed, "failed", "summary.json cannot be read", folder)
    return Line(label, seed, run.state, run.why or _describe_position(folder, running=run.state == "running"), folder)


def _describe_position(folder: Path, *, running: bool) -> str:
    """The last epoch that ended, counted from 1, and how fast it was."""
    found = _read_last_line(folder / PACE)
    if found is None:
        return "before the end of the first epoch"
    last, written = found
    told = f"task {_count(last, 'task', 'num_tasks')}, epoch {_count(last, 'epoch', 'epochs')}"
    if last.get("phase"):
        told += f" of phase {last['phase'] + 1}"
    if running and last.get("steps_per_second"):
        told += f", {last['steps_per_second']:.3g} steps/s"
    if running:
        told += f", {_format_age(time.time() - written)} ago"
    return told


def _count(line: dict[str, Any], key: str, of: str) -> str:
    return f"{line[key] + 1}/{line[of]}" if line.get(of) else f"{line[key] + 1}"


def _format_age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _read_last_line(path: Path) -> tuple[dict[str, Any], float] | None:
    """The last complete JSON object of a file of lines, and when the file was written; None if there is none."""
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            file.seek(max(0, facts.st_size - _TAIL), os.SEEK_SET)
            lines = file.read().splitlines()
    except OSError:  # a run that starts again removes it
        return None
    for line in reversed(lines):
        try:
            return json.loads(line), facts.st_mtime
        except ValueError:  # written at this moment, or left by a kill
            continue
    return None


def _read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json`` of a finished run, without the digest of its data; None if it is damaged."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        summary["comparable"].pop("data", None)  # a run that is not finished does not know it
        return summary | {key: summary[key] for key in ("experiment", "name", "fingerprint", "class_il", "task_il")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_summary(folder: Path) -> dict[str, Any]:
    """What the files of an unfinished run say of its settings, with the keys of ``summary.json``."""
    name, _, fingerprint = folder.parent.name.rpartition("-")
    summary = {"experiment": folder.parent.parent.name, "name": name, "fingerprint": fingerprint, "label": None}
    try:
        config = yaml.load(
            (folder / "config.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        evaluate_on = config["trainer"]["evaluate_on"]
        return summary | {"scale": config["scale"], "evaluate_on": evaluate_on, "comparable": select_comparable(config)}
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return summary | {"scale": None, "evaluate_on": "test", "comparable": {}}
