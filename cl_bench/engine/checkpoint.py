"""Exact resumption: the whole state of a run in one file, written atomically; the one before it is kept.

A checkpoint is plain tensors, numbers, strings, lists and dicts, so it loads with ``weights_only=True``. It is a zip
archive with a CRC-32 of each of its members. torch writes the sums and does not check them when it loads.
"""

import copy
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
    """The checkpoints of a run, in one folder.

    ``last.pt`` is the newest checkpoint, ``previous.pt`` the one before it. ``boundary.pt`` is the newest one between
    two tasks. It is the smallest file that the run can go on from, e.g. on another machine. ``task00.pt``,
    ``task01.pt``, ... are the networks after each task, if they are kept.
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
            OSError: it could not be written, or the run folder is gone; the files from before are unchanged.
        """
        last, previous, oldest = (self.folder / name for name in self.NAMES)
        partial = self._write_partial(state)
        if last.exists() and not self._last_is_damaged:  # a damaged file must not replace the good one
            last.replace(previous)
        partial.replace(last)
        self._last_is_damaged = False
        if boundary:
            twin = self.folder / "twin.pt"
            # A killed save may have left it; a copy would be written into that older checkpoint.
            twin.unlink(missing_ok=True)
            try:
                os.link(last, twin)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, twin)
            twin.replace(oldest)

    def keep_network(self, task: int, net: torch.nn.Module) -> None:
        """Write the state dict of the network after ``task``, whole or not at all; later saves leave the file alone.

        Raises:
            OSError: as :meth:`save`.
        """
        self._write_partial(clone_state(net.state_dict())).replace(self.folder / f"task{task:02}.pt")

    def _write_partial(self, state: State) -> Path:
        """The file that ``state`` was written to, on the disk; it still has to be moved to its place."""
        self.folder.mkdir(exist_ok=True)
        partial = self.folder / "partial.pt"
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)  # if the disk is full, free the space
            if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch's own wording of it
                raise error.__context__ from error
            raise
        return partial

    def load(self) -> State | None:
        """The newest whole checkpoint, None if there never was one; a damaged one is reported and skipped.

        Raises:
            ConfigError: there are checkpoints, but none is whole.
        """
        damaged: dict[str, str] = {}
        for name in self.NAMES:
            path = self.folder / name
            if not path.exists():
                continue
            try:
                _check_sums(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises many kinds of errors for a damaged file
                damaged[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if damaged:
                self._last_is_damaged = "last.pt" in damaged
                found = "; ".join(f"{self.folder / name} is damaged ({why})" for name, why in damaged.items())
                print(f"cl_bench: {found}; going on from the one before it, {path}", file=sys.stderr)
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
    """Raise an error if a member of the archive is not what was written."""
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{member} does not have its checksum")


def check_weights(file: str) -> None:
    """Refuse a file that is not there, which is known before the network is built."""
    if not Path(file).is_file():
        raise _wrong_weights(file, "no such file")


def _wrong_weights(file: str, why: str) -> ConfigError:
    return ConfigError(
        "backbone.weights",
        expected="a file with the weights of this network, a state dict saved by torch",
        got=f"{file} ({why})",
        fix="Take a file of a run with trainer.keep_tasks=true, the same backbone and the same number of classes.",
    )


def load_network(net: torch.nn.Module, file: str) -> None:
    """Load the state dict in ``file``, e.g. of :meth:`Checkpoint.keep_network`, into a network before its first task.

    A growing network takes what it has before its first task in the same shape; the new run grows by itself. What it
    does not take is said on standard error.

    Raises:
        ConfigError: the file cannot be read, or its tensors are not those of this network.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        # into a copy, which grows to the saved size; other shapes are an error
        missing, unknown = copy.deepcopy(net).load_state_dict(saved, strict=False)
    except Exception as error:  # torch raises many kinds of errors for another file
        raise _wrong_weights(file, " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")) from error
    if any(name.endswith("_extra_state") for name in net.state_dict()):
        unknown = []  # what a method has added to a growing network
    if missing or unknown:
        found = [*(f"no {name}" for name in missing), *(f"an unknown {name}" for name in unknown)]
        raise _wrong_weights(file, f"{', '.join(found[:3])}{' and more' if len(found) > 3 else ''}")
    own = {name: value.shape for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}
    taken = {name: value for name, value in saved.items() if name in own and value.shape == own[name]}
    if left := [name for name in own if name not in taken]:
        print(
            f"cl_bench: backbone.weights: not taken, since they depend on the tasks: {', '.join(left)}", file=sys.stderr
        )
    net.load_state_dict(taken, strict=False)


def get_final_state(saved: State) -> State:
    """The state at the end of a finished run: ``method``, a state dict, and ``rng``.

    Checkpoints of older versions hold it under ``task_start``, like the state at the beginning of a task.
    """
    return saved["final"] if "final" in saved else saved["task_start"]


def get_torch_rng_state() -> State:
    """The states of torch's global generators. A training step draws from them and from the run's own generators."""
    return {
        "torch": torch.get_rng_state(),
        # of the run's own device; a run on the CPU does not initialise the GPU for it
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_torch_rng_state(state: State) -> None:
    """The inverse of :func:`get_torch_rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def get_rng_state(generators: Mapping[str, Generator]) -> State:
    """The states of every random generator a run may draw from."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return get_torch_rng_state() | {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def set_rng_state(state: State, generators: Mapping[str, Generator]) -> None:
    """The inverse of :func:`get_rng_state`."""
    set_torch_rng_state(state)
    random.setstate(_to_tuples(state["python"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(v) for v in value) if isinstance(value, (tuple, list)) else value


def clone_state(state: Any) -> Any:
    """A deep copy on the CPU: the state as it is at this moment."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: clone_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(clone_state(value) for value in state)
    return state
