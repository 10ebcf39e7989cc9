"""DETR, fine-tuned on one task after the other: the lower bound.

Loss: the set loss of :mod:`cl_bench.methods.detection` on the objects of the task's classes.
"""

from collections.abc import Iterator

from cl_bench.core.types import Phase, Task
from cl_bench.methods.detection import Detector


class DETRFinetune(Detector):
    """Trains on each task and does nothing against forgetting."""

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase."""
        yield Phase(task.train, self.observe, self.net.parameters())
