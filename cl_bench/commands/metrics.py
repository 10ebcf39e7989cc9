"""Metrics for a finished run, computed from its accuracy matrices and curves, without training."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cl_bench.config.build import load_metric
from cl_bench.config.schema import CONFIGS
from cl_bench.core.errors import require
from cl_bench.core.record import SETTINGS, TITLES, replace_non_finite, takes_curve
from cl_bench.metrics.base import RECURRING, is_defined
from cl_bench.report.page import Run, format_number
from cl_bench.runs import run_dir as files
from cl_bench.runs.run import show_result

KEY = "--add"


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigError: the run, a name or what the run recorded does not fit.
    """
    parser = argparse.ArgumentParser(prog="cl_bench metrics", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(KEY, nargs="+", action="extend", required=True, metavar="NAME", help="one of the metrics below")
    parser.epilog = f"metrics: {', '.join(list_metrics())}"
    options = parser.parse_args(arguments)
    added = add_metrics(options.run, options.add)
    for name in dict.fromkeys(options.add):
        if name not in added:
            print(f"{name}: {options.run / 'summary.json'} has it already", file=sys.stderr)
    for name, values in added.items():
        text = ", ".join(f"{TITLES[setting]} {format_number(values[setting])}" for setting in SETTINGS)
        print(f"{name}: {text}; added to {options.run / 'summary.json'}", file=sys.stderr)
    if added:
        show_result(options.run, Run.read(options.run).summary, report=(options.run / "report.html").exists())
    return 0


def list_metrics() -> dict[str, str]:
    """The dotted path of every metric in ``configs/metrics``, by name."""
    found: dict[str, str] = {}
    for path in sorted((CONFIGS / "metrics").glob("*.yaml")):
        found |= yaml.safe_load(path.read_text(encoding="utf-8"))
    found.pop("defaults", None)
    return dict(sorted(found.items()))


def add_metrics(folder: Path, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Add metrics to ``summary.json`` of a finished run; everything else in it stays.

    Returns:
        The new values by name and setting, in the metric's unit; without the names that the summary had.

    Raises:
        ConfigError: there is no finished run, no such metric, or the run did not record what the metric needs.
    """
    metrics = {name: _load(name) for name in names}
    Run.read(folder)  # before the lock, which would create the folder
    with files.lock_run_dir(folder), files.explain_write_errors(folder):
        run = Run.read(folder)
        new = {name: metric for name, metric in metrics.items() if name not in run.summary["class_il"]}
        added = {name: _compute(run, name, metric) for name, metric in new.items()}
        summary = dict(run.summary)
        for setting in SETTINGS:
            summary[setting] = run.summary[setting] | {name: values[setting] for name, values in added.items()}
        if added:
            files.write_json(folder / "summary.json", summary)
    return added


def _load(name: str) -> Callable[..., float]:
    known = list_metrics()
    close = difflib.get_close_matches(name, known, n=1)
    require(
        name in known,
        KEY,
        expected=f"one of the metrics {', '.join(known)}",
        got=name,
        fix=f"Did you mean {close[0]}?" if close else "Choose one of them.",
    )
    return load_metric(known[name], KEY, [])


def _compute(run: Run, name: str, metric: Callable[..., float]) -> dict[str, Any]:
    require(
        bool(run.record.curves) or not takes_curve(metric),
        KEY,
        expected="a metric of the accuracy matrix, since this run measured nothing while learning (no curve.csv)",
        got=name,
        fix="Run it with trainer.evaluate_every=100, which is a run of its own.",
    )
    require(
        is_defined(metric, run.summary.get("recurring_classes", False)),
        KEY,
        expected="a metric that is defined for this run",
        got=f"{name}, which is not: {RECURRING}",
        fix=f"Without {name} the command adds the others.",
    )
    values = {setting: replace_non_finite(run.record.compute(metric, setting)) for setting in SETTINGS}
    require(
        any(value is not None for value in values.values()),
        KEY,
        expected="a metric that is defined for this run",
        got=f"{name}, which is not: a single task, or a task that was not answered",
        fix=f"See its definition in cl_bench/metrics; without {name} the command adds the others.",
    )
    return values
