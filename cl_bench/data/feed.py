"""The batches of one epoch, looked up ahead where that takes time.

Shapes: N images of a set, B of a batch.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from cl_bench.core.images import HostImages
from cl_bench.core.types import Data

AHEAD = 3
"""Batches that are on their way to the device while one is trained on."""


class Feed:
    """Images and labels of an epoch's steps.

    Images on the device are indexed there. Others come from a thread that is some batches ahead, so that the device
    waits neither for the disk nor for the bus. Either way a step has the same images.

    Args:
        order: CPU (M,) positions in ``data``, in the order of the epoch.
        size: images of a step.
    """

    def __init__(self, data: Data, order: Tensor, size: int, pool: ThreadPoolExecutor | None) -> None:
        self.data, self.size, self._pool = data, size, pool
        self._cpu, self._places = order, order.to(data.labels.device)
        self._coming: dict[int, Future[Tensor]] = {}

    def load_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) uint8 images and (B,) labels of a step."""
        part = slice(step * self.size, (step + 1) * self.size)
        places = self._places[part]
        if self._pool is None:
            return self.data.images.index_select(0, places), self.data.labels.index_select(0, places)
        for ahead in range(step, step + AHEAD + 1):
            if ahead not in self._coming and ahead * self.size < len(self._cpu):
                which = self._cpu[ahead * self.size : (ahead + 1) * self.size]
                self._coming[ahead] = self._pool.submit(self.data.images.__getitem__, which)
        return self._coming.pop(step).result(), self.data.labels.index_select(0, places)


@contextmanager
def open_feed(data: Data, order: Tensor, size: int) -> Iterator[Feed]:
    """A :class:`Feed`, with a thread as long as it is open where the images are not on the device."""
    if not isinstance(data.images, HostImages):
        yield Feed(data, order, size, None)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="images")
    try:
        yield Feed(data, order, size, pool)
    finally:
        pool.shutdown(cancel_futures=True)
