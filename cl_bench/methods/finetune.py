"""Fine-tuning: plain training on one task after the other, the lower bound.

Loss: CE(f(x), y), over all K classes or those that ``loss_classes`` names.
"""

from collections.abc import Iterator

from cl_bench.backbones.base import Backbone
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import ClassLoss, FunctionalMethod, Inputs, LossClasses, Terms
from cl_bench.scenarios.base import Scenario


class Finetune(FunctionalMethod):
    """Trains on each task and does nothing against forgetting.

    Args:
        loss_classes: the outputs that the loss compares.
    """

    shared_labels = True

    def __init__(self, *, net: Backbone, scenario: Scenario, loss_classes: LossClasses) -> None:
        super().__init__()
        self.net, self.classify = net, ClassLoss(scenario, loss_classes)

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase."""
        yield Phase(task.train, self.observe, self.net.parameters())

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream."""
        return {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}, {}
