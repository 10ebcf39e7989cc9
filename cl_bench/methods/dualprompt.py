"""DualPrompt (Wang, Zhang, Ebrahimi, Sun, Zhang, Lee, Ren, Su, Perot, Dy, Pfister, ECCV 2022, arXiv 2204.04799).

Prefixes of keys and values: one pair G^l for all tasks in some layers, and in other layers one pair E_t^l for each
task, with a key k_t. The query q(x) is the frozen ViT's class token:

    t(x) = the task that is learned, in training;   argmax_t cos( q(x), k_t ) over the tasks learned, in testing
    f(x) = class token of ViT( x; G^l, E_{t(x)}^l ),   a layer's attention being ( Q, [ P_K ; K ], [ P_V ; V ] )
    L    = CE( W f(x) + b, y ) - c mean over images of cos( q(x), k_t )

E_t starts as a copy of E_{t-1}. Departures: docs/methods/prompts.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.prompt_vit import PromptViT
from cl_bench.core.errors import require_nonnegative, require_positive, void
from cl_bench.core.types import Losses, Task
from cl_bench.methods.base import LossClasses
from cl_bench.methods.frozen_trunk import PromptMethod, WarmUp, check_layers, declare_void_warm_up
from cl_bench.scenarios.base import Scenario


@void(
    *("general_layers", "expert_layers", "length", "pull"),
    when=lambda v: not v["prompts"],
    why="method.prompts=false leaves prompts out",
)
@declare_void_warm_up
class DualPrompt(PromptMethod):
    """General prefixes for all tasks and an expert prefix for each task, chosen by the query.

    Args:
        general_layers, expert_layers: from 0.
        length: tokens of each prefix, for keys and for values.
        pull: c, weight of the term that pulls a task's key to the queries of its images.
        prompts, loss_classes, warm_up, warm_up_epochs, warm_up_lr, warm_up_weight_decay: see
            :class:`~cl_bench.methods.frozen_trunk.PromptMethod`.
    """

    learned: Tensor

    def __init__(
        self,
        *,
        net: PromptViT,
        scenario: Scenario,
        general_layers: list[int],
        expert_layers: list[int],
        length: int,
        pull: float,
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
        require_positive(fix="The paper has 5.", length=length)
        require_nonnegative(fix="The released code has 1.", pull=pull)
        check_layers(net, general_layers=general_layers, expert_layers=expert_layers)
        self.general_layers, self.expert_layers, self.pull = general_layers, expert_layers, pull
        self.register_buffer("learned", torch.zeros(len(scenario.tasks), dtype=torch.bool))
        if prompts:
            tasks, pair = len(scenario.tasks), (2, length, net.dim)
            self.general = nn.ParameterList(torch.rand(pair) for _ in general_layers)
            self.expert = nn.ParameterList(torch.rand(tasks, *pair) for _ in expert_layers)
            self.keys = nn.Parameter(torch.rand(tasks, net.dim))

    def list_prompts(self) -> list[nn.Parameter]:
        """Prefixes and keys."""
        return [*self.general, *self.expert, self.keys]

    @torch.no_grad()
    def open_task(self, task: Task) -> None:
        """Copy the last task's prefixes; from now on the task's prefixes may be chosen."""
        self.learned[task.id] = True
        if self.prompts and task.id > 0:
            for prefix in self.expert:
                prefix[task.id] = prefix[task.id - 1]

    def choose(self, query: Tensor) -> Tensor:
        """(B, D) -> (B,) the task of each image, among those learned."""
        match = F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T
        return match.masked_fill(~self.learned, -torch.inf).argmax(dim=1)

    def encode(self, x: Tensor, query: Tensor, task: int | None) -> tuple[Tensor, Losses]:
        """The class token with prefixes, and the pull of the task's key."""
        losses = {}
        if task is not None:
            match = F.cosine_similarity(query, self.keys[task][None], dim=1)
            losses["pull"] = -self.pull * match.mean()
        chosen = self.choose(query) if task is None else None
        prefixes = {layer: p.expand(len(x), -1, -1, -1) for layer, p in zip(self.general_layers, self.general)}
        for layer, p in zip(self.expert_layers, self.expert):
            own = p[task].expand(len(x), -1, -1, -1) if chosen is None else p[chosen]
            prefixes[layer] = torch.cat([prefixes[layer], own], dim=2) if layer in prefixes else own
        pairs = {layer: (p[:, 0], p[:, 1]) for layer, p in prefixes.items()}
        return self.net.encode(x, prefixes=pairs)[:, 0], losses
