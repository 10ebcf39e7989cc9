"""Arrays that one process creates once, and every process maps into its memory."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.system.atomic import hold_lock, write_text


@dataclass(frozen=True)
class Stored:
    """An array, its checksum, and facts about it.

    Attributes:
        array: (N, ...) uint8, memory-mapped from its file; writing to it does not change the file.
        checksum: SHA-256 of its bytes.
        facts: what ``describe`` returned when it was created.
    """

    array: np.ndarray
    checksum: str
    facts: dict[str, Any]


def load_or_make(
    file: Path,
    most: int,
    shape: tuple[int, ...],
    rows: Callable[[], Iterable[np.ndarray]],
    describe: Callable[[np.ndarray], dict[str, Any]],
) -> Stored:
    """The array in ``file``; it is created first if it is missing or damaged.

    The array is written to a temporary file, which is renamed when it is complete. A note beside it (``.json``) has its
    size and checksum. If the file was written to or copied since then, it is read once to compare its checksum;
    otherwise only its size and time are compared. Another process that needs the same file waits (``.lock``).

    Args:
        file: the path; its folder exists.
        most: largest number of rows. Their room is reserved at once, so that a full disk is reported before the work.
        shape: of a row.
        rows: yields the rows, each uint8; its errors are passed on.
        describe: the array -> facts to store beside it, as plain JSON values.

    Raises:
        OSError: there is no room for it, or its folder is not writable.
    """
    note = file.with_suffix(".json")
    if (found := _load_whole(file, note)) is not None:
        return found
    with hold_lock(file.with_suffix(".lock"), f"makes {file}"):
        if (found := _load_whole(file, note)) is None:
            if note.exists():
                print(f"cl_bench: {file} is damaged; it is created again", file=sys.stderr)
            found = _make(file, note, most, shape, rows, describe)
    return found


def _load_whole(file: Path, note: Path) -> Stored | None:
    """The content of the file; None if it differs from its note, or has no note."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        shape, checksum, facts = tuple(known["shape"]), known["checksum"], known["facts"]
        state = file.stat()
        if state.st_size != math.prod(shape):
            return None
        if state.st_mtime_ns != known["changed"]:
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != checksum:
                    return None
            with suppress(OSError):  # if it is not writable, the checksum is compared every time
                write_text(note, json.dumps(known | {"changed": state.st_mtime_ns}) + "\n")
        return Stored(_map_file(file, shape), checksum, facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(
    file: Path,
    note: Path,
    most: int,
    shape: tuple[int, ...],
    rows: Callable[[], Iterable[np.ndarray]],
    describe: Callable[[np.ndarray], dict[str, Any]],
) -> Stored:
    partial = file.with_suffix(".partial")
    count, checksum = 0, hashlib.sha256()
    try:
        with partial.open("wb") as out:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(out.fileno(), 0, most * math.prod(shape))
            for row in rows():
                content = np.ascontiguousarray(row, dtype=np.uint8).data
                out.write(content)
                checksum.update(content)
                count += 1
            out.flush()
            out.truncate(count * math.prod(shape))
            os.fsync(out.fileno())  # before the note: a power cut must not leave a complete note of an empty file
        facts = describe(_map_file(partial, (count, *shape)))
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)  # frees its room if the disk is full
        raise
    made = Stored(_map_file(file, (count, *shape)), checksum.hexdigest(), facts)
    known = {"shape": made.array.shape, "checksum": made.checksum, "changed": file.stat().st_mtime_ns, "facts": facts}
    write_text(note, json.dumps(known) + "\n")
    return made


def _map_file(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    # copy-on-write: torch needs a writable tensor, but the file must not change
    return np.memmap(file, dtype=np.uint8, mode="c", shape=shape)
