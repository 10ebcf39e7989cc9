"""Detection in phases: each task labels the objects of its own classes, on images of its own.

Protocol: CL-DETR (Liu et al., CVPR 2023) and its released code. The training images are shuffled and cut into disjoint
parts, in proportion to the number of classes of the tasks. Objects of other classes are in the images, without label.
An image without a labelled object stays. All tasks have one test set, with every label. Validation images are held out
before the cut; all tasks share them, too, with every label.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.errors import require, require_fraction, void
from cl_bench.core.types import Data, Task
from cl_bench.data.base import fixed_by_settings
from cl_bench.data.detection import NOTHING, DetectionSet
from cl_bench.data.transform import Transform
from cl_bench.scenarios.base import Scenario, Storage
from cl_bench.scenarios.selection import check_seeds, check_task_sizes, choose_class_order


@fixed_by_settings
@void("class_order_seed", when=lambda v: v["class_order"] != "random", why="only class_order=random is drawn")
@void(
    "data_seed",
    when=lambda v: len(v["classes_per_task"]) == 1 and not v["val_fraction"],
    why="nothing is drawn with one task and val_fraction=0",
)
class Detection(Scenario):
    """The classes of ``source`` in phases.

    Args:
        source: images with objects of K classes.
        classes_per_task: the number of classes of each task; they add up to K.
        class_order: ``natural``, ``random``, or all class ids in the order of learning.
        class_order_seed: draws ``random``.
        data_seed: shuffles the training images before they are cut.
        val_fraction: part of the training images held out for validation, in [0, 1); above 0 they show all classes.

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
        val_fraction: float,
    ) -> None:
        check_seeds(class_order_seed=class_order_seed, data_seed=data_seed)
        require_fraction(val_fraction=val_fraction, below_one=True, fix="0.1 holds out a tenth of the training images.")
        num_classes = len(source.class_names)
        one_task = f"For one task set 'scenario.classes_per_task=[{num_classes}]'."
        check_task_sizes(classes_per_task, num_classes, one_task)
        self.class_order = choose_class_order(num_classes, class_order, class_order_seed, {})
        self.data, self.class_names = source.digest, source.class_names
        channels, height, width = source.train_images.shape[1:]
        self.image_shape, self.target_shape = (channels, height, width), source.train_objects.shape[1:]
        mean, std = source.measure_moments()
        self.transform = Transform(mean=mean, std=std, crop_padding=0, flip=False)  # they would not move the boxes
        nothing = torch.empty(0, dtype=torch.int64)
        self.pretrain = Data(torch.empty(0, *self.image_shape, dtype=torch.uint8), nothing, nothing)
        self.pretrain_order = []
        shuffled = np.random.default_rng(data_seed).permutation(len(source.train_images))
        count = max(1, round(val_fraction * len(shuffled))) if val_fraction else 0
        _check_counts(source, shuffled[:count], tasks=len(classes_per_task), val_fraction=val_fraction)
        self._cut(source, classes_per_task, *map(torch.from_numpy, (shuffled[count:], shuffled[:count])))

    def _cut(self, source: DetectionSet, sizes: list[int], train: Tensor, held_out: Tensor) -> None:
        """Set :attr:`tasks` and :attr:`all_labels`.

        Args:
            train, held_out: (N,) the training images of all tasks and the validation images, shuffled.
        """
        position = np.argsort(np.array(self.class_order))
        labels = torch.from_numpy(_renumber(source.train_objects, position))
        images = torch.from_numpy(source.train_images)
        testing = _renumber(source.test_objects, position)
        test = Data(torch.from_numpy(source.test_images), torch.from_numpy(testing), torch.arange(len(testing)))
        rows = held_out.sort().values
        val = Data(images[rows], labels[rows], rows)
        ends = np.cumsum(sizes)
        cuts = np.maximum(ends * len(train) // ends[-1], np.arange(1, len(sizes) + 1)).tolist()
        self.tasks, self.all_labels = [], []
        for number, (size, end, first, last) in enumerate(zip(sizes, ends.tolist(), [0, *cuts], cuts)):
            rows, classes = train[first:last].sort().values, range(end - size, end)
            own = Data(images[rows], _keep_classes(labels[rows], classes), rows)
            self.tasks.append(Task(number, classes, own, val, test))
            self.all_labels.append(labels[rows])

    def to(self, device: torch.device, storage: Storage | Literal["auto"] = "auto") -> "Detection":
        """This scenario on ``device``, see :meth:`Scenario.to`."""
        super().to(device, storage)
        self.all_labels = [labels.to(device) for labels in self.all_labels]
        return self


def _check_counts(source: DetectionSet, held_out: np.ndarray, *, tasks: int, val_fraction: float) -> None:
    """Refuse too few training images, and validation images that do not show every class."""
    left = len(source.train_images) - len(held_out)
    require(
        left >= tasks,
        "val_fraction" if val_fraction else "source",
        expected=f"at least one training image per task, {tasks}",
        got=left,
        fix="Use more images or fewer tasks." if not val_fraction else "Lower val_fraction, or use more images.",
    )
    shown = source.train_objects[held_out, :, 0]
    missing = [source.class_names[int(c)] for c in np.setdiff1d(source.train_objects[..., 0], [-1, *shown.flat])]
    require(
        not val_fraction or not missing,
        "val_fraction",
        expected="validation images that show every class of the training images",
        got=f"none of {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''} at {val_fraction}",
        fix="Raise val_fraction, or use more images.",
    )


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
