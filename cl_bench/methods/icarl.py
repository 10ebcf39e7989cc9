"""iCaRL: incremental classifier and representation learning (Rebuffi, Kolesnikov, Sperl, Lampert, CVPR 2017).

The network is trained on the new task's images and the exemplars together, with a sigmoid g_y for every class:

    L = mean over images and classes of  BCE( g_y(x), q_y )
    q_y = the old network's g_y(x) for old classes (distillation),  1[y = label] for the others           (Algorithm 3)

and predicts the class whose exemplars' mean feature is nearest (Eq. 2). Features and means have unit length; the means
are computed again after every task. Exemplars are chosen by herding (``buffer=herding``).

Departures: the paper sums the loss over classes, this is the mean, which the published learning rates are made for.
``mean_over=seen`` is the mean over the classes seen, as in Mammoth in 2022; ``all`` is the mean over all outputs, with
target 0 for the classes to come, as in Mammoth today and in the authors' code. The old network sees the same augmented
image as the new one; the paper stores its answers once. The network's own argmax is the alternative ``head``.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import PerClassBuffer
from cl_bench.core.types import Data, Phase, Task
from cl_bench.methods.base import (
    Inputs,
    Predict,
    RehearsalMethod,
    Teacher,
    Terms,
    measure_class_means,
    score_by_nearest_mean,
)
from cl_bench.scenarios.base import Scenario


class ICaRL(RehearsalMethod):
    """Nearest mean of exemplars on features learned with distillation and rehearsal.

    Args:
        mean_over: the loss is the mean over the classes ``seen`` or over ``all``.
    """

    buffer: PerClassBuffer
    means: Tensor
    known: Tensor

    def __init__(
        self, *, net: Backbone, buffer: PerClassBuffer, scenario: Scenario, mean_over: Literal["seen", "all"]
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        self.mean_over, self.teacher = mean_over, Teacher(net)
        self._classes = [task.classes for task in scenario.tasks]
        with torch.no_grad():
            width = self.net.eval().features(buffer.transform.normalise(buffer.images[:1])).shape[1]
        self.register_buffer("means", torch.zeros(scenario.num_classes, width))  # (K, D)
        self.register_buffer("known", torch.zeros(scenario.num_classes, dtype=torch.bool))  # (K,)

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase on the task's images and the exemplars; then exemplars and class means."""
        self.teacher.take(self.net)
        yield Phase(Data.concatenate([task.train, self.buffer.data()]), self.observe, self.net.parameters())
        self.buffer.close_task(task, self.describe)
        means, known = measure_class_means(self.buffer, self._normalise_features, len(self.means))
        self.means.copy_(means)
        self.known.copy_(known)

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Binary cross-entropy on the task's classes, with ``all`` also those to come; distillation on the old ones."""
        x, classes = inputs["x"], self._classes[task]
        logits = self.net(x)
        if self.mean_over == "seen":
            logits = logits[:, : classes.stop]
        targets = F.one_hot(inputs["y"], logits.shape[1]).to(logits.dtype)
        if classes.start:
            targets[:, : classes.start] = torch.sigmoid(self.teacher(x)[:, : classes.start])
        terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") / logits.numel()
        losses = {"classification": terms[:, classes.start :].sum()}
        if classes.start:
            losses["distillation"] = terms[:, : classes.start].sum()
        return losses, {}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), minus the distance to each class's mean."""
        return score_by_nearest_mean(self._normalise_features(x), self.means, self.known)

    def alternatives(self) -> dict[str, Predict]:
        """``head``: the network's own scores."""
        return {"head": super().predict}

    def memory_bytes(self) -> int:
        """The old network and the class means."""
        return self.teacher.nbytes + self.means.nbytes

    def _normalise_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D) of unit length."""
        return F.normalize(self.net.features(x).to(self.means.dtype), dim=1)
