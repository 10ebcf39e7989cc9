"""What is remembered of past images.

Shapes: M = capacity, B images of a batch, N images of a task, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from cl_bench.core.errors import require
from cl_bench.core.images import send_together
from cl_bench.core.types import Batch, Data, Task
from cl_bench.data.transform import Transform

Columns = dict[str, Tensor]
Describe = Callable[[Tensor, Tensor], Columns]
"""(x (B, C, H, W) normalised and not augmented, y (B,)) -> what the method says of each image, by name, (B, ...) each.

``confidence`` (B,), ``logits`` (B, K) and ``features`` (B, D) are the names that policies and methods share.
"""

CHUNK = 256
"""Images described in one forward pass; bounds the memory of the pass, changes no result."""


@dataclass(frozen=True)
class Context:
    """What every buffer is given when it is built.

    Attributes:
        image_shape: (C, H, W).
        num_classes: K of the whole scenario.
        transform: augments what is sampled.
        generator: CPU generator of places and draws.
        device: where the images lie.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    transform: Transform
    generator: Generator
    device: torch.device


class Buffer(nn.Module, ABC):
    """At most M images with labels and named columns, in tensors that are allocated once.

    Everything is on the training device; the places and draws are decided with a CPU generator, so that they are the
    same on every device and nothing waits for the device. The whole content is module state, and so part of a
    checkpoint.

    Args:
        capacity: M, images in all.
        context: what every buffer is given.
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
        self.register_buffer("labels", torch.zeros(capacity, dtype=torch.int64, device=context.device))

    @abstractmethod
    def add(self, batch: Batch, **columns: Tensor) -> None:
        """While a task is learned: a batch of its stream was trained on; ``columns`` are (B, ...) each."""

    @abstractmethod
    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """A task is learned: take images of it; ``keep`` names the columns of ``describe`` to store with them."""

    def sample(self, size: int) -> Batch:
        """At most ``size`` different images, freshly augmented."""
        drawn = torch.randperm(self.filled, generator=self.generator)[:size]
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
        """Everything remembered, as a set to train on; where an image stood in the data set is not kept (-1)."""
        labels = self.labels[: self.filled]
        return Data(self.images[: self.filled], labels, torch.full_like(labels, -1))

    def __len__(self) -> int:
        return self.filled

    @property
    def nbytes(self) -> int:
        """Bytes of images, labels and columns as allocated."""
        return sum(t.numel() * t.element_size() for t in [self.images, self.labels, *self.columns.values()])

    def write(self, places: Tensor, raw: Tensor, labels: Tensor, columns: Columns) -> None:
        """Put images and columns at ``places`` (n,), each place at most once."""
        self.images[places] = raw
        self.labels[places] = labels
        for name, values in columns.items():
            if name not in self.columns:
                self.columns[name] = torch.zeros((self.capacity, *values.shape[1:]), dtype=torch.float32).to(raw.device)
            self.columns[name][places] = values.detach().float()

    def get_extra_state(self) -> dict[str, Any]:
        """What is no registered tensor: counts, and the columns, which exist from the first write on."""
        columns = {name: column.clone() for name, column in self.columns.items()}
        return {"filled": self.filled, "offered": self.offered, "columns": columns}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.filled, self.offered = state["filled"], state["offered"]
        self.columns = {name: column.clone().to(self.labels.device) for name, column in state["columns"].items()}


class PerClassBuffer(Buffer):
    """An equal share of the capacity for every class seen, filled when a task is closed.

    After task t every class holds the ``floor(M / classes seen)`` first of its ranking; old classes keep the front of
    theirs, so a ranking is made once. Between tasks the buffer holds old classes only.
    """

    def __init__(self, *, capacity: int, context: Context) -> None:
        require(
            capacity >= context.num_classes,
            "capacity",
            expected=f"at least {context.num_classes} images, one a class (a class has a share of capacity / classes)",
            got=capacity,
            fix="Raise buffer.capacity, or use buffer=reservoir, which keeps no share a class.",
        )
        super().__init__(capacity=capacity, context=context)

    @abstractmethod
    def rank(self, data: Data, describe: Describe) -> Tensor:
        """(N,) scores of a task's images on the CPU: within a class the higher ones are kept first."""

    def add(self, batch: Batch, **columns: Tensor) -> None:
        """Nothing: images are chosen when the task is closed."""

    def close_task(self, task: Task, describe: Describe, keep: tuple[str, ...] = ()) -> None:
        """Shrink the share of the old classes and give the task's classes theirs."""
        share = self.capacity // task.classes.stop
        labels = self.labels[: self.filled].cpu()
        old = torch.cat(
            [torch.empty(0, dtype=torch.int64), *(_of(labels, c)[:share] for c in range(task.classes.start))]
        )
        scores, labels = self.rank(task.train, describe), task.train.labels.cpu()
        best_first = torch.argsort(scores, descending=True, stable=True)
        new = torch.cat([best_first[labels[best_first] == c][:share] for c in task.classes])
        chosen = task.train.take(new.to(task.train.labels.device))
        described = described_in_chunks(chosen, self.transform, describe) if keep else {}

        # Compact first: the old images are gathered before their places are written over.
        kept = (self.images[old], self.labels[old], {name: column[old] for name, column in self.columns.items()})
        self.write(torch.arange(len(old)), *kept)
        self.filled = len(old) + len(new)
        places = torch.arange(len(old), self.filled)
        self.write(places, chosen.images, chosen.labels, {name: described[name] for name in keep})


def _of(labels: Tensor, c: int) -> Tensor:
    return torch.nonzero(labels == c).flatten()


@torch.no_grad()
def described_in_chunks(data: Data, transform: Transform, describe: Describe) -> Columns:
    """``describe`` over a whole set, un-augmented."""
    parts = [describe(transform.normalise(chunk.images), chunk.labels) for chunk in data.split(CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
