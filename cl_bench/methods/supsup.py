"""Supermasks in Superposition (Wortsman et al., NeurIPS 2020, arXiv 2006.14769).

A network of fixed random weights W; for each task i a binary mask M^i is learned, and nothing else. p = f(x, W * M^i).

    W         = sign(default initialisation) sqrt(2 / fan_in) in each layer; no bias, BatchNorm without gain and shift
    M         = the k_l largest |s| of layer l (``edge_popup``), k_l by density_l = min(0.5, budget (c_out + c_in) /
                (c_out c_in k k)), or [s >= 0] (``threshold``); one score s per weight; straight-through gradient
    loss      = CE over all ``outputs`` of the output layer; a task's classes are the first of them. Outputs beyond the
                classes of the largest task (l of them) belong to no class ("superfluous") and are only pushed down
    p(alpha)  = f(x, W * sum_i alpha_i M^i), over the k tasks learned
    H         = entropy of softmax(p(alpha))
    G         = logsumexp of p(alpha), the gradient through the first l outputs blocked
    oneshot   : task = argmin_i d H / d alpha_i  (or G)  at alpha = 1 / k
    binary    : keep the ceil(live / 2) live tasks of the smallest gradient at alpha = 1 / live, until one is left

With the task id (Task-IL) this is the paper's scenario GG. Without (Class-IL) it is GNu: task and class must be right.
If the scenario's tasks share their labels, it is GNs without: the class must be right, whatever mask predicts it. The
task is inferred for each image separately: test batches are shuffled over tasks, so no image can help another. In the
paper the first image of a single-task batch decides for the whole batch; ``deciding_images`` gives that protocol.

Departures:

1. In the paper one image decides for a whole batch of its task, which tells the method that the batch is of one task.
   Here each image decides for itself unless ``deciding_images`` is set.
2. Each task has its own BatchNorm statistics (as in the authors' code since May 2021). In a superposition they are
   weighted by alpha like the masks; the paper infers tasks only with networks without BatchNorm.
3. Parameters outside convolutions and linear layers (positions, class tokens, LayerNorm) keep their initial values.
4. The output layer is linear, not a 1 x 1 convolution, which is the same function.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.backbones.base import Backbone
from cl_bench.backbones.layers.masked import MaskedNet
from cl_bench.core.errors import ConfigError, require, require_positive, void
from cl_bench.core.types import Batch, Losses, Phase, Task
from cl_bench.methods.base import Method, Predict
from cl_bench.scenarios.base import Scenario
from cl_bench.system.memory import get_pass_bytes

INFERENCE = ("oneshot", "binary")
GRADIENT_BYTES = 2**27
"""Bytes on a CPU for the per-image gradients of one pass, each of the size of the network; changes no result."""


class Superposition(Method):
    """Masks over a fixed network, and the inference of an image's mask.

    Args:
        classes: the classes that each mask predicts, as positions in the class order; its length is the number of
            masks.
        outputs: size of the output layer; None for the classes of the largest task, without superfluous outputs.
        mask: how scores become a mask, ``edge_popup`` or ``threshold``.
        budget: s of the layers' density with ``edge_popup`` (the paper has 1 to 32; larger is denser). ``threshold``
            does not use it.
        mean_scores: whether a task's scores start from the mean of those of all earlier tasks.
        inference: ``oneshot`` or ``binary``.
        objective: what is differentiated, ``H`` or ``G``; G needs superfluous outputs.
        deciding_images: None: the task is inferred for each image. n: test batches are of one task each, and their
            first n images decide together (the paper has 1, and 128 for rotations).
    """

    shared_labels = True
    recurring_classes = False  # a mask has outputs for the classes of its task
    draws_weights = True

    def __init__(
        self,
        *,
        net: Backbone,
        scenario: Scenario,
        classes: list[range],
        outputs: int | None,
        mask: Literal["edge_popup", "threshold"],
        budget: float,
        mean_scores: bool,
        inference: Literal["oneshot", "binary"],
        objective: Literal["H", "G"],
        deciding_images: int | None,
    ) -> None:
        super().__init__()
        self.classes, self.num_classes, self.real = classes, scenario.num_classes, max(map(len, classes))
        size = self.real if outputs is None else outputs
        require(
            size >= self.real,
            "outputs",
            expected=f"at least {self.real}, the number of classes of the largest task",
            got=outputs,
            fix="null is that number; with more outputs (the paper has 100 for 10 classes) tasks are easier to infer.",
        )
        require_positive(fix="The paper has 1, 2, 4, 8, 16, 32.", budget=budget)
        require(
            objective == "H" or size > self.real,
            "objective",
            expected=f"H, since {size} outputs for {self.real} classes leave no superfluous output",
            got=objective,
            fix=f"Set method.outputs above {self.real}, or method.objective=H.",
        )
        require_positive(fix="With null each image decides for itself.", deciding_images=deciding_images)
        self.deciding_images = deciding_images
        self.test_batches = "mixed" if deciding_images is None else "single_task"
        self.inference, self.objective, self.superfluous = inference, objective, size - self.real
        self.net = MaskedNet(
            net,
            image_shape=scenario.image_shape,
            num_tasks=len(classes),
            outputs=size,
            rule=mask,
            budget=budget,
            mean_scores=mean_scores,
        )

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the logits of the given or inferred task, -inf for the classes of all others."""
        return self._predict(x, task_id, inference=self.inference, objective=self.objective)

    def alternatives(self) -> dict[str, Predict]:
        """The other inference rules; they differ in Class-IL only."""
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
        """(B, C, H, W) -> (B,) the inferred task of each image.

        With ``deciding_images`` it is one task for all images, by the mean H or G of the first ones.
        """
        k, n = int(self.net.learned), self.deciding_images
        deciding = x if n is None else x[:n]

        def slopes(alpha: Tensor) -> Tensor:
            each = self.compute_gradients(deciding, alpha, objective)
            return each if n is None else each.mean(dim=0, keepdim=True)

        alpha = x.new_full((k,), 1 / k)
        if inference == "oneshot":
            return slopes(alpha).argmin(dim=1).expand(len(x))
        live = torch.arange(k, device=x.device).expand(len(x) if n is None else 1, k)
        while live.shape[1] > 1:
            half = slopes(alpha).gather(1, live).argsort(dim=1)[:, : (live.shape[1] + 1) // 2]
            live = live.gather(1, half)
            alpha = x.new_zeros(len(live), k).scatter(1, live, 1 / live.shape[1]).expand(len(deciding), k)
        return live.squeeze(1).expand(len(x))

    @torch.no_grad()
    def compute_gradients(self, x: Tensor, alpha: Tensor, objective: str) -> Tensor:
        """(B, k) derivatives of each image's own H or G with respect to alpha, (k,) for all or (B, k), in fp32."""
        measure = self.compute_entropy if objective == "H" else self.compute_superfluous_mass

        def of_one(alpha: Tensor, image: Tensor) -> Tensor:
            return measure(self.net(image[None], alpha)).squeeze(0)

        if not self.training:  # unpacking takes most of the time of a pass
            for layer in self.net.list_layers().values():
                layer.keep_masked(alpha.shape[-1])
        chunk = max(1, get_pass_bytes(x.device, GRADIENT_BYTES) // (4 * sum(self.net.count_weights().values())))
        each: Callable[[Tensor, Tensor], Tensor] = torch.func.vmap(
            torch.func.grad(of_one), in_dims=(0 if alpha.dim() == 2 else None, 0), chunk_size=chunk
        )
        # vmap computes a fused attention one image after the other
        with torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            return each(alpha, x)

    @staticmethod
    def compute_entropy(logits: Tensor) -> Tensor:
        """H: (B, outputs) -> (B,), over all outputs."""
        log_p = logits.log_softmax(dim=1)
        return -(log_p.exp() * log_p).sum(dim=1)

    def compute_superfluous_mass(self, logits: Tensor) -> Tensor:
        """G: (B, outputs) -> (B,) logsumexp; only the superfluous outputs have gradients.

        Its gradient is softmax(p) there, which is the gradient of the cross-entropy for any label.
        """
        return torch.cat([logits[:, : self.real].detach(), logits[:, self.real :]], dim=1).logsumexp(dim=1)

    def memory_bytes(self) -> int:
        """Packed masks and BatchNorm statistics of the tasks learned, and the mean scores if they are kept."""
        net = self.net
        return int(net.learned) * (net.count_mask_bytes() + net.count_norm_bytes()) + net.count_mean_score_bytes()

    def capacity(self) -> float:
        """Bytes of the fp32 weights and of :meth:`memory_bytes`, relative to those of the weights."""
        return 1 + self.memory_bytes() / (4 * sum(self.net.count_weights().values()))

    def facts(self) -> dict[str, Any]:
        """The number of weights, how many each mask keeps, and bytes per task."""
        kept, weights = self.net.count_kept(), self.net.count_weights()
        totals = [sum(layer) for layer in zip(*kept.values())]
        return {
            "weights": sum(weights.values()),
            "kept_weights": totals,
            "density": [total / sum(weights.values()) for total in totals],
            "density_of_layers": {
                name: sum(counts) / (len(counts) * weights[name]) for name, counts in kept.items() if counts
            },
            "mask_bytes_a_task": self.net.count_mask_bytes(),
            "norm_bytes_a_task": self.net.count_norm_bytes(),
            "index_bytes": 2 * sum(totals),
            "mean_score_bytes": self.net.count_mean_score_bytes(),
        }


@void("budget", when=lambda v: v["mask"] == "threshold", why="method.mask=threshold has none")
class SupSup(Superposition):
    """One mask per task: scenarios GG, GNu and, if tasks share their labels, GNs.

    Args:
        score_init: scores of a new task: ``random``, or ``running_mean`` of those of all earlier tasks ("Transfer").
        outputs, mask, budget, inference, objective: see :class:`Superposition`.
        deciding_images: see :class:`Superposition`. Unlike other keys it has a default, so that older runs keep their
            fingerprint (decision 14).
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
        deciding_images: int | None = None,
    ) -> None:
        super().__init__(
            net=net,
            scenario=scenario,
            classes=[task.classes for task in scenario.tasks],
            outputs=outputs,
            mask=mask,
            budget=budget,
            mean_scores=score_init == "running_mean",
            inference=inference,
            objective=objective,
            deciding_images=deciding_images,
        )

    def learn(self, task: Task) -> Iterator[Phase]:
        """New scores, one phase that trains only them, then the mask is stored."""
        self.net.open_task()
        yield Phase(task.train, self.observe, self.net.list_scores())
        self.net.close_task()

    def observe(self, batch: Batch) -> Losses:
        """CE over all outputs, including the superfluous ones."""
        return {"ce": F.cross_entropy(self.net(batch.x), batch.y - self.classes[batch.task].start)}


@void("budget", when=lambda v: v["mask"] == "threshold", why="method.mask=threshold has none")
class SupSupNNs(Superposition):
    """New masks when the stream needs them: scenario NNs, no task id in training or test, one set of labels.

    Every ``check_every`` batches the next batch decides which mask is trained:

        nu = softmax(-dH/dalpha), H the mean over the batch, at alpha = 1 / k
        k max nu < 1 + epsilon: a new mask, else the mask argmax nu

    with k the number of masks made so far, but at least ``floor`` (masks not made yet have random scores). Of ``task``
    only the images are read. Departures and why a floor is needed: docs/methods/supsup.md.

    Args:
        max_masks: at most this many masks; once they are made, the likeliest of them is trained.
        floor: smallest k of the rule; 1 is the paper's text, with which one mask is always followed by a new one.
        epsilon: how much likelier than chance the likeliest mask must be.
        check_every: batches between two decisions.
        batch_size, epochs: the trainer's.
        outputs, mask, budget, inference, objective: see :class:`Superposition`.
    """

    visits: Tensor

    def __init__(
        self,
        *,
        net: Backbone,
        scenario: Scenario,
        outputs: int | None,
        mask: Literal["edge_popup", "threshold"],
        budget: float,
        inference: Literal["oneshot", "binary"],
        objective: Literal["H", "G"],
        max_masks: int,
        floor: int,
        epsilon: float,
        check_every: int,
        batch_size: int,
        epochs: int,
    ) -> None:
        usual = "configs/method/supsup_nns.yaml has usual values."
        require_positive(fix=usual, max_masks=max_masks, floor=floor, check_every=check_every)
        require(floor <= max_masks, "floor", expected=f"at most max_masks={max_masks}", got=floor, fix="5 is usual.")
        super().__init__(
            net=net,
            scenario=scenario,
            classes=[range(scenario.num_classes)] * max_masks,
            outputs=outputs,
            mask=mask,
            budget=budget,
            mean_scores=False,
            inference=inference,
            objective=objective,
            deciding_images=None,
        )
        if self.net.list_norms():
            raise ConfigError(
                "backbone",
                expected="a network without BatchNorm, because its statistics are not stored with the scores",
                got=f"{len(self.net.list_norms())} BatchNorm layers",
                fix="Use backbone=mlp.",
            )
        self.transform, self.floor, self.epsilon = scenario.transform, floor, epsilon
        self.check_every, self.batch_size, self.epochs = check_every, batch_size, epochs
        for i, layer in enumerate(self.net.list_layers().values()):
            self.register_buffer(f"bank_{i}", layer.scores.new_empty(max_masks, *layer.scores.shape))
        for number in range(max_masks):
            self.net.open_task()
            self._keep(number)
        self.register_buffer("visits", torch.zeros(len(scenario.tasks), max_masks, dtype=torch.int64))

    def learn(self, task: Task) -> Iterator[Phase]:
        """The shuffled stream in parts of ``check_every`` batches, each one phase for the mask that it needs."""
        stream = torch.cat([torch.randperm(len(task.train)) for _ in range(self.epochs)])
        for part in stream.split(self.check_every * self.batch_size):
            first = part[: self.batch_size].to(task.train.labels.device)
            number = self.choose(self.transform.normalise(task.train.images[first]))
            self._load(number)
            yield Phase(task.train, self.observe, self.net.list_scores(), epochs=1, order=partial(_use_order, part))
            self._keep(number)
            self.net.learned.clamp_(min=number + 1)
            self.visits[task.id, number] += 1

    def observe(self, batch: Batch) -> Losses:
        """CE over all outputs, including the superfluous ones."""
        return {"ce": F.cross_entropy(self.net(batch.x), batch.y)}

    def choose(self, x: Tensor) -> int:
        """The mask that a batch (B, C, H, W) trains; the number of masks made so far if a new one is needed."""
        made, room = int(self.net.learned), len(self.classes)
        if made == 0:
            return 0
        k = max(made, self.floor)
        nu = (-self.compute_gradients(x, x.new_full((k,), 1 / k), "H").mean(dim=0)).softmax(dim=0)
        likeliest = int(nu.argmax())
        if made < room and (k * float(nu.max()) < 1 + self.epsilon or likeliest >= made):
            return made
        return int(nu[:made].argmax())

    @torch.no_grad()
    def _load(self, number: int) -> None:
        """Load the scores of a mask."""
        for i, layer in enumerate(self.net.list_layers().values()):
            layer.scores.copy_(self.get_buffer(f"bank_{i}")[number])

    @torch.no_grad()
    def _keep(self, number: int) -> None:
        """Store the scores as those of a mask, and the mask."""
        for i, layer in enumerate(self.net.list_layers().values()):
            self.get_buffer(f"bank_{i}")[number] = layer.scores
            layer.store(number)

    def memory_bytes(self) -> int:
        """Masks made, and their fp32 scores, since any mask may be trained again."""
        return super().memory_bytes() + int(self.net.learned) * 4 * sum(self.net.count_weights().values())

    def facts(self) -> dict[str, Any]:
        """Also the masks that each task trained."""
        chosen = [row.nonzero().flatten().tolist() for row in self.visits]
        return super().facts() | {"masks": int(self.net.learned), "masks_of_tasks": chosen}


def _use_order(order: Tensor, generator: torch.Generator) -> Tensor:
    """``order``, which is fixed before the phase."""
    return order
