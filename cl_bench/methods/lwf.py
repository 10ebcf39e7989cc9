"""Learning without forgetting (Li and Hoiem, ECCV 2016; TPAMI 2018).

    L = CE over the new task's classes + alpha * sum over old tasks o of H( y_o', yhat_o' )                 (Eq. 1 to 4)

y_o and yhat_o are the old and the present network's softmax over the classes of task o, both at temperature T, and H
the cross-entropy between them. Before it, the head alone learns the new classes (warm-up step of the paper's Fig. 3).
No image is kept.

Departures: one linear head holds the rows of all tasks, which is the paper's head for each of them; the warm-up has a
fixed number of epochs where the paper trains to convergence, and BatchNorm's running statistics go on in it. The
weight decay of 0.0005 that paper and Mammoth have is ``optimizer.weight_decay``, 0 by default. See docs/methods/lwf.md.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import SingleHead
from cl_bench.core.errors import require
from cl_bench.core.types import Batch, Losses, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Teacher, Terms
from cl_bench.scenarios.base import Scenario


class LwF(FunctionalMethod):
    """Keeps the answers of the old network on the new task's images.

    Args:
        alpha: weight of the old tasks' term (lambda_o of the paper).
        temperature: T.
        warm_up_epochs: passes in which only the head learns the new classes; 0 for none.
    """

    def __init__(
        self, *, net: SingleHead, scenario: Scenario, alpha: float, temperature: float, warm_up_epochs: int
    ) -> None:
        super().__init__()
        require(temperature > 0, "temperature", expected="above 0", got=temperature, fix="The paper has 2.")
        require(warm_up_epochs >= 0, "warm_up_epochs", expected="0 or more", got=warm_up_epochs, fix="0 is no warm-up.")
        self.net, self.teacher = net, Teacher(net)
        self.alpha, self.temperature, self.warm_up_epochs = alpha, temperature, warm_up_epochs
        self._classes = [task.classes for task in scenario.tasks]

    def learn(self, task: Task) -> Iterator[Phase]:
        """From the second task on the head by itself first; then everything."""
        self.teacher.take(self.net)
        if task.id > 0 and self.warm_up_epochs:
            yield Phase(task.train, self.observe_new, self.net.head.parameters(), epochs=self.warm_up_epochs)
        yield Phase(task.train, self.observe, self.net.parameters())

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy of the new classes and, over each old task's classes, against the old network."""
        logits = self.net(inputs["x"])
        losses = {"ce": self._new(logits, inputs["y"], task)}
        if task > 0:
            answers, old = self.teacher(inputs["x"]), self._classes[:task]
            kept = [self._keep(logits[:, c.start : c.stop], answers[:, c.start : c.stop]) for c in old]
            losses["distillation"] = self.alpha * torch.stack(kept).sum()
        return losses, {}

    def observe_new(self, batch: Batch) -> Losses:
        """The warm-up's loss: cross-entropy of the new classes, on features that stay."""
        with torch.no_grad():
            features = self.net.features(batch.x)
        return {"ce": self._new(self.net.head(features), batch.y, batch.task)}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        return self.net(x)

    def memory_bytes(self) -> int:
        """The old network."""
        return self.teacher.nbytes

    def _new(self, logits: Tensor, y: Tensor, task: int) -> Tensor:
        classes = self._classes[task]
        return F.cross_entropy(logits[:, classes.start : classes.stop], y - classes.start)

    def _keep(self, logits: Tensor, answers: Tensor) -> Tensor:
        """H(y_o', yhat_o') of one old task, (B, classes) each -> scalar, mean over images."""
        return F.cross_entropy(logits / self.temperature, torch.softmax(answers / self.temperature, dim=1))
