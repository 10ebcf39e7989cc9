"""Lifelong Vision Transformer (Wang, Liu, Duan, Kong, Tao, CVPR 2022, pp. 171-181), the learning rule.

Two heads on one trunk: *injection* learns the new task only, *accumulation* learns old and new in balance and answers
at test time. For a batch (x, y) of task t and a draw (m, y_m, z_m) from the memory:

    L   = L_It + L_l + gamma L_a                              first task: L_It + r(1) L_At
    L_l = alpha L_r + beta L_d + r(t) L_At
    L_It = CE(injection(x), y)           L_At = CE(accumulation(x), y)         L_r = CE(accumulation(m), y_m)
    L_d  = T^2 KL( softmax(z_m / T) || softmax(accumulation(m) / T) ),  or MSE( accumulation(m), z_m )
    L_a  = mean over all entries of |g_K (K_w - K_w^{t-1})| and |g_B (B - B^{t-1})|             (paper Eq. 2)

g is the gradient of CE(injection) averaged over the images of task t-1 when it was closed, K^{t-1} and B^{t-1} the keys
and biases then. z are the accumulation head's logits when the image was stored. The memory is the paper's Eq. 8
(``buffer=confidence_aware``), with the injection head's confidence.

With a buffer that is filled while the stream passes (``buffer=reservoir``) L_r and L_d act in the first task already.
Departures and what the sources leave open: docs/methods/lvt.md.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.lvt import LVT
from cl_bench.buffers.base import CHUNK, Buffer, Columns
from cl_bench.core.errors import require, void
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms, check_replay_size, true_class_probability


@void("temperature", when=lambda v: v["distillation"] == "mse", why="method.distillation=mse has none")
@void("gamma", when=lambda v: not v["inter_task"], why="method.inter_task is false")
@void(
    "new_weight", "new_weight_rule", when=lambda v: not v["accumulation_head"], why="method.accumulation_head is false"
)
class LifelongViT(FunctionalMethod):
    """Inter-task attention penalty, dual classifiers, confidence-aware memory.

    Args:
        alpha, beta, gamma: weights of L_r, L_d and L_a.
        new_weight: r(t) for t >= 2 with ``new_weight_rule=constant``; the smallest r(t) with ``decay``. r(1) = 1.
        new_weight_rule: ``constant``, or ``decay`` for r(t) = max(new_weight, 0.9^(t-1)).
        distillation: ``kl`` at ``temperature``, or ``mse``.
        temperature: T of L_d.
        replay_size: images drawn from the buffer at each step.
        inter_task: ablation switch of L_a.
        injection_head: ablation switch; without it L_It is dropped and the accumulation head gives the confidence.
        accumulation_head: ablation switch; without it the injection head takes every loss and answers.
    """

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
        super().__init__()
        require(
            injection_head or accumulation_head,
            "accumulation_head",
            expected="at least one of injection_head and accumulation_head",
            got="both switched off",
            fix="Leave one of them on.",
        )
        check_replay_size(replay_size)
        require(temperature > 0, "temperature", expected="above 0", got=temperature, fix="The paper's code has 2.")
        self.net, self.buffer = net, buffer
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.new_weight, self.new_weight_rule = new_weight, new_weight_rule
        self.distillation, self.temperature, self.replay_size = distillation, temperature, replay_size
        self.inter_task, self.injection_head = inter_task, injection_head
        self.accumulation_head = accumulation_head
        for i, parameter in enumerate(net.keys_and_biases()):
            self.register_buffer(f"old_{i}", parameter.detach().clone())
            self.register_buffer(f"importance_{i}", torch.zeros_like(parameter))

    @property
    def answering(self) -> nn.Module:
        """The head of L_At, L_r, L_d and of the answer."""
        return self.net.accumulation if self.accumulation_head else self.net.injection

    @property
    def injecting(self) -> nn.Module:
        """The head of L_It, of confidence and importance."""
        return self.net.injection if self.injection_head else self.net.accumulation

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase; then importance, snapshot of keys and biases, memory."""
        trained = [self.net.stem, self.net.stages, self.answering]
        if self.injecting is not self.answering:
            trained.append(self.injecting)
        yield Phase(task.train, self.observe, [p for module in trained for p in module.parameters()])
        if self.inter_task:
            self._measure_importance(task.train)
        self.buffer.close_task(task, self.describe, keep=("logits",))

    def inputs(self, batch: Batch) -> Inputs:
        """(x, y) of the stream and a draw (m, y_m, z_m) from the memory, the images in one tensor."""
        if not len(self.buffer):
            return {"x": batch.x, "y": batch.y}
        memory = self.buffer.sample(self.replay_size)
        drawn = {"y_m": memory.y, "z_m": memory.columns["logits"]}
        return {"x": torch.cat([batch.x, memory.x]), "y": batch.y} | drawn

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """The named terms of the loss, weights included; the stream's logits are remembered."""
        y = inputs["y"]
        features = self.net.features(inputs["x"])
        new, old = features[: len(y)], features[len(y) :]

        losses: Losses = {}
        if self.injection_head:
            losses["injection"] = F.cross_entropy(self.injecting(new), y)  # L_It
        answers = self.answering(new)
        if self.accumulation_head:
            losses["accumulation"] = self.rate(task) * F.cross_entropy(answers, y)  # r(t) L_At
        if "y_m" in inputs:
            logits = self.answering(old)
            losses["replay"] = self.alpha * F.cross_entropy(logits, inputs["y_m"])  # L_r
            losses["distillation"] = self.beta * self._distil(logits.to(inputs["z_m"].dtype), inputs["z_m"])  # L_d
        if self.inter_task and task > 0:
            losses["attention"] = self.gamma * self.penalty()  # L_a
        return losses, {"logits": answers.detach()}

    def remember(self, batch: Batch, columns: Columns) -> None:
        """The stream passes the buffer, with its logits."""
        self.buffer.add(batch, **columns)

    def rate(self, task: int) -> float:
        """r(t), t = task + 1."""
        if task == 0:
            return 1.0
        return max(self.new_weight, 0.9**task) if self.new_weight_rule == "decay" else self.new_weight

    def penalty(self) -> Tensor:
        """L_a without its weight: mean |g (p - p_old)| over all entries of keys and biases; 0 for an unchanged net."""
        drifts = [
            (self.get_buffer(f"importance_{i}") * (p - self.get_buffer(f"old_{i}"))).abs().flatten()
            for i, p in enumerate(self.net.keys_and_biases())
        ]
        return torch.cat(drifts).mean()

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
        return sum(
            t.nbytes for name, t in self.named_buffers(recurse=False) if name.startswith(("old_", "importance_"))
        )

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the accumulation head's logits."""
        return self.answering(self.net.features(x))

    def _distil(self, logits: Tensor, stored: Tensor) -> Tensor:
        """L_d, teacher first: (B, K), (B, K) -> scalar, mean over images."""
        if self.distillation == "mse":
            return F.mse_loss(logits, stored)
        student, teacher = (F.log_softmax(z / self.temperature, dim=1) for z in (logits, stored))
        return self.temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def _measure_importance(self, data: Data) -> None:
        """g_K, g_B: mean over the images of d CE(injection) / d K_w and d B; and the snapshot they belong to."""
        parameters = self.net.keys_and_biases()
        totals = [torch.zeros_like(p) for p in parameters]
        for chunk in data.split(CHUNK):
            logits = self.injecting(self.net.features(self.buffer.transform.normalise(chunk.images)))
            summed = F.cross_entropy(logits, chunk.labels, reduction="sum")
            for total, gradient in zip(totals, torch.autograd.grad(summed, parameters)):
                total += gradient
        for i, (parameter, total) in enumerate(zip(parameters, totals)):
            self.get_buffer(f"importance_{i}").copy_(total / len(data))
            self.get_buffer(f"old_{i}").copy_(parameter.detach())
