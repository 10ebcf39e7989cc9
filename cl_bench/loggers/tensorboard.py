"""Curves for TensorBoard, in ``<run folder>/tensorboard``."""

import os
import time
from typing import Any, BinaryIO

from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.dashboard import Series
from cl_bench.loggers.delivered import Delivered, Event

FOLDER = "tensorboard"
"""Name of the folder inside the run folder."""

EVENTS = "events.out.tfevents.cl_bench"
"""Name of the one file in it; TensorBoard looks for ``tfevents`` in a name."""


class TensorBoard(Logger):
    """Writes the series of :mod:`~cl_bench.loggers.dashboard` over the optimizer steps: TensorBoard has no other axis.

    Torch's ``SummaryWriter`` starts a new file in every process, and TensorBoard reads files in the order of their
    names, which depends on the clocks of the machines. Here all processes of a run append to one file. Its length is
    stored after each event, and what a kill left after that is cut off: no point appears twice, none is missing.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None

    def start(self, run: RunInfo) -> None:
        """Cut the file back to the last delivered event."""
        self._delivered = Delivered(run.folder, f"{FOLDER}/delivered.json")
        path = run.folder / FOLDER / EVENTS
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, min(path.stat().st_size, self._delivered.note.get("bytes", 0)))
        self._file = path.open("ab")
        self._records = _Records(self._file)
        self._series = Series(run.folder)

    def log_event(self, number: int, event: Event) -> None:
        """Add the points of the event, unless they were delivered."""
        self._write(self._delivered.list_due(number, event))

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Add the events that were missed, and close the file."""
        if self._file is None or self._file.closed:
            return
        try:
            if status == "finished":
                self._write(self._delivered.list_undelivered())
                self._delivered.mark(self._delivered.count, finished=True)
        finally:
            self._file.close()

    def _write(self, events: list[tuple[int, Event]]) -> None:
        assert self._file is not None
        for due, content in events:
            if point := self._series.extract(due, content):
                self._records.add(point.axes["step"], point.values)
            self._file.flush()  # before the mark: what is marked is written
            self._delivered.mark(due + 1, bytes=self._file.tell())


class _Records:
    """TensorBoard's records, written to an open file; the only part that needs TensorBoard."""

    def __init__(self, file: BinaryIO) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter(file)
        if file.tell() == 0:
            self._write(file_version="brain.Event:2")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each series."""
        tagged = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=tagged))

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
