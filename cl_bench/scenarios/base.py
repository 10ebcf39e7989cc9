"""The base class of a scenario: a data set cut into a sequence of tasks."""

import hashlib
from abc import ABC
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cl_bench.core.images import HostImages, RearrangedImages, are_on_host, get_stored
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
        target_shape: of the label of an image: () for a class, (M, 5) in detection (decision 36).
        measure: the word for what is measured of the answers.
        follows_seed: whether the tasks depend on the run's ``seed``; the seeds of a row may then differ in their tasks.
    """

    shared_labels: bool = False
    follows_seed: bool = False
    target_shape: tuple[int, ...] = ()
    measure: str = "accuracy"
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
    def recurring(self) -> bool:
        """Whether a task has training images of other classes than its own (:attr:`Task.other_classes`)."""
        return any(task.other_classes for task in self.tasks)

    @property
    def num_classes(self) -> int:
        """K, over all tasks."""
        return len(self.class_order)

    def to(self, device: torch.device, storage: Storage | Literal["auto"] = "auto") -> "Scenario":
        """This scenario on ``device``; the images are kept as ``storage`` says, or, with ``auto``, where they fit."""
        if storage == "auto":
            fits = self.nbytes <= LARGEST_SHARE * get_free_bytes(device)
            in_ram = device.type == "cpu" and not any(are_on_host(d.images) for d in self._list_sets())
            storage = "device" if fits or in_ram else "host"
        self.storage = storage
        self.transform.to(device)
        mover = _Mover(device, storage)
        self.pretrain = mover.move(self.pretrain)
        self.tasks = [task.change_data(mover.move) for task in self.tasks]
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all stored images; images that several tasks share count once."""
        return sum(images.numel() for images in {id(s): s for s in map(get_stored, self._list_images())}.values())

    def _list_images(self) -> list[Tensor]:
        return [data.images for data in self._list_sets()]

    def _list_sets(self) -> list[Data]:
        return [self.pretrain, *(data for task in self.tasks for data in (task.train, task.val, task.test))]

    def list_class_ids(self, task: Task) -> list[int]:
        """The class ids of a task in the data set's own numbering."""
        return [self.class_order[c] for c in task.classes]


class _Mover:
    """Moves data to a device; a tensor that several tasks share is moved once."""

    def __init__(self, device: torch.device, storage: Storage) -> None:
        self.device, self.storage = device, storage
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with the original: another tensor gets no old id

    def move(self, data: Data) -> Data:
        images = data.images
        if isinstance(images, RearrangedImages):
            images = images.change_tensors(self._move_vector, self._move_images)
        else:
            images = self._move_images(images)
        return Data(images, self._move_vector(data.labels), self._move_vector(data.index))

    def _move_vector(self, tensor: Tensor) -> Tensor:
        return self._once(tensor, lambda t: t.to(self.device))

    def _move_images(self, images: Tensor) -> Tensor:
        return self._once(images, lambda i: _move_images(i, self.device, self.storage))

    def _once(self, tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = (tensor, move(tensor))
        return self._moved[id(tensor)][1]


def _move_images(images: Tensor, device: torch.device, storage: Storage) -> Tensor:
    if isinstance(images, HostImages):
        images = images.move_to(device)
        return images[:] if storage == "device" else images
    if storage == "host":
        return HostImages.from_rows(images, torch.arange(len(images)), device)
    return images.to(device)
