"""What a configuration may name inside Avalanche; importing Avalanche takes seconds, so it happens here, when asked.

Avalanche is not ours, so decision 15 does not cover it: decision 30 says what may be named.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cl_bench.core.errors import ConfigError

KINDS = {
    "scenario": ("avalanche.benchmarks.classic", "avalanche.benchmarks.scenarios"),
    "strategy": ("avalanche.training.supervised",),
    "plugin": ("avalanche.training.plugins", "avalanche.training.losses"),
    "part": ("avalanche.training.storage_policy", "avalanche.training.losses"),
}
"""The modules that may define what is named, for each kind of thing. None of them runs what its arguments name."""

REFUSED = ("avalanche.training.plugins.checkpoint", "avalanche.training.plugins.evaluation")
"""Modules inside them that read pickles or write files; a run has checkpoints and metrics of its own."""


def import_from_avalanche(path: Any, key: str, kind: str, example: str) -> Callable[..., Any]:
    """The class or function that a dotted path names in Avalanche. What it may be is checked before an import.

    Args:
        path: e.g. ``avalanche.training.supervised.Naive``.
        key: its key, for messages.
        kind: one of :data:`KINDS`; one of its modules must define what is found.
        example: a right path.

    Raises:
        ConfigError: it is no such path, or another module defines what it names.
    """
    expected = f"the dotted path of something that {' or '.join(KINDS[kind])} defines"
    fix = f"For example {example}."
    if not isinstance(path, str) or not path.startswith("avalanche.") or not path.isascii():
        raise ConfigError(key, expected=expected, got=path, fix=fix)
    module, _, name = path.rpartition(".")
    try:
        with silence():
            found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(key, expected=expected, got=path, fix=f"It cannot be loaded: {error}.") from error
    home = getattr(found, "__module__", None) or ""
    inside = is_inside(home, KINDS[kind]) and not is_inside(home, REFUSED)
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not inside:
        raise ConfigError(key, expected=expected, got=path, fix=fix)
    return found


@contextmanager
def silence() -> Iterator[None]:
    """Inside, no warning is shown: Avalanche warns of its own code, whatever filter is set."""
    with warnings.catch_warnings(record=True):
        yield


def is_inside(module: str, packages: Sequence[str]) -> bool:
    """Whether a module is one of ``packages`` or inside one of them."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)
