"""DETR, fine-tuned on one task after the other: the lower bound.

Loss: the set loss of :mod:`cl_bench.methods.detection` on the objects of the task's classes.
"""

from collections.abc import Iterator

from cl_bench.backbones.detr import DETR
from cl_bench.core.types import Phase, Task
from cl_bench.methods.detection import Detector, SetLoss


class DETRFinetune(Detector):
    """Trains on each task and does nothing against forgetting."""

    def __init__(self, *, net: DETR, set_loss: SetLoss) -> None:
        super().__init__(net=net, set_loss=set_loss)

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase."""
        yield Phase(task.train, self.observe, self.net.parameters())
