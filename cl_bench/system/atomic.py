"""Files that are written whole or not at all, and by one process at a time."""

import fcntl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing, even if the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def hold_lock(lock_file: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold a lock file. The lock ends with its process, even if that is killed.

    Args:
        lock_file: created if missing, and not removed: to remove it would let a third process in.
        waiting: what another process is doing that holds the lock; it is printed, and this process waits. None to
            refuse instead of waiting.

    Raises:
        BlockingIOError: another process holds the lock, and ``waiting`` is None.
        OSError: the file could not be created or locked.
    """
    with lock_file.open("a") as lock:
        try:
            _lock_at_once(lock)
        except BlockingIOError:
            if waiting is None:
                raise
            print(f"cl_bench: waiting for another process, which {waiting}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_at_once(lock: TextIO) -> None:
    for _ in range(3):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)  # is_locked() of another process, such as `cl_bench status`, holds it for a moment
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(lock_file: Path) -> bool:
    """Whether a process holds a lock file, which is neither made nor changed."""
    try:
        with lock_file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it is not ours to read
        return False
    return False
