"""DEN: Lifelong Learning with Dynamically Expandable Networks (Yoon, Yang, Lee, Hwang, ICLR 2018).

L is the cross-entropy of the newest task's head over the task's classes, W^{t-1} the network before task t. Each line
is a phase that runs until its loss has converged:

    first task   min_W      L + mu |W|_1
    (a) head     min_o      L(o; W^{t-1}) + mu |o|_1      o the weights of the new head
        S = units with a path of non-zero weights to the head, found layer by layer from the top
        retrain  min_W_S    L(W_S; W_{S^c}) + nu/2 |W_S|_2^2
    (b) expand   min_W^N    L(W^N; W^{t-1}) + mu |W^N|_1 + gamma sum_g |W^N_g|_2   if L > tau
        k new units a layer, W^N their incoming and outgoing weights, g the weights entering one of them;
        a unit whose group is zero is deleted
    (c) drift    min_W      L + lambda/2 |W - W^{t-1}|_2^2
        rho_i = |w_i^t - w_i^{t-1}|_2; units with rho_i > sigma are split in two, an old and a drifted copy
        split    min_W      L + lambda/2 |W - W^{t-1}|_2^2                       if any was split

The penalties |.|_1 and |.|_2 are proximal steps after every step of the optimizer, as in the authors' code:

    w <- sign(w) max(|w| - mu, 0)            w_g <- w_g max(1 - gamma / |w_g|_2, 0)

Each unit is stamped with the task that added it. A task is predicted by its own head and the units that are not stamped
with a later task (``cl_bench/backbones/den.py``); without a task id the heads' logits are concatenated.

Departures and what the sources leave open: docs/methods/den.md.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.den import DEN, Layer, Units
from cl_bench.core.errors import require, require_nonnegative, require_positive
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import Method
from cl_bench.scenarios.base import Scenario

CHUNK = 500
"""Images in one forward pass when the loss is measured; changes no result."""

Mask = tuple[Tensor, Tensor]
"""Which entries of a layer's weight (n, m, *kernel) and bias (n,) a phase may change."""


class DynamicallyExpandable(Method):
    """Selective retraining, expansion, split and duplication.

    Args:
        l1: mu, threshold of the soft-thresholding step.
        l2: nu, weight decay of the selected sub-network.
        group_lasso: gamma, what each step subtracts from the norm of a new unit's incoming weights.
        drift: lambda.
        units: k, units that an expansion adds to every hidden layer.
        tau: mean cross-entropy of the training images after selective retraining, above which the network expands.
        sigma: drift of a unit above which it is split.
        split_limit: at most this many units of a layer are split, those that drifted most; None for no limit.
        window: number of epochs that decide about convergence, even.
        tolerance: a phase ends if the mean loss of the newer half of the window is not lower than that of the older
            half by at least this much.
    """

    task_id = "used"
    losses: Tensor
    total: Tensor
    images: Tensor

    def __init__(
        self,
        *,
        net: DEN,
        scenario: Scenario,
        l1: float,
        l2: float,
        group_lasso: float,
        drift: float,
        units: int,
        tau: float,
        sigma: float,
        split_limit: int | None,
        window: int,
        tolerance: float,
    ) -> None:
        super().__init__()
        require_nonnegative(
            fix="docs/methods/den.md has the paper's values.",
            l1=l1,
            l2=l2,
            group_lasso=group_lasso,
            drift=drift,
            sigma=sigma,
        )
        require_positive(fix="The paper's code has 10.", units=units)
        require(
            window > 1 and window % 2 == 0, "window", expected="an even number above 0", got=window, fix="10 is usual."
        )
        self.net, self.transform = net, scenario.transform
        self.l1, self.l2, self.group_lasso, self.drift = l1, l2, group_lasso, drift
        self.units, self.tau, self.sigma, self.split_limit = units, tau, sigma, split_limit
        self.tolerance = tolerance
        self.history: list[dict[str, Any]] = []
        self.base_parameters = sum(p.numel() for p in net.parameters()) + (net.widths[-1] + 1) * net.num_classes
        self.register_buffer("losses", torch.full((window,), torch.inf))  # of the newest epochs of the phase
        self.register_buffer("total", torch.zeros(()))  # summed over the images of this epoch
        self.register_buffer("images", torch.zeros(()))
        self._old: list[Mask] = []  # W^{t-1}, hidden layers
        self._chosen: list[Mask] = []  # W_S

    def learn(self, task: Task) -> Iterator[Phase]:
        """The first task's phase, or the phases (a), (b) and (c); the result of each decides what follows."""
        net = self.net
        self._old = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in net.list_hidden()]
        net.add_head(len(task.classes))
        none = [0] * len(net.widths)
        note: dict[str, Any] = {"task": task.id, "selected": None, "loss": None, "expanded": False}
        note |= {"added": none, "removed": none, "split": none, "drifted": none}
        if task.id == 0:
            yield self._build_phase(
                task, self.observe, [select_all(layer) for layer in net.list_path()], self.shrink_weights
            )
        else:
            yield self._build_phase(
                task,
                self.observe_head,
                [*map(select_nothing, net.list_hidden()), select_all(net.list_path()[-1])],
                self.shrink_head,
            )

            selected = find_connected([layer.weight.detach() for layer in net.list_path()])
            self._chosen = select_between(net.list_path(), selected)
            note["selected"] = [int(which.sum()) for which in selected]
            yield self._build_phase(task, self.observe_selected, self._chosen, None)

            note["loss"] = self.measure_loss(task.train)
            if note["loss"] > self.tau:
                note["expanded"], note["added"] = True, [self.units] * len(none)
                before = [tuple(layer.weight.shape[:2]) for layer in net.list_path()]
                net.grow(self.units)
                new = [select_new(layer, *shape) for layer, shape in zip(net.list_path(), before)]
                yield self._build_phase(task, self.observe, new, self.shrink_new)
                useless = self.find_useless()
                note["removed"] = [len(which) for which in useless]
                net.remove(useless)

            edges = [select_connections(layer) for layer in net.list_path()]
            yield self._build_phase(task, self.observe_drift, edges, None)

            rho = self.measure_drifts()
            note["drifted"] = [int((r > self.sigma).sum()) for r in rho]
            which = [find_most_drifted(r, self.sigma, self.split_limit) for r in rho]
            note["split"] = [len(units) for units in which]
            if any(note["split"]):
                edges = duplicate(edges, which)
                net.split(which, self._old)
                yield self._build_phase(task, self.observe_drift, edges, None)
        self.history.append(note | self.measure_size())

    # -- losses ----------------------------------------------------------------------------------------------------

    def observe(self, batch: Batch) -> Losses:
        """L: the newest head on all units."""
        return self._add_to_total(
            batch, {"ce": self._compute_ce(self.net.answer(batch.x, batch.task), batch.y, batch.task)}
        )

    def observe_head(self, batch: Batch) -> Losses:
        """L for the head alone: the layers below are frozen."""
        with torch.no_grad():
            features = self.net.extract_features_at(batch.x, batch.task)
        head = self.net.get_head(batch.task)
        return self._add_to_total(batch, {"ce": self._compute_ce(head(features, len(head.bias)), batch.y, batch.task)})

    def observe_selected(self, batch: Batch) -> Losses:
        """L + nu/2 |W_S|^2."""
        losses = {"ce": self._compute_ce(self.net.answer(batch.x, batch.task), batch.y, batch.task)}
        squares = [(layer.weight * mask).square().sum() for layer, (mask, _) in zip(self.net.list_path(), self._chosen)]
        return self._add_to_total(batch, losses | {"l2": self.l2 / 2 * torch.stack(squares).sum()})

    def observe_drift(self, batch: Batch) -> Losses:
        """L + lambda/2 |W - W^{t-1}|^2 over the weights and biases of W^{t-1}."""
        losses = {"ce": self._compute_ce(self.net.answer(batch.x, batch.task), batch.y, batch.task)}
        squares = [torch.cat([w.flatten(), b]).square().sum() for w, b in self._compute_drift()]
        return self._add_to_total(batch, losses | {"drift": self.drift / 2 * torch.stack(squares).sum()})

    @torch.no_grad()
    def measure_loss(self, data: Data) -> float:
        """Mean L over un-augmented images; the network expands if it is above tau."""
        task = len(self.net.heads) - 1
        total = 0.0
        for chunk in data.split(CHUNK):
            logits = self.net.answer(self.transform.normalise(chunk.images), task)
            total += float(self._compute_ce(logits, chunk.labels, task)) * len(chunk)
        return total / len(data)

    def _compute_ce(self, logits: Tensor, y: Tensor, task: int) -> Tensor:
        return F.cross_entropy(logits, y - self.net.get_classes(task).start)

    def _compute_drift(self) -> list[Mask]:
        """W - W^{t-1} of each hidden layer, in the shape of W^{t-1}."""
        return [
            (layer.weight[: len(w), : w.shape[1]] - w, layer.bias[: len(b)] - b)
            for layer, (w, b) in zip(self.net.list_hidden(), self._old)
        ]

    def _add_to_total(self, batch: Batch, losses: Losses) -> Losses:
        """Return ``losses``, and add their sum to the epoch's total, which decides about convergence."""
        self.total += torch.stack([loss.detach() for loss in losses.values()]).sum() * len(batch)
        self.images += len(batch)
        return losses

    # -- phases ----------------------------------------------------------------------------------------------------

    def _build_phase(
        self, task: Task, observe: Callable[[Batch], Losses], masks: list[Mask], proximal: Callable[[], None] | None
    ) -> Phase:
        """Train the entries of ``masks`` only: after each optimizer step all others are reset."""
        self.losses.fill_(torch.inf)
        self.total.zero_()
        self.images.zero_()
        parts = [
            (parameter, mask, parameter.detach().clone())
            for layer, pair in zip(self.net.list_path(), masks)
            for parameter, mask in zip((layer.weight, layer.bias), pair)
            if mask.any()
        ]
        partly_trained = [part for part in parts if not part[1].all()]

        @torch.no_grad()
        def after_step() -> None:
            if proximal:
                proximal()
            for parameter, mask, start in partly_trained:
                parameter.copy_(torch.where(mask, parameter, start))

        return Phase(
            task.train, observe, [part[0] for part in parts], after_step=after_step, after_epoch=self._has_converged
        )

    def _has_converged(self, epoch: int) -> bool:
        """Record the epoch's mean loss; True if the newer half of the window is no better than the older."""
        self.losses.copy_(torch.cat([self.losses[1:], (self.total / self.images)[None]]))
        self.total.zero_()
        self.images.zero_()
        older, newer = self.losses.chunk(2)
        return bool(older.mean() - newer.mean() < self.tolerance)  # inf and nan until the window is full: False

    def shrink_weights(self) -> None:
        """mu |W|_1, first task."""
        for layer in self.net.list_path():
            layer.weight.copy_(apply_soft_threshold(layer.weight, self.l1))

    def shrink_head(self) -> None:
        """mu |o|_1."""
        head = self.net.list_path()[-1]
        head.weight.copy_(apply_soft_threshold(head.weight, self.l1))

    def shrink_new(self) -> None:
        """mu |W^N|_1 + gamma sum_g |W^N_g|_2; old entries are reset after this."""
        self.shrink_weights()
        for layer in self.net.list_hidden():
            new = layer.weight[-self.units :]
            new.copy_(shrink_groups(new, self.group_lasso))

    def find_useless(self) -> Units:
        """The units just added whose incoming weights are all 0."""
        return [
            len(layer.bias) - self.units + (layer.weight[-self.units :].flatten(1) == 0).all(1).nonzero().flatten()
            for layer in self.net.list_hidden()
        ]

    @torch.no_grad()
    def measure_drifts(self) -> list[Tensor]:
        """rho of each hidden layer's units in W^{t-1}, (n,)."""
        return [torch.cat([w.flatten(1), b[:, None]], dim=1).norm(dim=1) for w, b in self._compute_drift()]

    # -- answers and facts -----------------------------------------------------------------------------------------

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the heads' logits concatenated; if the task is known, those of its head only."""
        if task_id is None:
            return self.net(x)
        scores = x.new_full((len(x), self.net.num_classes), -torch.inf)
        for task in range(len(self.net.heads)):
            own = task_id == task
            scores[own, self.net.get_classes(task)] = self.net.answer(x[own], task).to(scores.dtype)
        return scores

    def measure_size(self) -> dict[str, Any]:
        """Units, non-zero weights and biases of all layers and heads, capacity, and the fraction of zero weights."""
        layers = [*self.net.list_hidden(), *(self.net.get_head(t) for t in range(len(self.net.heads)))]
        weights = sum(layer.weight.numel() for layer in layers)
        nonzero = sum(int(layer.weight.count_nonzero()) for layer in layers)
        parameters = nonzero + sum(int(layer.bias.count_nonzero()) for layer in layers)
        return {
            "units": self.net.widths,
            "nonzero_parameters": parameters,
            "capacity": parameters / self.base_parameters,
            "sparsity": 1 - nonzero / weights,
        }

    def capacity(self) -> float:
        """Non-zero parameters relative to all parameters of the base network with one head over all classes."""
        return self.measure_size()["capacity"]

    def facts(self) -> dict[str, Any]:
        """What each task changed in the network; lists have one entry per hidden layer."""
        return {"base_parameters": self.base_parameters, "tasks": self.history}

    def memory_bytes(self) -> int:
        """The units' stamps, eight bytes each; W^{t-1} is stored only during a task."""
        return 8 * sum(self.net.widths)

    def get_extra_state(self) -> dict[str, Any]:
        """The history behind :meth:`facts`."""
        return {"history": list(self.history)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.history = list(state["history"])


def apply_soft_threshold(weight: Tensor, threshold: float) -> Tensor:
    """The proximal step of threshold * |w|_1: sign(w) max(|w| - threshold, 0)."""
    return weight.sign() * (weight.abs() - threshold).clamp(min=0)


def shrink_groups(weight: Tensor, threshold: float) -> Tensor:
    """The proximal step of threshold * sum over rows |w_g|_2: w_g max(1 - threshold / |w_g|, 0); (n, m, *kernel)."""
    norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
    return torch.where(norm > threshold, weight * (1 - threshold / norm), 0.0)


def find_connected(weights: list[Tensor]) -> list[Tensor]:
    """The units with a path of non-zero weights to an output (paper, Algorithm 2).

    Args:
        weights: (n, m, *kernel) of each hidden layer, and of the head last.

    Returns:
        A (units,) mask for each hidden layer.
    """
    chosen = torch.ones(len(weights[-1]), dtype=torch.bool, device=weights[-1].device)
    masks = []
    for weight in reversed(weights[1:]):
        chosen = (weight[chosen] != 0).any(0).reshape(weight.shape[1], -1).any(1)
        masks.append(chosen)
    return masks[::-1]


def select_between(path: list[Layer], chosen: list[Tensor]) -> list[Mask]:
    """The connections between input, the ``chosen`` units of the hidden layers of ``path``, and outputs."""
    first, head = path[0].weight, path[-1].weight
    rows = [*chosen, torch.ones(len(head), dtype=torch.bool, device=head.device)]
    columns = [torch.ones(first.shape[1], dtype=torch.bool, device=first.device), *chosen]
    return [
        (both * (row[:, None] & column).view(*both.shape[:2], *[1] * (both.dim() - 2)), row)
        for (both, _), row, column in zip(map(select_connections, path), rows, columns)
    ]


def select_all(layer: Layer) -> Mask:
    """All entries."""
    return torch.ones_like(layer.weight, dtype=torch.bool), torch.ones_like(layer.bias, dtype=torch.bool)


def select_nothing(layer: Layer) -> Mask:
    """No entry."""
    return torch.zeros_like(layer.weight, dtype=torch.bool), torch.zeros_like(layer.bias, dtype=torch.bool)


def select_connections(layer: Layer) -> Mask:
    """The non-zero weights and all biases: a weight of 0 is no connection."""
    return layer.weight.detach() != 0, select_all(layer)[1]


def select_new(layer: Layer, units: int, inputs: int) -> Mask:
    """All entries beyond the first ``units`` and ``inputs``, and all biases of a head: its units are new."""
    weight, bias = select_all(layer)
    weight[:units, :inputs] = False
    if len(bias) > units:
        bias[:units] = False
    return weight, bias


def duplicate(masks: list[Mask], units: Units) -> list[Mask]:
    """The masks of a path after its hidden ``units`` got copies at the end of their layers."""
    none = units[0][:0]
    result = []
    for (weight, bias), rows, columns in zip(masks, [*units, none], [none, *units]):
        weight = torch.cat([weight, weight[rows]])
        result.append((torch.cat([weight, weight[:, columns]], dim=1), torch.cat([bias, bias[rows]])))
    return result


def find_most_drifted(rho: Tensor, sigma: float, limit: int | None) -> Tensor:
    """Positions of the units with drift above ``sigma``, in ascending order; at most ``limit`` of them, the largest."""
    count = int((rho > sigma).sum())
    count = count if limit is None else min(count, limit)
    return rho.topk(count).indices.sort().values
