"""SIGINT and SIGTERM: a request to stop is noted, and obeyed where nothing is lost by it."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """The run was asked to stop, and leaves. No ``Exception``: whoever handles errors must not take it for one."""


_caught: list[int] = []  # of the innermost collect_stop_signals()
_depth = 0  # of allow_interruption() blocks


@contextmanager
def handle_once(act: Callable[[int], None], words: str) -> Iterator[None]:
    """Within, the first SIGINT and the first SIGTERM say ``words`` and call ``act`` with their number.

    The second one of a kind does what it did before. Outside the main thread, where a sweep may run its jobs, signals
    cannot be caught, and nothing changes.
    """
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        with suppress(RuntimeError, OSError, ValueError):  # stderr is gone, or was being written to at this moment
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
    """Collect SIGINT and SIGTERM instead of dying of them; the second one of a kind is not collected any more."""
    global _caught
    caught: list[int] = []
    outer = _caught

    def catch(number: int) -> None:
        caught.append(number)
        if _depth:
            raise Interrupted

    _caught = caught
    try:
        with handle_once(catch, "Stopping; once more to stop at once."):
            yield caught
    finally:
        _caught = outer


@contextmanager
def allow_interruption() -> Iterator[None]:
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


def allow_interruption_between(items: Iterator[T]) -> Iterator[T]:
    """The items, each of which is made inside of :func:`allow_interruption`."""
    while True:
        with allow_interruption():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item
