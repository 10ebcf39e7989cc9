"""Learning to prompt (L2P; Wang, Zhang, Lee, Zhang, Sun, Ren, Su, Perot, Dy, Pfister, CVPR 2022, arXiv 2112.08654).

A pool of M prompts P_j of L tokens each, with keys k_j. The query q(x) is the frozen ViT's class token:

    I(x) = the N keys with the largest cos( q(x), k_j )             for each image by itself
    f(x) = mean of the outputs of the N L prompt tokens in ViT( [ class token ; P_I ; patches ] )
    L    = CE( W f(x) + b, y ) - c mean over images of sum_{j in I} cos( q(x), k_j )

Departures: docs/methods/prompts.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.prompt_vit import PromptViT
from cl_bench.core.errors import require, require_nonnegative, require_positive, void
from cl_bench.core.types import Losses
from cl_bench.methods.base import LossClasses
from cl_bench.methods.frozen_trunk import PromptMethod, WarmUp, declare_void_warm_up
from cl_bench.scenarios.base import Scenario


@void("pool", "length", "top", "pull", when=lambda v: not v["prompts"], why="method.prompts=false leaves prompts out")
@declare_void_warm_up
class L2P(PromptMethod):
    """Prompts as input tokens, chosen from one pool by the query.

    Args:
        pool: M, prompts.
        length: L, tokens of each.
        top: N, prompts of an image.
        pull: c, weight of the term that pulls the chosen keys to the query.
        prompts, loss_classes, warm_up, warm_up_epochs, warm_up_lr, warm_up_weight_decay: see
            :class:`~cl_bench.methods.frozen_trunk.PromptMethod`.
    """

    def __init__(
        self,
        *,
        net: PromptViT,
        scenario: Scenario,
        pool: int,
        length: int,
        top: int,
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
        require_positive(fix="The paper has 10 prompts of 5 tokens.", pool=pool, length=length)
        require(0 < top <= pool, "top", expected=f"1 to pool={pool}", got=top, fix="The paper has 5.")
        require_nonnegative(fix="The released code has 0.1.", pull=pull)
        self.top, self.pull = top, pull
        if prompts:
            self.pool = nn.Parameter(torch.rand(pool, length, net.dim))
            self.keys = nn.Parameter(torch.rand(pool, net.dim))

    def list_prompts(self) -> list[nn.Parameter]:
        """Pool and keys."""
        return [self.pool, self.keys]

    def choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> (B, N) the prompts of each image, and their keys' cosines with the query."""
        match = F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T
        found = match.topk(self.top, dim=1)
        return found.indices, found.values

    def encode(self, x: Tensor, query: Tensor, task: int | None) -> tuple[Tensor, Losses]:
        """The mean of the prompts' outputs, and the pull of the keys."""
        chosen, match = self.choose(query)
        tokens = self.pool[chosen].flatten(1, 2)  # (B, N L, D)
        outputs = self.net.encode(x, tokens=tokens)[:, 1 : 1 + tokens.shape[1]]
        return outputs.mean(dim=1), {"pull": -self.pull * match.sum(dim=1).mean()}
