"""CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218).

Components P_j with keys K_j and attention vectors A_j in some layers; each task adds the same number of them, and those
of earlier tasks are frozen. The query q(x) is the frozen ViT's class token, and J the components of the tasks so far:

    alpha_j = cos( q(x) * A_j, K_j )                    for each image by itself; * is elementwise
    P(x)    = sum_{j in J} alpha_j P_j                  L tokens: the first half P_K, the second half P_V
    f(x)    = class token of ViT( x; P^l ),             a layer's attention being ( Q, [ P_K ; K ], [ P_V ; V ] )
    L       = CE( W f(x) + b, y ) + lambda sum over layers of  |K K^T - I|^2 + |A A^T - I|^2 + |P P^T - I|^2

with the rows J of K, A and P. They start orthonormal. Departures: docs/methods/prompts.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.prompt_vit import PromptViT
from cl_bench.core.errors import require, require_nonnegative, void
from cl_bench.core.types import Losses, Task
from cl_bench.methods.base import LossClasses
from cl_bench.methods.frozen_trunk import PromptMethod, WarmUp, check_layers, declare_void_warm_up
from cl_bench.scenarios.base import Scenario


@void(
    *("layers", "components", "length", "orthogonality"),
    when=lambda v: not v["prompts"],
    why="method.prompts=false leaves prompts out",
)
@declare_void_warm_up
class CodaPrompt(PromptMethod):
    """Prefixes that are weighted sums of components; each task adds some.

    Args:
        layers: from 0.
        components: that each task adds to each layer.
        length: L, tokens of a component; half of them are keys, half values.
        orthogonality: lambda.
        prompts, loss_classes, warm_up, warm_up_epochs, warm_up_lr, warm_up_weight_decay: see
            :class:`~cl_bench.methods.frozen_trunk.PromptMethod`.
    """

    opened: Tensor

    def __init__(
        self,
        *,
        net: PromptViT,
        scenario: Scenario,
        layers: list[int],
        components: int,
        length: int,
        orthogonality: float,
        prompts: bool,
        loss_classes: LossClasses,
        warm_up: WarmUp,
        warm_up_epochs: int,
        warm_up_lr: float,
        warm_up_weight_decay: float,
    ) -> None:
        rest: dict[str, Any] = {"warm_up_epochs": warm_up_epochs, "warm_up_lr": warm_up_lr}
        rest |= {"warm_up": warm_up, "warm_up_weight_decay": warm_up_weight_decay}
        super().__init__(net=net, scenario=scenario, prompts=prompts, loss_classes=loss_classes, **rest)
        require(components > 0, "components", expected="above 0", got=components, fix="The released code has 10.")
        even = length > 0 and length % 2 == 0
        require(even, "length", expected="an even number above 0", got=length, fix="The released code has 8.")
        require_nonnegative(fix="The released code has 0.", orthogonality=orthogonality)
        check_layers(net, layers=layers)
        self.layers, self.components, self.orthogonality = layers, components, orthogonality
        total = components * len(scenario.tasks)
        self.register_buffer("opened", torch.zeros(total, dtype=torch.bool))
        if prompts:
            sizes = {"pool": length * net.dim, "keys": net.dim, "attention": net.dim}
            for name, width in sizes.items():
                parts = (nn.init.orthogonal_(torch.empty(total, width)) for _ in layers)
                self.add_module(name, nn.ParameterList(parts))
        self.length = length

    def list_prompts(self) -> list[nn.Parameter]:
        """Components, keys and attention vectors."""
        return [p for name in ("pool", "keys", "attention") for p in self.get_submodule(name).parameters()]

    def open_task(self, task: Task) -> None:
        """From now on the task's components are used."""
        self.opened[: (task.id + 1) * self.components] = True

    def encode(self, x: Tensor, query: Tensor, task: int | None) -> tuple[Tensor, Losses]:
        """The class token with prefixes, and the penalty."""
        prefixes, penalties = {}, []
        for number, layer in enumerate(self.layers):
            pool, keys, attention = (self._take(name, number, task) for name in ("pool", "keys", "attention"))
            alpha = F.cosine_similarity(query[:, None] * attention, keys, dim=2)  # (B, M)
            if task is None:
                alpha = alpha * self.opened
            prompt = (alpha @ pool).unflatten(1, (self.length, -1))  # (B, L, D)
            prefixes[layer] = (prompt[:, : self.length // 2], prompt[:, self.length // 2 :])
            if task is not None and self.orthogonality > 0:
                penalties += [_measure_overlap(rows) for rows in (keys, attention, pool)]
        losses = {"orthogonality": self.orthogonality * torch.stack(penalties).sum()} if penalties else {}
        return self.net.encode(x, prefixes=prefixes)[:, 0], losses

    def _take(self, name: str, number: int, task: int | None) -> Tensor:
        """The rows so far of a layer's parameters, of which only the task's own are trained; all without a task."""
        whole = self.get_submodule(name).get_parameter(str(number))
        if task is None:
            return whole
        first, end = task * self.components, (task + 1) * self.components
        return torch.cat([whole[:first].detach(), whole[first:end]])


def _measure_overlap(rows: Tensor) -> Tensor:
    """(M, D) -> |R R^T - I|^2, a scalar."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().sum()
