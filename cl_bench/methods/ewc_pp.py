"""EWC++: elastic weight consolidation with a running Fisher information (Chaudhry, Dokania, Ajanthan, Torr, ECCV 2018,
Sec. 3.1), as the code of A-GEM has it under the name EWC.

    L = CE + strength * sum over weights i of  P_i (theta_i - theta*_i)^2
    F <- (1 - rate) F + rate / every * sum of g^2 over the last ``every`` steps,   g = grad CE of a batch
    P = (F - min F) / (max F - min F)   at the end of a task,   min and max over all weights

theta* are the weights at the end of the latest task. F goes on from task to task, so one pair of F and P is kept for
any number of tasks.

Departures: none from that code, in which a step enters F only after the update that is due at it. In the paper the pull
has a factor of 1/2.
"""

from collections.abc import Iterator
from typing import Any

import torch

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import require_fraction, require_nonnegative, require_positive
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import ClassLoss, FunctionalMethod, Inputs, LossClasses, ParameterSnapshot, Terms
from cl_bench.scenarios.base import Scenario


class EWCpp(FunctionalMethod):
    """A quadratic pull to the latest task's weights, weighted by a running mean of squared batch gradients.

    Args:
        strength: lambda.
        rate: weight of the latest steps in the running mean.
        every: steps between two updates of the running mean.
        loss_classes: the outputs that the loss compares.
    """

    shared_labels = True

    def __init__(
        self,
        *,
        net: Backbone,
        scenario: Scenario,
        strength: float,
        rate: float,
        every: int,
        loss_classes: LossClasses,
    ) -> None:
        super().__init__()
        require_nonnegative(fix="0 is fine-tuning.", strength=strength)
        require_fraction(fix="The code of A-GEM has 0.9.", rate=rate)
        require_positive(fix="The code of A-GEM has 50 for CIFAR-100.", every=every)
        self.net, self.strength, self.rate, self.every = net, strength, rate, every
        self.classify = ClassLoss(scenario, loss_classes)
        self.pull = ParameterSnapshot(self, net.parameters(), values="centre", importance="precision")  # theta*, P
        self.fisher = ParameterSnapshot(self, net.parameters(), values="running", importance="recent")  # F, sum of g^2
        self.steps = 0  # of this task

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the Fisher information is scaled to [0, 1] and the weights are kept."""
        self.steps = 0
        yield Phase(task.train, self.observe, self.net.parameters())
        with torch.no_grad():
            running = self.fisher.values
            low, high = (torch.stack([f(r) for r in running]) for f in (torch.min, torch.max))
            spread = (high.max() - low.min()).clamp(min=torch.finfo(low.dtype).tiny)
            self.pull.take(self.net.parameters(), [(r - low.min()) / spread for r in running])
            self.fisher.take(running, [torch.zeros_like(r) for r in running])

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream, and the pull."""
        losses = {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}
        if task > 0:
            losses["pull"] = self.strength * self.pull.compute_pull(self.net.parameters())
        return losses, {}

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the squared gradient of the cross-entropy: that of the loss less the pull's, which is known."""
        self.steps += 1
        if self.steps % self.every == 0:
            pairs = zip(self.fisher.values, self.fisher.importance)
            running = [(1 - self.rate) * old + self.rate / self.every * recent for old, recent in pairs]
            self.fisher.take(running, [torch.zeros_like(r) for r in running])
        parameters = list(self.net.parameters())
        parts = zip(parameters, self.fisher.importance, self.pull.importance, self.pull.drifts(parameters))
        for p, recent, precision, drift in parts:  # in the first task the precision is 0
            if p.grad is not None:
                recent += (p.grad - 2 * self.strength * precision * drift).square()

    def memory_bytes(self) -> int:
        """Weights, precision, running and recent squares."""
        return self.pull.nbytes + self.fisher.nbytes

    def get_extra_state(self) -> dict[str, Any]:
        """The number of steps of this task."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.steps = state["steps"]
