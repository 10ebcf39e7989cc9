"""Supermasks in Superposition (Wortsman et al., NeurIPS 2020, arXiv 2006.14769).

A network of fixed random weights W; task i is a binary mask M^i, and nothing else is learned. p = f(x, W * M^i).

    W         = sign(default initialisation) sqrt(2 / fan_in) a layer; no bias, BatchNorm without gain and shift
    M         = the k_l largest |s| of layer l (``edge_popup``), k_l by density_l = min(0.5, budget (c_out + c_in) /
                (c_out c_in k k)), or [s >= 0] (``threshold``); scores s, one a weight; gradient straight through
    loss      = CE over all ``outputs`` of the output layer; a task's classes are the first of them, those beyond the
                largest task's l classes belong to no class of any task ("superfluous") and are only pushed down
    p(alpha)  = f(x, W * sum_i alpha_i M^i), over the k tasks learned
    H         = entropy of softmax(p(alpha))
    G         = logsumexp of p(alpha), the gradient through the first l outputs blocked
    oneshot   : task = argmin_i d H / d alpha_i  (or G)  at alpha = 1 / k
    binary    : halve the live tasks, keeping those of the smallest gradient at alpha = 1 / live, until one is left

With the task's id (Task-IL) this is the paper's scenario GG; without (Class-IL) GNu: task and class must be right.
Each image infers its task by itself: test batches mix tasks here, so no image can help another.

Departures:

1. The paper lets one image decide for a whole batch of its task; that protocol is not offered, for it tells the method
   that the batch is of one task.
2. BatchNorm statistics are kept a task (as in the authors' code since May 2021). In a superposition they are weighted
   by alpha like the masks; the paper infers tasks only with networks that have no BatchNorm.
3. Parameters of no convolution or linear layer (positions, class tokens, LayerNorm) stay as they are at the start.
4. The output layer is linear, not a 1 x 1 convolution, which is the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.backbones.layers.masked import MaskedNet
from cl_bench.errors import require
from cl_bench.methods.base import Method, Predict
from cl_bench.scenarios.base import Scenario
from cl_bench.types import Batch, Losses, Phase, Task

INFERENCE = ("oneshot", "binary")
CHUNK_WEIGHTS = 2**25
"""Images whose gradients are taken at once, times the weights of the network: each image has a gradient of that size.
Bounds the memory, 128 MiB a copy; changes no result."""


class SupSup(Method):
    """Masks over a fixed network, and the task inferred from one image.

    Args:
        outputs: size of the output layer; None for the classes of the largest task, no superfluous ones.
        mask: how scores become a mask, ``edge_popup`` or ``threshold``.
        budget: s of the layers' density with ``edge_popup`` (the paper has 1 to 32; larger is denser). ``threshold``
            does not use it.
        score_init: scores of a new task: ``random``, or ``running_mean`` of those of all earlier tasks ("Transfer").
        inference: ``oneshot`` or ``binary``.
        objective: what is differentiated, ``H`` or ``G``; G needs superfluous outputs.
    """

    task_id = "used"

    def __init__(
        self,
        *,
        net: Backbone,
        scenario: Scenario,
        outputs: int | None,
        mask: Literal["edge_popup", "threshold"],
        budget: float,
        score_init: Literal["random", "running_mean"],
        inference: Literal["oneshot", "binary"],
        objective: Literal["H", "G"],
    ) -> None:
        super().__init__()
        self.classes = [task.classes for task in scenario.tasks]
        self.num_classes, self.real = scenario.num_classes, max(map(len, self.classes))
        size = self.real if outputs is None else outputs
        require(
            size >= self.real,
            "outputs",
            expected=f"at least {self.real}, the classes of the largest task",
            got=outputs,
            fix="null is as many as that; more (the paper has 100 for 10 classes) makes tasks easier to infer.",
        )
        require(budget > 0, "budget", expected="above 0", got=budget, fix="The paper has 1, 2, 4, 8, 16, 32.")
        require(
            objective == "H" or size > self.real,
            "objective",
            expected=f"H, since {size} outputs for {self.real} classes leave none superfluous",
            got=objective,
            fix=f"Set method.outputs above {self.real}, or method.objective=H.",
        )
        self.inference, self.objective, self.superfluous = inference, objective, size - self.real
        self.net = MaskedNet(
            net,
            image_shape=scenario.image_shape,
            num_tasks=len(scenario.tasks),
            outputs=size,
            rule=mask,
            budget=budget,
            mean_scores=score_init == "running_mean",
        )

    def learn(self, task: Task) -> Iterator[Phase]:
        """New scores, one phase that trains them and nothing else, and the mask is stored."""
        self.net.open_task()
        yield Phase(task.train, self.observe, self.net.scores())
        self.net.close_task()

    def observe(self, batch: Batch) -> Losses:
        """CE over all outputs, superfluous ones too."""
        return {"ce": F.cross_entropy(self.net(batch.x), batch.y - self.classes[batch.task].start)}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the logits of the task given or inferred, -inf for the classes of all others."""
        return self._predict(x, task_id, inference=self.inference, objective=self.objective)

    def alternatives(self) -> dict[str, Predict]:
        """The other rules of inference; they differ in Class-IL only."""
        rules = product(INFERENCE, ("H", "G") if self.superfluous else ("H",))
        return {
            f"{inference}_{objective}": partial(self._predict, inference=inference, objective=objective)
            for inference, objective in rules
            if (inference, objective) != (self.inference, self.objective)
        }

    def _predict(self, x: Tensor, task_id: Tensor | None, *, inference: str, objective: str) -> Tensor:
        scores = x.new_full((len(x), self.num_classes), -torch.inf)
        learned = int(self.net.learned)
        if learned == 0:
            return scores
        task = self.infer(x, inference, objective) if task_id is None else task_id
        for t, classes in enumerate(self.classes[:learned]):
            which = (task == t).nonzero().flatten()
            if len(which):
                logits = self.net(x[which], t)[:, : len(classes)]
                scores[which, classes.start : classes.stop] = logits.to(scores.dtype)
        return scores

    def infer(self, x: Tensor, inference: str, objective: str) -> Tensor:
        """(B, C, H, W) -> (B,) the task that each image belongs to, as far as it can tell by itself."""
        k = int(self.net.learned)
        alpha = x.new_full((k,), 1 / k)
        if inference == "oneshot":
            return self.gradients(x, alpha, objective).argmin(dim=1)
        live = torch.arange(k, device=x.device).expand(len(x), k)
        while live.shape[1] > 1:
            slopes = self.gradients(x, alpha, objective).gather(1, live)
            half = slopes.argsort(dim=1)[:, : (live.shape[1] + 1) // 2]
            live = live.gather(1, half)
            alpha = x.new_zeros(len(x), k).scatter(1, live, 1 / live.shape[1])
        return live.squeeze(1)

    @torch.no_grad()
    def gradients(self, x: Tensor, alpha: Tensor, objective: str) -> Tensor:
        """(B, k) derivatives of each image's own H or G with respect to alpha, (k,) for all or (B, k), in fp32."""
        measure = self.entropy if objective == "H" else self.superfluous_mass

        def of_one(alpha: Tensor, image: Tensor) -> Tensor:
            return measure(self.net(image[None], alpha)).squeeze(0)

        chunk = max(1, CHUNK_WEIGHTS // sum(self.net.weights().values()))
        each: Callable[[Tensor, Tensor], Tensor] = torch.func.vmap(
            torch.func.grad(of_one), in_dims=(0 if alpha.dim() == 2 else None, 0), chunk_size=chunk
        )
        with torch.autocast(x.device.type, enabled=False):
            return each(alpha, x)

    @staticmethod
    def entropy(logits: Tensor) -> Tensor:
        """H: (B, outputs) -> (B,), over all outputs."""
        log_p = logits.log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1)

    def superfluous_mass(self, logits: Tensor) -> Tensor:
        """G: (B, outputs) -> (B,) logsumexp; only the superfluous outputs pass gradients.

        Its gradient there is softmax(p), which is that of the cross-entropy whatever the label.
        """
        return torch.cat([logits[:, : self.real].detach(), logits[:, self.real :]], dim=1).logsumexp(dim=1)

    def memory_bytes(self) -> int:
        """Packed masks and BatchNorm statistics of the tasks learned, and the mean scores where they are kept."""
        net = self.net
        return int(net.learned) * (net.mask_bytes() + net.norm_bytes()) + net.mean_score_bytes()

    def capacity(self) -> float:
        """Bytes of the fp32 weights and of :meth:`memory_bytes`, relative to those of the weights."""
        return 1 + self.memory_bytes() / (4 * sum(self.net.weights().values()))

    def facts(self) -> dict[str, Any]:
        """Weights, what each mask keeps of them, and bytes a task."""
        kept, weights = self.net.kept(), self.net.weights()
        totals = [sum(layer) for layer in zip(*kept.values())]
        return {
            "weights": sum(weights.values()),
            "kept_weights": totals,
            "density": [total / sum(weights.values()) for total in totals],
            "density_of_layers": {
                name: sum(counts) / (len(counts) * weights[name]) for name, counts in kept.items() if counts
            },
            "mask_bytes_a_task": self.net.mask_bytes(),
            "norm_bytes_a_task": self.net.norm_bytes(),
            "index_bytes": 2 * sum(totals),
            "mean_score_bytes": self.net.mean_score_bytes(),
        }
