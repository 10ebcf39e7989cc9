"""Dark experience replay++ (Buzzega, Boschini, Porrello, Abati, Calderara, NeurIPS 2020, Eq. 6).

    L = CE(f(x), y) + alpha MSE( h(x'), z' ) + beta CE( f(x''), y'' )

(x', z') and (x'', y'') are two independent draws from the buffer, h are logits and z' the logits stored with an image
when the stream showed it. Three forward passes, so that BatchNorm sees each draw by itself (as Mammoth's ``derpp``).

Departures: none with ``buffer=reservoir``. A per-class buffer takes its images, and their logits, when the task is
closed, un-augmented, not while the stream passes.
"""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer, Columns
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms, check_draws, check_replay_size, described


class DERpp(FunctionalMethod):
    """Replays stored images with the logits the network once gave them, and with their labels.

    Args:
        alpha: weight of the logit-matching term.
        beta: weight of the replayed cross-entropy; 0 is DER, which has no second draw.
        replay_size: images of each draw.
    """

    shared_labels = True

    def __init__(self, *, net: Backbone, buffer: Buffer, alpha: float, beta: float, replay_size: int) -> None:
        super().__init__()
        check_replay_size(replay_size)
        check_draws(net, buffer, replay_size)
        self.net, self.buffer = net, buffer
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
        """Stream cross-entropy, logit matching, replayed cross-entropy; the stream's logits are remembered."""
        logits = self.net(inputs["x"])
        losses = {"ce": F.cross_entropy(logits, inputs["y"])}
        if "x'" in inputs:
            stored = inputs["z'"]
            losses["logit_mse"] = self.alpha * F.mse_loss(self.net(inputs["x'"]).to(stored.dtype), stored)
        if "x''" in inputs:
            losses["replay_ce"] = self.beta * F.cross_entropy(self.net(inputs["x''"]), inputs["y''"])
        return losses, {"logits": logits.detach()}

    def remember(self, batch: Batch, columns: Columns) -> None:
        """The stream passes the buffer, with its logits."""
        self.buffer.add(batch, **columns)

    def describe(self, x: Tensor, y: Tensor) -> Columns:
        """What a buffer may rank by, and the logits to store."""
        return described(self.net, x, y)

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.net(x)
