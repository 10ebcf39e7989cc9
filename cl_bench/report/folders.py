"""Run folders below a folder, and the state of those that are not finished; nothing heavy is imported here."""

import os
from dataclasses import dataclass
from pathlib import Path

from cl_bench.core.record import FAILURE
from cl_bench.system.atomic import is_locked


@dataclass(frozen=True)
class LeftOut:
    """A run that is not finished: its folder; ``running``, ``failed`` or ``interrupted``; and why it failed."""

    folder: Path
    state: str
    why: str = ""

    @classmethod
    def of(cls, folder: Path) -> "LeftOut":
        """What the files of a run folder say. A run that was killed has been interrupted."""
        if is_locked(folder / ".lock"):
            return cls(folder, "running")
        try:
            return cls(folder, "failed", " ".join((folder / FAILURE).read_text(encoding="utf-8").split()))
        except OSError:
            return cls(folder, "interrupted")


def scan(path: Path) -> tuple[list[Path], list[Path]]:
    """Folders of finished and of begun runs at or below ``path``, sorted; a run folder has no other inside."""
    finished, begun = [], []
    for folder, folders, files in os.walk(path):
        if "summary.json" in files:
            finished.append(Path(folder))
        elif "env.json" in files and "config.yaml" in files:
            begun.append(Path(folder))
        else:
            continue
        folders.clear()
    return sorted(finished), sorted(begun)
