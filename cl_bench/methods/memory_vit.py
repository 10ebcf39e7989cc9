"""Learnable-memory ViT (Sandler, Zhmoginov, Vladymyrov, Jackson, CVPR 2022, arXiv 2203.15243), the learning rule.

For each task, new memory tokens, a new class token and a new head are trained with the cross-entropy over the task's
own classes; the trunk and everything of earlier tasks is frozen:

    L = CE( W_t T(c_t) + b_t, y )

So the predictions for an earlier task never change: Task-IL forgetting is 0. With a buffer the loss is over the images
of the batch and a draw from the buffer, and over all classes so far,

    L = CE( [ W_j T(c_j) + b_j ]_{j <= t}, y )

and trains the parameters of all tasks (``rehearsal=all``; earlier predictions may change) or the new ones (``new``).

The paper gives no rule for an unknown task; the rules here use the concatenated logits z = [z_1 .. z_T]:

    argmax        argmax_k z_k
    energy        t* = argmax_t log sum_k exp z_tk (Liu et al. 2020, temperature 1), then argmax_k z_{t*,k}
    nearest_mean  argmin_k | f(x) - mean of f over the training images of class k |, f the trunk's own class token
                  (the frozen-backbone baseline of Janson et al. 2022, arXiv 2210.04428; no memory tokens)

``method.rule`` predicts, the others are reported under ``alternatives``. If the task id is known, head t of z predicts.

The trunk must be trained before. If the network comes without weights, a phase of its own trains it first, with AdamW
and a head that is not used again: on task 1 (``first_task``) or on classes that belong to no task (``half``).

Departures and what the paper leaves open: docs/methods/memory_vit.md.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.memory_vit import MemoryViT
from cl_bench.buffers.base import Buffer, Columns
from cl_bench.core.errors import require_positive, void
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.methods.base import (
    Inputs,
    Predict,
    Terms,
    describe_weights,
    true_class_probability,
    update_class_means,
)
from cl_bench.methods.frozen_trunk import FrozenTrunkMethod, WarmUp, declare_void_warm_up
from cl_bench.scenarios.base import Scenario


@void(
    *("rehearsal", "rehearsal_size"),
    when=lambda v: v["config"].choices.buffer == "none",
    why="buffer=none remembers no images",
)
@declare_void_warm_up
class LearnableMemory(FrozenTrunkMethod):
    """Trains the memory tokens, class token and head of each task on a frozen trunk.

    Args:
        rule: how the class of an image of an unknown task is predicted during the run.
        rehearsal: what the images of earlier tasks train beside the new task's parameters: those of ``all`` tasks, or
            none (``new``).
        rehearsal_size: images of earlier tasks that are added to each batch.
        warm_up: the images that train a trunk without weights: ``first_task``, or ``half`` for the classes that
            ``scenario.pretrain_classes`` holds out. Not used if the network comes with weights.
        warm_up_epochs, warm_up_lr, warm_up_weight_decay: of that phase (AdamW).
    """

    task_id: ClassVar[Literal["ignored", "used", "needed"]] = "used"
    net: MemoryViT
    means: Tensor

    def __init__(
        self,
        *,
        net: MemoryViT,
        buffer: Buffer | None,
        scenario: Scenario,
        rule: Literal["argmax", "energy", "nearest_mean"],
        rehearsal: Literal["new", "all"],
        rehearsal_size: int,
        warm_up: WarmUp,
        warm_up_epochs: int,
        warm_up_lr: float,
        warm_up_weight_decay: float,
    ) -> None:
        super().__init__(
            net=net,
            scenario=scenario,
            warm_up=warm_up,
            warm_up_epochs=warm_up_epochs,
            warm_up_lr=warm_up_lr,
            warm_up_weight_decay=warm_up_weight_decay,
        )
        require_positive(fix="32 is usual at batch size 32.", rehearsal_size=rehearsal_size)
        self.rule, self.rehearsal, self.rehearsal_size = rule, rehearsal, rehearsal_size
        self.buffer = buffer if buffer is not None and buffer.capacity else None
        self.register_buffer("means", torch.zeros(scenario.num_classes, net.dim))

    def learn(self, task: Task) -> Iterator[Phase]:
        """The trunk's warm-up before the first task; then one phase on the task's own parameters, then class means."""
        yield from self.list_warm_up(task)
        self.net.add_task(len(task.classes))
        rehearsed = self.buffer is not None and self.rehearsal == "all"
        yield Phase(task.train, self.observe, self.net.thaw_tasks() if rehearsed else self.net.list_newest())
        update_class_means(self.means, task.train, self.transform, self.net.features)
        if self.buffer is not None:
            self.buffer.close_task(task, self.describe)

    def inputs(self, batch: Batch) -> Inputs:
        """The batch and a draw of images of earlier tasks."""
        slots = torch.empty(0) if self.buffer is None else self.buffer.list_slots(without=batch.task)
        if self.buffer is None or not len(slots):
            return {"x": batch.x, "y": batch.y}
        draw = self.buffer.sample_from(slots, self.rehearsal_size)
        return {"x": torch.cat([batch.x, draw.x]), "y": torch.cat([batch.y, draw.y])}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy over the new task's classes; with a buffer over all classes so far."""
        if self.buffer is not None:
            return {"ce": F.cross_entropy(self.net(inputs["x"])[:, : sum(self.net.sizes)], inputs["y"])}, {}
        first = sum(self.net.sizes[:-1])
        return {"ce": F.cross_entropy(self.net.compute_newest_logits(inputs["x"]), inputs["y"] - first)}, {}

    def remember(self, batch: Batch, columns: Columns) -> None:
        """Offer a batch of the stream to the buffer."""
        if self.buffer is not None:
            self.buffer.add(batch)

    def describe(self, x: Tensor, y: Tensor) -> Columns:
        """What a buffer may rank by: confidence, logits and features of images (B, C, H, W), labels (B,)."""
        logits = self.net(x)
        return {"confidence": true_class_probability(logits, y), "logits": logits, "features": self.net.features(x)}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K) by ``rule``; with a known task id all logits, from which head t is taken."""
        return self.net(x) if task_id is not None else self._list_rules()[self.rule](x, None)

    def alternatives(self) -> dict[str, Predict]:
        """The rules other than ``rule``."""
        return {name: rule for name, rule in self._list_rules().items() if name != self.rule}

    def argmax(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the concatenated logits."""
        return self.net(x)

    def energy(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the logits of the head of lowest energy only, or all logits if the task is known."""
        logits, sizes = self.net(x).float(), self.net.sizes
        if task_id is not None or not sizes:
            return logits
        negative_energy = [z.logsumexp(dim=1) for z in logits[:, : sum(sizes)].split(sizes, dim=1)]
        task = torch.stack(negative_energy, dim=1).argmax(dim=1)  # (B,)
        unlearned = logits.shape[1] - sum(sizes)
        head = torch.tensor([*sizes, unlearned], device=x.device)
        owner = torch.arange(len(head), device=x.device).repeat_interleave(head, output_size=logits.shape[1])  # (K,)
        return logits.masked_fill(owner != task[:, None], -torch.inf)

    def nearest_mean(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), minus the distance of the trunk's features to each class mean."""
        scores = -torch.cdist(self.net.features(x).float(), self.means)
        scores[:, sum(self.net.sizes) :] = -torch.inf
        return scores

    def facts(self) -> dict[str, Any]:
        """Where the trunk's weights come from, and how many parameters each task adds."""
        net = self.net
        own = len(net.trunk.blocks) * net.num_memory * net.dim + net.dim if net.class_token else 0
        per_task = [own + (net.dim + 1) * size for size in net.sizes]
        return {"trunk": self.origin, "parameters_per_task": per_task} | describe_weights(net)

    def memory_bytes(self) -> int:
        """Class means, which only ``nearest_mean`` reads."""
        return self.means.nbytes

    def _list_rules(self) -> dict[str, Predict]:
        return {"argmax": self.argmax, "energy": self.energy, "nearest_mean": self.nearest_mean}
