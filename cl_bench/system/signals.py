"""SIGINT and SIGTERM: a request to stop is noted, and obeyed when nothing is lost by it."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """The run stops because it was asked to. It is no ``Exception``, so that code that handles errors ignores it."""


_caught: list[int] = []  # of the innermost collect_stop_signals()
_depth = 0  # of allow_interruption() blocks


@contextmanager
def handle_once(act: Callable[[int], None], words: str) -> Iterator[None]:
    """Inside, the first SIGINT and the first SIGTERM print ``words`` and call ``act`` with their number.

    The second one of each kind has its former effect. Outside the main thread, where a sweep may run its jobs, signals
    cannot be caught, and nothing changes.
    """
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        with suppress(RuntimeError, OSError, ValueError):  # stderr is closed, or was being written to
            print(words, file=sys.stderr)
        act(number)

    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextmanager
def collect_stop_signals() -> Iterator[list[int]]:
    """A list of the SIGINT and SIGTERM received inside, which do not kill the process; a second one of a kind does."""
    global _caught
    caught: list[int] = []
    outer = _caught

    def catch(number: int) -> None:
        caught.append(number)
        if _depth:
            raise Interrupted

    _caught = caught
    try:
        with handle_once(catch, "Stopping; repeat the signal to stop at once."):
            yield caught
    finally:
        _caught = outer


@contextmanager
def allow_interruption() -> Iterator[None]:
    """Inside, a request to stop raises :class:`Interrupted` at once; elsewhere it is obeyed after the step.

    It is for work that may take minutes and can be repeated: reading data, measuring, a method between its phases.
    """
    global _depth
    _depth += 1
    try:
        if _caught:
            raise Interrupted
        yield
    finally:
        _depth -= 1


def allow_interruption_between(items: Iterator[T]) -> Iterator[T]:
    """The items; each one is created inside :func:`allow_interruption`."""
    while True:
        with allow_interruption():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
