"""What every dashboard shows of a run: names, values and axes of its series, its name and group, its files.

The live loggers and ``cl_bench export`` use the same code, so that a run looks the same either way. Tasks and epochs
are counted from 1 here, because people read these axes.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cl_bench.core.record import SETTINGS, Curve, Matrix, get_measure, name_measure, name_precision
from cl_bench.loggers.base import RunInfo
from cl_bench.loggers.delivered import Event
from cl_bench.loggers.jsonl import read_events
from cl_bench.metrics.accuracy import average_accuracy, average_incremental_accuracy, learning_accuracy
from cl_bench.metrics.anytime import anytime_average_accuracy
from cl_bench.metrics.base import is_defined
from cl_bench.metrics.forgetting import forgetting
from cl_bench.metrics.transfer import backward_transfer

AXES = ("step", "epoch", "task")
"""Optimizer steps so far; epochs so far; the task that is being learned, or was learned last."""

SERIES = {"lr": "step", "loss": "step", "losses/*": "step"}
SERIES |= {f"sample_{setting}{kind}/*": "step" for setting in SETTINGS for kind in ("", "_tasks")}
SERIES |= {f"{setting}{kind}/*": "task" for setting in SETTINGS for kind in ("", "_tasks")}
"""Names of series -> the axis that they are drawn over. No name belongs to two entries."""

METRICS = (average_accuracy, average_incremental_accuracy, forgetting, backward_transfer, learning_accuracy)
"""Computed after every task, from the rows so far."""

FILES = ("report.html", "config.yaml", "summary.json", "accuracy_matrix.csv", "average_precision.csv")
"""Files of a run folder that are stored with the run, if they are there."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST_SECRET = 8  # a shorter one may be an ordinary word or number
_LONGEST_NAME = 128  # characters, what W&B accepts


class Point(NamedTuple):
    """The position on each of :data:`AXES`, and the values of the series there."""

    axes: dict[str, int]
    values: dict[str, float]


class Series:
    """Turns the events of a run into points of series.

    A metric after a task needs the rows of all earlier tasks. So this object remembers them; if it has not seen the
    events before the one that it is asked about, it reads them from ``metrics.jsonl``.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._next: int = 0  # the number of the event that it expects
        self._epochs: int = 0
        self._forget()

    def extract(self, number: int, event: Event) -> Point | None:
        """The point of event ``number``; None if it has no value."""
        if number != self._next:
            self._forget()
            for earlier in read_events(self._folder, 0, number):
                self._read(earlier)
        self._next = number + 1
        measure = get_measure(event)
        found = {name_measure(name, measure): value for name, value in self._read(event).items()}
        values = {name: value for name, value in found.items() if value is not None and value == value}
        axes = {"step": event["step"], "epoch": self._epochs, "task": event.get("task", -1) + 1}
        return Point(axes, values) if values else None

    def _forget(self) -> None:
        self._next, self._epochs = 0, 0
        self._rows: dict[str, dict[int, list[float]]] = {setting: {} for setting in SETTINGS}
        self._curves = {setting: Curve([]) for setting in SETTINGS}

    def _read(self, event: Event) -> dict[str, float | None]:
        reader = {"epoch": self._read_epoch, "task": self._read_task, "sample": self._read_sample}.get(event["event"])
        return reader(event) if reader else {}

    def _read_epoch(self, event: Event) -> dict[str, float | None]:
        self._epochs += 1
        return {"lr": event.get("lr"), "loss": event.get("loss")} | _name("losses", event["losses"].items())

    def _read_task(self, event: Event) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        task = event["task"]
        for setting in SETTINGS:
            rows = self._rows[setting]
            rows[task] = _to_floats(event[setting])
            matrix = Matrix.from_accuracy([rows.get(i, [math.nan] * (task + 1)) for i in range(task + 1)])
            defined = [metric for metric in METRICS if is_defined(metric, event.get("recurring_classes", False))]
            found = {metric.__name__: metric(matrix) for metric in defined}
            if self._curves[setting].step:
                found[anytime_average_accuracy.__name__] = anytime_average_accuracy(self._curves[setting])
            values |= _name(setting, found.items()) | _name_tasks(setting, event[setting])
        return values | _name("class_il", name_precision(event.get("average_precision", [])).items())

    def _read_sample(self, event: Event) -> dict[str, float | None]:
        values: dict[str, float | None] = {}
        for setting in SETTINGS:
            row, curve = event[f"sample_{setting}"], self._curves[setting]
            curve.count += [100] * (len(row) - len(curve.count))  # accuracies in percent, as of 100 images
            curve.add(event["step"], event["task"], _to_floats(row))
            values[f"sample_{setting}/average_accuracy"] = event[f"sample_{setting}_average"]
            values |= _name_tasks(f"sample_{setting}", row)
        return values


def _to_floats(row: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in row]


def _name(prefix: str, values: Iterable[tuple[str, float | None]]) -> dict[str, float | None]:
    return {f"{prefix}/{name}": value for name, value in values}


def _name_tasks(setting: str, row: list[float | None]) -> dict[str, float | None]:
    return _name(f"{setting}_tasks", ((f"task_{task}", value) for task, value in enumerate(row, start=1)))


def flatten_summary(summary: dict[str, Any]) -> dict[str, float]:
    """The known numbers of ``summary.json`` for a table of runs, e.g. ``class_il/forgetting``."""
    measure = get_measure(summary)
    return {
        f"{group}/{name_measure(key, measure)}": value
        for group in (*SETTINGS, "cost")
        for key, value in (summary.get(group) or {}).items()
        if value is not None
    }


def make_config(run: RunInfo) -> dict[str, Any]:
    """The configuration, and what tells a run from others: fingerprint, label, data and class order; no secrets."""
    identity = {"fingerprint": run.fingerprint, "label": run.label, "data": run.data, "class_order": run.class_order}
    return hide_secrets(run.config | identity)


def make_name(run: RunInfo) -> str:
    """The name of a run: what was typed, and its seed."""
    return _join(run.name, run.label, end=f"seed {run.seed}")


def make_group(run: RunInfo) -> str:
    """The group of a run: its row, so that a dashboard averages over seeds."""
    return _join(run.experiment, run.name, run.label, end=run.fingerprint)


def _join(*parts: str, end: str) -> str:
    return " ".join(filter(None, parts))[: _LONGEST_NAME - 1 - len(end)] + f" {end}"


def write_files(source: Path, target: Path) -> list[Path]:
    """Copy :data:`FILES` of a run folder, without secrets, into the folder ``target``; returns the copies."""
    copies = []
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            text = (source / name).read_text(encoding="utf-8")
            (target / name).write_text(hide_secrets(text), encoding="utf-8")
            copies.append(target / name)
    return copies


def list_pictures(folder: Path, summary: dict[str, Any]) -> dict[str, Path]:
    """The pictures of the report by name: heat maps with numbers, confusion matrix, curves."""
    measure = get_measure(summary)
    return {name_measure(path.stem, measure): path for path in sorted((folder / "plots").glob("*.png"))}


def hide_secrets(value: Any) -> Any:
    """The configuration with ``***`` for secrets of the environment that it contains."""
    if isinstance(value, dict):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_secrets(item) for item in value]
    if isinstance(value, str):
        for name, secret in os.environ.items():
            if _SECRET_NAME.search(name) and len(secret) >= _SHORTEST_SECRET:
                value = value.replace(secret, "***")
    return value
