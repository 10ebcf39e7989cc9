"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, Eq. 3) and its online form (Schwarz et al., ICML 2018).

    L = CE + strength / 2 * sum over old tasks t, weights i of  F_t,i (theta_i - theta*_t,i)^2                       EWC
    L = CE + strength / 2 * sum over weights i of  F~_i (theta_i - theta*_i)^2,   F~ = decay F~ + F_t         online EWC

F_t is the diagonal of the Fisher information at the weights theta*_t at the end of task t: the mean over its images of
the squared gradient of log p(y | x). The label y is drawn from the network's softmax (``sampled``, the definition) or
is the image's label (``empirical``). ``weighted`` uses the image's label, too, and weights each image by p(y | x), as
Mammoth does.

EWC's sum of quadratics is stored as one, so its size does not grow with the tasks: precision P = sum F_t, centre
C = sum F_t theta*_t / P. The two differ by a constant, which has no gradient.

Departures: the constant, and how the Fisher information is measured (docs/methods/ewc.md). The head is regularised like
every other weight.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import require_fraction, require_nonnegative, require_positive, void
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import (
    ClassLoss,
    FunctionalMethod,
    Inputs,
    LossClasses,
    ParameterSnapshot,
    Terms,
    true_class_probability,
)
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import get_pass_bytes

GRADIENT_BYTES = 2**28
"""Bytes on a CPU for the per-image gradients of one pass; changes no result."""


@void("decay", when=lambda v: not v["online"], why="only online EWC decays (method.online=true)")
class EWC(FunctionalMethod):
    """A quadratic penalty on changes of old weights, weighted by the importance of each.

    Args:
        strength: lambda.
        online: one decaying Fisher information around the latest weights instead of one for each task.
        decay: gamma of online EWC; not used otherwise.
        fisher: the label in log p(y | x): ``sampled`` from the network's softmax, ``empirical`` for the image's label,
            or ``weighted`` for the image's label with each squared gradient times p(y | x).
        loss_classes: the outputs that the loss and log p(y | x) compare.
        fisher_images: images of a task that the Fisher information is measured on, evenly spaced; None for all.
    """

    shared_labels = True

    def __init__(
        self,
        *,
        net: Backbone,
        scenario: Scenario,
        strength: float,
        online: bool,
        decay: float,
        fisher: Literal["sampled", "empirical", "weighted"],
        fisher_images: int | None,
        loss_classes: LossClasses,
    ) -> None:
        super().__init__()
        require_nonnegative(fix="0 is fine-tuning.", strength=strength)
        require_fraction(fix="1 forgets no task.", decay=decay)
        require_positive(fix="Set method.fisher_images=null to use every image.", fisher_images=fisher_images)
        self.net, self.transform = net, scenario.transform
        self.classify = ClassLoss(scenario, loss_classes)
        self.strength, self.online, self.decay = strength, online, decay
        self.fisher, self.fisher_images = fisher, fisher_images
        self.snapshot = ParameterSnapshot(self, net.parameters(), values="centre", importance="precision")  # C, P

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the Fisher information."""
        yield Phase(task.train, self.observe, self.net.parameters())
        self._consolidate(self.measure_fisher_information(task))

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream, and the penalty."""
        losses = {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}
        if task > 0:
            losses["pull"] = self.strength / 2 * self.snapshot.compute_pull(self.net.parameters())
        return losses, {}

    def memory_bytes(self) -> int:
        """Precision and centre."""
        return self.snapshot.nbytes

    @torch.no_grad()
    def measure_fisher_information(self, task: Task) -> list[Tensor]:
        """The diagonal Fisher information of each parameter at the current weights, over a task's training images."""
        names = [name for name, _ in self.net.named_parameters()]
        weights = {name: p.detach() for name, p in self.net.named_parameters()}
        fixed = dict(self.net.named_buffers())

        def log_likelihood(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = functional_call(self.net, {**weights, **fixed}, (x[None],))
            return -self.classify(logits, y[None], task.id)

        # one gradient per image; in evaluation mode, so that BatchNorm treats each image separately
        gradients = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
        data = task.train
        if self.fisher_images is not None and self.fisher_images < len(data):
            spread = torch.linspace(0, len(data) - 1, self.fisher_images).long()
            data = data.take(spread.to(data.labels.device))
        totals = {name: torch.zeros_like(p) for name, p in weights.items()}
        at_once = max(1, get_pass_bytes(data.labels.device, GRADIENT_BYTES) // sum(p.nbytes for p in weights.values()))
        for chunk in data.split(at_once):
            x, y = self.transform.normalise(chunk.images), chunk.labels
            likelihood = None
            if self.fisher != "empirical":
                logits = self.classify.mask(self.net(x), y, task.id)
                if self.fisher == "sampled":
                    y = torch.multinomial(torch.softmax(logits.float(), dim=1), 1).squeeze(1)
                else:
                    likelihood = true_class_probability(logits, y)
            with sdpa_kernel(SDPBackend.MATH):  # vmap computes a fused attention one image after the other
                found = gradients(weights, x, y)
            for name, gradient in found.items():
                square = gradient.square()
                totals[name] += square.sum(dim=0) if likelihood is None else torch.tensordot(likelihood, square, dims=1)
        return [totals[name] / len(data) for name in names]

    @torch.no_grad()
    def _consolidate(self, information: list[Tensor]) -> None:
        """Add a task's Fisher information and weights to precision and centre."""
        weights, kept = list(self.net.parameters()), self.snapshot
        if self.online:
            kept.take(weights, [self.decay * old + new for old, new in zip(kept.importance, information)])
            return
        totals = [old + new for old, new in zip(kept.importance, information)]
        centres = [
            torch.where(total > 0, (old * centre + new * p) / total, p)
            for old, centre, new, p, total in zip(kept.importance, kept.values, information, weights, totals)
        ]
        kept.take(centres, totals)
