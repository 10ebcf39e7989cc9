"""Reservoir sampling (Vitter 1985, Algorithm R), a batch at a time."""

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer, Context, Describe
from cl_bench.core.errors import require
from cl_bench.core.images import send_together
from cl_bench.core.types import Batch, Task


class Reservoir(Buffer):
    """After n offered images each of them is in the buffer with probability min(1, M / n).

    Every batch of the stream is offered, so an image is offered anew in every epoch (as Mammoth does it).
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        require(capacity > 0, "capacity", expected="1 or more images", got=capacity, fix="buffer=none keeps no images.")
        super().__init__(capacity=capacity, context=context)

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Offer a batch; image i of it is the (offered + i)-th ever."""
        drawn = torch.rand(len(batch), generator=self.generator, dtype=torch.float64).tolist()
        taken: dict[int, int] = {}  # place -> image; one after another, a later image overwrites an earlier one
        for i, uniform in enumerate(drawn):
            nth = self.offered + i
            place = nth if nth < self.capacity else int(uniform * (nth + 1))  # uniform integer in [0, nth]
            if place < self.capacity:
                taken[place] = i
        self.offered += len(batch)
        self.filled = min(self.offered, self.capacity)
        if taken:
            places, images = send_together([torch.tensor([*taken]), torch.tensor([*taken.values()])], batch.y.device)
            kept = {name: values.index_select(0, images) for name, values in columns.items()}
            self.write(places, batch.raw.index_select(0, images), batch.y.index_select(0, images), kept)

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Nothing: the stream was sampled as it passed."""
