"""What methods on a frozen ViT share: how a trunk without weights is trained first, and how prompts are learned."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.layers.frozen_vit import FrozenViT
from cl_bench.backbones.prompt_vit import PromptViT
from cl_bench.core.errors import require, require_positive, void
from cl_bench.core.types import Batch, Losses, Phase, Task
from cl_bench.methods.base import ClassLoss, FunctionalMethod, Inputs, LossClasses, Terms, describe_weights
from cl_bench.optim import adamw
from cl_bench.scenarios.base import Scenario

Built = TypeVar("Built", bound=Callable[..., Any])

WarmUp = Literal["first_task", "half"]
"""The images that train a trunk without weights: those of the first task, or of ``scenario.pretrain_classes``."""


def declare_void_warm_up(built: Built) -> Built:
    """Declare that the keys of the warm-up have no effect on a trunk with weights."""
    return void(
        *("warm_up", "warm_up_epochs", "warm_up_lr", "warm_up_weight_decay"),
        when=lambda v: bool(v["config"].backbone.get("pretrained") or v["config"].backbone.get("checkpoint")),
        why="the network comes with weights",
    )(built)


class FrozenTrunkMethod(FunctionalMethod):
    """A functional method on a frozen ViT; a trunk without weights is trained by a phase of its own first.

    Args:
        warm_up: on which images, see :data:`WarmUp`.
        warm_up_epochs, warm_up_lr, warm_up_weight_decay: of that phase (AdamW, a head that is not used again).
    """

    net: FrozenViT

    def __init__(
        self,
        *,
        net: FrozenViT,
        scenario: Scenario,
        warm_up: WarmUp,
        warm_up_epochs: int,
        warm_up_lr: float,
        warm_up_weight_decay: float,
    ) -> None:
        super().__init__()
        require_positive(fix="Use 200.", warm_up_epochs=warm_up_epochs)
        self.net, self.warm_up, self.warm_up_epochs = net, warm_up, warm_up_epochs
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

    def list_warm_up(self, task: Task) -> Iterator[Phase]:
        """The phase that trains the trunk, before the first task and only if it has no weights."""
        if task.id == 0 and self.net.source is None:
            yield Phase(
                task.train if self.warm_up == "first_task" else self.pretrain,
                self.observe_warm_up,
                self.net.trunk.parameters(),
                epochs=self.warm_up_epochs,
                optimizer=self.optimizer,
            )

    def observe_warm_up(self, batch: Batch) -> Losses:
        """Cross-entropy of the trunk with its own head."""
        return {"warm_up_ce": F.cross_entropy(self.net.trunk(self.net.fit_images(batch.x)), batch.y)}


class PromptMethod(FrozenTrunkMethod):
    """Learns prompts and a head on a frozen trunk; a subclass says which prompts an image gets.

        L = CE( W f(x, prompts(x)) + b, y ) + the subclass's own terms

    Without ``prompts`` f is the trunk's class token, and only the head is trained.

    Args:
        prompts: False for the row with all prompts off.
        loss_classes: the outputs that CE compares, see :class:`~cl_bench.methods.base.ClassLoss`; the published codes
            set the logits of other tasks to -inf, which is ``task``.
        others: of :class:`FrozenTrunkMethod`.
    """

    net: PromptViT

    def __init__(
        self, *, net: PromptViT, scenario: Scenario, prompts: bool, loss_classes: LossClasses, **others: Any
    ) -> None:
        super().__init__(net=net, scenario=scenario, **others)
        self.prompts, self.loss = prompts, ClassLoss(scenario, loss_classes)

    @abstractmethod
    def encode(self, x: Tensor, query: Tensor, task: int | None) -> tuple[Tensor, Losses]:
        """Images (B, C, H, W) and their queries (B, D) -> (B, D), the input of the head, and more loss terms.

        Args:
            task: that is being learned; None when the method predicts. What an image gets then depends on no other
                image of its batch.
        """

    @abstractmethod
    def list_prompts(self) -> list[nn.Parameter]:
        """The parameters that are trained beside the head."""

    def open_task(self, task: Task) -> None:
        """Called before a task's phase; nothing by default."""

    def learn(self, task: Task) -> Iterator[Phase]:
        """The trunk's warm-up before the first task; then one phase on prompts and head."""
        yield from self.list_warm_up(task)
        self.net.freeze()
        self.open_task(task)
        yield Phase(
            task.train, self.observe, [*(self.list_prompts() if self.prompts else []), *self.net.head.parameters()]
        )

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy, and the subclass's terms."""
        features, losses = self._encode(inputs["x"], task)
        return {"ce": self.loss(self.net.head(features), inputs["y"], task)} | losses, {}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K) logits; each image gets its own prompts."""
        return self.net.head(self._encode(x, None)[0])

    def _encode(self, x: Tensor, task: int | None) -> tuple[Tensor, Losses]:
        with torch.no_grad():
            query = self.net.features(x)
        query = query.to(self.net.head.weight.dtype)  # autocast gives less
        return self.encode(x, query, task) if self.prompts else (query, {})

    def facts(self) -> dict[str, Any]:
        """Where the trunk's weights come from, and how many parameters the prompts have."""
        count = sum(p.numel() for p in self.list_prompts()) if self.prompts else 0
        return {"trunk": self.origin, "prompt_parameters": count} | describe_weights(self.net)


def check_layers(net: PromptViT, **layers: list[int]) -> None:
    """Refuse layers that the trunk does not have, or one twice."""
    depth = len(net.trunk.blocks)
    for key, numbers in layers.items():
        right = len(set(numbers)) == len(numbers) and all(0 <= number < depth for number in numbers)
        require(
            right, key, expected=f"different numbers from 0 to {depth - 1}", got=numbers, fix="Choose some of them."
        )
