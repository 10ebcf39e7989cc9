"""Shared by the dashboards: they cannot remove a line, so each event is delivered to them only once."""

import json
import sys
from pathlib import Path
from typing import Any

from cl_bench.loggers.jsonl import read_events
from cl_bench.system.atomic import write_text

Event = dict[str, Any]
"""A line of ``metrics.jsonl``."""


class Delivered:
    """Stores how many events were delivered, also if the process is killed.

    Args:
        folder: the run folder.
        name: name of the file inside it with the count; it is in the same folder as the delivered data, so that both
            are deleted together.

    Attributes:
        fresh: whether nothing was ever delivered from this folder.
        count: events 0 to ``count`` (exclusive) are delivered.
        note: other values that the logger stores.
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

    def list_due(self, number: int, event: Event) -> list[tuple[int, Event]]:
        """The events to deliver when event ``number`` arrives: none if it was delivered, else it and those missed.

        Events are missed while a run has no such logger; ``metrics.jsonl`` has them.
        """
        if number < self.count:
            return []
        missed = read_events(self._folder, self.count, number)
        return [*enumerate(missed, self.count), (number, event)]

    def list_undelivered(self) -> list[tuple[int, Event]]:
        """The events in ``metrics.jsonl`` that were not delivered."""
        return [*enumerate(read_events(self._folder, self.count, sys.maxsize), self.count)]

    def mark(self, count: int, **note: Any) -> None:
        """Store that events 0 to ``count`` (exclusive) are delivered; a kill leaves the old state or the new one."""
        self.count = count
        self.note = self.note | note
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps({"events": self.count, "note": self.note}))
