"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, Eq. 3) and its online form (Schwarz et al., ICML 2018).

    L = CE + strength / 2 * sum over old tasks t, weights i of  F_t,i (theta_i - theta*_t,i)^2                       EWC
    L = CE + strength / 2 * sum over weights i of  F~_i (theta_i - theta*_i)^2,   F~ = decay F~ + F_t         online EWC

F_t is the diagonal of the Fisher information at the weights theta*_t that task t ended with: the mean over its images
of the squared gradient of log p(y | x), y drawn from the network's own answer (``sampled``, the definition) or the
image's label (``empirical``); ``weighted`` takes that, too, and weights each image by p(y | x), as Mammoth does.

EWC's sum of quadratics is kept as one: precision P = sum F_t, centre C = sum F_t theta*_t / P. What is left out is a
constant, which no gradient sees, so memory does not grow with the tasks.

Departures: the constant, and how the Fisher information is measured (docs/methods/ewc.md). The head is consolidated
like every other weight.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import require, void
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms, true_class_probability
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import get_pass_bytes

GRADIENT_BYTES = 2**28
"""Memory of a CPU for the gradients of single images in one pass; changes no result."""


@void("decay", when=lambda v: not v["online"], why="only online EWC decays (method.online=true)")
class EWC(FunctionalMethod):
    """A quadratic pull towards old weights, as strong as each of them mattered.

    Args:
        strength: lambda.
        online: one decaying Fisher around the latest weights instead of one for each task.
        decay: gamma of online EWC; not used otherwise.
        fisher: which label log p(y | x) is of: ``sampled`` from the network's answer, or ``empirical``, the image's;
            ``weighted``, the image's, its squared gradient times p(y | x).
        fisher_images: images of a task that the Fisher is measured on, evenly spread; None for all.
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
    ) -> None:
        super().__init__()
        require(strength >= 0, "strength", expected="0 or more", got=strength, fix="0 is fine-tuning.")
        require(0 <= decay <= 1, "decay", expected="a number in [0, 1]", got=decay, fix="1 forgets no task.")
        require(
            fisher_images is None or fisher_images > 0,
            "fisher_images",
            expected="1 or more, or null for every image",
            got=fisher_images,
            fix="Set method.fisher_images=null.",
        )
        self.net, self.transform = net, scenario.transform
        self.strength, self.online, self.decay = strength, online, decay
        self.fisher, self.fisher_images = fisher, fisher_images
        for i, p in enumerate(net.parameters()):
            self.register_buffer(f"precision_{i}", torch.zeros_like(p))
            self.register_buffer(f"centre_{i}", torch.zeros_like(p))

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, then the Fisher information."""
        yield Phase(task.train, self.observe, self.net.parameters())
        self._consolidate(self.fisher_information(task))

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream and the pull."""
        losses = {"ce": F.cross_entropy(self.net(inputs["x"]), inputs["y"])}
        if task > 0:
            losses["pull"] = self.strength / 2 * self.penalty()
        return losses, {}

    def penalty(self) -> Tensor:
        """Sum of P (theta - C)^2 over all weights."""
        pulls = [
            (self.get_buffer(f"precision_{i}") * (p - self.get_buffer(f"centre_{i}")).square()).sum()
            for i, p in enumerate(self.net.parameters())
        ]
        return torch.stack(pulls).sum()

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.net(x)

    def memory_bytes(self) -> int:
        """Precision and centre."""
        return sum(t.nbytes for t in self.buffers(recurse=False))

    @torch.no_grad()
    def fisher_information(self, task: Task) -> list[Tensor]:
        """Diagonal Fisher information of each parameter at the present weights, over a task's training images."""
        names = [name for name, _ in self.net.named_parameters()]
        weights = {name: p.detach() for name, p in self.net.named_parameters()}
        fixed = dict(self.net.named_buffers())

        def log_likelihood(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = functional_call(self.net, {**weights, **fixed}, (x[None],))
            return -F.cross_entropy(logits, y[None])

        # one gradient an image; in evaluation mode, so that BatchNorm treats each image by itself
        gradients = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
        data = task.train
        if self.fisher_images is not None and self.fisher_images < len(data):
            spread = torch.linspace(0, len(data) - 1, self.fisher_images).long()
            data = data.take(spread.to(data.labels.device))
        totals = {name: torch.zeros_like(p) for name, p in weights.items()}
        at_once = max(1, get_pass_bytes(data.labels.device, GRADIENT_BYTES) // sum(p.nbytes for p in weights.values()))
        for chunk in data.split(at_once):
            x, y = self.transform.normalise(chunk.images), chunk.labels
            if self.fisher == "sampled":
                y = torch.multinomial(torch.softmax(self.net(x).float(), dim=1), 1).squeeze(1)
            likelihood = true_class_probability(self.net(x), y) if self.fisher == "weighted" else None
            for name, gradient in gradients(weights, x, y).items():
                square = gradient.square()
                totals[name] += square.sum(dim=0) if likelihood is None else torch.tensordot(likelihood, square, dims=1)
        return [totals[name] / len(data) for name in names]

    def _consolidate(self, information: list[Tensor]) -> None:
        """Add a task's Fisher information and weights to precision and centre."""
        for i, (p, new) in enumerate(zip(self.net.parameters(), information)):
            precision, centre = self.get_buffer(f"precision_{i}"), self.get_buffer(f"centre_{i}")
            if self.online:
                precision.mul_(self.decay).add_(new)
                centre.copy_(p.detach())
            else:
                total = precision + new
                mixed = (precision * centre + new * p.detach()) / total
                centre.copy_(torch.where(total > 0, mixed, p.detach()))
                precision.copy_(total)
