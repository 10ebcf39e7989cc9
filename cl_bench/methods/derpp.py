"""Dark experience replay++ (Buzzega, Boschini, Porrello, Abati, Calderara, NeurIPS 2020, Eq. 6).

    L = CE(f(x), y) + alpha MSE( h(x'), z' ) + beta CE( f(x''), y'' )

(x', z') and (x'', y'') are two independent draws from the buffer, h are logits and z' the logits stored with an image
when it was in the stream. Three forward passes, so that BatchNorm normalises each draw separately (as Mammoth's
``derpp``).

Departures: none with ``buffer=reservoir``. A per-class buffer takes its images and their logits at the end of the task,
un-augmented, not during training.
"""

from collections.abc import Iterator

import torch.nn.functional as F

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.methods.base import Inputs, RehearsalMethod, Terms, check_draws, check_replay_size


class DERpp(RehearsalMethod):
    """Replays stored images, once with the logits stored with them and once with their labels.

    Args:
        alpha: weight of the logit-matching term.
        beta: weight of the replayed cross-entropy; 0 is DER, without the second draw.
        replay_size: images in each draw.
    """

    shared_labels = True

    def __init__(self, *, net: Backbone, buffer: Buffer, alpha: float, beta: float, replay_size: int) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        check_draws(net, buffer, replay_size)
        self.alpha, self.beta, self.replay_size = alpha, beta, replay_size

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the buffer closes the task."""
        yield Phase(task.train, self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe, keep=("logits",))

    def inputs(self, batch: Batch) -> Inputs:
        """(x, y) of the stream, (x', z') and (x'', y'') of two draws."""
        found = {"x": batch.x, "y": batch.y}
        if len(self.buffer):
            first = self.buffer.sample(self.replay_size)
            found |= {"x'": first.x, "z'": first.columns["logits"]}
            if self.beta:
                second = self.buffer.sample(self.replay_size)
                found |= {"x''": second.x, "y''": second.y}
        return found

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Stream cross-entropy, logit matching, replayed cross-entropy; the stream's logits are stored."""
        logits = self.net(inputs["x"])
        losses = {"ce": F.cross_entropy(logits, inputs["y"])}
        if "x'" in inputs:
            stored = inputs["z'"]
            losses["logit_mse"] = self.alpha * F.mse_loss(self.net(inputs["x'"]).to(stored.dtype), stored)
        if "x''" in inputs:
            losses["replay_ce"] = self.beta * F.cross_entropy(self.net(inputs["x''"]), inputs["y''"])
        return losses, {"logits": logits.detach()}
