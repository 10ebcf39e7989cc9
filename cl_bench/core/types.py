"""The data types that scenario, method and trainer exchange.

Shapes: N images of a set, B images of a batch, C channels, H x W pixels, K classes of the scenario.

Inside the program a class is its *position* in the class order, so that the classes of a task are a
contiguous range and a growing head only ever appends. The data set's own class ids come back when
predictions are written (:attr:`cl_bench.scenarios.base.Scenario.class_order`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Generator, Tensor

from cl_bench.core.images import concatenate_images


@dataclass(frozen=True)
class Data:
    """A set of images kept as uint8, on the training device where they fit.

    Attributes:
        images: (N, C, H, W) uint8, or one of the classes in :mod:`cl_bench.core.images`, which are indexed like such a
            tensor.
        labels: (N,) int64, positions in the class order; in detection (N, M, 5) float, see :mod:`cl_bench.core.boxes`.
        index: (N,) int64, each image's position in the data set's own order.
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: Tensor | slice) -> "Data":
        """The subset at positions (or mask, or slice) ``which``."""
        return Data(self.images[which], self.labels[which], self.index[which])

    def list_classes(self) -> Tensor:
        """(P,) int64, the class of each image; in detection, of each object in all images."""
        if self.labels.ndim == 1:
            return self.labels
        classes = self.labels[..., 0]
        return classes[classes >= 0].long()

    def split(self, size: int) -> Iterator["Data"]:
        """The set in order, in parts of at most ``size`` images; for measuring, never for training."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))

    @staticmethod
    def concatenate(parts: Iterable["Data"]) -> "Data":
        """One set that joins several."""
        parts = list(parts)
        return Data(
            concatenate_images([p.images for p in parts]),
            torch.cat([p.labels for p in parts]),
            torch.cat([p.index for p in parts]),
        )


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Attributes:
        id: 0 for the first task.
        classes: its classes as positions in the class order.
        train, val, test: its images; ``val`` is empty unless ``scenario.val_fraction`` holds some out.
        other_classes: classes of other tasks that have training images in this one; none unless the stream is blurry
            or classes come back.
    """

    id: int
    classes: range
    train: Data
    val: Data
    test: Data
    other_classes: tuple[int, ...] = ()

    def get_split(self, split: str) -> Data:
        """The ``test`` or the ``val`` images."""
        return {"test": self.test, "val": self.val}[split]

    def change_data(self, change: Callable[[Data], Data]) -> "Task":
        """The same task with ``change`` applied to its training, validation and test images."""
        return replace(self, train=change(self.train), val=change(self.val), test=change(self.test))


def list_seen_classes(tasks: Iterable[Task]) -> list[int]:
    """The classes that have training images in one of the tasks, in ascending order."""
    return sorted({c for task in tasks for c in (*task.classes, *task.other_classes)})


@dataclass(frozen=True)
class Batch:
    """A training batch, from the stream or from a buffer.

    Attributes:
        x: (B, C, H, W) float, augmented and normalised.
        y: (B,) int64, positions in the class order; in detection (B, M, 5), as ``Data.labels``.
        raw: (B, C, H, W) uint8, the same images before augmentation; a buffer stores these.
        task: id of the task that is being learned.
        columns: what a buffer stores beside its images, by name, each (B, ...); empty for the stream.
        offered: whether the buffer is offered the batch after this step; with ``trainer.steps_per_batch`` only after
            the last step on it.
        host_y: (B,) ``y`` on the CPU, if ``y`` is on another device and known there; see :meth:`list_labels`.
    """

    x: Tensor
    y: Tensor
    raw: Tensor
    task: int
    columns: dict[str, Tensor] = field(default_factory=dict)
    offered: bool = True
    host_y: Tensor | None = None

    def list_labels(self) -> list[int]:
        """The labels as plain numbers; only without ``host_y`` this waits for the device."""
        return (self.y if self.host_y is None else self.host_y).tolist()

    def __len__(self) -> int:
        return len(self.y)


Losses = dict[str, Tensor]
"""Named scalar loss terms; the trainer minimises their sum."""


class LoopReport(Protocol):
    """What a phase with a loop of its own tells the trainer (:attr:`Phase.loop`)."""

    def step(self, losses: Losses, images: int) -> None:
        """Called after each step, with its loss terms and the number of its images. A request to stop is raised."""

    def end_epoch(self, lr: float) -> None:
        """Called after each epoch, with its learning rate."""


@dataclass(frozen=True)
class Phase:
    """One training phase that a method asks the trainer for: some epochs of gradient descent on one set.

    Attributes:
        data: the training images.
        observe: batch -> named loss terms.
        params: the parameters that this phase trains.
        epochs: passes over ``data``; None uses ``trainer.epochs``.
        lr: peak learning rate; None uses ``optimizer.lr``.
        batch_size: images per step; None uses ``trainer.batch_size``.
        optimizer: parameters -> optimizer; None uses the configured one.
        schedule: (epoch, epochs) -> factor on the learning rate; None uses the configured one.
        after_step: called after every optimizer step, e.g. for a proximal step.
        after_epoch: called with the epoch just finished, from 0; returning True ends the phase early.
        order: CPU generator -> positions in ``data`` that an epoch visits, in this order, equally many in every epoch;
            None visits every image once, shuffled.
        loop: a training loop of its own, for the method of another program (decision 30); None for the trainer's. It is
            saved at its end only, so a run that was stopped inside it begins it again, and the keys of a step have no
            effect on it (:attr:`cl_bench.methods.base.Method.own_loop`).
    """

    data: Data
    observe: Callable[[Batch], Losses]
    params: Iterable[torch.nn.Parameter]
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    schedule: Callable[[int, int], float] | None = None
    after_step: Callable[[], None] | None = None
    after_epoch: Callable[[int], bool | None] | None = None
    order: Callable[[Generator], Tensor] | None = None
    loop: Callable[[LoopReport], None] | None = None
