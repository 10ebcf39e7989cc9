"""What a run measured: the accuracy matrices of both settings and the costs, with JSON and CSV."""

import csv
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = ("class_il", "task_il")
TITLES = {"class_il": "Class-IL", "task_il": "Task-IL"}
"""The settings as they are written in tables and plots."""

SCHEMA = 1
"""The ``schema`` of ``summary.json`` that this program writes and reads."""

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
class Cost:
    """The costs of a run; None = could not be measured.

    ``capacity`` is the number of parameters relative to the network after the first task, or the method's own count.
    ``method_bytes`` is what the method stores for old tasks beside parameters and buffer.
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


@dataclass
class Record:
    """Everything a run measured."""

    class_il: Matrix
    task_il: Matrix
    cost: Cost = field(default_factory=Cost)

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

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, None for nan."""
        matrices = {
            s: {
                "correct": replace_non_finite(self.get_matrix(s).correct.tolist()),
                "count": self.get_matrix(s).count.tolist(),
            }
            for s in SETTINGS
        }
        return matrices | {"cost": asdict(self.cost)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """The inverse of :meth:`to_json`."""
        class_il, task_il = (
            Matrix(np.array(data[s]["correct"], dtype=float), np.array(data[s]["count"])) for s in SETTINGS
        )
        return cls(class_il, task_il, Cost(**data["cost"]))

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
                            count = int(matrix.count[task])
                            writer.writerow([setting, row, task, int(correct), count, round(100 * correct / count, 4)])


def replace_non_finite(value: Any) -> Any:
    """The value with None for every nan and infinity, which JSON does not have; in dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
