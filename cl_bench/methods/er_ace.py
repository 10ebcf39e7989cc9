"""ER-ACE: experience replay with asymmetric cross-entropy (Caccia, Aljundi, Asadi, Tuytelaars, Pineau, Belilovsky,
ICLR 2022, Eq. 4).

    L = CE( f(x), y; C_in ) + CE( f(x'), y' ),   one mean each, from two forward passes

The stream (x, y) is compared over C_in only: the classes of its batch, and the outputs from the newest class seen so
far on. So it sends no gradient to the outputs of old classes, and its images do not push old features away. The draw
(x', y') from the buffer is compared over all outputs.

Departures: none with ``buffer=reservoir``. "From the newest class on" is in the released code and not in the paper. The
released code has a cosine head of scale 10, ``backbone.head=cosine``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer
from cl_bench.core.types import Batch
from cl_bench.methods.base import Inputs, RehearsalMethod, Terms, check_draws, check_replay_size


class ERACE(RehearsalMethod):
    """Replay in which new images compete among new classes only.

    Args:
        replay_size: images drawn from the buffer at each step.
    """

    shared_labels = True
    newest: Tensor

    def __init__(self, *, net: Backbone, buffer: Buffer, replay_size: int) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        check_draws(net, buffer, replay_size)
        self.replay_size = replay_size
        self.register_buffer("newest", torch.tensor(0))  # the largest label seen so far

    def inputs(self, batch: Batch) -> Inputs:
        """(x, y) of the stream with the newest class, and (x', y') of a draw."""
        self.newest.copy_(torch.maximum(self.newest, batch.y.max()))
        found = {"x": batch.x, "y": batch.y, "newest": self.newest.clone()}
        drawn = self.draw(self.replay_size, batch.task)
        return found if drawn is None else found | {"x'": drawn.x, "y'": drawn.y}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream over its own classes and later ones, and of the draw over all."""
        logits, y = self.net(inputs["x"]), inputs["y"]
        classes = torch.arange(logits.shape[1], device=y.device)
        present = (y[:, None] == classes).any(dim=0)
        allowed = present | (classes >= inputs["newest"])
        losses = {"ce": F.cross_entropy(logits.masked_fill(~allowed, -torch.inf), y)}
        if "x'" in inputs:
            losses["replay_ce"] = F.cross_entropy(self.net(inputs["x'"]), inputs["y'"])
        return losses, {}
