"""DETR on all images with all their objects at once, the upper bound.

As joint training elsewhere: nothing is learned until the last task has arrived. The images of every task get the labels
of all classes, which no continual learner sees.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cl_bench.backbones.detr import DETR
from cl_bench.core.types import Data, Phase, Task
from cl_bench.methods.detection import Detector, SetLoss
from cl_bench.scenarios.detection import Detection


class DETRJoint(Detector):
    """Sees every image and every label together; not a continual learner."""

    learned: Tensor

    def __init__(self, *, net: DETR, scenario: Detection, set_loss: SetLoss) -> None:
        super().__init__(net=net, set_loss=set_loss)
        self._scenario = scenario
        self.register_buffer("learned", torch.tensor(False))

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase after the last task, none before."""
        tasks = self._scenario.tasks
        if task.id == len(tasks) - 1:
            labelled = zip(tasks, self._scenario.all_labels)
            everything = Data.concatenate(Data(t.train.images, labels, t.train.index) for t, labels in labelled)
            yield Phase(everything, self.observe, self.net.parameters())
            self.learned.fill_(True)

    def detect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Detector.detect`; no answer before anything was learned."""
        scores, boxes = super().detect(x)
        return torch.where(self.learned, scores, -torch.inf), boxes
