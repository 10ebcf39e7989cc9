"""A reservoir for each class, with an equal share of the memory for every class seen so far (Soutif et al. 2023, by the
class-balanced buffer of Avalanche)."""

import torch

from cl_bench.buffers.base import OnlineBuffer


class ClassBalanced(OnlineBuffer):
    """floor(M / classes seen) images of every class, each image of a class with the same probability.

    When a class comes, the others are above their quota. They give up random images, the largest class first, as their
    room is needed, so the buffer stays full; Avalanche drops these images at once. What M / classes leaves over stays
    with the classes that have it; in Avalanche the first classes have one image more.
    """

    def choose(self, count: int, labels: list[int], task: int) -> dict[int, int]:
        """An image takes a slot if its class is below its quota, else it is offered to the reservoir of its class."""
        drawn = torch.rand(count, generator=self.generator, dtype=torch.float64).tolist()
        taken: dict[int, int] = {}
        for i, (label, uniform) in enumerate(zip(labels, drawn)):
            self.offered_of[label] += 1
            own = torch.nonzero(self.slot_class == label).flatten()
            if len(own) < self.capacity // int((self.offered_of > 0).sum()):
                slot = self.take_slot(uniform)
            else:
                nth = int(uniform * int(self.offered_of[label]))  # uniform among the images of the class so far
                if nth >= len(own):
                    continue
                slot = int(own[nth])
            self.slot_class[slot] = label
            taken[slot] = i
        return taken
