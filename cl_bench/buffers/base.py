"""What every buffer is: a fixed amount of past images, with labels and what the method stores with them.

Shapes: M = capacity, B images of a batch, N images of a task, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from cl_bench.core.errors import require, require_positive
from cl_bench.core.images import send_together
from cl_bench.core.types import Batch, Data, Task
from cl_bench.data.transform import Transform

Columns = dict[str, Tensor]
Describe = Callable[[Tensor, Tensor], Columns]
"""(x (B, C, H, W) normalised and not augmented, y (B,)) -> the method's values for each image, by name, (B, ...) each.

``confidence`` (B,), ``logits`` (B, K) and ``features`` (B, D) are the names that policies and methods share.
"""

CHUNK = 256
"""Images in one forward pass of ``Describe``; limits the memory of the pass, changes no result."""


@dataclass(frozen=True)
class Context:
    """What every buffer gets when it is built.

    Attributes:
        image_shape: (C, H, W).
        num_classes: K of the whole scenario.
        transform: augments sampled images.
        generator: CPU generator of slots and draws.
        device: the device of the images.
        pairs: number of pairs of a task and one of its classes; None for K, if tasks share no class.
        target_shape: of the label of an image: () for a class, (M, 5) in detection.
        num_tasks: tasks of the scenario; read by a buffer with a quota for each.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    transform: Transform
    generator: Generator
    device: torch.device
    pairs: int | None = None
    target_shape: tuple[int, ...] = ()
    num_tasks: int = 1


class Buffer(nn.Module, ABC):
    """At most M images with labels and named columns, in tensors that are allocated once.

    Everything is on the training device. Slots and draws come from a CPU generator, so they are the same on every
    device and nothing waits for the device. The whole content is module state, so a checkpoint contains it.

    Args:
        capacity: M, images in total.
        context: what every buffer gets.
    """

    images: Tensor
    labels: Tensor

    def __init__(self, *, capacity: int, context: Context) -> None:
        super().__init__()
        self.capacity = capacity
        self.transform, self.generator = context.transform, context.generator
        self.filled = 0
        self.offered = 0
        self.columns: Columns = {}
        shape = (capacity, *context.image_shape)
        self.register_buffer("images", torch.zeros(shape, dtype=torch.uint8, device=context.device))
        labels = torch.zeros(
            (capacity, *context.target_shape),
            dtype=torch.float32 if context.target_shape else torch.int64,
            device=context.device,
        )
        self.register_buffer("labels", labels)

    @abstractmethod
    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Offer a batch of the stream after a training step on it; ``columns`` are (B, ...) each."""

    @abstractmethod
    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Take images of a learned task; ``keep`` names the columns of ``describe`` to store with them."""

    def list_slots(self, without: int | None = None) -> Tensor:
        """(n,) on the CPU: the slots with images, in order; without those of the task ``without``.

        By default a buffer takes its images at the end of a task, so it has none of the task that is being learned.
        """
        return torch.arange(self.filled)

    def sample(self, size: int, without: int | None = None) -> Batch:
        """At most ``size`` different images, freshly augmented; none of the task ``without``."""
        return self.sample_from(self.list_slots(without), size)

    def sample_from(self, slots: Tensor, size: int) -> Batch:
        """At most ``size`` different images of these ``slots`` (n,) on the CPU, freshly augmented."""
        drawn = slots[torch.randperm(len(slots), generator=self.generator)[:size]]
        moves = self.transform.draw_moves((len(drawn), *self.images.shape[1:]), self.generator)
        which, *moves = send_together([drawn, *moves], self.labels.device)
        raw = self.images.index_select(0, which)  # copies whole images; images[which] goes pixel by pixel
        return Batch(
            x=self.transform.apply(raw, moves, self.generator),
            y=self.labels.index_select(0, which),
            raw=raw,
            task=-1,
            columns={name: column.index_select(0, which) for name, column in self.columns.items()},
        )

    def data(self) -> Data:
        """All stored images as a training set; their positions in the data set are not known (-1)."""
        labels = self.labels[: self.filled]
        return Data(self.images[: self.filled], labels, torch.full((self.filled,), -1, device=labels.device))

    def __len__(self) -> int:
        return self.filled

    @property
    def nbytes(self) -> int:
        """Bytes of images, labels and columns as allocated."""
        return sum(t.numel() * t.element_size() for t in [self.images, self.labels, *self.columns.values()])

    def write(self, slots: Tensor, raw: Tensor, labels: Tensor, columns: Columns) -> None:
        """Write images and columns into ``slots`` (n,), each slot at most once."""
        self.images[slots] = raw
        self.labels[slots] = labels
        for name, values in columns.items():
            if name not in self.columns:
                self.columns[name] = torch.zeros((self.capacity, *values.shape[1:]), dtype=torch.float32).to(raw.device)
            self.columns[name][slots] = values.detach().float()

    def get_extra_state(self) -> dict[str, Any]:
        """State that is not a registered tensor: counts, and the columns, which exist after the first write."""
        columns = {name: column.clone() for name, column in self.columns.items()}
        return {"filled": self.filled, "offered": self.offered, "columns": columns}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.filled, self.offered = state["filled"], state["offered"]
        self.columns = {name: column.clone().to(self.labels.device) for name, column in state["columns"].items()}


class OnlineBuffer(Buffer):
    """Filled while a task is learned: a policy decides on the CPU which of the offered images go into which slots.

    Every batch of the stream is offered, so an image is offered again in every epoch (as in Mammoth).

    Attributes:
        slot_task: (M,) on the CPU, the task of the image in each slot, -1 for an empty slot.
        slot_class: (M,) on the CPU, its class; not kept by a policy that is not ``by_class``.
        offered_of: (K,) on the CPU, how many images of each class were offered; likewise.
    """

    by_class: ClassVar[bool] = True
    """Whether the policy looks at labels; it then has room for one image per class at least."""

    def __init__(self, *, capacity: int, context: Context) -> None:
        if self.by_class:
            check_quota(capacity, context.num_classes)
        require_positive(fix="buffer=none stores no images.", capacity=capacity)
        super().__init__(capacity=capacity, context=context)
        self.slot_task = torch.full((capacity,), -1)
        self.slot_class = torch.full((capacity,), -1)
        self.offered_of = torch.zeros(context.num_classes, dtype=torch.int64)

    @abstractmethod
    def choose(self, count: int, labels: list[int], task: int) -> dict[int, int]:
        """The slots that ``count`` offered images of a task go to.

        Args:
            labels: their classes; empty for a policy that is not ``by_class``.

        Returns:
            slot -> position of the image among those offered. A later image overwrites an earlier one.
        """

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Offer a batch of the stream after a training step on it; ``columns`` are (B, ...) each."""
        taken = self.choose(len(batch), batch.list_labels() if self.by_class else [], batch.task)
        self.offered += len(batch)
        if not taken:
            return
        host_slots = torch.tensor([*taken])
        self.slot_task[host_slots] = batch.task
        self.filled = max(self.filled, int(host_slots.max()) + 1)
        slots, images = send_together([host_slots, torch.tensor([*taken.values()])], batch.y.device)
        kept = {name: values.index_select(0, images) for name, values in columns.items()}
        self.write(slots, batch.raw.index_select(0, images), batch.y.index_select(0, images), kept)

    def take_slot(self, uniform: float) -> int:
        """A free slot; if there is none, a random one of the class with most images, for ``uniform`` in [0, 1)."""
        if self.filled < self.capacity:
            self.filled += 1
            return self.filled - 1
        slots = torch.nonzero(self.slot_class == torch.bincount(self.slot_class).argmax()).flatten()
        return int(slots[int(uniform * len(slots))])

    def offer(self, data: Data, task: int) -> None:
        """Offer all images of a set once, in random order, e.g. by a method that does not train on the stream."""
        for part in torch.randperm(len(data), generator=self.generator).split(CHUNK):
            offered = data.take(part.to(data.labels.device))
            self.add(Batch(x=offered.images, y=offered.labels, raw=offered.images, task=task))

    def list_slots(self, without: int | None = None) -> Tensor:
        """(n,) on the CPU: the slots with images, in order; without those of the task ``without``."""
        tasks = self.slot_task[: self.filled]
        return super().list_slots() if without is None else torch.nonzero(tasks != without).flatten()

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Do nothing: the buffer was filled during the task."""

    def get_extra_state(self) -> dict[str, Any]:
        """That of every buffer, and what the policy knows of slots and classes."""
        names = ("slot_task", "slot_class", "offered_of")
        return super().get_extra_state() | {name: getattr(self, name).clone() for name in names}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        super().set_extra_state(state)
        for name in ("slot_task", "slot_class", "offered_of"):
            if name in state:  # checkpoints of older versions have none
                getattr(self, name).copy_(state[name])


class PerClassBuffer(Buffer):
    """An equal quota for every class seen, filled at the end of each task.

    After task t every class has the first ``floor(M / classes seen)`` images of its ranking. Old classes keep the first
    images of theirs, so a class is ranked once. During a task the buffer has images of old classes only.
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        check_quota(capacity, context.num_classes)
        super().__init__(capacity=capacity, context=context)

    @abstractmethod
    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) scores of a task's images on the CPU: in each class, images with higher scores come first."""

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Do nothing: images are chosen at the end of the task."""

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Cut the old classes to the new quota, and take as many images of each of the task's classes."""
        quota = self.capacity // task.classes.stop
        labels = self.labels[: self.filled].cpu()
        old = torch.cat(
            [torch.empty(0, dtype=torch.int64), *(_find_class(labels, c)[:quota] for c in range(task.classes.start))]
        )
        scores, labels = self.rank(task.train, describe), task.train.labels.cpu()
        best_first = torch.argsort(scores, descending=True, stable=True)
        new = torch.cat([best_first[labels[best_first] == c][:quota] for c in task.classes])
        chosen = task.train.take(new.to(task.train.labels.device))
        described = describe_in_chunks(chosen, self.transform, describe) if keep else {}

        # First gather the old images, before their slots are overwritten.
        kept = (self.images[old], self.labels[old], {name: column[old] for name, column in self.columns.items()})
        self.write(torch.arange(len(old)), *kept)
        self.filled = len(old) + len(new)
        slots = torch.arange(len(old), self.filled)
        self.write(slots, chosen.images, chosen.labels, {name: described[name] for name in keep})


def check_quota(capacity: int, num_classes: int) -> None:
    """Refuse a capacity of less than one image per class."""
    require(
        capacity >= num_classes,
        "capacity",
        expected=f"at least {num_classes} images, one per class: a class has a quota of capacity / classes",
        got=capacity,
        fix="Raise buffer.capacity, or use buffer=reservoir, which has no quota per class.",
    )


def _find_class(labels: Tensor, c: int) -> Tensor:
    return torch.nonzero(labels == c).flatten()


@torch.no_grad()
def describe_in_chunks(data: Data, transform: Transform, describe: Describe) -> Columns:
    """``describe`` of all images of a set, un-augmented."""
    parts = [describe(transform.normalise(chunk.images), chunk.labels) for chunk in data.split(CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
