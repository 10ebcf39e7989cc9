"""What a method is: three verbs.

Shapes: B images of a batch, C channels, H x W pixels, K classes of the scenario.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone, check_single_images
from cl_bench.buffers.base import Buffer, Columns
from cl_bench.core.errors import require
from cl_bench.core.types import Batch, Losses, Phase, Task

Predict = Callable[[Tensor, Tensor | None], Tensor]
"""(B, C, H, W) images, (B,) task ids or None -> (B, K) scores, see :meth:`Method.predict`."""

Inputs = dict[str, Tensor]
"""What a step is computed from, by name; ``x`` (B, C, H, W) and ``y`` (B,) are the stream's."""

Terms = tuple[Losses, Columns]
"""Named loss terms, and what to remember of each image of the stream, (B, ...) each."""


class Method(nn.Module, ABC):
    """A learning rule around a network.

    A method returns named losses; it never logs, saves, steps an optimizer or loops over training batches. Everything
    it must remember between tasks is module state (parameters, registered buffers, extra state), for resuming is
    replay: the trainer loads the state of the task's beginning, runs :meth:`learn` again and lays the saved state of
    the phase over it. So the code of :meth:`learn` depends on nothing but that state, the task, and torch's global
    random generator. It runs in evaluation mode; a phase's steps run in training mode.
    """

    task_id: ClassVar[Literal["ignored", "used", "needed"]] = "ignored"
    """What :meth:`predict` does with a task id: nothing (Task-IL restricts the Class-IL scores to the task's classes),
    uses it where it is given (Task-IL needs a pass of its own), or cannot answer without (Class-IL is null)."""

    shared_labels: ClassVar[bool] = False
    """Whether it can learn tasks that share their classes. Not where a task has a head, a teacher or a share of the
    memory for classes that were never seen before."""

    test_batches: Literal["mixed", "single_task"] = "mixed"
    """How test images come to :meth:`predict` where it is told no task id: tasks mixed, or batches of one task each,
    which tells it more than an image does. The summary and the report say so, and an audit fails it (decision 14)."""

    @abstractmethod
    def learn(self, task: Task) -> Iterator[Phase]:
        """Yield the phases of a task; code before the first ``yield`` opens the task, after the last closes it."""

    @abstractmethod
    def observe(self, batch: Batch) -> Losses:
        """Named loss terms of a batch; the trainer minimises their sum."""

    @abstractmethod
    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """Scores (B, K) of images (B, C, H, W), -inf for a class that the method has no answer for.

        ``task_id`` is (B,) or None where it is unknown. Classes not seen yet, and in Task-IL the classes of other
        tasks, are masked by the evaluation, in one place for every method; a row of -inf is no answer.
        """

    def after_backward(self) -> None:
        """Change gradients before the optimizer's step."""

    def alternatives(self) -> dict[str, Predict]:
        """Other rules to answer by than :meth:`predict`, by name.

        Each is measured once, after the last task, and stands in ``summary.json`` under ``alternatives``.
        """
        return {}

    def facts(self) -> dict[str, Any]:
        """What else is known of the learned method, as plain JSON values: ``method_facts`` of ``summary.json``."""
        return {}

    def capacity(self) -> float | None:
        """Size relative to the method's own base network, where that is more than a count of parameters."""
        return None

    def memory_bytes(self) -> int:
        """Bytes kept for old tasks beside the network's parameters and the buffer: masks, copies, statistics."""
        return 0


class FunctionalMethod(Method):
    """A method whose step is to look up tensors, to compute the loss terms from them alone, and to remember.

    The middle part can then be compiled, captured in a CUDA graph, or computed for many seeds at once
    (:mod:`cl_bench.engine.step`, :mod:`cl_bench.engine.replicas`). A method that cannot be cut so is a plain
    :class:`Method`.
    """

    self_contained: ClassVar[bool] = True
    """Whether :meth:`terms` reads registered tensors only, and no network that is kept aside."""

    def inputs(self, batch: Batch) -> Inputs:
        """Everything that the loss terms of a batch read, e.g. a draw from the buffer: host work, before the step."""
        return {"x": batch.x, "y": batch.y}

    @abstractmethod
    def terms(self, inputs: Inputs, task: int) -> Terms:
        """The loss terms of ``inputs``.

        A function of its arguments and of the module's parameters and tensors, which waits for no device, draws
        nothing but dropout, and changes nothing but BatchNorm's statistics.
        """

    def remember(self, batch: Batch, columns: Columns) -> None:
        """Hand a batch of the stream to the buffer, with the columns that :meth:`terms` gave."""

    def observe(self, batch: Batch) -> Losses:
        """Named loss terms of a batch: inputs, terms, remember."""
        losses, columns = self.terms(self.inputs(batch), batch.task)
        self.remember(batch, columns)
        return losses


class Teacher(nn.Module):
    """A network as it was, which only answers: its weights are buffers, and it is always in evaluation mode."""

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        for module in self.net.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.train()

    def take(self, net: Backbone) -> None:
        """Become a copy of ``net``."""
        self.net.load_state_dict(net.state_dict())

    def train(self, mode: bool = True) -> "Teacher":
        """Evaluation mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits."""
        return self.net(x)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights and statistics."""
        return sum(t.nbytes for t in self.buffers())


def check_replay_size(replay_size: int) -> None:
    """Refuse a rehearsal step without rehearsal."""
    require(
        replay_size > 0,
        "replay_size",
        expected="1 or more images",
        got=replay_size,
        fix="32 is usual at batch size 32.",
    )


def check_draws(net: Backbone, buffer: Buffer, replay_size: int) -> None:
    """Refuse draws of one image that pass a network by themselves, where it cannot be trained on one."""
    for key, size in {"replay_size": replay_size, "buffer.capacity": buffer.capacity}.items():
        if size == 1:
            check_single_images(net, buffer.images.shape[1:], key)


def described(net: Backbone, x: Tensor, y: Tensor) -> Columns:
    """What a buffer may rank by or store of images (B, C, H, W) with labels (B,), by the network's own head."""
    logits = net(x)
    return {"confidence": true_class_probability(logits, y), "logits": logits, "features": net.features(x)}


def true_class_probability(logits: Tensor, y: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,) softmax probability of each image's class: its confidence."""
    return torch.softmax(logits.float(), dim=1).gather(1, y[:, None]).squeeze(1)
