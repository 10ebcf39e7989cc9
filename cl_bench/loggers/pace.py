"""``pace.jsonl``: how fast each epoch went. Times stand in a file of their own, which a resumed run has otherwise."""

import json
import time
from typing import Any, TextIO

from cl_bench.loggers.base import Logger, Progress, RunInfo

FILE = "pace.jsonl"
"""Name of the file in the run folder."""


class Pace(Logger):
    """Writes a line an epoch: ``task``, ``phase``, ``epoch``, ``step`` and ``steps_per_second``.

    Counted from the end of the first step that this process took of the epoch, so that what is done once (compiling,
    capturing) is left out where it is done in the first step; null where there is no second one. The loop has waited
    for the device when an epoch ends. An epoch that a kill has cut off and that was learned again stands there for as
    often as it ended.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._steps, self._began = 0, 0.0

    def start(self, run: RunInfo) -> None:
        """Open the file at its end."""
        self._file = (run.folder / FILE).open("a", buffering=1)

    def log_step(self, progress: Progress) -> None:
        """Count the step."""
        if not self._steps:
            self._began = time.perf_counter()
        self._steps += 1

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Write the rate of an epoch."""
        if event["event"] == "epoch":
            seconds, steps = time.perf_counter() - self._began, self._steps - 1
            line = {key: event[key] for key in ("task", "phase", "epoch", "step")}
            line["steps_per_second"] = round(steps / seconds, 3) if steps > 0 and seconds > 0 else None
            assert self._file is not None
            self._file.write(json.dumps(line) + "\n")
        self._steps = 0

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
