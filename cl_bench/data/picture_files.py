"""The picture files of a folder; what is left out is counted."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.pictures import list_endings


@dataclass(frozen=True)
class PictureFile:
    """A file, with its size and its two times of change in nanoseconds, which change with its content."""

    path: str
    state: tuple[int, ...]


def _list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ConfigError(
            "root",
            expected=f"a folder {folder} with one folder of pictures per class",
            got=getattr(error, "strerror", None) or str(error),
            fix="Set scenario.source.root=PATH to the folder that contains train/ and test/.",
        ) from error


def _get_state(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The state of the file that the entry is or links to; None if there is no such file."""
    try:
        return entry.stat()
    except OSError:
        return None


def _skip_hidden(entry: os.DirEntry[str], left_out: Counter[str]) -> bool:
    if entry.name.startswith("."):  # .ipynb_checkpoints, ._1.png, .DS_Store
        left_out["whose names begin with a dot"] += 1
        return True
    return False


def list_classes(folder: Path, left_out: Counter[str]) -> list[str]:
    """The names of the class folders in ``folder``; other entries are counted in ``left_out``."""
    names = []
    for entry in _list_entries(folder):
        if _skip_hidden(entry, left_out):
            continue
        state = _get_state(entry)
        require(
            state is not None,
            "root",
            expected=f"class folders in {folder}",
            got=f"{entry.path}, a link that leads nowhere",
            fix="Fix the link or remove it.",
        )
        if state is not None and stat.S_ISDIR(state.st_mode):
            names.append(entry.name)
        else:
            left_out["beside the class folders"] += 1
    return names


def list_files(folder: Path, left_out: Counter[str]) -> list[PictureFile]:
    """The files that may be pictures, in the folder of a class and below, sorted by name; other entries are counted."""

    def find(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[PictureFile]:
        for entry in _list_entries(folder):
            if _skip_hidden(entry, left_out):
                continue
            state, ending = _get_state(entry), os.path.splitext(entry.name)[1].lower()
            if state is not None and stat.S_ISDIR(state.st_mode):
                here = (state.st_dev, state.st_ino)
                if here in above:
                    left_out["that link back to a folder above them"] += 1
                else:
                    yield from find(Path(entry.path), above | {here})
            elif state is not None and not stat.S_ISREG(state.st_mode):
                left_out["that are neither files nor folders"] += 1
            elif ending and ending not in list_endings():
                left_out[f"named *{to_text(ending)}"] += 1
            else:  # also a link that leads nowhere: it is reported with the damaged pictures
                times = () if state is None else (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                yield PictureFile(entry.path, times)

    resolved = folder.resolve()
    states = [os.stat(above) for above in (resolved, *resolved.parents)]
    return list(find(folder, frozenset((state.st_dev, state.st_ino) for state in states)))


def find_file(path: Path) -> PictureFile:
    """The file at a path that a list names; one that is not there is reported with the damaged pictures."""
    try:
        state = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return PictureFile(str(path), ())
    return PictureFile(str(path), (state.st_size, state.st_mtime_ns, state.st_ctime_ns))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without empty ones; bytes that are not UTF-8 are kept, as in a file name."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "root",
            expected=f"to read {path}",
            got=getattr(error, "strerror", None) or str(error),
            fix="Set scenario.source.root=PATH to the folder that contains it.",
        ) from error
    return [line for line in text.splitlines() if line.strip()]


def to_text(name: str) -> str:
    r"""A file name for messages and reports; bytes that are not UTF-8 are written as ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
