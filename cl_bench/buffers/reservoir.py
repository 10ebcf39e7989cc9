"""Reservoir sampling (Vitter 1985, Algorithm R), a batch at a time."""

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer, Context, Describe
from cl_bench.errors import require
from cl_bench.types import Batch, Task


class Reservoir(Buffer):
    """After n offered images each of them is in the buffer with probability min(1, M / n).

    Every batch of the stream is offered, so an image is offered anew in every epoch (as Mammoth does it).
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        require(capacity > 0, "capacity", expected="1 or more images", got=capacity, fix="buffer=none keeps no images.")
        super().__init__(capacity=capacity, context=context)

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Offer a batch; image i of it is the (offered + i)-th ever."""
        size = len(batch)
        nth = torch.arange(self.offered, self.offered + size)
        # A uniform integer in [0, n] for each; below M it is the place that the image takes.
        drawn = (torch.rand(size, generator=self.generator, dtype=torch.float64) * (nth + 1)).long()
        place = torch.where(nth < self.capacity, nth, drawn)
        # One after another, a later image of the batch overwrites an earlier one: the last writer of a place counts.
        overwritten = (place[:, None] == place[None, :]).triu(1).any(1)
        (taken,) = torch.nonzero((place < self.capacity) & ~overwritten, as_tuple=True)
        self.offered += size
        self.filled = min(self.offered, self.capacity)
        if len(taken):
            on_device = taken.to(batch.y.device, non_blocking=True)
            kept = {name: values[on_device] for name, values in columns.items()}
            self.write(
                place[taken].to(batch.y.device, non_blocking=True), batch.raw[on_device], batch.y[on_device], kept
            )

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Nothing: the stream was sampled as it passed."""
