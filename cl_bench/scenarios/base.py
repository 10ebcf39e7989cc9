"""The base class of a scenario: a data set cut into a sequence of tasks."""

import hashlib
from abc import ABC
from functools import cached_property
from typing import ClassVar, Literal

import torch

from cl_bench.core.images import HostImages
from cl_bench.core.types import Data, Task
from cl_bench.data.transform import Transform
from cl_bench.system.memory import get_free_bytes

LARGEST_SHARE = 0.5
"""Largest part of the free device memory for images; the rest is for the network and its activations."""

CHUNK = 500
"""Images that are hashed together."""

Storage = Literal["device", "host"]


class Scenario(ABC):
    """A sequence of tasks over K classes.

    Attributes:
        shared_labels: whether every task has all K classes; otherwise each class belongs to one task.
        tasks: in the order of learning.
        class_order: (K) the data set's class id at each position; tasks hold positions.
        class_names: one name per class id of the data set.
        image_shape: (C, H, W).
        transform: augmentation and normalisation.
        pretrain: training images of classes that are in no task, for methods that train a network before the first
            task; labels are positions in ``pretrain_order``. Both are empty if the scenario holds no classes out.
        pretrain_order: the data set's class id at each of those positions.
        storage: where the images are kept, on the training device or on the host; None before :meth:`to`.
    """

    shared_labels: ClassVar[bool] = False
    tasks: list[Task]
    class_order: list[int]
    class_names: list[str]
    image_shape: tuple[int, int, int]
    transform: Transform
    pretrain: Data
    pretrain_order: list[int]
    storage: Storage | None = None

    @cached_property
    def data(self) -> str:
        """16 hexadecimal digits of a hash of images, labels and class names: a run resumes only on the same data.

        A scenario over an :class:`~cl_bench.data.base.ImageSet` sets the digest of that. Others use this default, which
        reads every image.
        """
        content = hashlib.sha256(repr(self.class_names).encode())
        for data in self._list_sets():
            content.update(repr(tuple(data.images.shape)).encode())
            for part in data.split(CHUNK):
                content.update(part.images.cpu().contiguous().numpy().data)
                content.update(part.labels.cpu().numpy().data)
        return content.hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        """K, over all tasks."""
        return len(self.class_order)

    def to(self, device: torch.device, storage: Storage | Literal["auto"] = "auto") -> "Scenario":
        """This scenario on ``device``; the images are kept as ``storage`` says, or, with ``auto``, where they fit."""
        if storage == "auto":
            fits = self.nbytes <= LARGEST_SHARE * get_free_bytes(device)
            in_ram = device.type == "cpu" and not any(isinstance(d.images, HostImages) for d in self._list_sets())
            storage = "device" if fits or in_ram else "host"
        self.storage = storage
        self.transform.to(device)
        self.pretrain = _move(self.pretrain, device, storage)
        self.tasks = [task.change_data(lambda data: _move(data, device, storage)) for task in self.tasks]
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(data.images.numel() for data in self._list_sets())

    def _list_sets(self) -> list[Data]:
        return [self.pretrain, *(data for task in self.tasks for data in (task.train, task.val, task.test))]

    def list_class_ids(self, task: Task) -> list[int]:
        """The class ids of a task in the data set's own numbering."""
        return [self.class_order[c] for c in task.classes]


def _move(data: Data, device: torch.device, storage: Storage) -> Data:
    images = data.images
    if isinstance(images, HostImages):
        images = images.move_to(device)
        images = images[:] if storage == "device" else images
    elif storage == "host":
        images = HostImages.from_rows(images, torch.arange(len(images)), device)
    else:
        images = images.to(device)
    return Data(images, data.labels.to(device), data.index.to(device))
