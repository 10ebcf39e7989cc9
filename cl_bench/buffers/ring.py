"""A ring for each class of each task (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2019)."""

import torch

from cl_bench.buffers.base import Context, OnlineBuffer
from cl_bench.core.errors import require


class Ring(OnlineBuffer):
    """The last n images of every class in every task, first in, first out; n = M / pairs of task and class.

    With ``method.replay_current_task=false`` a task's images are written while it is learned and read from the next one
    on, as in the code of A-GEM.
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        pairs = context.pairs or context.num_classes
        require(
            capacity >= pairs,
            "capacity",
            expected=f"at least {pairs} images, one per class of each task",
            got=capacity,
            fix="Raise buffer.capacity, or use buffer=reservoir, which has no quota per class.",
        )
        super().__init__(capacity=capacity, context=context)
        self.length = capacity // pairs

    def choose(self, count: int, labels: list[int], task: int) -> dict[int, int]:
        """The next free slot until a ring is full, then its oldest one."""
        if not (self.slot_task == task).any():
            self.offered_of.zero_()  # of this task
        taken: dict[int, int] = {}
        for i, label in enumerate(labels):
            nth = int(self.offered_of[label])
            self.offered_of[label] += 1
            if nth < self.length:
                slot = self.filled
                self.filled += 1
                self.slot_class[slot], self.slot_task[slot] = label, task
            else:
                own = torch.nonzero((self.slot_class == label) & (self.slot_task == task)).flatten()
                slot = int(own[nth % self.length])
            taken[slot] = i
        return taken
