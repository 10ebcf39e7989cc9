"""What TensorBoard and W&B share: they cannot take a line back, so each event is delivered to them once."""

import json
import sys
from pathlib import Path
from typing import Any

from cl_bench.loggers.jsonl import read_events
from cl_bench.system.atomic import write_text


class Delivered:
    """Remembers across kills how many events were delivered.

    Args:
        folder: the run folder.
        name: name of the file inside it that holds the count; it lies beside what was delivered, so that deleting
            one deletes both.

    Attributes:
        fresh: nothing was ever delivered from this folder.
        count: events 0 to ``count`` (exclusive) are delivered.
        note: what else the logger wants to find again.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._path = folder / name
        self.fresh = not self._path.exists()
        self.count = 0
        self.note: dict[str, Any] = {}
        if not self.fresh:
            state = json.loads(self._path.read_text())
            self.count, self.note = state["events"], state["note"]

    def list_due(self, number: int, event: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
        """What to deliver when event ``number`` comes: nothing if it was delivered, else it and those missed before.

        Events are missed when a run was begun without this logger or went on without it; ``metrics.jsonl`` has them.
        """
        if number < self.count:
            return []
        missed = read_events(self._folder, self.count, number)
        return [*enumerate(missed, self.count), (number, event)]

    def list_undelivered(self) -> list[tuple[int, dict[str, Any]]]:
        """What is in ``metrics.jsonl`` and was not delivered."""
        return [*enumerate(read_events(self._folder, self.count, sys.maxsize), self.count)]

    def mark(self, count: int, **note: Any) -> None:
        """Events 0 to ``count`` (exclusive) are delivered; atomic, so that a kill leaves the old state or the new."""
        self.count = count
        self.note = self.note | note
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps({"events": self.count, "note": self.note}))


def extract_curves(event: dict[str, Any]) -> dict[str, float]:
    """The curves of an ``epoch`` or ``task`` event by name, e.g. ``losses/ce`` and ``class_il/task_3``; no nulls."""
    if event["event"] not in ("epoch", "task"):
        return {}
    curves: dict[str, Any] = {}
    for key, value in event.items():
        if isinstance(value, dict):
            curves |= {f"{key}/{name}": item for name, item in value.items()}
        elif isinstance(value, list):
            curves |= {f"{key}/task_{task}": item for task, item in enumerate(value)}
        elif key not in ("event", "step", "task", "phase", "epoch"):
            curves[key] = value
    return {key: value for key, value in curves.items() if isinstance(value, int | float)}
