"""DETR with a memory of images: replay in every step, and CL-DETR's balanced stage (Liu et al., CVPR 2023, 3.4).

The buffer is offered each image of a task once, after the task, so ``buffer=reservoir`` holds a random, equal share of
the images of every task. An exemplar keeps the labels of its own task: later and earlier classes in it are unlabelled.

``replay_size`` images of earlier tasks join each batch of the stream. With ``balanced_epochs`` the network is also
trained, after each task but the first, on the memory alone, which then has the present task, too.

Departures: docs/methods/detr.md.
"""

from collections.abc import Iterator

import torch

from cl_bench.backbones.detr import DETR
from cl_bench.buffers.base import OnlineBuffer
from cl_bench.core.errors import require, require_nonnegative, require_positive, void
from cl_bench.core.types import Batch, Losses, Phase, Task
from cl_bench.methods.detection import Detector, SetLoss


@void("balanced_lr", when=lambda v: not v["balanced_epochs"], why="balanced_epochs=0 is no balanced stage")
class DETRReplay(Detector):
    """Trains on the stream and on stored images, then on stored images of all tasks.

    Args:
        replay_size: stored images in each step on the stream; 0 for none.
        balanced_epochs: passes over the memory after a task; 0 for no such stage.
        balanced_lr: its peak learning rate; None for ``optimizer.lr``.
    """

    def __init__(
        self,
        *,
        net: DETR,
        buffer: OnlineBuffer,
        set_loss: SetLoss,
        replay_size: int,
        balanced_epochs: int,
        balanced_lr: float | None,
    ) -> None:
        super().__init__(net=net, set_loss=set_loss)
        require_nonnegative(fix="0 is none.", replay_size=replay_size, balanced_epochs=balanced_epochs)
        require_positive(fix="null takes optimizer.lr.", balanced_lr=balanced_lr)
        require(
            replay_size + balanced_epochs > 0,
            "replay_size",
            expected="above 0, since there is no balanced stage",
            got=0,
            fix="method=detr_finetune replays nothing.",
        )
        self.buffer, self.replay_size = buffer, replay_size
        self.balanced_epochs, self.balanced_lr = balanced_epochs, balanced_lr

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase on the stream; the buffer is offered the task; then the balanced stage."""
        yield Phase(task.train, self.observe_with_replay, self.net.parameters())
        self.buffer.offer(task.train, task.id)
        if task.id and self.balanced_epochs:
            stored = self.buffer.data()
            yield Phase(stored, self.observe, self.net.parameters(), epochs=self.balanced_epochs, lr=self.balanced_lr)

    def observe_with_replay(self, batch: Batch) -> Losses:
        """The set loss of the stream's batch and a draw from the buffer together."""
        if not self.replay_size or not len(self.buffer):
            return self.observe(batch)
        drawn = self.buffer.sample(self.replay_size)
        x, y = torch.cat([batch.x, drawn.x]), torch.cat([batch.y, drawn.y])
        return self.set_loss(*self.net.detect(x), y)
