"""What a run measured: accuracy matrices and curves of both settings, and the costs, with JSON and CSV."""

import csv
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = ("class_il", "task_il")
TITLES = {"class_il": "Class-IL", "task_il": "Task-IL"}
"""The settings as they are written in tables and plots."""

SCHEMA = 1
"""The ``schema`` of ``summary.json`` that this program writes and reads."""

FAILURE = "failure.txt"
"""The file of a run folder that says why its run failed."""

BASELINE = -1
"""``after_task`` of the row measured before training."""


@dataclass
class Matrix:
    """R[i, j] = accuracy in percent on task j after training task i, for one setting.

    Attributes:
        correct: (T + 1, T) right predictions; the last row is for the untrained network. nan = not measured.
        count: (T,) images of each task.
    """

    correct: np.ndarray
    count: np.ndarray

    @classmethod
    def empty(cls, num_tasks: int) -> "Matrix":
        """A matrix without measurements yet."""
        return cls(np.full((num_tasks + 1, num_tasks), math.nan), np.zeros(num_tasks))

    @classmethod
    def from_accuracy(cls, rows: list[list[float]], baseline: list[float] | None = None) -> "Matrix":
        """A matrix from accuracies in percent: row i has tasks 0..i (or more), with 100 images per task."""
        num_tasks = len(rows)
        matrix = cls.empty(num_tasks)
        matrix.count[:] = 100.0
        for i, row in enumerate([*rows, baseline or []]):
            matrix.correct[i, : len(row)] = row
        return matrix

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.count)

    @property
    def accuracy(self) -> np.ndarray:
        """(T, T) accuracies in percent; nan = not measured."""
        return 100.0 * self.correct[:-1] / np.where(self.count > 0, self.count, math.nan)

    @property
    def baseline(self) -> np.ndarray:
        """(T,) accuracies in percent of the untrained network."""
        return 100.0 * self.correct[-1] / np.where(self.count > 0, self.count, math.nan)


@dataclass
class Curve:
    """The accuracy while learning, for one setting: E evaluations on a fixed sample of each task's images.

    Attributes:
        step: optimizer steps done before each evaluation.
        learning: the task that was being learned, or had just been learned.
        correct: for each evaluation, right predictions on the tasks 0 to ``learning``. nan = not answered.
        count: (T,) images asked of each task.
    """

    count: list[int]
    step: list[int] = field(default_factory=list)
    learning: list[int] = field(default_factory=list)
    correct: list[list[float]] = field(default_factory=list)

    @classmethod
    def from_accuracy(cls, learning: list[int], rows: list[list[float]]) -> "Curve":
        """A curve from accuracies in percent, with 100 images per task and one step between two evaluations."""
        return cls([100] * (max(learning) + 1), [*range(1, len(rows) + 1)], learning, rows)

    @property
    def num_tasks(self) -> int:
        """T."""
        return len(self.count)

    @property
    def accuracy(self) -> np.ndarray:
        """(E, T) accuracies in percent; nan = not answered, or not begun yet."""
        rows = np.full((len(self.step), self.num_tasks), math.nan)
        for row, correct in zip(rows, self.correct):
            row[: len(correct)] = correct
        count = np.array(self.count, dtype=float)
        return 100.0 * rows / np.where(count > 0, count, math.nan)

    def add(self, step: int, learning: int, correct: list[float]) -> None:
        """Enter an evaluation.

        It replaces one of the same task at the same step: after the last step of a task, the method closes the task.
        """
        if self.step and (self.step[-1], self.learning[-1]) == (step, learning):
            for column in (self.step, self.learning, self.correct):
                column.pop()
        self.step.append(step)
        self.learning.append(learning)
        self.correct.append(correct)


def takes_curve(metric: Callable[..., Any]) -> bool:
    """Whether a metric is a function of a :class:`Curve`, by its annotation, and not of a :class:`Matrix`."""
    return Curve in typing.get_type_hints(metric).values()


@dataclass
class Cost:
    """The costs of a run; None = could not be measured.

    ``capacity`` is the number of parameters relative to the network after the first task, or the method's own count.
    ``method_bytes`` is what the method stores for old tasks beside parameters and buffer. ``evaluate_seconds`` is for
    the accuracy matrices and other rules to answer by, ``curve_seconds`` for the curves.
    """

    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    samples_seen: int = 0
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    parameters: int | None = None
    parameters_trainable: int | None = None
    capacity: float | None = None
    buffer_bytes: int | None = None
    method_bytes: int | None = None
    energy_joules: float | None = None
    curve_seconds: float = 0.0


@dataclass
class Record:
    """Everything a run measured.

    Attributes:
        curves: by setting; empty if nothing was measured while learning.
        average_precision: in detection, after each task for ``all``, ``old`` and ``new`` classes: AP, AP50 and AP75 in
            percent; else empty.
    """

    class_il: Matrix
    task_il: Matrix
    cost: Cost = field(default_factory=Cost)
    curves: dict[str, Curve] = field(default_factory=dict)
    average_precision: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def empty(cls, num_tasks: int) -> "Record":
        """A record without measurements yet."""
        return cls(Matrix.empty(num_tasks), Matrix.empty(num_tasks))

    def get_matrix(self, setting: str) -> Matrix:
        """The matrix of ``class_il`` or ``task_il``."""
        return {"class_il": self.class_il, "task_il": self.task_il}[setting]

    def add(self, after_task: int, setting: str, correct: list[float], count: list[int]) -> None:
        """Enter one row: right predictions (nan = not measured) and images of each task."""
        matrix = self.get_matrix(setting)
        matrix.correct[after_task] = correct  # BASELINE = -1 is the last row
        matrix.count[:] = count

    def add_to_curve(self, step: int, learning: int, setting: str, correct: list[float], count: list[int]) -> None:
        """Enter one evaluation while learning, see :meth:`Curve.add`; ``count`` are the images asked of each task."""
        self.curves.setdefault(setting, Curve(count)).add(step, learning, correct)

    def compute(self, metric: Callable[..., float], setting: str) -> float:
        """A metric of one setting, from its matrix or its curve; nan if there is no curve."""
        if not takes_curve(metric):
            return metric(self.get_matrix(setting))
        return metric(self.curves[setting]) if setting in self.curves else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, None for nan."""
        matrices = {
            s: {
                "correct": replace_non_finite(self.get_matrix(s).correct.tolist()),
                "count": self.get_matrix(s).count.tolist(),
            }
            for s in SETTINGS
        }
        curves = {s: replace_non_finite(vars(curve)) for s, curve in self.curves.items()}
        detection = {"average_precision": replace_non_finite(self.average_precision)} if self.average_precision else {}
        return matrices | {"cost": asdict(self.cost), "curves": curves} | detection

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """The inverse of :meth:`to_json`."""
        class_il, task_il = (
            Matrix(np.array(data[s]["correct"], dtype=float), np.array(data[s]["count"])) for s in SETTINGS
        )
        curves = {s: Curve(**values) for s, values in data.get("curves", {}).items()}  # older records have none
        for curve in curves.values():
            curve.correct = [[math.nan if c is None else c for c in row] for row in curve.correct]
        return cls(class_il, task_il, Cost(**data["cost"]), curves, data.get("average_precision", []))

    def write_csv(self, path: Path) -> None:
        """Write ``accuracy_matrix.csv``: one line per setting, row and task, without entries that were not measured."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["setting", "after_task", "task", "correct", "count", "accuracy"])
            for setting in SETTINGS:
                matrix = self.get_matrix(setting)
                for row in [BASELINE, *range(matrix.num_tasks)]:
                    for task, correct in enumerate(matrix.correct[row]):
                        if not math.isnan(correct):
                            writer.writerow([setting, row, task, *_count(correct, int(matrix.count[task]))])

    def write_curve_csv(self, path: Path) -> None:
        """Write ``curve.csv``: a line per setting, evaluation and task; ``correct`` is empty if it was not answered."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["setting", "step", "learning", "task", "correct", "count", "accuracy"])
            for setting, curve in self.curves.items():
                for step, learning, row in zip(curve.step, curve.learning, curve.correct):
                    for task, (correct, count) in enumerate(zip(row, curve.count)):
                        known = ["", count, ""] if math.isnan(correct) else _count(correct, count)
                        writer.writerow([setting, step, learning, task, *known])

    def list_precision(self) -> dict[str, float]:
        """Average precision after the last task as metrics: ``AP_old``, ``AP50_old``, ...; empty if not measured."""
        return name_precision(self.average_precision)

    def write_precision_csv(self, path: Path) -> None:
        """Write ``average_precision.csv``: in detection, a line per task and ``all``, ``old`` or ``new`` classes."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.average_precision[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(replace_non_finite(self.average_precision))


def _count(correct: float, count: int) -> list[float]:
    """Right answers, a whole number (but AP times images), number of images, accuracy in percent."""
    whole = int(correct) if correct == int(correct) else correct
    return [whole, count, round(100 * correct / count, 4)]


def name_precision(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The rows of the last task in :attr:`Record.average_precision` as metrics: ``AP_old``, ``AP50_old``, ..."""
    last = [row for row in rows if row["after_task"] == rows[-1]["after_task"]]
    return {f"{key}_{row['classes']}": row[key] for row in last for key in row if key.startswith("AP")}


def get_measure(summary: Mapping[str, Any]) -> str:
    """The word for what a run or an event measured: ``accuracy``, or ``AP`` in detection; older records have none."""
    return summary.get("measure", "accuracy")


def name_measure(text: str, measure: str) -> str:
    """A text about accuracy in the words of a scenario that is measured by something else."""
    if measure == "accuracy":
        return text
    for word in ("accuracies", "accuracy"):
        text = text.replace(word, measure).replace(word.capitalize(), measure)
    return text


def replace_non_finite(value: Any) -> Any:
    """The value with None for every nan and infinity, which JSON does not have; in dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
