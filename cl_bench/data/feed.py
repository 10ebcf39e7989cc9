"""The batches of one epoch, loaded ahead if the images are on the host.

Shapes: N images of a set, B of a batch.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from cl_bench.core.images import are_on_host
from cl_bench.core.types import Data

AHEAD = 3
"""Batches that are loaded while one is used."""


class Feed:
    """The images and labels of the steps of an epoch.

    Images on the device are indexed there. Others are loaded by a thread, some batches ahead, so that the device does
    not wait for disk or bus. A step gets the same images in both cases.

    Args:
        order: (M,) positions in ``data`` on the CPU, in the order of the epoch.
        size: images per batch.
        repeats: steps on each batch.
    """

    def __init__(self, data: Data, order: Tensor, size: int, repeats: int, pool: ThreadPoolExecutor | None) -> None:
        self.data, self.size, self.repeats, self._pool = data, size, repeats, pool
        self._cpu, self._positions = order, order.to(data.labels.device)
        self._labels = None if data.labels.device.type == "cpu" else data.labels.cpu()
        self._coming: dict[int, Future[Tensor]] = {}
        self._loaded: tuple[int, tuple[Tensor, Tensor]] | None = None

    def load_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) uint8 images and (B,) labels of a step."""
        number = step // self.repeats
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = number, self._load(number)
        return self._loaded[1]

    def _load(self, number: int) -> tuple[Tensor, Tensor]:
        part = slice(number * self.size, (number + 1) * self.size)
        positions = self._positions[part]
        if self._pool is None:
            return self.data.images.index_select(0, positions), self.data.labels.index_select(0, positions)
        for ahead in range(number, number + AHEAD + 1):
            if ahead not in self._coming and ahead * self.size < len(self._cpu):
                which = self._cpu[ahead * self.size : (ahead + 1) * self.size]
                self._coming[ahead] = self._pool.submit(self.data.images.__getitem__, which)
        return self._coming.pop(number).result(), self.data.labels.index_select(0, positions)

    def get_host_labels(self, step: int) -> Tensor | None:
        """(B,) labels of a step on the CPU; None if the batch has them there already."""
        if self._labels is None:
            return None
        number = step // self.repeats
        return self._labels[self._cpu[number * self.size : (number + 1) * self.size]]


@contextmanager
def open_feed(data: Data, order: Tensor, size: int, repeats: int = 1) -> Iterator[Feed]:
    """A :class:`Feed`; if the images are not on the device, it has a thread until it is closed."""
    if not are_on_host(data.images):
        yield Feed(data, order, size, repeats, None)
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="images")
    try:
        yield Feed(data, order, size, repeats, pool)
    finally:
        pool.shutdown(cancel_futures=True)
