"""What a scenario is: a data set cut into a sequence of tasks."""

from abc import ABC
from dataclasses import replace
from typing import ClassVar

import torch

from cl_bench.data.transform import Transform
from cl_bench.types import Data, Task


class Scenario(ABC):
    """A sequence of tasks over K classes.

    Attributes:
        shared_labels: whether every task has all K classes; else each class belongs to one task.
        tasks: in the order of learning.
        class_order: (K) the data set's class id at each position; tasks hold positions.
        class_names: a name a class id of the data set.
        image_shape: (C, H, W).
        transform: augmentation and normalisation.
        pretrain: training images of classes that are part of no task, for methods that train a network before the
            first task; labels are positions in ``pretrain_order``. Both are empty unless the scenario holds some out.
        pretrain_order: the data set's class id at each of those positions.
    """

    shared_labels: ClassVar[bool] = False
    tasks: list[Task]
    class_order: list[int]
    class_names: list[str]
    image_shape: tuple[int, int, int]
    transform: Transform
    pretrain: Data
    pretrain_order: list[int]

    @property
    def num_classes(self) -> int:
        """K, over all tasks."""
        return len(self.class_order)

    def to(self, device: torch.device) -> "Scenario":
        """Put every image on ``device``; returns self."""
        self.transform.to(device)
        self.pretrain = _on(self.pretrain, device)
        self.tasks = [
            replace(t, train=_on(t.train, device), val=_on(t.val, device), test=_on(t.test, device)) for t in self.tasks
        ]
        return self

    def original(self, task: Task) -> list[int]:
        """The data set's class ids of a task."""
        return [self.class_order[c] for c in task.classes]


def _on(data: Data, device: torch.device) -> Data:
    return Data(data.images.to(device), data.labels.to(device), data.index.to(device))
