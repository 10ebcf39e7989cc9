"""SIGINT and SIGTERM: a request to stop is noted, and obeyed where nothing is lost by it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """The run was asked to stop, and leaves. No ``Exception``: whoever handles errors must not take it for one."""


_caught: list[int] = []  # of the innermost stop_signals()
_depth = 0  # of breakable() blocks


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; the second one of a kind is not collected any more."""
    global _caught
    caught: list[int] = []
    before: dict[int, Any] = {}
    outer = _caught

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, before[number])
        with suppress(RuntimeError, OSError, ValueError):  # stderr is gone, or was being written to at this moment
            print("Stopping; once more to stop at once.", file=sys.stderr)
        if _depth:
            raise Interrupted

    _caught = caught
    with suppress(ValueError):  # a sweep may run jobs in a thread, where signals cannot be caught
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for caught_before, handler in before.items():
            signal.signal(caught_before, handler)
        _caught = outer


@contextmanager
def breakable() -> Iterator[None]:
    """Here a request to stop is obeyed at once, by :class:`Interrupted`; elsewhere it is obeyed after the step.

    For what may take minutes and can be done anew: reading data, measuring, what a method does between its phases.
    """
    global _depth
    _depth += 1
    try:
        if _caught:
            raise Interrupted
        yield
    finally:
        _depth -= 1


def breakable_items(items: Iterator[T]) -> Iterator[T]:
    """The items, each of which is made inside of :func:`breakable`."""
    while True:
        with breakable():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
