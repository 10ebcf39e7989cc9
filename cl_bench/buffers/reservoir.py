"""Reservoir sampling (Vitter 1985, Algorithm R), a batch at a time."""

import torch

from cl_bench.buffers.base import OnlineBuffer


class Reservoir(OnlineBuffer):
    """After n offered images, each of them is in the buffer with probability min(1, M / n)."""

    by_class = False

    def choose(self, count: int, labels: list[int], task: int) -> dict[int, int]:
        """Image i of those offered is number offered + i of all offered images, from 0."""
        drawn = torch.rand(count, generator=self.generator, dtype=torch.float64).tolist()
        taken: dict[int, int] = {}
        for i, uniform in enumerate(drawn):
            nth = self.offered + i
            slot = nth if nth < self.capacity else int(uniform * (nth + 1))  # uniform integer in [0, nth]
            if slot < self.capacity:
                taken[slot] = i
        return taken
