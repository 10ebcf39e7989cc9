"""Experience replay (Ratcliff 1990; Robins 1995; setting of Chaudhry et al. 2019, "tiny episodic memories").

    L = CE over the stream's batch and a batch from the buffer together, one mean over both             (loss=joint)
    L = CE(f(x), y) + CE(f(x'), y'),  one mean each                                                     (loss=summed)

``joint`` is Mammoth's ``er``: one forward pass. ``summed`` is that of Aljundi et al. 2019 and Caccia et al. 2022 (AML):
two forward passes, so BatchNorm normalises the stream (x, y) and the draw (x', y') separately, and a replayed image
counts as much as with twice the learning rate in ``joint`` where both batches have one size.

Departures: none with a buffer that is filled during the task. A per-class buffer takes its images at the end of a task,
so the current task is not replayed while it is learned, as with ``replay_current_task=false``.
"""

from typing import Literal

import torch

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer
from cl_bench.core.errors import void
from cl_bench.core.types import Batch
from cl_bench.methods.base import (
    ClassLoss,
    Inputs,
    LossClasses,
    RehearsalMethod,
    Terms,
    check_draws,
    check_replay_size,
    is_filled_between_tasks,
)
from cl_bench.scenarios.base import Scenario


@void("replay_current_task", when=is_filled_between_tasks, why="this buffer takes its images at the end of a task")
class ER(RehearsalMethod):
    """Trains on the stream and on stored images together.

    Args:
        replay_size: images drawn from the buffer at each step.
        loss: one mean over stream and draw, or the sum of two means.
        loss_classes: the outputs that the loss compares.
        replay_current_task: whether images of the current task are drawn, too.
    """

    shared_labels = True

    def __init__(
        self,
        *,
        net: Backbone,
        buffer: Buffer,
        scenario: Scenario,
        replay_size: int,
        loss: Literal["joint", "summed"],
        loss_classes: LossClasses,
        replay_current_task: bool,
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        if loss == "summed":
            check_draws(net, buffer, replay_size)
        self.replay_size, self.loss, self.replay_current_task = replay_size, loss, replay_current_task
        self.classify = ClassLoss(scenario, loss_classes)

    def inputs(self, batch: Batch) -> Inputs:
        """The stream's batch (x, y) and a draw from the buffer: in the same batch, or as (x', y')."""
        x, y = batch.x, batch.y
        drawn = self.draw(self.replay_size, batch.task)
        if drawn is None:
            return {"x": x, "y": y}
        if self.loss == "joint":
            return {"x": torch.cat([x, drawn.x]), "y": torch.cat([y, drawn.y])}
        return {"x": x, "y": y, "x'": drawn.x, "y'": drawn.y}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the batch, and of the draw if it is apart."""
        losses = {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}
        if "x'" in inputs:
            losses["replay_ce"] = self.classify(self.net(inputs["x'"]), inputs["y'"], task)
        return losses, {}
