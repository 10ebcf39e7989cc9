"""Fine-tuning with a pull towards the old network's features.

It is the idea of less-forgetting learning (Jung, Ju, Jung, Kim, 2016, arXiv 1607.00122) in its simplest form:

    L = CE(f(x), y) + strength / D * || h(x) - h_old(x) ||^2        mean over images

h(x) are the D features that the head reads, h_old(x) those of the network before this task. No image is kept.

Departures: the paper freezes the last layer; here the one head of all classes is trained.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from cl_bench.backbones.base import SingleHead
from cl_bench.core.errors import require_nonnegative
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Teacher, Terms


class FeaturePull(FunctionalMethod):
    """Keeps the features of new images where the old network has them.

    Args:
        strength: weight of the pull.
    """

    net: SingleHead

    def __init__(self, *, net: SingleHead, strength: float) -> None:
        super().__init__()
        require_nonnegative(fix="0 is fine-tuning.", strength=strength)
        self.net, self.teacher, self.strength = net, Teacher(net), strength

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase. The old network is module state, so a resumed run has it."""
        self.teacher.take(self.net)
        yield Phase(task.train, self.observe, self.net.parameters())

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy, and from the second task on the pull."""
        features = self.net.features(inputs["x"])
        losses = {"ce": F.cross_entropy(self.net.head(features), inputs["y"])}
        if task > 0:
            with torch.no_grad():
                old = self.teacher.net.features(inputs["x"])
            losses["pull"] = self.strength * F.mse_loss(features, old)
        return losses, {}

    def memory_bytes(self) -> int:
        """The old network."""
        return self.teacher.nbytes
