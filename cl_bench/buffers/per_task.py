"""The first images of every task, for a method that chooses them."""

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer, Context, Describe, describe_in_chunks
from cl_bench.core.errors import require
from cl_bench.core.types import Batch, Task


class PerTask(Buffer):
    """floor(M / tasks) images of every task, the first ones in the order in which the method gives them; all stay.

    FRCL gives its inducing points. Other methods give a task's training images in the order of the data set.

    Attributes:
        quota: images of a task.
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        require(
            capacity >= context.num_tasks,
            "capacity",
            expected=f"at least {context.num_tasks} images, one per task",
            got=capacity,
            fix="Raise buffer.capacity.",
        )
        super().__init__(capacity=capacity, context=context)
        self.quota = capacity // context.num_tasks

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Do nothing: images are taken at the end of the task."""

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Take the task's first images."""
        taken = task.train.take(slice(0, self.quota))
        described = describe_in_chunks(taken, self.transform, describe) if keep else {}
        slots = torch.arange(self.filled, self.filled + len(taken))
        self.write(slots, taken.images, taken.labels, {name: described[name] for name in keep})
        self.filled += len(taken)
