"""Fine-tuning: plain training on one task after the other, the lower bound.

Loss: CE(f(x), y) over all K classes.
"""

from collections.abc import Iterator

import torch.nn.functional as F

from cl_bench.backbones.base import Backbone
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms


class Finetune(FunctionalMethod):
    """Trains on each task and does nothing against forgetting."""

    shared_labels = True

    def __init__(self, *, net: Backbone) -> None:
        super().__init__()
        self.net = net

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase."""
        yield Phase(task.train, self.observe, self.net.parameters())

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream."""
        return {"ce": F.cross_entropy(self.net(inputs["x"]), inputs["y"])}, {}
