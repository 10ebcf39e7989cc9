"""``pace.jsonl``: the speed of each epoch. Times have their own file, since they differ in a resumed run."""

import json
import time
from typing import Any, TextIO

from cl_bench.loggers.base import Logger, Progress, RunInfo

FILE = "pace.jsonl"
"""Name of the file in the run folder."""


class Pace(Logger):
    """Writes one line per epoch: ``task``, ``phase``, ``epoch``, ``step`` and ``steps_per_second``.

    Beside them ``num_tasks`` and ``epochs``, the length of the sequence and of the phase, for ``cl_bench status``.

    The speed is measured from the end of the first step of the epoch in this process, so that compiling and capturing
    in the first step are not included; it is null if there is no second step. Measurements between two steps
    (``trainer.evaluate_every``) are not included either. When an epoch ends, the loop has waited for the device. An
    epoch that ended more than once, because of a kill, has as many lines.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._steps, self._began, self._latest = 0, 0.0, 0.0
        self._progress: Progress | None = None

    def start(self, run: RunInfo) -> None:
        """Open the file at its end."""
        self._file = (run.folder / FILE).open("a", buffering=1)

    def log_step(self, progress: Progress) -> None:
        """Count the step."""
        self._latest, self._progress = time.perf_counter(), progress
        if not self._steps:
            self._began = self._latest
        self._steps += 1

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Write the speed of an epoch, or leave out a measurement between two steps."""
        if event["event"] == "sample":
            self._began += time.perf_counter() - self._latest
            return
        if event["event"] == "epoch":
            seconds, steps = time.perf_counter() - self._began, self._steps - 1
            line = {key: event[key] for key in ("task", "phase", "epoch", "step")}
            line["steps_per_second"] = round(steps / seconds, 3) if steps > 0 and seconds > 0 else None
            line |= {key: getattr(self._progress, key, None) for key in ("num_tasks", "epochs")}
            assert self._file is not None
            self._file.write(json.dumps(line) + "\n")
        self._steps = 0

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
