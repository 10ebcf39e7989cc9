"""Learnable-memory ViT (Sandler, Zhmoginov, Vladymyrov, Jackson, CVPR 2022, arXiv 2203.15243), the learning rule.

For each task, new memory tokens, a new class token and a new head are trained with the cross-entropy over the task's
own classes; the trunk and everything of earlier tasks is frozen:

    L = CE( W_t T(c_t) + b_t, y )

So the predictions for an earlier task never change: Task-IL forgetting is 0. The paper gives no rule for an unknown
task; the rules here use the concatenated logits z = [z_1 .. z_T]:

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
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.memory_vit import MemoryViT
from cl_bench.buffers.base import CHUNK
from cl_bench.core.errors import require, require_positive, void
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Predict, Terms
from cl_bench.optim import adamw
from cl_bench.scenarios.base import Scenario


@void(
    "warm_up",
    "warm_up_epochs",
    "warm_up_lr",
    "warm_up_weight_decay",
    when=lambda v: bool(v["config"].backbone.get("pretrained") or v["config"].backbone.get("checkpoint")),
    why="the network comes with weights",
)
class LearnableMemory(FunctionalMethod):
    """Trains the memory tokens, class token and head of each task on a frozen trunk.

    Args:
        rule: how the class of an image of an unknown task is predicted during the run.
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
        scenario: Scenario,
        rule: Literal["argmax", "energy", "nearest_mean"],
        warm_up: Literal["first_task", "half"],
        warm_up_epochs: int,
        warm_up_lr: float,
        warm_up_weight_decay: float,
    ) -> None:
        super().__init__()
        require_positive(fix="Use 200.", warm_up_epochs=warm_up_epochs)
        self.net, self.rule, self.warm_up, self.warm_up_epochs = net, rule, warm_up, warm_up_epochs
        self.optimizer = partial(
            adamw, lr=warm_up_lr, betas=[0.9, 0.999], weight_decay=warm_up_weight_decay, decay_vectors=True
        )
        self.optimizer([nn.Parameter(torch.zeros(1))])  # checks lr and weight decay now, not at the first step
        self.transform, self.pretrain = scenario.transform, scenario.pretrain
        classes = len(scenario.tasks[0].classes) if warm_up == "first_task" else len(scenario.pretrain_order)
        if net.source is None:
            require(
                classes > 0,
                "warm_up",
                expected="first_task, or half with classes held out to train the trunk on",
                got="half without such classes",
                fix="Set scenario.pretrain_classes=50 as well.",
            )
            net.trunk.reset_classifier(classes)  # used in the warm-up only
            on = "the first task" if warm_up == "first_task" else f"{classes} held-out classes"
        self.origin = net.source or f"warmed up on {on}"
        self.register_buffer("means", torch.zeros(scenario.num_classes, net.dim))

    def learn(self, task: Task) -> Iterator[Phase]:
        """The trunk's warm-up before the first task; then one phase on the task's own parameters, then class means."""
        if task.id == 0 and self.net.source is None:
            yield Phase(
                task.train if self.warm_up == "first_task" else self.pretrain,
                self.observe_warm_up,
                self.net.trunk.parameters(),
                epochs=self.warm_up_epochs,
                optimizer=self.optimizer,
            )
        self.net.add_task(len(task.classes))
        yield Phase(task.train, self.observe, self.net.list_newest())
        self._measure_means(task.train)

    def observe_warm_up(self, batch: Batch) -> Losses:
        """Cross-entropy of the trunk with its own head."""
        return {"warm_up_ce": F.cross_entropy(self.net.trunk(self.net.fit_images(batch.x)), batch.y)}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy over the new task's classes."""
        first = sum(self.net.sizes[:-1])
        return {"ce": F.cross_entropy(self.net.compute_newest_logits(inputs["x"]), inputs["y"] - first)}, {}

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
        return {"trunk": self.origin, "parameters_per_task": [own + (net.dim + 1) * size for size in net.sizes]}

    def memory_bytes(self) -> int:
        """Class means, which only ``nearest_mean`` reads."""
        return self.means.nbytes

    def _list_rules(self) -> dict[str, Predict]:
        return {"argmax": self.argmax, "energy": self.energy, "nearest_mean": self.nearest_mean}

    @torch.no_grad()
    def _measure_means(self, data: Data) -> None:
        totals = torch.zeros_like(self.means)
        for chunk in data.split(CHUNK):
            totals.index_add_(0, chunk.labels, self.net.features(self.transform.normalise(chunk.images)))
        counts = torch.bincount(data.labels, minlength=len(self.means))[:, None]
        self.means.copy_(torch.where(counts > 0, totals / counts.clamp(min=1), self.means))
