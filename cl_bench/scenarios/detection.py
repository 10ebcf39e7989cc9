"""Detection in phases: each task labels the objects of its own classes, on images of its own.

Protocol: CL-DETR (Liu et al., CVPR 2023) and its released code. The training images are shuffled and cut into disjoint
parts, in proportion to the number of classes of the tasks. Objects of other classes are in the images, without label.
An image without a labelled object stays. All tasks have one test set, with every label.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.errors import require
from cl_bench.core.types import Data, Task
from cl_bench.data.base import fixed_by_settings
from cl_bench.data.detection import NOTHING, DetectionSet
from cl_bench.data.transform import Transform
from cl_bench.scenarios.base import Scenario, Storage
from cl_bench.scenarios.selection import check_seeds


@fixed_by_settings
class Detection(Scenario):
    """The classes of ``source`` in phases.

    Args:
        source: images with objects of K classes.
        classes_per_task: the number of classes of each task; they add up to K.
        class_order: ``natural``, ``random``, or all class ids in the order of learning.
        class_order_seed: draws ``random``.
        data_seed: shuffles the training images before they are cut.

    Attributes:
        all_labels: of each task (N, M, 5), the annotations of its training images with all classes, for joint training.
    """

    measure = "AP"
    all_labels: list[Tensor]

    def __init__(
        self,
        *,
        source: DetectionSet,
        classes_per_task: list[int],
        class_order: Any,
        class_order_seed: int,
        data_seed: int,
    ) -> None:
        check_seeds(class_order_seed=class_order_seed, data_seed=data_seed)
        num_classes = len(source.class_names)
        require(
            len(classes_per_task) > 0 and min(classes_per_task) > 0 and sum(classes_per_task) == num_classes,
            "classes_per_task",
            expected=f"positive numbers that add up to {num_classes} classes",
            got=list(classes_per_task),
            fix=f"For one task set 'scenario.classes_per_task=[{num_classes}]'.",
        )
        require(
            len(source.train_images) >= len(classes_per_task),
            "source",
            expected=f"at least one training image per task, {len(classes_per_task)}",
            got=len(source.train_images),
            fix="Use more images or fewer tasks.",
        )
        self.class_order = _order_classes(num_classes, class_order, class_order_seed)
        self.data, self.class_names = source.digest, source.class_names
        channels, height, width = source.train_images.shape[1:]
        self.image_shape, self.target_shape = (channels, height, width), source.train_objects.shape[1:]
        mean, std = source.measure_moments()
        self.transform = Transform(mean=mean, std=std, crop_padding=0, flip=False)  # they would not move the boxes
        nothing = torch.empty(0, dtype=torch.int64)
        self.pretrain = Data(torch.empty(0, *self.image_shape, dtype=torch.uint8), nothing, nothing)
        self.pretrain_order = []
        self._cut(source, classes_per_task, data_seed)

    def _cut(self, source: DetectionSet, sizes: list[int], data_seed: int) -> None:
        """Set :attr:`tasks` and :attr:`all_labels`."""
        position = np.argsort(np.array(self.class_order))
        labels = torch.from_numpy(_renumber(source.train_objects, position))
        images = torch.from_numpy(source.train_images)
        testing = _renumber(source.test_objects, position)
        test = Data(torch.from_numpy(source.test_images), torch.from_numpy(testing), torch.arange(len(testing)))
        shuffled = torch.from_numpy(np.random.default_rng(data_seed).permutation(len(images)))
        ends = np.cumsum(sizes)
        cuts = np.maximum(ends * len(images) // ends[-1], np.arange(1, len(sizes) + 1)).tolist()
        self.tasks, self.all_labels = [], []
        for number, (size, end, first, last) in enumerate(zip(sizes, ends.tolist(), [0, *cuts], cuts)):
            rows, classes = shuffled[first:last].sort().values, range(end - size, end)
            own = Data(images[rows], _keep_classes(labels[rows], classes), rows)
            self.tasks.append(Task(number, classes, own, own.take(slice(0)), test))
            self.all_labels.append(labels[rows])

    def to(self, device: torch.device, storage: Storage | Literal["auto"] = "auto") -> "Detection":
        """This scenario on ``device``, see :meth:`Scenario.to`."""
        super().to(device, storage)
        self.all_labels = [labels.to(device) for labels in self.all_labels]
        return self


def _order_classes(num_classes: int, order: Any, seed: int) -> list[int]:
    """The data set's class ids in the order of learning."""
    if order == "natural":
        return list(range(num_classes))
    if order == "random":
        return np.random.RandomState(seed).permutation(num_classes).tolist()
    explicit = [] if isinstance(order, str) else list(order)
    require(
        sorted(explicit) == list(range(num_classes)),
        "class_order",
        expected=f"natural, random, or a list of the {num_classes} class ids, each once",
        got=order if isinstance(order, str) else repr(explicit),
        fix="Use class_order=random with a class_order_seed for a random order.",
    )
    return explicit


def _renumber(objects: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Objects with class ids -> with positions in the class order."""
    renumbered = objects.copy()
    there = objects[..., 0] >= 0
    renumbered[..., 0][there] = position[objects[..., 0][there].astype(int)]
    return renumbered


def _keep_classes(labels: Tensor, classes: range) -> Tensor:
    """(N, M, 5) with the objects of these classes only."""
    own = (labels[..., 0] >= classes.start) & (labels[..., 0] < classes.stop)
    return torch.where(own[..., None], labels, torch.tensor(NOTHING))
