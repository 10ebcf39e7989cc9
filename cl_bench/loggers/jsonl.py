"""``metrics.jsonl``: the events of a run, one JSON object per line. It always exists; all else can be made from it."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from cl_bench.core.errors import ConfigError
from cl_bench.core.record import replace_non_finite
from cl_bench.loggers.base import Logger, RunInfo

METRICS = "metrics.jsonl"
"""Name of the file in the run folder."""


class JsonLines(Logger):
    """Writes ``metrics.jsonl``; line n is event n, also if the run was killed and events are logged again."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._ends: list[int] = []  # byte where each line ends: line n can be cut off without reading the file

    def start(self, run: RunInfo) -> None:
        """Open the file and remove what a kill left after the last complete line."""
        path = run.folder / METRICS
        path.touch()
        self._file = path.open("r+b")  # not "ab", which ignores where truncate() left the position
        self._ends = _find_line_ends(self._file)
        self._cut(len(self._ends))

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """Write the event as line ``number``, the last of the file, and force it to the disk."""
        assert self._file is not None
        if number > len(self._ends):
            raise ConfigError(
                self._file.name,
                expected=f"the {number} lines written before this run was stopped",
                got=f"{len(self._ends)} lines",
                fix="Restore the file, or start again with overwrite=true.",
            )
        self._cut(number)
        self._file.write(json.dumps(replace_non_finite(event), allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        # A checkpoint must never count events that a power cut removed from this file.
        os.fsync(self._file.fileno())
        self._ends.append(self._file.tell())

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _cut(self, lines: int) -> None:
        assert self._file is not None
        del self._ends[lines:]
        end = self._ends[-1] if self._ends else 0
        self._file.seek(end)
        self._file.truncate()


def read_events(folder: Path, first: int, stop: int) -> list[dict[str, Any]]:
    """The events ``first`` to ``stop`` (exclusive) of the run in ``folder``, if they were written."""
    path = folder / METRICS
    if first >= stop or not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for number, line in enumerate(file) if first <= number < stop]


def _find_line_ends(file: BinaryIO) -> list[int]:
    ends: list[int] = []
    end = 0
    for line in file:
        end += len(line)
        if not _is_whole(line):
            break
        ends.append(end)
    return ends


def _is_whole(line: bytes) -> bool:
    """Whether a line is complete (after a power cut it may also contain zeros)."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False
