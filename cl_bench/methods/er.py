"""Experience replay (Ratcliff 1990; Robins 1995; setting of Chaudhry et al. 2019, "tiny episodic memories").

Loss: CE over the stream's batch and a batch from the buffer together, mean over both (as Mammoth's ``er``).

Departures: none with ``buffer=reservoir``. A per-class buffer takes its images at the end of a task, so the current
task is not replayed while it is learned.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.methods.base import Inputs, RehearsalMethod, Terms, check_replay_size


class ER(RehearsalMethod):
    """Trains on the stream and on stored images together.

    Args:
        replay_size: images drawn from the buffer at each step.
    """

    shared_labels = True

    def __init__(self, *, net: Backbone, buffer: Buffer, replay_size: int) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        self.replay_size = replay_size

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the buffer closes the task."""
        yield Phase(task.train, self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe)

    def inputs(self, batch: Batch) -> Inputs:
        """The stream's batch and a draw from the buffer, in one batch."""
        x, y = batch.x, batch.y
        if len(self.buffer):
            drawn = self.buffer.sample(self.replay_size)
            x, y = torch.cat([x, drawn.x]), torch.cat([y, drawn.y])
        return {"x": x, "y": y}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the whole batch."""
        return {"ce": F.cross_entropy(self.net(inputs["x"]), inputs["y"])}, {}
