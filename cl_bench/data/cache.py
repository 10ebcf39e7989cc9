"""Arrays that are made once, by one process, and mapped into the memory of all that want them."""

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
    """An array and what is known of it.

    Attributes:
        array: (N, ...) uint8, memory-mapped from its file; writing to it changes the memory only.
        checksum: of its bytes (SHA-256).
        facts: what was said of it when it was made.
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
    """The array in ``file``, made there first if it is not there or not whole.

    The file is written beside its place and takes it when it is whole; its size and checksum are in a note beside it
    (``.json``). A file that was written to since then, or copied, is read once to compare its checksum; otherwise only
    its size and time are looked at. Another process that wants the same file waits until it is made (``.lock``).

    Args:
        file: where it lies; its folder is there.
        most: rows that there may be; their room is taken at once, so that a full disk is told of before the work.
        shape: of a row.
        rows: makes the rows, uint8 each; its errors are passed on.
        describe: the array -> facts to keep beside it, as plain JSON values.

    Raises:
        OSError: there is no room for it, or its folder may not be written to.
    """
    note = file.with_suffix(".json")
    if (found := _load_whole(file, note)) is not None:
        return found
    with hold_lock(file.with_suffix(".lock"), f"makes {file}"):
        if (found := _load_whole(file, note)) is None:
            if note.exists():
                print(f"cl_bench: {file} is damaged; it is made again", file=sys.stderr)
            found = _make(file, note, most, shape, rows, describe)
    return found


def _load_whole(file: Path, note: Path) -> Stored | None:
    """What the file holds, None where it is not what its note says, or where there is no note."""
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
            with suppress(OSError):  # where it may not be written to, it is compared every time
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
            os.fsync(out.fileno())  # before the note: a power cut must not leave a whole note of an empty file
        facts = describe(_map_file(partial, (count, *shape)))
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)  # where the disk is full, give its room back
        raise
    made = Stored(_map_file(file, (count, *shape)), checksum.hexdigest(), facts)
    known = {"shape": made.array.shape, "checksum": made.checksum, "changed": file.stat().st_mtime_ns, "facts": facts}
    write_text(note, json.dumps(known) + "\n")
    return made


def _map_file(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    # copy-on-write: torch wants a tensor that could be written to, the file never is
    return np.memmap(file, dtype=np.uint8, mode="c", shape=shape)
