"""Learning without forgetting (Li and Hoiem, ECCV 2016; TPAMI 2018).

    L = CE over the new task's classes + alpha * sum over old tasks o of H( y_o', yhat_o' )                 (Eq. 1 to 4)

y_o and yhat_o are the old and the present network's softmax over the classes of task o, both at temperature T, and H
the cross-entropy between them. Before this, only the head is trained, on the new classes (warm-up step of the paper's
Fig. 3). No image is kept.

Departures: one linear head has the rows of all tasks; the rows of a task are the paper's head of that task. The warm-up
has a fixed number of epochs; the paper trains to convergence. BatchNorm's running statistics are updated in the
warm-up. The weight decay of 0.0005 of the paper and of Mammoth is ``optimizer.weight_decay``, 0 by default. See
docs/methods/lwf.md.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import SingleHead
from cl_bench.core.errors import require_nonnegative, require_positive
from cl_bench.core.types import Batch, Losses, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Teacher, Terms
from cl_bench.scenarios.base import Scenario


class LwF(FunctionalMethod):
    """Distils the old network's answers on the new task's images.

    Args:
        alpha: weight of the old tasks' term (lambda_o of the paper).
        temperature: T.
        warm_up_epochs: passes in which only the head learns the new classes; 0 for none.
    """

    net: SingleHead

    def __init__(
        self, *, net: SingleHead, scenario: Scenario, alpha: float, temperature: float, warm_up_epochs: int
    ) -> None:
        super().__init__()
        require_positive(fix="The paper has 2.", temperature=temperature)
        require_nonnegative(fix="0 is no warm-up.", warm_up_epochs=warm_up_epochs)
        self.net, self.teacher = net, Teacher(net)
        self.alpha, self.temperature, self.warm_up_epochs = alpha, temperature, warm_up_epochs
        self._classes = [task.classes for task in scenario.tasks]

    def learn(self, task: Task) -> Iterator[Phase]:
        """From the second task on, first the head alone; then everything."""
        self.teacher.take(self.net)
        if task.id > 0 and self.warm_up_epochs:
            yield Phase(task.train, self.observe_new, self.net.head.parameters(), epochs=self.warm_up_epochs)
        yield Phase(task.train, self.observe, self.net.parameters())

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the new classes, and for each old task the cross-entropy to the old network's answers."""
        logits = self.net(inputs["x"])
        losses = {"ce": self._classify(logits, inputs["y"], task)}
        if task > 0:
            answers, old = self.teacher(inputs["x"]), self._classes[:task]
            kept = [self._distil(logits[:, c.start : c.stop], answers[:, c.start : c.stop]) for c in old]
            losses["distillation"] = self.alpha * torch.stack(kept).sum()
        return losses, {}

    def observe_new(self, batch: Batch) -> Losses:
        """The warm-up's loss: cross-entropy of the new classes, on frozen features."""
        with torch.no_grad():
            features = self.net.features(batch.x)
        return {"ce": self._classify(self.net.head(features), batch.y, batch.task)}

    def memory_bytes(self) -> int:
        """The old network."""
        return self.teacher.nbytes

    def _classify(self, logits: Tensor, y: Tensor, task: int) -> Tensor:
        classes = self._classes[task]
        return F.cross_entropy(logits[:, classes.start : classes.stop], y - classes.start)

    def _distil(self, logits: Tensor, answers: Tensor) -> Tensor:
        """H(y_o', yhat_o') of one old task, (B, classes) each -> scalar, mean over images."""
        return F.cross_entropy(logits / self.temperature, torch.softmax(answers / self.temperature, dim=1))
