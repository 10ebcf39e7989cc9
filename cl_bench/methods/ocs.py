"""OCS: online coreset selection for rehearsal (Yoon, Madaan, Yang, Hwang, ICLR 2022).

With g_b = grad CE(f(x_b), y_b) of each image b of the stream's batch, g their mean, and g_C = grad CE(f(x'), y') of a
draw (x', y') from the memory C,

    S(b) = cos(g_b, g)                         minibatch similarity
    V(b) = - mean over p of cos(g_b, g_p)      sample diversity
    A(b) = cos(g_b, g_C)                       coreset affinity
    picked: the images with the largest S + V + tau A;   without A in the first task
    L = CE(f(x), y) over the picked images + replay_weight CE(f(x'), y'),   one mean each

After a task the memory gets images that were picked in the last epoch: of a random number of these, the ones with the
largest S + V come first (``buffer=ordered``), for S and V among them all.

Departures: see docs/methods/ocs.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer, Context
from cl_bench.buffers.reservoir import Reservoir
from cl_bench.core.errors import require_positive, void
from cl_bench.core.types import Batch, Data, Phase, Task
from cl_bench.methods.base import (
    ClassLoss,
    Columns,
    Inputs,
    LossClasses,
    RehearsalMethod,
    Terms,
    check_draws,
    check_replay_size,
    compute_gradients,
    copy_buffers,
)
from cl_bench.scenarios.base import Scenario

RANKED_TOGETHER = 10
"""Images whose gradients are in memory at once after a task; limits the memory, changes no result."""


def picks_every_image(values: Mapping[str, Any]) -> bool:
    """Whether a batch has no more images than are picked, see :func:`~cl_bench.core.errors.void`."""
    return values["select"] >= values["config"].trainer.batch_size


@void("tau", when=picks_every_image, why="method.select is not below trainer.batch_size, so every image is picked")
class OCS(RehearsalMethod):
    """Learns and stores the images of each batch whose gradients stand for the task and suit the memory.

    Args:
        select: images of a batch that are learned.
        replay_size: images drawn from the memory at each step.
        tau: weight of the affinity to the memory.
        replay_weight: weight of the memory's loss.
        candidates: picked images of a task that are ranked for the memory.
        loss_classes: the outputs that all losses compare.
    """

    shared_labels = True
    replay_current_task = False

    def __init__(
        self,
        *,
        net: Backbone,
        buffer: Buffer,
        scenario: Scenario,
        select: int,
        replay_size: int,
        tau: float,
        replay_weight: float,
        candidates: int,
        loss_classes: LossClasses,
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        require_positive(fix="The paper picks 10 of 20.", select=select)
        require_positive(fix="250 are ranked in the released code.", candidates=candidates)
        check_replay_size(replay_size)
        check_draws(net, buffer, replay_size)
        self.select, self.replay_size, self.tau, self.replay_weight = select, replay_size, tau, replay_weight
        self.classify = ClassLoss(scenario, loss_classes)
        self.picked = Reservoir(
            capacity=candidates,
            context=Context(
                image_shape=scenario.image_shape,
                num_classes=scenario.num_classes,
                transform=buffer.transform,
                generator=buffer.generator,
                device=buffer.labels.device,
            ),
        )
        self._new_epoch = False
        self._picks: Tensor | None = None  # of the present step only

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the buffer gets the picked images, the best first."""
        self._new_epoch = True
        yield Phase(task.train, self.observe, self.net.parameters(), after_epoch=self._end_epoch)
        images = self.picked.data()
        best_first = self.rank(images, task.id).argsort(descending=True, stable=True)
        self.buffer.close_task(replace(task, train=images.take(best_first)), self.describe)

    def _end_epoch(self, epoch: int) -> None:
        self._new_epoch = True

    def inputs(self, batch: Batch) -> Inputs:
        """(x, y) of the picked images, and (x', y') of a draw from the memory."""
        drawn, task = self.draw(self.replay_size, batch.task), batch.task
        reference = None
        if drawn is not None:
            y = drawn.y
            reference = compute_gradients(
                self.net, drawn.x, lambda logits: self.classify(logits, y, task), keep_statistics=True
            )
        gradients = self.compute_image_gradients(batch.x, batch.y, task)
        unit = F.normalize(gradients)
        scores = score_gradients(unit, gradients.mean(dim=0), unit.mean(dim=0))
        if reference is not None:
            flat = torch.cat([g.flatten() for g in reference.values()])
            scores = scores + self.tau * (unit @ F.normalize(flat, dim=0))
        picks = scores.topk(min(self.select, len(batch))).indices
        self._picks = picks
        found = {"x": batch.x.index_select(0, picks), "y": batch.y.index_select(0, picks)}
        return found if drawn is None else found | {"x'": drawn.x, "y'": drawn.y}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the picked images and, weighted, of the memory."""
        losses = {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}
        if "x'" in inputs:
            losses["replay_ce"] = self.replay_weight * self.classify(self.net(inputs["x'"]), inputs["y'"], task)
        return losses, {}

    def remember(self, batch: Batch, columns: Columns) -> None:
        """Offer the picked images to the buffer, and keep a random part of those of this epoch."""
        if self._new_epoch:
            self.picked.filled = self.picked.offered = 0
            self._new_epoch = False
        picks, self._picks = self._picks, None
        assert picks is not None
        x, y, raw = (t.index_select(0, picks) for t in (batch.x, batch.y, batch.raw))
        picked = replace(batch, x=x, y=y, raw=raw, host_y=None)
        self.picked.add(picked)
        self.buffer.add(picked)  # for a buffer that is filled during a task

    def compute_image_gradients(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """(B, C, H, W), (B,) -> (B, P): the gradient of each image's loss, by all P parameters that are trained.

        In training mode BatchNorm normalises by the whole batch; its running statistics stay as they are.
        """
        leaves = {name: p.detach().requires_grad_() for name, p in self.net.named_parameters()}
        with torch.enable_grad():
            logits = functional_call(self.net, {**leaves, **copy_buffers(self.net)}, (x,))
            losses = self.classify(logits, y, task, reduction="none")
        rows = torch.autograd.grad(
            losses,
            list(leaves.values()),
            torch.eye(len(y), device=x.device, dtype=losses.dtype),
            is_grads_batched=True,
            materialize_grads=True,
        )
        return torch.cat([g.flatten(1) for g in rows], dim=1)

    def rank(self, images: Data, task: int) -> Tensor:
        """(N,) S + V of the images of a task among each other, un-augmented, in evaluation mode."""

        def gradients() -> Iterator[Tensor]:
            for part in images.split(RANKED_TOGETHER):
                yield self.compute_image_gradients(self.buffer.transform.normalise(part.images), part.labels, task)

        sums = [torch.stack([g.sum(dim=0), F.normalize(g).sum(dim=0)]) for g in gradients()]
        mean, direction = torch.stack(sums).sum(dim=0) / len(images)
        return torch.cat([score_gradients(F.normalize(g), mean, direction) for g in gradients()])

    def memory_bytes(self) -> int:
        """The picked images of a task."""
        return self.picked.nbytes

    def get_extra_state(self) -> dict[str, Any]:
        """Whether the next step begins an epoch."""
        return {"new_epoch": self._new_epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self._new_epoch = state["new_epoch"]


def score_gradients(unit: Tensor, mean: Tensor, direction: Tensor) -> Tensor:
    """(B, P) gradients at unit length, (P,) their mean before that and (P,) after it -> (B,) S + V."""
    return unit @ (F.normalize(mean, dim=0) - direction)
