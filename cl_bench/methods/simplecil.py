"""SimpleCIL: class means on a frozen network (Zhou, Cai, Ye, Zhan, Liu, IJCV 2024, arXiv 2303.07338).

Nothing is trained. h(x) are the network's features:

    w_k = mean of h(x) over the training images of class k, un-augmented
    score of class k = cos( h(x), w_k )

Departures: docs/methods/simplecil.md.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import GradientFreeMethod, measure_width, update_class_means
from cl_bench.scenarios.base import Scenario


class SimpleCIL(GradientFreeMethod):
    """Answers with the class whose mean is nearest by cosine."""

    means: Tensor
    known: Tensor

    def __init__(self, *, net: Backbone, scenario: Scenario) -> None:
        super().__init__(net=net, scenario=scenario)
        self.register_buffer("means", torch.zeros(scenario.num_classes, measure_width(net, scenario.image_shape)))
        self.register_buffer("known", torch.zeros(scenario.num_classes, dtype=torch.bool))

    def learn(self, task: Task) -> Iterator[Phase]:
        """No phase: the means of the task's classes."""
        update_class_means(self.means, task.train, self.transform, self.net.features)
        self.known[task.classes.start : task.classes.stop] = True
        yield from ()

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K) cosines, -inf for a class without a mean."""
        features = F.normalize(self.net.features(x).float(), dim=1)
        return (features @ F.normalize(self.means, dim=1).T).masked_fill(~self.known, -torch.inf)

    def memory_bytes(self) -> int:
        """The class means."""
        return self.means.nbytes
