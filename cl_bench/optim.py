"""Optimizers and learning-rate schedules of a phase."""

import functools
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter

from cl_bench.core.errors import require, require_fraction, require_nonnegative, require_positive, void


def sgd(
    params: Iterable[Parameter], *, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> torch.optim.Optimizer:
    """SGD; ``weight_decay`` is the L2 coefficient."""
    _check_rates(lr, weight_decay)
    require_fraction(fix="0 is plain SGD.", below_one=True, momentum=momentum)
    require(
        momentum > 0 or not nesterov, "nesterov", expected="false without momentum", got=nesterov, fix="Set a momentum."
    )
    kind = without_compiler(torch.optim.SGD)
    return kind(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)


def adam(params: Iterable[Parameter], *, lr: float, betas: list[float], weight_decay: float) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015); ``weight_decay`` is the L2 coefficient, part of the gradient."""
    _check_rates(lr, weight_decay)
    _check_betas(betas)
    kind = without_compiler(torch.optim.Adam)
    return kind(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)


@void("decay_vectors", when=lambda v: not v["weight_decay"], why="optimizer.weight_decay is 0")
def adamw(
    params: Iterable[Parameter], *, lr: float, betas: list[float], weight_decay: float, decay_vectors: bool
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Without ``decay_vectors``, biases, gains and other parameters of one dimension have no weight decay, as in timm.
    """
    _check_rates(lr, weight_decay)
    _check_betas(betas)
    params = list(params)
    vectors = [p for p in params if p.ndim <= 1 and not decay_vectors]
    others = [p for p in params if p.ndim > 1 or decay_vectors]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    return without_compiler(torch.optim.AdamW)(
        [group for group in groups if group["params"]],
        lr=lr,
        betas=(betas[0], betas[1]),
        weight_decay=weight_decay,
        fused=True,
    )


def rmsprop(params: Iterable[Parameter], *, lr: float, alpha: float, weight_decay: float) -> torch.optim.Optimizer:
    """RMSprop (Tieleman and Hinton 2012); ``alpha`` smooths the squared gradients, ``weight_decay`` is L2."""
    _check_rates(lr, weight_decay)
    require_fraction(fix="0.99 is usual.", below_one=True, alpha=alpha)
    kind = without_compiler(torch.optim.RMSprop)
    return kind(params, lr=lr, alpha=alpha, weight_decay=weight_decay, foreach=True)


@functools.cache
def without_compiler(kind: type[torch.optim.Optimizer]) -> Any:
    """A class of optimizers that computes the same as ``kind``, without importing torch's compiler.

    Torch wraps these methods so that its compiler skips them, and so the first optimizer imports the compiler: 4 s of
    CPU. Nothing here compiles a call of an optimizer (``engine/step.py``).
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)


def _check_betas(betas: list[float]) -> None:
    require(len(betas) == 2, "betas", expected="two numbers", got=list(betas), fix="[0.9,0.999] is usual.")
    require_fraction(fix="[0.9,0.999] is usual.", below_one=True, betas=betas)


def _check_rates(lr: float, weight_decay: float) -> None:
    require_positive(fix="The experiments use 0.03 to 0.1.", lr=lr)
    require_nonnegative(fix="0 is no weight decay.", weight_decay=weight_decay)


class Constant:
    """A constant learning rate."""

    def __call__(self, epoch: int, epochs: int) -> float:
        """Factor on the learning rate in ``epoch`` (from 0) of ``epochs``."""
        return 1.0


@void("factor", when=lambda v: not v["milestones"], why="schedule.milestones is empty")
class MultiStep:
    """``factor`` to the power of the number of milestones passed; a milestone is the first epoch with the new rate."""

    def __init__(self, *, milestones: list[int], factor: float) -> None:
        require_positive(fix="0.1 divides the rate by ten.", factor=factor)
        require_nonnegative(fix="With an empty list the rate stays constant.", milestones=milestones)
        self.milestones, self.factor = list(milestones), factor

    def __call__(self, epoch: int, epochs: int) -> float:
        """Factor on the learning rate in ``epoch`` (from 0) of ``epochs``."""
        return self.factor ** sum(epoch >= m for m in self.milestones)


class Exponential:
    """``factor`` to the power of the number of epochs passed."""

    def __init__(self, *, factor: float) -> None:
        require(0 < factor <= 1, "factor", expected="a number in (0, 1]", got=factor, fix="DEN has 0.95.")
        self.factor = factor

    def __call__(self, epoch: int, epochs: int) -> float:
        """Factor on the learning rate in ``epoch`` (from 0) of ``epochs``."""
        return self.factor**epoch


@void("warmup_factor", when=lambda v: not v["warmup_epochs"], why="schedule.warmup_epochs is 0")
class Cosine:
    """Linear warm-up from ``warmup_factor`` in ``warmup_epochs`` epochs, then half a cosine down to ``min_factor``."""

    def __init__(self, *, warmup_epochs: int, warmup_factor: float, min_factor: float) -> None:
        require_nonnegative(fix="0 is no warm-up.", warmup_epochs=warmup_epochs)
        fix = "0.01 is a hundredth of the learning rate."
        require_fraction(fix=fix, warmup_factor=warmup_factor, min_factor=min_factor)
        self.warmup_epochs, self.warmup_factor, self.min_factor = warmup_epochs, warmup_factor, min_factor

    def __call__(self, epoch: int, epochs: int) -> float:
        """Factor on the learning rate in ``epoch`` (from 0) of ``epochs``."""
        if epoch < self.warmup_epochs:
            return self.warmup_factor + (1 - self.warmup_factor) * epoch / self.warmup_epochs
        progress = (epoch - self.warmup_epochs) / max(1, epochs - self.warmup_epochs)
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * progress))


@void("warmup_factor", when=lambda v: not v["warmup_epochs"], why="schedule.warmup_epochs is 0")
class WarmRestarts:
    """``warmup_factor`` in the first epochs, then cycles, each half a cosine from 1 towards ``min_factor``.

    Loshchilov and Hutter, ICLR 2017. The first cycle has ``cycle`` epochs, each later one ``growth`` times as many as
    the one before.
    """

    def __init__(self, *, warmup_epochs: int, warmup_factor: float, cycle: int, growth: int, min_factor: float) -> None:
        require_nonnegative(fix="0 is no warm-up.", warmup_epochs=warmup_epochs)
        require_positive(fix="GDumb has a cycle of 1 and a growth of 2.", cycle=cycle, growth=growth)
        fix = "0.01 is a hundredth of the learning rate."
        require_fraction(fix=fix, warmup_factor=warmup_factor, min_factor=min_factor)
        self.warmup_epochs, self.warmup_factor, self.min_factor = warmup_epochs, warmup_factor, min_factor
        self.cycle, self.growth = cycle, growth

    def __call__(self, epoch: int, epochs: int) -> float:
        """Factor on the learning rate in ``epoch`` (from 0) of ``epochs``."""
        if epoch < self.warmup_epochs:
            return self.warmup_factor
        position, length = epoch - self.warmup_epochs, self.cycle
        while position >= length:
            position, length = position - length, length * self.growth
        return self.min_factor + (1 - self.min_factor) * 0.5 * (1 + math.cos(math.pi * position / length))
