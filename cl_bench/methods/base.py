"""What every method is built on: three verbs, and what several methods share.

Shapes: B images of a batch, C channels, H x W pixels, K classes of the scenario.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call

from cl_bench.backbones.base import Backbone, check_single_images, turn_into_buffers
from cl_bench.buffers.base import CHUNK, Buffer, Columns
from cl_bench.core.errors import require_positive
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.data.transform import Transform
from cl_bench.scenarios.base import Scenario

Predict = Callable[[Tensor, Tensor | None], Tensor]
"""(B, C, H, W) images, (B,) task ids or None -> (B, K) scores, see :meth:`Method.predict`."""

Inputs = dict[str, Tensor]
"""What a step is computed from, by name; ``x`` (B, C, H, W) and ``y`` (B,) are the stream's."""

LossClasses = Literal["all", "seen", "task"]
"""The outputs that a training loss compares, see :class:`ClassLoss`."""

Terms = tuple[Losses, Columns]
"""Named loss terms, and what the buffer stores with each image of the stream, (B, ...) each."""


class Method(nn.Module, ABC):
    """A learning rule around a network.

    A method returns named losses; it never logs, saves, steps an optimizer or loops over training batches. Everything
    it must remember between tasks is module state (parameters, registered buffers, extra state), because a run is
    resumed by replay: the trainer loads the state saved at the start of the task, runs :meth:`learn` again, and loads
    the state saved at the end of each finished phase. So the code of :meth:`learn` may depend only on that state, the
    task, and torch's global random generator. It runs in evaluation mode; the steps of a phase run in training mode.
    """

    task_id: ClassVar[Literal["ignored", "used", "needed"]] = "ignored"
    """What :meth:`predict` does with a task id: it ignores it (Task-IL restricts the Class-IL scores to the task's
    classes), uses it if it is given (Task-IL needs its own pass), or needs it (Class-IL is null)."""

    shared_labels: ClassVar[bool] = False
    """Whether it can learn tasks that share their classes. A method cannot if it needs new classes in each task, e.g.
    for a new head, for distillation on the old ones, or for a quota of the buffer."""

    recurring_classes: ClassVar[bool] = True
    """Whether a method with :attr:`shared_labels` can also learn tasks with images of other tasks' classes."""

    draws_weights: ClassVar[bool] = False
    """Whether the method draws the weights of its network itself. Then ``backbone.weights`` would have no effect, so
    it is refused."""

    test_batches: Literal["mixed", "single_task"] = "mixed"
    """How :meth:`predict` gets the test images if it gets no task id: all tasks shuffled together, or batches of one
    task each, which tell it more than an image does. The summary and the report say so, and the audit fails
    (decision 14)."""

    gradient_free: ClassVar[bool] = False
    """Whether it learns without gradient descent: :meth:`learn` yields no phase, and the network stays as it is
    (decision 37)."""

    own_loop: ClassVar[bool] = False
    """Whether its phases have training loops of their own (:attr:`~cl_bench.core.types.Phase.loop`). Then keys of our
    steps that are not at their default are refused, and what it keeps for old tasks is unknown."""

    @abstractmethod
    def learn(self, task: Task) -> Iterator[Phase]:
        """Yield the phases of a task; code before the first ``yield`` starts the task, code after the last ends it."""

    @abstractmethod
    def observe(self, batch: Batch) -> Losses:
        """Named loss terms of a batch; the trainer minimises their sum."""

    @abstractmethod
    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """Scores (B, K) of images (B, C, H, W), -inf for a class that the method cannot score.

        ``task_id`` is (B,), or None if it is unknown. The evaluation masks classes not seen yet and, in Task-IL, the
        classes of other tasks, in one place for every method. A row of -inf is no answer.
        """

    def after_backward(self) -> None:
        """Change gradients before the optimizer's step."""

    def alternatives(self) -> dict[str, Predict]:
        """Other prediction rules than :meth:`predict`, by name.

        Each is measured once, after the last task, and reported in ``summary.json`` under ``alternatives``.
        """
        return {}

    def facts(self) -> dict[str, Any]:
        """More facts about the trained method, as plain JSON values: ``method_facts`` of ``summary.json``."""
        return {}

    def capacity(self) -> float | None:
        """Size relative to the method's own base network; None if the number of parameters says it all."""
        return None

    def memory_bytes(self) -> int:
        """Bytes kept for old tasks besides the network's parameters and the buffer: masks, copies, statistics."""
        return 0


class GradientFreeMethod(Method):
    """A method that computes between the tasks on a frozen network, and yields no phase (decision 37).

    Args:
        net: the network, which stays as it is.
        scenario: whose images it gets.
    """

    gradient_free = True

    def __init__(self, *, net: Backbone, scenario: Scenario) -> None:
        super().__init__()
        self.net, self.transform = net.requires_grad_(False), scenario.transform

    def observe(self, batch: Batch) -> Losses:
        """Not used, since there is no phase."""
        raise TypeError(f"{type(self).__name__} has no step")

    def facts(self) -> dict[str, Any]:
        """Where the network's weights come from, if it says so."""
        return {"trunk": getattr(self.net, "source", None)} | describe_weights(self.net)


class FunctionalMethod(Method):
    """A method whose step has three parts: get the tensors, compute the loss terms from them alone, fill the buffer.

    The second part can then be compiled, captured in a CUDA graph, or computed for many seeds at once
    (:mod:`cl_bench.engine.step`, :mod:`cl_bench.engine.replicas`). A method that cannot be split like this is a plain
    :class:`Method`. Unless a method says otherwise, it predicts with the logits of its network.
    """

    net: Backbone

    self_contained: ClassVar[bool] = True
    """Whether :meth:`terms` reads registered tensors only, and no network that is kept outside the module's state."""

    def inputs(self, batch: Batch) -> Inputs:
        """Everything that the loss terms of a batch read, e.g. a draw from the buffer; runs before the step."""
        return {"x": batch.x, "y": batch.y}

    @abstractmethod
    def terms(self, inputs: Inputs, task: int) -> Terms:
        """The loss terms of ``inputs``.

        It is a function of its arguments and of the module's parameters and tensors. It never waits for the device,
        draws no random number except for dropout, and changes nothing except BatchNorm's statistics.
        """

    def remember(self, batch: Batch, columns: Columns) -> None:
        """Offer a batch of the stream to the buffer, with the columns that :meth:`terms` returned."""

    def offer(self, batch: Batch, columns: Columns) -> None:
        """:meth:`remember` unless this step is one of several on the same batch and not the last."""
        if batch.offered:
            self.remember(batch, columns)

    def observe(self, batch: Batch) -> Losses:
        """Named loss terms of a batch: inputs, terms, remember."""
        losses, columns = self.terms(self.inputs(batch), batch.task)
        self.offer(batch, columns)
        return losses

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the network's logits."""
        return self.net(x)


class RehearsalMethod(FunctionalMethod):
    """A functional method with a buffer, which is offered every batch of the stream."""

    buffer: Buffer

    replay_current_task: bool = True
    """Whether :meth:`draw` may give images of the task that is being learned."""

    def __init__(self, *, net: Backbone, buffer: Buffer) -> None:
        super().__init__()
        self.net, self.buffer = net, buffer

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the buffer closes the task."""
        yield Phase(task.train, self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe)

    def draw(self, size: int, task: int) -> Batch | None:
        """At most ``size`` images of the buffer while ``task`` is learned; None if it has none to give."""
        slots = self.buffer.list_slots(without=None if self.replay_current_task else task)
        return self.buffer.sample_from(slots, size) if len(slots) else None

    def remember(self, batch: Batch, columns: Columns) -> None:
        """Offer a batch of the stream to the buffer, with the columns that :meth:`terms` returned."""
        self.buffer.add(batch, **columns)

    def describe(self, x: Tensor, y: Tensor) -> Columns:
        """What a buffer may rank by or store: confidence, logits and features of images (B, C, H, W), labels (B,)."""
        logits = self.net(x)
        return {"confidence": true_class_probability(logits, y), "logits": logits, "features": self.net.features(x)}


class ClassLoss(nn.Module):
    """Cross-entropy over some of the K outputs; the others are left out, as if they were -inf.

    ``all``: over every output. ``seen``: over the classes seen in the tasks up to the current one. ``task``: for each
    image, over the classes of its own task, so that the rows of a task are a head of its own (multi-head).

    An output that is left out gets no gradient. So ``seen`` gives the gradients of a head that grows with each task,
    and those of one whose other outputs are set to -1000, where exp underflows to 0.

    Args:
        classes: which outputs.
    """

    task_of: Tensor
    unseen: Tensor | None

    def __init__(self, scenario: Scenario, classes: LossClasses) -> None:
        super().__init__()
        self.classes = classes
        unseen = torch.ones(len(scenario.tasks), scenario.num_classes, dtype=torch.bool)  # after each task
        for number, task in enumerate(scenario.tasks):
            unseen[number:, [*task.classes, *task.other_classes]] = False
        self._ends = [scenario.num_classes - int(row.flip(0).byte().argmin()) for row in unseen]
        # only if the classes seen are not the first ones
        gaps = any(bool(row[:end].any()) for row, end in zip(unseen, self._ends))
        task_of = torch.zeros(scenario.num_classes, dtype=torch.int64)  # (K,); if tasks share classes, the last one
        for number, task in enumerate(scenario.tasks):
            task_of[task.classes.start : task.classes.stop] = number
        self.register_buffer("task_of", task_of, persistent=False)
        self.register_buffer("unseen", unseen if gaps else None, persistent=False)

    def mask(self, logits: Tensor, y: Tensor, task: int) -> Tensor:
        """(B, K) logits of images with labels (B,), while ``task`` is learned -> (B, k), those that are compared."""
        if self.classes == "seen" and self.unseen is not None:
            return logits.masked_fill(self.unseen[task], -torch.inf)
        if self.classes == "seen":
            return logits[:, : self._ends[task]]
        if self.classes == "task":
            return logits.masked_fill(self.task_of[y][:, None] != self.task_of, -torch.inf)
        return logits

    def forward(self, logits: Tensor, y: Tensor, task: int, reduction: str = "mean") -> Tensor:
        """(B, K), (B,) -> the cross-entropy: a scalar, or (B,) with ``reduction="none"``."""
        return F.cross_entropy(self.mask(logits, y, task), y, reduction=reduction)


class Teacher(nn.Module):
    """A frozen copy of a network: its weights are buffers, and it is always in evaluation mode."""

    def __init__(self, net: Backbone) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        turn_into_buffers(self.net)
        self.train()

    def take(self, net: Backbone) -> None:
        """Become a copy of ``net``."""
        self.net.load_state_dict(net.state_dict())

    def train(self, mode: bool = True) -> "Teacher":
        """Evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits."""
        return self.net(x)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights and statistics."""
        return sum(t.nbytes for t in self.buffers())


class ParameterSnapshot:
    """Old values of some parameters of a method and, if asked for, the importance of each entry; 0 until :meth:`take`.

    Both are registered buffers of the method itself, so they are part of its state and of its checkpoints.

    Args:
        method: gets the buffers ``{values}_0``, ``{importance}_0``, ``{values}_1``, ...
        parameters: the parameters; later calls get the same ones in the same order.
        values, importance: names of the buffers; None for no importance.
    """

    def __init__(
        self,
        method: Method,
        parameters: Iterable[nn.Parameter],
        *,
        values: str = "old",
        importance: str | None = None,
    ) -> None:
        self._method, self._values, self._importance = method, values, importance
        self._count = 0
        for p in parameters:
            for name in filter(None, (values, importance)):
                method.register_buffer(f"{name}_{self._count}", torch.zeros_like(p))
            self._count += 1

    @property
    def values(self) -> list[Tensor]:
        """The old values of each parameter."""
        return self._get(self._values)

    @property
    def importance(self) -> list[Tensor]:
        """The importance of each parameter's entries, in the parameter's shape; an empty list if there is none."""
        return self._get(self._importance) if self._importance else []

    def _get(self, name: str) -> list[Tensor]:
        return [self._method.get_buffer(f"{name}_{i}") for i in range(self._count)]

    def drifts(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Each parameter minus its old values."""
        return [p - old for p, old in zip(parameters, self.values, strict=True)]

    def compute_pull(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Sum over all entries of importance times squared drift, a scalar."""
        pairs = zip(self.importance, self.drifts(parameters))
        return torch.stack([(importance * drift.square()).sum() for importance, drift in pairs]).sum()

    @torch.no_grad()
    def take(self, values: Iterable[Tensor], importance: Iterable[Tensor] = ()) -> None:
        """Replace the old values and the importance."""
        for old, new in zip(self.values + self.importance, [*values, *importance], strict=True):
            old.copy_(new)

    @property
    def nbytes(self) -> int:
        """Bytes of old values and importance."""
        return sum(t.nbytes for t in self.values + self.importance)


def describe_weights(net: Backbone) -> dict[str, Any]:
    """``{"weights": ...}``: which weights a pre-trained network had and how it gets images, if it says so."""
    weights = getattr(net, "weights", None)
    return {"weights": weights} if weights else {}


@torch.no_grad()
def measure_width(net: Backbone, image_shape: tuple[int, int, int]) -> int:
    """D of a network's features, for images (C, H, W); it is left in evaluation mode."""
    tensor = next(iter([*net.parameters(), *net.buffers()]))
    return net.eval().features(torch.zeros(1, *image_shape, device=tensor.device)).shape[1]


@torch.no_grad()
def update_class_means(means: Tensor, data: Data, transform: Transform, features: Callable[[Tensor], Tensor]) -> None:
    """Set the rows of ``means`` (K, D) whose classes have images in ``data``, to their mean features, un-augmented.

    Args:
        features: (B, C, H, W) -> (B, D).
    """
    totals = torch.zeros_like(means)
    for chunk in data.split(CHUNK):
        totals.index_add_(0, chunk.labels, features(transform.normalise(chunk.images)))
    counts = torch.bincount(data.labels, minlength=len(means))[:, None]
    means.copy_(torch.where(counts > 0, totals / counts.clamp(min=1), means))


@torch.no_grad()
def measure_class_means(
    buffer: Buffer, features: Callable[[Tensor], Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """The mean feature of the stored images of each class, un-augmented and scaled to unit length, and which have one.

    Args:
        features: (B, C, H, W) -> (B, D).

    Returns:
        (K, D), 0 for a class without images, and (K,) bool.
    """
    stored = buffer.data()
    found = torch.cat([features(buffer.transform.normalise(chunk.images)) for chunk in stored.split(CHUNK)])
    sums = found.new_zeros(num_classes, found.shape[1]).index_add_(0, stored.labels, found)
    known = torch.zeros(num_classes, dtype=torch.bool, device=found.device)
    known[stored.labels] = True
    return F.normalize(sums, dim=1), known


def score_by_nearest_mean(features: Tensor, means: Tensor, known: Tensor) -> Tensor:
    """(B, D), (K, D), (K,) -> (B, K): minus the distance to each class's mean, -inf for a class without one."""
    return -torch.cdist(features, means).masked_fill(~known, torch.inf)


def compute_gradients(
    net: Backbone, x: Tensor, loss: Callable[[Tensor], Tensor], *, keep_statistics: bool
) -> dict[str, Tensor]:
    """The gradient of ``loss(net(x))``, a scalar, for images (B, C, H, W), by the name of each parameter.

    Parameters and their gradients are not touched. Nor is their place in an autograd graph, so that a step of them can
    still be captured as a CUDA graph.

    Args:
        keep_statistics: whether BatchNorm's running statistics stay as they are.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    state = copy_buffers(net) if keep_statistics else {}
    value = loss(functional_call(net, {**leaves, **state}, (x,)))
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found))


def copy_buffers(net: Backbone) -> dict[str, Tensor]:
    """Copies of BatchNorm's running statistics and other buffers, by name."""
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


def repeat_passes(size: int, visits: int, generator: Generator) -> Tensor:
    """Positions of ``visits`` visits to ``size`` images: shuffled passes one after the other, the last one cut."""
    passes = [torch.randperm(size, generator=generator) for _ in range(-(-visits // size))]
    return torch.cat(passes)[:visits]


def check_replay_size(replay_size: int) -> None:
    """Refuse a rehearsal step that replays nothing."""
    require_positive(fix="32 is usual at batch size 32.", replay_size=replay_size)


def is_filled_between_tasks(values: Mapping[str, Any]) -> bool:
    """Whether the configured buffer has images of earlier tasks only, see :func:`~cl_bench.core.errors.void`."""
    return values["config"].choices.buffer in ("fixed_memory", "confidence_aware", "herding", "ordered", "per_task")


def check_draws(net: Backbone, buffer: Buffer, replay_size: int) -> None:
    """Refuse draws of one image in a forward pass of their own if the network cannot be trained on one image."""
    for key, size in {"replay_size": replay_size, "buffer.capacity": buffer.capacity}.items():
        if size == 1:
            check_single_images(net, buffer.images.shape[1:], key)


def true_class_probability(logits: Tensor, y: Tensor) -> Tensor:
    """(B, K), (B,) -> (B,) softmax probability of each image's class: its confidence."""
    return torch.softmax(logits.float(), dim=1).gather(1, y[:, None]).squeeze(1)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, *, mean_over_classes: bool) -> Tensor:
    """T^2 KL( softmax(teacher / T) || softmax(student / T) ), logits (B, K) each -> scalar, mean over images.

    With ``mean_over_classes`` the sum over classes that is in KL is a mean as well.
    """
    p, q = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
    divergence = F.kl_div(p, q, reduction="none", log_target=True)
    return temperature**2 * (divergence.mean() if mean_over_classes else divergence.sum() / len(student))
