"""The greedy sampler of GDumb (Prabhu, Torr, Dokania, ECCV 2020, Algorithm 1)."""

import torch

from cl_bench.buffers.base import OnlineBuffer


class Greedy(OnlineBuffer):
    """The first images of every class: one is taken if its class has fewer than M / classes seen.

    If the buffer is full, a random image of the largest class makes room. So the classes of a full buffer differ by one
    image at most, if enough images of each were offered. Of several largest classes it is the one that stands first in
    the class order; the paper does not say which.
    """

    def choose(self, count: int, labels: list[int], task: int) -> dict[int, int]:
        """One image at a time."""
        drawn = torch.rand(count, generator=self.generator, dtype=torch.float64).tolist()
        taken: dict[int, int] = {}
        for i, (label, uniform) in enumerate(zip(labels, drawn)):
            self.offered_of[label] += 1
            held = int((self.slot_class == label).sum())
            if held * int((self.offered_of > 0).sum()) < self.capacity:
                slot = self.take_slot(uniform)
                self.slot_class[slot] = label
                taken[slot] = i
        return taken
