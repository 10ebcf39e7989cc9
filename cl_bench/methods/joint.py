"""Joint training on all tasks at once, the upper bound.

As Mammoth does it: nothing is learned until the last task has arrived, then one phase on the union of all tasks. The
rows of the accuracy matrix before that are unanswerable (null), and so are the metrics that need them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.core.types import Data, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms
from cl_bench.scenarios.base import Scenario


class Joint(FunctionalMethod):
    """Sees every task's data together; not a continual learner."""

    shared_labels = True
    learned: Tensor

    def __init__(self, *, net: Backbone, scenario: Scenario) -> None:
        super().__init__()
        self.net, self._tasks = net, scenario.tasks
        self.register_buffer("learned", torch.tensor(False))

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase after the last task, none before."""
        if task.id == len(self._tasks) - 1:
            everything = Data.concatenate(t.train for t in self._tasks)
            yield Phase(everything, self.observe, self.net.parameters())
            self.learned.fill_(True)

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy over all classes."""
        return {"ce": F.cross_entropy(self.net(inputs["x"]), inputs["y"])}, {}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K); no answer before anything was learned."""
        return torch.where(self.learned, self.net(x), -torch.inf)
