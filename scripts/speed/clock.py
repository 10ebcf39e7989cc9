"""A logger that writes when a run's events came and how much memory the process held."""

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from cl_bench.loggers.base import Logger, RunInfo

FILE = "clock.json"
STATM = Path("/proc/self/statm")


class Clock(Logger):
    """Writes ``clock.json``: one object per event with ``event``, ``task``, ``seconds`` and ``read_resident_bytes``.

    The loop waits for the device before it logs an event, so times between events are right on a GPU, too.
    """

    def start(self, run: RunInfo) -> None:
        """Remember the folder."""
        self._path = run.folder / FILE
        self.notes: list[dict[str, Any]] = []

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Note one event."""
        now, bytes_now = time.perf_counter(), read_resident_bytes()
        self.notes.append(
            {
                "event": event["event"],
                "task": event["task"],
                "seconds": now,
                "step": event["step"],
                "resident_bytes": bytes_now,
            }
        )

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Write the file."""
        self._path.write_text(json.dumps(self.notes))


def read_resident_bytes() -> int | None:
    """Bytes of memory that the process holds now; None if the system does not say."""
    return int(STATM.read_text().split()[1]) * 4096 if STATM.exists() else None


def read_step_seconds(run: Path) -> list[float]:
    """Seconds of a step in each epoch but the first of the first task of the run in folder ``run``.

    Compiling, capturing and warming up happen once, in the first epoch.
    """
    notes = [note for note in json.loads((run / FILE).read_text()) if note["event"] == "epoch" and note["task"] == 0]
    return [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(notes)]
