"""A-GEM: averaged gradient episodic memory (Chaudhry, Ranzato, Rohrbach, Elhoseiny, ICLR 2019, Eq. 11).

    g = grad CE(f(x), y),   g_ref = grad CE(f(x'), y'),   (x', y') a random batch of images of earlier tasks
    g <- g - (g . g_ref / g_ref . g_ref) g_ref   if g . g_ref < 0, else unchanged

The dot product is one number over all parameters. In the first task there is no g_ref, and the step is plain.

Departures: none with ``buffer=ring``. The forward pass of (x', y') moves BatchNorm's running statistics before that of
the stream, as in the released code.
"""

import torch
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Buffer
from cl_bench.core.types import Batch
from cl_bench.methods.base import (
    ClassLoss,
    Inputs,
    LossClasses,
    RehearsalMethod,
    Terms,
    check_draws,
    check_replay_size,
    compute_gradients,
)
from cl_bench.scenarios.base import Scenario


class AGEM(RehearsalMethod):
    """Projects the gradient of the stream so that a step does not raise the loss on a batch of earlier tasks.

    Args:
        replay_size: images in the batch of earlier tasks.
        loss_classes: the outputs that both losses compare.
    """

    shared_labels = True
    replay_current_task = False

    def __init__(
        self, *, net: Backbone, buffer: Buffer, scenario: Scenario, replay_size: int, loss_classes: LossClasses
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        check_draws(net, buffer, replay_size)
        self.replay_size, self.classify = replay_size, ClassLoss(scenario, loss_classes)
        self._reference: dict[str, Tensor] = {}  # of the present step only

    def inputs(self, batch: Batch) -> Inputs:
        """The stream's batch; the reference gradient is measured."""
        drawn = self.draw(self.replay_size, batch.task)
        if drawn is not None:
            y, task = drawn.y, batch.task
            self._reference = compute_gradients(
                self.net, drawn.x, lambda logits: self.classify(logits, y, task), keep_statistics=False
            )
        return {"x": batch.x, "y": batch.y}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the stream."""
        return {"ce": self.classify(self.net(inputs["x"]), inputs["y"], task)}, {}

    @torch.no_grad()
    def after_backward(self) -> None:
        """Project the gradient."""
        pairs = [(p.grad, self._reference[name]) for name, p in self.net.named_parameters() if name in self._reference]
        project([gradient for gradient, _ in pairs if gradient is not None], [reference for _, reference in pairs])
        self._reference = {}


def project(gradients: list[Tensor], references: list[Tensor]) -> None:
    """Change the gradients in place, where they point against the references; tensors of the same shapes."""
    if not references:
        return
    dot = torch.stack([(g * r).sum() for g, r in zip(gradients, references, strict=True)]).sum()
    length = torch.stack([r.square().sum() for r in references]).sum()
    factor = torch.where(dot < 0, dot / length, 0.0)  # on the device: nothing waits for it
    for g, r in zip(gradients, references):
        g -= factor * r
