"""Reservoir sampling (Vitter 1985, Algorithm R), a batch at a time."""

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer, Context, Describe
from cl_bench.core.errors import require_positive
from cl_bench.core.images import send_together
from cl_bench.core.types import Batch, Task


class Reservoir(Buffer):
    """After n offered images, each of them is in the buffer with probability min(1, M / n).

    Every batch of the stream is offered, so an image is offered again in every epoch (as in Mammoth).
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        require_positive(fix="buffer=none stores no images.", capacity=capacity)
        super().__init__(capacity=capacity, context=context)

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Offer a batch; its image i is number offered + i of all offered images, from 0."""
        drawn = torch.rand(len(batch), generator=self.generator, dtype=torch.float64).tolist()
        taken: dict[int, int] = {}  # slot -> image; a later image overwrites an earlier one
        for i, uniform in enumerate(drawn):
            nth = self.offered + i
            slot = nth if nth < self.capacity else int(uniform * (nth + 1))  # uniform integer in [0, nth]
            if slot < self.capacity:
                taken[slot] = i
        self.offered += len(batch)
        self.filled = min(self.offered, self.capacity)
        if taken:
            slots, images = send_together([torch.tensor([*taken]), torch.tensor([*taken.values()])], batch.y.device)
            kept = {name: values.index_select(0, images) for name, values in columns.items()}
            self.write(slots, batch.raw.index_select(0, images), batch.y.index_select(0, images), kept)

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Do nothing: the buffer was filled during the task."""
