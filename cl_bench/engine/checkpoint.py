"""Exact resumption: the whole state of a run in one file, written atomically, the one before it kept.

A checkpoint is plain tensors, numbers, strings, lists and dicts, so it loads with ``weights_only=True``. It is a zip
archive with a CRC-32 of each of its members; torch writes these and does not look at them when it loads.
"""

import os
import random
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator

from cl_bench.core.errors import ConfigError

State = dict[str, Any]


class Checkpoint:
    """The files of one folder, which lies in a run folder.

    ``last.pt`` is the newest checkpoint, ``previous.pt`` the one before it. ``boundary.pt`` is the newest one between
    two tasks: the smallest file that the run can go on from, to be carried to another machine.
    """

    NAMES = ("last.pt", "previous.pt", "boundary.pt")
    """From the newest to the oldest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last_is_damaged = False

    def save(self, state: State, *, boundary: bool = False) -> None:
        """Write ``state``; a kill at any moment leaves at least one whole checkpoint.

        Args:
            boundary: whether the state is one between two tasks.

        Raises:
            OSError: it could not be written, or the run folder is gone; what was there before is as it was.
        """
        self.folder.mkdir(exist_ok=True)
        last, previous, oldest = (self.folder / name for name in self.NAMES)
        partial = self.folder / "partial.pt"
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)  # where the disk is full, give its room back
            if isinstance(error, RuntimeError) and isinstance(
                error.__context__, OSError
            ):  # torch says it in its own words
                raise error.__context__ from error
            raise
        if last.exists() and not self._last_is_damaged:  # a damaged one must not take the place of the good one
            last.replace(previous)
        partial.replace(last)
        self._last_is_damaged = False
        if boundary:
            twin = self.folder / "twin.pt"
            # Of a save that was killed; a copy would be written into that older checkpoint.
            twin.unlink(missing_ok=True)
            try:
                os.link(last, twin)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, twin)
            twin.replace(oldest)

    def load(self) -> State | None:
        """The newest whole checkpoint, None where there never was one; a damaged one is reported and passed over.

        Raises:
            ConfigError: there are checkpoints and none is whole.
        """
        damaged: dict[str, str] = {}
        for name in self.NAMES:
            path = self.folder / name
            if not path.exists():
                continue
            try:
                _check_sums(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many kinds for a damaged file; each means the same
                damaged[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if damaged:
                self._last_is_damaged = "last.pt" in damaged
                told = "; ".join(f"{self.folder / name} is damaged ({why})" for name, why in damaged.items())
                print(f"cl_bench: {told}; going on from the one before it, {path}", file=sys.stderr)
            return state
        if damaged:
            raise ConfigError(
                str(self.folder),
                expected="a whole checkpoint",
                got="; ".join(f"{name} is damaged ({why})" for name, why in damaged.items()),
                fix="Put a copy of one of them back, or start this run afresh with overwrite=true.",
            )
        return None


def _check_sums(path: Path) -> None:
    """Raise where a member of the archive is not what was written."""
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{member} does not have its checksum")


def torch_rng_state() -> State:
    """The states of torch's own generators: all that a step of training draws from beside the run's."""
    return {
        "torch": torch.get_rng_state(),
        # of the run's own device; a run on the CPU does not wake the GPU for it
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_torch_rng_state(state: State) -> None:
    """The inverse of :func:`torch_rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def rng_state(generators: Mapping[str, Generator]) -> State:
    """The states of every random generator a run may draw from."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return torch_rng_state() | {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def set_rng_state(state: State, generators: Mapping[str, Generator]) -> None:
    """The inverse of :func:`rng_state`."""
    set_torch_rng_state(state)
    random.setstate(_tuples(state["python"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (tuple, list)) else value


def cloned(state: Any) -> Any:
    """A deep copy on the CPU: what a state was at this moment."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: cloned(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(cloned(value) for value in state)
    return state
