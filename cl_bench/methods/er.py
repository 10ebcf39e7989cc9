"""Experience replay (Ratcliff 1990; Robins 1995; setting of Chaudhry et al. 2019, "tiny episodic memories").

Loss: CE over the stream's batch and a batch from the buffer together, mean over both (as Mammoth's ``er``).

Departures: none with ``buffer=reservoir``. A per-class buffer takes its images when a task is closed, so the task at
hand is not replayed while it is learned.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer, Columns
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms, check_replay_size, described


class ER(FunctionalMethod):
    """Replays stored images beside the stream.

    Args:
        replay_size: images drawn from the buffer at each step.
    """

    shared_labels = True

    def __init__(self, *, net: Backbone, buffer: Buffer, replay_size: int) -> None:
        super().__init__()
        check_replay_size(replay_size)
        self.net, self.buffer, self.replay_size = net, buffer, replay_size

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the buffer closes the task."""
        yield Phase(task.train, self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe)

    def inputs(self, batch: Batch) -> Inputs:
        """Stream and memory together."""
        x, y = batch.x, batch.y
        if len(self.buffer):
            memory = self.buffer.sample(self.replay_size)
            x, y = torch.cat([x, memory.x]), torch.cat([y, memory.y])
        return {"x": x, "y": y}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of stream and memory in one forward pass."""
        return {"ce": F.cross_entropy(self.net(inputs["x"]), inputs["y"])}, {}

    def remember(self, batch: Batch, columns: Columns) -> None:
        """The stream passes the buffer."""
        self.buffer.add(batch)

    def describe(self, x: Tensor, y: Tensor) -> Columns:
        """What a buffer may rank by."""
        return described(self.net, x, y)

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.net(x)
