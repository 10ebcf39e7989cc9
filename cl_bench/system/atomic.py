"""Files that are there whole or not at all, and made by one process at a time."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def hold_lock(lock_file: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file; where another process holds it, say so and wait. The lock goes with its process, even killed.

    Args:
        lock_file: made if missing, and left behind: to remove it would let a third process in.
        waiting: what is waited for, told on standard error.

    Raises:
        OSError: the file could not be made or locked.
    """
    with lock_file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"cl_bench: waiting for another process, which {waiting}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
