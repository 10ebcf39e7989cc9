"""Lifelong Vision Transformer (Wang, Liu, Duan, Kong, Tao, CVPR 2022, pp. 171-181), the learning rule.

Two heads on one trunk: *injection* learns the new task only, *accumulation* learns old and new tasks in balance and
predicts at test time. For a batch (x, y) of task t and a draw (m, y_m, z_m) from the buffer:

    L   = L_It + L_l + gamma L_a                              first task: L_It + r(1) L_At
    L_l = alpha L_r + beta L_d + r(t) L_At
    L_It = CE(injection(x), y)           L_At = CE(accumulation(x), y)         L_r = CE(accumulation(m), y_m)
    L_d  = T^2 KL( softmax(z_m / T) || softmax(accumulation(m) / T) ),  or MSE( accumulation(m), z_m )
    L_a  = mean over all entries of |g_K (K_w - K_w^{t-1})| and |g_B (B - B^{t-1})|             (paper Eq. 2)

g is the gradient of CE(injection) averaged over the images of task t-1 at the end of that task, K^{t-1} and B^{t-1} are
the keys and biases at the same time. z_m are the accumulation head's logits when the image was stored. The buffer is
the paper's Eq. 8 (``buffer=confidence_aware``), with the injection head's confidence.

With a buffer that is filled during the task (``buffer=reservoir``) L_r and L_d act in the first task already.
Departures and what the sources leave open: docs/methods/lvt.md.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.lvt import LVT
from cl_bench.buffers.base import CHUNK, Buffer, Columns
from cl_bench.core.errors import require, require_positive, void
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import (
    Inputs,
    ParameterSnapshot,
    RehearsalMethod,
    Terms,
    check_replay_size,
    distillation_loss,
    true_class_probability,
)


@void("temperature", when=lambda v: v["distillation"] == "mse", why="method.distillation=mse has none")
@void("gamma", when=lambda v: not v["inter_task"], why="method.inter_task is false")
@void(
    "new_weight", "new_weight_rule", when=lambda v: not v["accumulation_head"], why="method.accumulation_head is false"
)
class LifelongViT(RehearsalMethod):
    """Inter-task attention penalty, dual classifiers, confidence-aware buffer.

    Args:
        alpha, beta, gamma: weights of L_r, L_d and L_a.
        new_weight: r(t) for t >= 2 with ``new_weight_rule=constant``; the smallest r(t) with ``decay``. r(1) = 1.
        new_weight_rule: ``constant``, or ``decay`` for r(t) = max(new_weight, 0.9^(t-1)).
        distillation: ``kl`` at ``temperature``, or ``mse``.
        temperature: T of L_d.
        replay_size: images drawn from the buffer at each step.
        inter_task: ablation switch of L_a.
        injection_head: ablation switch; without it there is no L_It, and the confidence is the accumulation head's.
        accumulation_head: ablation switch; without it the injection head has every loss and predicts.
    """

    net: LVT

    def __init__(
        self,
        *,
        net: LVT,
        buffer: Buffer,
        alpha: float,
        beta: float,
        gamma: float,
        new_weight: float,
        new_weight_rule: Literal["constant", "decay"],
        distillation: Literal["kl", "mse"],
        temperature: float,
        replay_size: int,
        inter_task: bool,
        injection_head: bool,
        accumulation_head: bool,
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        require(
            injection_head or accumulation_head,
            "accumulation_head",
            expected="at least one of injection_head and accumulation_head",
            got="both switched off",
            fix="Leave one of them on.",
        )
        check_replay_size(replay_size)
        require_positive(fix="The paper's code has 2.", temperature=temperature)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.new_weight, self.new_weight_rule = new_weight, new_weight_rule
        self.distillation, self.temperature, self.replay_size = distillation, temperature, replay_size
        self.inter_task, self.injection_head = inter_task, injection_head
        self.accumulation_head = accumulation_head
        self.snapshot = ParameterSnapshot(self, net.keys_and_biases(), importance="importance")

    @property
    def answering(self) -> nn.Module:
        """The head of L_At, L_r, L_d and of the prediction."""
        return self.net.accumulation if self.accumulation_head else self.net.injection

    @property
    def injecting(self) -> nn.Module:
        """The head of L_It, of confidence and importance."""
        return self.net.injection if self.injection_head else self.net.accumulation

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase; then the importance and snapshot of keys and biases, and the buffer."""
        trained = [self.net.stem, self.net.stages, self.answering]
        if self.injecting is not self.answering:
            trained.append(self.injecting)
        yield Phase(task.train, self.observe, [p for module in trained for p in module.parameters()])
        if self.inter_task:
            self._measure_importance(task.train)
        self.buffer.close_task(task, self.describe, keep=("logits",))

    def inputs(self, batch: Batch) -> Inputs:
        """(x, y) of the stream and a draw (m, y_m, z_m) from the buffer, the images in one tensor."""
        if not len(self.buffer):
            return {"x": batch.x, "y": batch.y}
        drawn = self.buffer.sample(self.replay_size)
        replayed = {"y_m": drawn.y, "z_m": drawn.columns["logits"]}
        return {"x": torch.cat([batch.x, drawn.x]), "y": batch.y} | replayed

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """The named terms of the loss, weights included; the stream's logits are stored."""
        y = inputs["y"]
        features = self.net.features(inputs["x"])
        new, old = features[: len(y)], features[len(y) :]

        losses: Losses = {}
        if self.injection_head:
            losses["injection"] = F.cross_entropy(self.injecting(new), y)  # L_It
        answers = self.answering(new)
        if self.accumulation_head:
            losses["accumulation"] = self.get_new_weight(task) * F.cross_entropy(answers, y)  # r(t) L_At
        if "y_m" in inputs:
            logits = self.answering(old)
            losses["replay"] = self.alpha * F.cross_entropy(logits, inputs["y_m"])  # L_r
            losses["distillation"] = self.beta * self._compute_distillation(
                logits.to(inputs["z_m"].dtype), inputs["z_m"]
            )  # L_d
        if self.inter_task and task > 0:
            losses["attention"] = self.gamma * self.compute_penalty()  # L_a
        return losses, {"logits": answers.detach()}

    def get_new_weight(self, task: int) -> float:
        """r(t), t = task + 1."""
        if task == 0:
            return 1.0
        return max(self.new_weight, 0.9**task) if self.new_weight_rule == "decay" else self.new_weight

    def compute_penalty(self) -> Tensor:
        """L_a without its weight: mean |g (p - p_old)| over all entries of keys and biases; 0 for an unchanged net."""
        drifts = self.snapshot.drifts(self.net.keys_and_biases())
        weighted = [(g * drift).abs().flatten() for g, drift in zip(self.snapshot.importance, drifts)]
        return torch.cat(weighted).mean()

    def describe(self, x: Tensor, y: Tensor) -> Columns:
        """Confidence by the injection head, and the accumulation head's logits to store."""
        features = self.net.features(x)
        return {
            "confidence": true_class_probability(self.injecting(features), y),
            "logits": self.answering(features),
            "features": features,
        }

    def memory_bytes(self) -> int:
        """Old keys and biases and their importance."""
        return self.snapshot.nbytes

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), logits of :attr:`answering`."""
        return self.answering(self.net.features(x))

    def _compute_distillation(self, logits: Tensor, stored: Tensor) -> Tensor:
        """L_d of logits (B, K) and stored logits (B, K) -> scalar, mean over images."""
        if self.distillation == "mse":
            return F.mse_loss(logits, stored)
        return distillation_loss(logits, stored, self.temperature, mean_over_classes=False)

    def _measure_importance(self, data: Data) -> None:
        """Take the snapshot: K_w and B, and g, the mean over the images of d CE(injection) / d K_w and d B."""
        parameters = self.net.keys_and_biases()
        totals = [torch.zeros_like(p) for p in parameters]
        for chunk in data.split(CHUNK):
            logits = self.injecting(self.net.features(self.buffer.transform.normalise(chunk.images)))
            summed = F.cross_entropy(logits, chunk.labels, reduction="sum")
            for total, gradient in zip(totals, torch.autograd.grad(summed, parameters)):
                total += gradient
        self.snapshot.take(parameters, [total / len(data) for total in totals])
