"""Additive Parameter Decomposition (Yoon, Kim, Yang, Hwang, "Scalable and Order-robust Continual Learning with Additive
Parameter Decomposition", ICLR 2020), the learning rule.

A weight of task i is theta_i = sigma * sigmoid(v_i) + tau_i (:mod:`cl_bench.backbones.apd`). When task t arrives, with
theta_i* the weights of task i < t as they are then, and M_i = sigmoid(v_i),

    L =   CE(x, y; theta_t)                                                       ``ce``
        + lambda1 sum_{i<=t} ||tau_i||_1                                          ``sparsity``
        + lambda2 / 2 sum_{i<t} || theta_i* - (sigma * M_i + tau_i) ||_2^2        ``drift``
        + l2 / 2 ( ||tau_t||_2^2 + ||v_t||_2^2  [+ ||sigma||_2^2 for t = 1] )     ``l2``

is minimised over sigma, v_t, the bias and head of t, and tau_1 .. tau_t. Old v, biases and heads are frozen. Old tau
are not: they compensate the old tasks for the change of sigma, without old data (``variant=fixed`` freezes them as
well). At test, and when capacity is counted, |tau| <= lambda1 is 0. The task id is needed at test.

``apd2`` consolidates after every s-th task (section 3.3). In each layer, k-means puts the tensors tau_i into K = k0 t /
s clusters. For each element of a cluster with two or more members

    tau~ = (max_i tau_i + min_i tau_i) / 2,  tau_i = 0            if max_i tau_i - min_i tau_i <= beta
    tau~ = 0,                                tau_i unchanged      otherwise

and from then on theta_i = sigma * M_i + tau~_g(i) + tau_i, with tau~ frozen until the next consolidation, which starts
from tau~_g(i) + tau_i and drops the older tau~.

Departures and what the sources leave open: docs/methods/apd.md.
"""

import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.apd import NO_GROUP, APDNet, TaskPart
from cl_bench.core.errors import require, require_nonnegative, require_positive, void
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import Method
from cl_bench.scenarios.base import Scenario

CANDIDATES = 5
"""The epoch that is kept is one of this many last epochs of a task."""

LLOYD_STEPS = 100
"""At most this many steps of k-means."""

CHUNK = 500
"""Validation images in one forward pass; changes no result."""


@void(
    "consolidate_every",
    "clusters",
    "beta",
    when=lambda v: v["variant"] != "apd2",
    why="only method.variant=apd2 consolidates",
)
class APD(Method):
    """Shared weights, task masks, and sparse task weights that compensate the drift of the shared ones.

    Args:
        variant: ``fixed`` (old tau frozen), ``apd1`` (old tau trained), ``apd2`` (and consolidated).
        epochs: passes over a task. Of the last 5, the best on the task's validation images is kept (of equals the
            latest); the last one if there are no validation images.
        lambda1: weight of the l1 norms, and the threshold below which tau counts as 0.
        lambda2: weight of half the squared drift of old weights.
        l2: weight of half the squared norms of tau_t and v_t, and of sigma in the first task.
        consolidate_every: s, tasks between consolidations (``apd2``).
        clusters: k0, clusters added at each consolidation.
        beta: largest range of an element that a cluster shares.
    """

    task_id: ClassVar[Literal["ignored", "used", "needed"]] = "needed"

    def __init__(
        self,
        *,
        net: APDNet,
        scenario: Scenario,
        variant: Literal["fixed", "apd1", "apd2"],
        epochs: int,
        lambda1: float,
        lambda2: float,
        l2: float,
        consolidate_every: int,
        clusters: int,
        beta: float,
    ) -> None:
        super().__init__()
        require_nonnegative(fix="See configs/method/apd.yaml.", lambda1=lambda1, lambda2=lambda2, l2=l2, beta=beta)
        require_positive(fix="Leave it at ${trainer.epochs}.", epochs=epochs)
        require(
            0 < clusters <= consolidate_every,
            "clusters",
            expected=f"1 to consolidate_every={consolidate_every}, since there are no more tasks to cluster",
            got=clusters,
            fix="The paper has clusters=2, consolidate_every=5.",
        )
        self.net, self.variant, self.epochs = net, variant, epochs
        self.lambda1, self.lambda2, self.l2 = lambda1, lambda2, l2
        self.consolidate_every, self.clusters, self.beta = consolidate_every, clusters, beta
        self.num_classes, self.transform = scenario.num_classes, scenario.transform
        self.classes = [task.classes for task in scenario.tasks]
        self.anchors: list[list[Tensor]] = []  # theta_i* for the current task; computed, never saved
        self.best: list[Tensor] = []  # the trained parameters at the best epoch so far
        self.best_epoch, self.best_accuracy = -1, -1.0
        self.centroids: list[Tensor] = []  # (K, weights of the layer) per layer, of the last consolidation
        self.history: list[dict[str, Any]] = []  # what facts() returns for each task

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase; then the best epoch is restored, and after every s-th task tau is consolidated."""
        net = self.net
        net.add_task(len(task.classes))
        if self.variant == "fixed":
            for part in net.parts[: task.id]:
                part.tau.requires_grad_(False)
        self.anchors = [[w.detach() for w in net.compute_weights(i)] for i in range(task.id)]
        self._forget_best()
        trained = [p for p in net.parameters() if p.requires_grad]
        yield Phase(
            task.train,
            self.observe,
            trained,
            epochs=self.epochs,
            after_epoch=lambda epoch: self._keep_best(epoch, task, trained),
        )
        with torch.no_grad():
            for parameter, best in zip(trained, self.best):
                parameter.copy_(best)
            kept = self.best_epoch if self.best else self.epochs - 1
            self._forget_best()
            drift = self.measure_drift()
            learned = task.id + 1
            if self.variant == "apd2" and learned % self.consolidate_every == 0:
                self.consolidate()
        self.history.append({"capacity": self.capacity(), **drift, "epoch_kept": kept})

    def observe(self, batch: Batch) -> Losses:
        """The named terms of the loss, weights included."""
        net, new = self.net, self.net.parts[-1]
        logits = net.compute_task_logits(batch.x, batch.task)
        losses = {"ce": F.cross_entropy(logits, batch.y - self.classes[batch.task].start)}
        norms = [tau.abs().sum() for part in net.parts for tau in part.tau]
        losses["sparsity"] = self.lambda1 * torch.stack(norms).sum()
        if batch.task > 0:
            moved = [
                (anchor - weight).square().sum()
                for old, anchors in enumerate(self.anchors)
                for anchor, weight in zip(anchors, net.compute_weights(old))
            ]
            losses["drift"] = self.lambda2 / 2 * torch.stack(moved).sum()
        decayed = [*new.tau, *new.v, *(net.sigma if batch.task == 0 else [])]
        losses["l2"] = self.l2 / 2 * torch.stack([p.square().sum() for p in decayed]).sum()
        return losses

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), each image by the weights of its task; -inf for other and unlearned tasks."""
        assert task_id is not None  # the evaluation asks no method that needs a task id without one
        scores = x.new_full((len(x), self.num_classes), -torch.inf)
        for task in range(len(self.net.tasks)):
            rows = torch.nonzero(task_id == task).flatten()
            if len(rows):
                classes = self.classes[task]
                logits = self.net.compute_task_logits(x[rows], task, self.lambda1)
                scores[rows, classes.start : classes.stop] = logits.to(scores.dtype)
        return scores

    @torch.no_grad()
    def measure_drift(self) -> dict[str, float | None]:
        """L2 distance of old weights, all layers together, to theta_i*: mean and max over the old tasks.

        ``drift_relative`` is the largest distance divided by ||theta_i*||. None for the first task.
        """
        pairs = [
            (_flatten(self.net.compute_weights(old)), _flatten(anchors)) for old, anchors in enumerate(self.anchors)
        ]
        if not pairs:
            return {"drift_mean": None, "drift_max": None, "drift_relative": None}
        moved = torch.stack([torch.linalg.vector_norm(now - then) for now, then in pairs])
        lengths = torch.stack([torch.linalg.vector_norm(then) for _, then in pairs])
        return {
            "drift_mean": float(moved.mean()),
            "drift_max": float(moved.max()),
            "drift_relative": float((moved / lengths).max()),
        }

    @torch.no_grad()
    def consolidate(self) -> None:
        """Cluster the task weights of each layer, and move what the members of a cluster share into its tau~."""
        net = self.net
        num_tasks = len(net.tasks)
        count = self.clusters * num_tasks // self.consolidate_every
        centroids: list[Tensor] = []
        local: list[Tensor] = []
        groups = [[NO_GROUP] * num_tasks for _ in net.layers]
        for layer in net.layers:
            tensors = torch.stack([net.get_adaptive(i, layer, self.lambda1) for i in range(num_tasks)])
            # K grows: clusters without a centroid start at the newest tasks
            points = tensors.flatten(1).float().cpu()
            old = self.centroids[layer] if self.centroids else points[:0]
            labels, means = run_k_means(points, torch.cat([old, points[num_tasks - (count - len(old)) :]]))
            centroids.append(means)
            for cluster in range(count):
                members = torch.nonzero(labels == cluster).flatten().tolist()
                if len(members) == 1:
                    (only,) = members
                    net.parts[only].tau[layer].copy_(net.get_adaptive(only, layer))
                elif members:
                    shared, own = split(tensors[members], self.beta)
                    for task, tau in zip(members, own):
                        net.parts[task].tau[layer].copy_(tau)
                        groups[layer][task] = len(local)
                    local.append(shared)
        net.share(local, groups)
        self.centroids = centroids

    def capacity(self) -> float | None:
        """Numbers that are not 0 at test, relative to the weights of one network with a head for every class seen."""
        net = self.net
        if not len(net.tasks):
            return None
        kept = [*net.sigma, *net.local]
        for part in net.parts:
            kept += [*part.v, *part.bias, *part.head.parameters(), *self._prune(part)]
        base = [*net.sigma, *(part.head.weight for part in net.parts)]
        return sum(int(torch.count_nonzero(p)) for p in kept) / sum(p.numel() for p in base)

    def measure_capacity_as_released(self) -> float | None:
        """Capacity as the authors' code and the published numbers count it.

        It counts the biases and the head of the newest task only, cuts tau~ at lambda1 as well, and is relative to a
        network with heads for all tasks except the newest.
        """
        net = self.net
        if not len(net.tasks):
            return None
        newest = net.parts[-1]
        kept = [*net.sigma, *newest.bias, *newest.head.parameters()]
        kept += [F.hardshrink(shared, self.lambda1) for shared in net.local]
        for part in net.parts:
            kept += [*part.v, *self._prune(part)]
        base = [*net.sigma, *(part.head.weight for part in net.parts[:-1])]
        return sum(int(torch.count_nonzero(p)) for p in kept) / sum(p.numel() for p in base)

    def facts(self) -> dict[str, Any]:
        """After each task: capacity, drift of old weights, epoch kept; at the end: share of zeros in each tau.

        ``capacity_as_released`` is the final capacity as the authors' code counts it.
        """
        names = self.history[0] if self.history else {}
        facts: dict[str, Any] = {name: [entry[name] for entry in self.history] for name in names}
        sparsity = [self.measure_sparsity(task) for task in range(len(self.net.tasks))]
        return facts | {"capacity_as_released": self.measure_capacity_as_released(), "tau_sparsity": sparsity}

    def measure_sparsity(self, task: int) -> float:
        """Share of a task's tau that is 0 at test."""
        return float((_flatten(self._prune(self.net.parts[task])) == 0).float().mean())

    def memory_bytes(self) -> int:
        """theta_i* of the old tasks during the last one, and the centroids."""
        return sum(t.nbytes for tensors in [*self.anchors, self.centroids] for t in tensors)

    def get_extra_state(self) -> dict[str, Any]:
        """The best epoch so far, the centroids, and what was measured after each task."""
        return {
            "best": list(self.best),
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "centroids": list(self.centroids),
            "history": [dict(entry) for entry in self.history],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.best = list(state["best"])
        self.best_epoch, self.best_accuracy = state["best_epoch"], state["best_accuracy"]
        self.centroids, self.history = list(state["centroids"]), [dict(entry) for entry in state["history"]]

    def _prune(self, part: TaskPart) -> list[Tensor]:
        return [F.hardshrink(tau, self.lambda1) for tau in part.tau]

    def _forget_best(self) -> None:
        self.best, self.best_epoch, self.best_accuracy = [], -1, -1.0

    @torch.no_grad()
    def _keep_best(self, epoch: int, task: Task, trained: list[nn.Parameter]) -> None:
        """Remember the trained parameters if no earlier epoch was better on validation images."""
        if len(task.val) and epoch >= self.epochs - CANDIDATES:
            accuracy = self._measure_accuracy(task.val, task)
            if accuracy >= self.best_accuracy:
                self.best = [p.detach().clone() for p in trained]
                self.best_epoch, self.best_accuracy = epoch, accuracy

    def _measure_accuracy(self, data: Data, task: Task) -> float:
        """Share of correct predictions of the task's own head, as at test."""
        right = 0
        for chunk in data.split(CHUNK):
            logits = self.net.compute_task_logits(self.transform.normalise(chunk.images), task.id, self.lambda1)
            right += int((logits.argmax(dim=1) + task.classes.start == chunk.labels).sum())
        return right / len(data)


def split(members: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """What the members (n, *shape) of a cluster share (*shape), and what each keeps (n, *shape).

    If the largest and smallest values of an element differ by at most ``beta``, the middle between them is shared, so
    no member's sum of both changes by more than ``beta / 2``. The other elements stay unchanged.
    """
    low, high = members.amin(dim=0), members.amax(dim=0)
    close = high - low <= beta
    return torch.where(close, (low + high) / 2, 0.0), torch.where(close, 0.0, members)


def run_k_means(points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm on the CPU: points (n, d), first centroids (K, d) -> cluster of each (n,), centroids (K, d)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some stay empty
        found = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=LLOYD_STEPS, random_state=0).fit(
            np.ascontiguousarray(points.numpy())
        )
    return torch.from_numpy(found.labels_), torch.from_numpy(found.cluster_centers_)


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
