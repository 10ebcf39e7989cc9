"""How long a call takes with a full batch, timed with as many images as a budget of seconds allows.

If a full batch does not fit into the budget, its time is scaled from smaller ones by counted operations
(``torch.utils.flop_counter``).
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cl_bench.engine.step import Graphs

SMALLEST = 4
"""Images of the first timed batch."""

TIMED = 5
"""Largest number of timed calls with batches of one size."""

LEAST_GAIN, GAIN = 0.5, 0.7
"""Seconds per image in a full batch relative to the smallest batch, if no larger batch was timed yet: at least, and
expected. ResNets and ViTs had 0.36 to 0.87."""

Span = np.ndarray
"""(3,) seconds: at least, expected, at most."""


class Budget:
    """The seconds that something may take, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] | None = None) -> None:
        self.seconds, self.clock = seconds, clock or time.perf_counter
        self._began = self.clock()

    def get_left(self) -> float:
        """The seconds until its end; negative after it."""
        return self._began + self.seconds - self.clock()

    def take_share(self, part: float, until: float = 1.0) -> "Budget":
        """A part of what is left before ``until``, itself a part of all its seconds."""
        return Budget(part * max(0.0, self.get_left() - (1 - until) * self.seconds), self.clock)


class Operations(TorchDispatchMode):
    """Counts floating-point operations inside a ``with`` block.

    It uses the formulas of ``torch.utils.flop_counter``, whose ``FlopCounterMode`` cannot enclose ``torch.func.grad``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The result of one operation, which is counted."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.count += formula(*args, **kwargs, out_val=result)
        return result


@dataclass(frozen=True)
class Measured:
    """The seconds of a call with ``full`` images; the largest timed call had ``size``.

    Attributes:
        gain: seconds per image in a full batch relative to the smallest batch.
    """

    seconds: Span
    size: int
    full: int
    gain: float


def measure(
    work: Callable[[int], int], full: int, budget: Budget, *, gain: float = GAIN, only_full: bool = False
) -> Measured:
    """The seconds of ``work`` with ``full`` images: timed if the budget allows it, else scaled from fewer images.

    Args:
        work: number of images -> number of images that it drew from a buffer as well, the same for every size.
        full: images of a full batch.
        budget: seconds to use.
        gain: the one measured before; the smallest size is scaled by it if no other size could be timed.
        only_full: time no other size, for work that is compiled for each size; the first calls are not counted.
    """

    drawn = 0

    def time_once(size: int) -> float:
        nonlocal drawn
        began = budget.clock()
        drawn = work(size)
        return budget.clock() - began

    def time_several(size: int, part: float, slowest: float = 0.0) -> list[float]:
        taken: list[float] = []
        until = (1 - part) * budget.get_left()
        while len(taken) < TIMED and budget.get_left() - max([slowest, *taken]) > until:
            taken.append(time_once(size))
        return taken or [slowest or time_once(size)]

    def count_and_time(size: int, part: float) -> tuple[int, list[float]]:
        with Operations() as operations:
            slower = time_once(size)  # than without counting
        return operations.count, time_several(size, part, slower)

    size = small = full if only_full else min(full, SMALLEST)
    first = max(time_once(size) for _ in range(Graphs.WARM_UP + 1 if only_full else 1))
    small_count, taken = 0, [first]
    if size == full:
        taken = time_several(size, 1)
    elif budget.get_left() > first:
        small_count, taken = count_and_time(size, 1 / 8)
    count, small_taken = small_count, taken
    while small_count and size < full:
        room = int(budget.get_left() / (1.5 * statistics.median(taken) / size))  # an image takes less in a larger batch
        if room < 1.25 * size:
            break
        size = min(room, full)
        count, taken = count_and_time(size, 1)

    seconds = np.array([min(taken), statistics.median(taken), max(taken)])
    images = (full + drawn) / (small + drawn)
    if size == small:
        if size < full:
            seconds = seconds * images * [min(gain, LEAST_GAIN), gain, 1]
        return Measured(seconds, size, full, gain)
    if size < full:
        per_image = (statistics.median(taken) - statistics.median(small_taken)) / (size - small)
        full_count = small_count + (count - small_count) / (size - small) * (full - small)
        seconds = _extrapolate(seconds, max(0.0, per_image) * (full - size), full_count / count)
    alone = statistics.median(small_taken) * images  # as if every image took as long as in the smallest batch
    return Measured(seconds, size, full, min(1.0, float(seconds[1]) / alone))


def _extrapolate(seconds: Span, added: float, factor: float) -> Span:
    """Seconds of a full batch, from those of the largest timed one, between two limits.

    One limit lies on the line through the smallest and the largest timed size. The other grows with the counted
    operations, as if a call itself cost nothing. Their geometric mean is expected.

    Args:
        added: seconds that the line adds.
        factor: by which the number of operations grows.
    """
    line, scaled = seconds + added, seconds * factor
    low, high = np.minimum(line, scaled), np.maximum(line, scaled)
    return np.array([low[0], math.sqrt(low[1] * high[1]), high[2]])
