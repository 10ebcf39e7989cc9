"""A network of fixed random weights with one binary mask per task over every convolution and linear layer.

:class:`MaskedNet` makes one from any network of ``nn.Conv2d`` and ``nn.Linear``. Old masks are bits in uint8 buffers;
the mask of the current task is computed from one real score per weight.

Shapes: T tasks of the scenario, k of them learned, n weights of a layer, C channels, B images.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_bench.core.errors import ConfigError

Rule = Literal["edge_popup", "threshold"]
"""Which weights a mask keeps: those of the k largest ``|score|`` of the layer, or those with ``score >= 0``."""


class Selection:
    """The mask of the current forward pass; one object for all masked layers of a network.

    Attributes:
        which: None for the mask of the scores, a task's number for its stored mask, or weights (k,) for the
            superposition of the first k stored masks.
    """

    def __init__(self) -> None:
        self.which: int | Tensor | None = None

    @contextlib.contextmanager
    def use(self, which: int | Tensor | None) -> Iterator[None]:
        """Use ``which`` for the forward passes in this context."""
        before, self.which = self.which, which
        try:
            yield
        finally:
            self.which = before


class _StraightThrough(torch.autograd.Function):
    """The mask in the forward pass; in the backward pass its gradient is the scores' gradient: dM/ds := 1."""

    @staticmethod
    def forward(ctx, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class MaskedLayer(nn.Module):
    """``layer`` without bias, its weights fixed at sign(w) sqrt(2 / fan_in) and multiplied by a mask.

    Args:
        layer: the convolution or linear layer; only the signs of its weights are kept.
        num_tasks: T, number of masks.
        rule: how the scores become a mask.
        kept: number of weights that ``edge_popup`` keeps; ``threshold`` does not use it.
        mean_scores: also store the mean of the scores of all tasks learned.
        selection: the network's.
    """

    packed: Tensor
    mean_scores: Tensor | None
    kept_masked: tuple[tuple[int, ...], Tensor] | None = None
    """What :meth:`keep_masked` keeps, and what it was made of."""

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        *,
        num_tasks: int,
        rule: Rule,
        kept: int,
        mean_scores: bool,
        selection: Selection,
    ) -> None:
        super().__init__()
        layer.register_parameter("bias", None)
        weight = layer.weight.requires_grad_(False)
        fan_in = weight[0].numel()
        weight.copy_(weight.sign() * math.sqrt(2 / fan_in))
        self.layer, self.rule, self.kept, self.selection = layer, rule, kept, selection
        self.scores = nn.Parameter(torch.empty_like(weight))
        packed = torch.zeros(num_tasks, math.ceil(weight.numel() / 8), dtype=torch.uint8, device=weight.device)
        self.register_buffer("packed", packed)
        self.register_buffer("mean_scores", torch.zeros_like(weight) if mean_scores else None)
        self.open(learned=0)

    @torch.no_grad()
    def open(self, learned: int) -> None:
        """Set the scores for the next task: the mean of the earlier ones if it is stored, otherwise random."""
        if self.mean_scores is not None and learned > 0:
            self.scores.copy_(self.mean_scores)
        else:
            nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))  # U(-1, 1) / sqrt(fan_in)

    @torch.no_grad()
    def store(self, task: int) -> None:
        """Store the mask of the scores as that of ``task``, which is the number of tasks stored before."""
        self.packed[task] = pack(self.compute_mask().flatten())
        if self.mean_scores is not None:
            self.mean_scores += (self.scores - self.mean_scores) / (task + 1)

    @torch.no_grad()
    def compute_mask(self) -> Tensor:
        """The mask of the scores, bool, in the shape of the weights."""
        if self.rule == "threshold":
            return self.scores >= 0
        mask = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.scores.device)
        mask[self.scores.abs().flatten().topk(self.kept, sorted=False).indices] = True
        return mask.view(self.scores.shape)

    def mask_weight(self) -> Tensor:
        """The weights times the selected mask."""
        which, fixed = self.selection.which, self.layer.weight
        if which is None:
            scores = self.scores if self.rule == "threshold" else self.scores.abs()
            return fixed * _StraightThrough.apply(scores, self.compute_mask())
        if isinstance(which, int):
            return fixed * unpack(self.packed[which], fixed.numel()).view(fixed.shape)
        return (which @ self.get_masked(len(which))).view(fixed.shape)

    def get_masked(self, k: int) -> Tensor:
        """(k, n): the weights under each of the first ``k`` stored masks."""
        if self.kept_masked is not None and self.kept_masked[0] == self._identify(k):
            return self.kept_masked[1]
        return self.layer.weight.flatten() * unpack(self.packed[:k], self.layer.weight.numel())

    def keep_masked(self, k: int) -> None:
        """Keep :meth:`get_masked` for the next batches, until a mask changes or training goes on."""
        self.kept_masked = (self._identify(k), self.get_masked(k))

    def _identify(self, k: int) -> tuple[int, ...]:
        return k, self.packed._version, self.packed.data_ptr(), self.layer.weight.data_ptr()

    def train(self, mode: bool = True) -> "MaskedLayer":
        """Set the mode; in training nothing is kept."""
        if mode:
            self.kept_masked = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """The output of ``layer`` with the masked weights."""
        return torch.func.functional_call(self.layer, {"weight": self.mask_weight()}, (x,))


class TaskBatchNorm(nn.Module):
    """BatchNorm without gain and shift, with separate running statistics for each task.

    In a superposition the statistics are weighted like the masks.

    Args:
        norm: the layer that it replaces.
        num_tasks: T.
        selection: the network's.
    """

    mean: Tensor
    var: Tensor
    means: Tensor
    vars: Tensor

    def __init__(self, norm: _BatchNorm, *, num_tasks: int, selection: Selection) -> None:
        super().__init__()
        self.momentum, self.eps, self.selection = norm.momentum or 0.0, norm.eps, selection
        device, channels = next(norm.buffers()).device, norm.num_features
        self.register_buffer("mean", torch.zeros(channels, device=device))  # of the current task
        self.register_buffer("var", torch.ones(channels, device=device))
        self.register_buffer("means", torch.zeros(num_tasks, channels, device=device))
        self.register_buffer("vars", torch.zeros(num_tasks, channels, device=device))

    def open(self) -> None:
        """Fresh statistics for the next task."""
        self.mean.zero_()
        self.var.fill_(1.0)

    def store(self, task: int) -> None:
        """Store the statistics as those of ``task``."""
        self.means[task], self.vars[task] = self.mean, self.var

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        which = self.selection.which
        if which is None:
            return F.batch_norm(x, self.mean, self.var, training=self.training, momentum=self.momentum, eps=self.eps)
        if isinstance(which, int):
            return F.batch_norm(x, self.means[which], self.vars[which], eps=self.eps)
        # Written out, because torch's batch_norm has no gradient with respect to the statistics.
        shape = (-1, *[1] * (x.dim() - 2))
        means, variances = (stored[: len(which)].to(which.dtype) for stored in (self.means, self.vars))
        return (x - (which @ means).view(shape)) * (which @ variances + self.eps).rsqrt().view(shape)


class MaskedNet(nn.Module):
    """A network whose weights never change, with a mask for each task.

    Args:
        net: the network; its layers are replaced.
        image_shape: (C, H, W).
        num_tasks: T.
        outputs: size of the output layer.
        rule: how scores become a mask.
        budget: s of the layers' density min(0.5, s (c_out + c_in) / (c_out c_in k k)) under ``edge_popup``.
        mean_scores: each task's scores start from the mean of the earlier tasks' scores.
    """

    learned: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        num_tasks: int,
        outputs: int,
        rule: Rule,
        budget: float,
        mean_scores: bool,
    ) -> None:
        super().__init__()
        self.selection = Selection()
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        names = find_called_layers(net, image_shape)
        head = net.get_submodule(names[-1])
        if not isinstance(head, nn.Linear) or getattr(net, "head", head) is not head:
            raise ConfigError(
                "backbone",
                expected="a network whose last layer is linear",
                got=f"{type(head).__name__} {names[-1]}",
                fix="Use backbone=supsup, mlp or another network with a linear head.",
            )
        replace(net, names[-1], nn.Linear(head.in_features, outputs, bias=False).to(head.weight.device))
        for name in names:
            layer = net.get_submodule(name)
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            masked = MaskedLayer(
                layer,
                num_tasks=num_tasks,
                rule=rule,
                kept=count_kept_weights(layer.weight.shape, budget),
                mean_scores=mean_scores,
                selection=self.selection,
            )
            replace(net, name, masked)
        norms = [(name, m) for name, m in net.named_modules() if isinstance(m, _BatchNorm)]
        for name, norm in norms:
            replace(net, name, TaskBatchNorm(norm, num_tasks=num_tasks, selection=self.selection))
        self.net = net
        self.register_buffer("learned", torch.zeros((), dtype=torch.int64, device=head.weight.device))

    def list_layers(self) -> dict[str, MaskedLayer]:
        """The masked layers by name."""
        return {name: m for name, m in self.net.named_modules() if isinstance(m, MaskedLayer)}

    def list_norms(self) -> list[TaskBatchNorm]:
        """The normalisation layers, which have statistics per task."""
        return [m for m in self.net.modules() if isinstance(m, TaskBatchNorm)]

    def list_scores(self) -> list[nn.Parameter]:
        """The trained parameters: one real number per weight."""
        return [layer.scores for layer in self.list_layers().values()]

    def open_task(self) -> None:
        """New scores and statistics."""
        for layer in self.list_layers().values():
            layer.open(int(self.learned))
        for norm in self.list_norms():
            norm.open()

    def close_task(self) -> None:
        """Store mask and statistics; they never change again."""
        task = int(self.learned)
        for layer in self.list_layers().values():
            layer.store(task)
        for norm in self.list_norms():
            norm.store(task)
        self.learned += 1

    def forward(self, x: Tensor, which: int | Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, outputs) with the mask of the scores, of a task, or of several (:class:`Selection`)."""
        with self.selection.use(which):
            return self.net(x)

    def count_kept(self) -> dict[str, list[int]]:
        """Number of weights that each stored mask keeps, per layer."""
        layers, learned = self.list_layers(), int(self.learned)
        return {
            name: unpack(layer.packed[:learned], layer.scores.numel()).sum(1).tolist() for name, layer in layers.items()
        }

    def count_weights(self) -> dict[str, int]:
        """Number of weights per layer."""
        return {name: layer.scores.numel() for name, layer in self.list_layers().items()}

    def count_mask_bytes(self) -> int:
        """Bytes of one task's stored mask, one bit per weight."""
        return sum(layer.packed.shape[1] for layer in self.list_layers().values())

    def count_norm_bytes(self) -> int:
        """Bytes of one task's BatchNorm statistics."""
        return sum(norm.mean.nbytes + norm.var.nbytes for norm in self.list_norms())

    def count_mean_score_bytes(self) -> int:
        """Bytes of the mean scores, 0 if they are not stored."""
        return sum(layer.mean_scores.nbytes for layer in self.list_layers().values() if layer.mean_scores is not None)


def compute_density(shape: torch.Size, budget: float) -> float:
    """Fraction of a layer's weights (c_out, c_in, ...) that the Erdos-Renyi rule keeps, at most a half."""
    return min(0.5, budget * (shape[0] + shape[1]) / shape.numel())


def count_kept_weights(shape: torch.Size, budget: float) -> int:
    """The number of weights of :func:`compute_density`, rounded as in the authors' code: n - floor((1 - density) n)."""
    return shape.numel() - int((1 - compute_density(shape, budget)) * shape.numel())


def find_called_layers(net: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Names of the convolutions and linear layers, in the order of their first call in a forward pass.

    A layer that the output does not depend on (e.g. a second head) is not called.
    """
    called: dict[str, None] = {}
    layers = [(name, m) for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(lambda *_, name=name: called.setdefault(name)) for name, m in layers]
    training = net.training
    with torch.no_grad():
        net.eval()(torch.zeros(1, *image_shape, device=next(net.parameters()).device))
    net.train(training)
    for hook in hooks:
        hook.remove()
    return list(called)


def replace(net: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule ``name`` by ``new``."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)


def pack(bits: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8, the first bit is the lowest."""
    padded = F.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (padded << _bit_positions(bits.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """(..., ceil(n / 8)) uint8 -> (..., n) uint8 of 0 and 1."""
    return ((packed[..., None] >> _bit_positions(packed.device)) & 1).flatten(-2)[..., :n]


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
