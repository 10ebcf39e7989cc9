"""One step of gradient descent, and the ways to perform it: the only place that steps an optimizer.

The trainer says *what* a step is (:class:`Step`), :class:`Speed` performs it: eagerly, with the loss terms compiled, or
with forward and backward pass captured as a CUDA graph. Only the middle of a :class:`FunctionalMethod` can be anything
but eager: what is looked up before it and remembered after it stays ordinary Python in every case, so the random draws
are the same.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer
from cl_bench.methods.base import FunctionalMethod, Inputs, Method, Terms
from cl_bench.types import Batch, Losses, Phase

Choice = Literal["auto", "eager", "compile", "graph"]

RECOMPILE_LIMIT = 256
"""Shapes and tasks that one method's step is compiled for before it is left to eager."""

Results = tuple[Losses, dict[str, Tensor], list[Tensor | None]]
"""Loss terms, columns to remember, and the gradient of each trained parameter."""

Capture = Callable[[Callable[[], Results]], tuple[Results, Callable[[], None]]]
"""A computation -> its results' places, and a call that computes them anew from what its inputs hold by then."""


@dataclass(frozen=True)
class Step:
    """What the trainer asks for: the loss terms of ``batch`` under ``phase.observe``, and ``params`` changed by them.

    Attributes:
        params: what the optimizer trains and ``clip_norm``, the largest norm of their whole gradient, looks at.
        speed: how the run's steps are performed.
    """

    method: Method
    phase: Phase
    batch: Batch
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip_norm: float | None
    autocast: torch.autocast
    speed: "Speed"

    @property
    def functional(self) -> FunctionalMethod | None:
        """The method, where the step is that of a functional one; not where the method or the phase has its own."""
        method = self.method
        if not isinstance(method, FunctionalMethod) or type(method).observe is not FunctionalMethod.observe:
            return None
        return method if self.phase.observe == method.observe else None

    def update(self) -> None:
        """Change the parameters by the gradients that they have."""
        self.method.after_backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        self.optimizer.step()
        if self.phase.after_step:
            self.phase.after_step()


def eager(step: Step) -> Losses:
    """Perform a step as it is written; the reference for every other way."""
    with step.autocast:
        losses = step.phase.observe(step.batch)
    step.method.zero_grad()  # all of them: what this phase leaves alone must not pile up gradients
    total(losses.values()).backward()
    step.update()
    return losses


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of the loss terms, which is minimised."""
    losses = list(losses)
    return sum(losses[1:], losses[0]) if losses else torch.zeros(())


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` with the strides of its parameter, as ``backward`` would leave it.

    A fused optimizer walks through both in the order of their memory: other strides would be other places.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def state_of(method: Method) -> dict[str, Tensor]:
    """The registered tensors that :meth:`FunctionalMethod.terms` may read, parameters left out, by name.

    The contents of the rehearsal buffer are not among them: they reach a step through its inputs.
    """
    memories = tuple(f"{name}." for name, module in method.named_modules() if isinstance(module, Buffer))
    return {name: tensor for name, tensor in method.named_buffers() if not name.startswith(memories)}


class Speed:
    """How the steps of a run are performed.

    Args:
        choice: ``eager``; ``compile`` (torch.compile of the loss terms); ``graph`` (forward and backward pass as a CUDA
            graph); ``auto`` measures all three at the first step and takes the fastest. On a CPU ``auto`` is eager,
            where compiled steps were measured and are no faster (docs/speed.md), so that results stay bit-equal.
        device: of the run.
        capture: how ``graph`` captures; None for CUDA's own way, which wants a CUDA device.

    Attributes:
        used: what steps are performed by; ``auto`` before it has been chosen.
        why: why it is not what was asked for, None where it is.
        joint: whether steps are computed as one with those of other replicas, outside of this.
    """

    def __init__(self, choice: Choice, device: torch.device, capture: Capture | None = None) -> None:
        self.asked, self.device = choice, device
        self.used: Choice = choice
        self.why: str | None = None
        self.joint = False
        self._phase: Phase | None = None
        self._compiled: Callable[[Inputs, int], Terms] | None = None
        self._graphs = Graphs(capture or cuda_capture)
        if choice == "auto" and device.type == "cpu":
            self._fall_back("on a CPU a compiled step is no faster")
        if choice == "graph" and device.type != "cuda" and capture is None:
            self._fall_back("a graph wants a CUDA device")

    def facts(self) -> dict[str, str | None]:
        """What ``summary.json`` says of it."""
        used = "joint" if self.joint else self.used
        return {"asked": self.asked, "used": used, "why": "computed with other replicas" if self.joint else self.why}

    def perform(self, step: Step, inputs: Inputs | None = None) -> Losses:
        """Perform a step, whose inputs may have been looked up before; returns its loss terms."""
        method = step.functional
        if method is None or (self.used == "eager" and inputs is None):
            if method is None and self.used != "eager" and self.why is None:
                self.why = "some steps were eager: this method's step is not a function of tensors alone"
            return eager(step)
        if inputs is None:
            with step.autocast:
                inputs = method.inputs(step.batch)
        if step.phase is not self._phase:  # other parameters, perhaps another network
            self._phase, self._compiled = step.phase, None
            self._graphs.clear()
        if self.used == "auto":
            self.used, self.why = self._fastest(step, method, inputs)
        try:
            losses, columns = self._differentiate(step, method, inputs)
        except Exception as error:  # whatever a compiler or a capture may raise; eager raises it again if it is ours
            if self.used == "eager":
                raise
            self._fall_back(f"{self.used} failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
            losses, columns = self._differentiate(step, method, inputs)
        with step.autocast:
            method.remember(step.batch, columns)
        step.update()
        return losses

    def _fall_back(self, why: str) -> None:
        self.used, self.why = "eager", why

    def _differentiate(self, step: Step, method: FunctionalMethod, inputs: Inputs) -> Terms:
        """Loss terms and columns, and the gradients left on the parameters."""
        step.method.zero_grad()
        if self.used == "graph":
            return self._graphs.terms(step, method, inputs)
        compute: Callable[[Inputs, int], Terms] = method.terms
        if self.used == "compile":
            compute = self._compiled = self._compiled or _compiled(method)
        with step.autocast:
            losses, columns = compute(inputs, step.batch.task)
        total(losses.values()).backward()
        return losses, columns

    def _fastest(self, step: Step, method: FunctionalMethod, inputs: Inputs) -> tuple[Choice, str | None]:
        """Time each way on the same inputs; nothing of the method is changed by it."""
        state = {name: tensor.clone() for name, tensor in state_of(method).items()}
        seconds: dict[Choice, float] = {}
        failed: list[str] = []
        choices: tuple[Choice, ...] = ("eager", "compile", "graph")
        with torch.random.fork_rng(devices=[self.device]):
            for choice in choices:
                self.used = choice
                try:
                    seconds[choice] = self._time(step, method, inputs)
                except Exception as error:
                    failed.append(f"{choice} failed: {type(error).__name__}")
                for name, tensor in state_of(method).items():
                    tensor.copy_(state[name])
        self._graphs.clear()  # it holds the measured shape's memory
        best = min(seconds, key=lambda choice: seconds[choice])
        timed = ", ".join(f"{choice} {1e3 * s:.2f} ms" for choice, s in seconds.items())
        return best, "; ".join([f"fastest of {timed}", *failed])

    def _time(self, step: Step, method: FunctionalMethod, inputs: Inputs) -> float:
        """Median seconds of forward and backward pass."""
        taken = []
        for _ in range(Graphs.WARM_UP + 12):
            torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            self._differentiate(step, method, inputs)
            torch.cuda.synchronize(self.device)
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[Graphs.WARM_UP + 2 :])


def _compiled(method: FunctionalMethod) -> Callable[[Inputs, int], Terms]:
    """Its terms, compiled when they are first called.

    Static: the last batch of an epoch is one more shape, not an unknown one. A method may look at the task's number, so
    every task is one compilation more; past the limit torch would be eager without a word.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(method.terms, dynamic=False)


@dataclass
class Captured:
    """A captured computation: where its inputs and results lie, and how to run it again."""

    inputs: Inputs
    results: Results
    replay: Callable[[], None]


class Graphs:
    """Forward and backward pass captured once for each shape of a step's inputs, and replayed from then on.

    The first steps of a shape are eager: ordinary training steps, after which every library has chosen its algorithm
    and made its workspace, as a capture needs it. Optimizer, clipping and the method's own hooks stay outside, so that
    a learning rate is a plain number and a new one costs nothing.
    """

    WARM_UP = 3

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self._seen: Counter[tuple] = Counter()
        self._captured: dict[tuple, Captured] = {}

    def clear(self) -> None:
        """Forget every graph, and free its memory."""
        self._seen.clear()
        self._captured.clear()

    def terms(self, step: Step, method: FunctionalMethod, inputs: Inputs) -> Terms:
        """Loss terms and columns, valid until the next call, and the gradients on the parameters."""
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        self._seen[key] += 1

        def compute(inputs: Inputs) -> Results:
            with step.autocast:
                losses, columns = method.terms(inputs, step.batch.task)
            found = torch.autograd.grad(total(losses.values()), step.params, allow_unused=True)
            return losses, columns, [None if g is None else laid_out_as(p, g) for p, g in zip(step.params, found)]

        if self._seen[key] <= self.WARM_UP:
            losses, columns, gradients = compute(inputs)
        else:
            if key not in self._captured:
                places = {name: tensor.clone() for name, tensor in inputs.items()}
                self._captured[key] = Captured(places, *self.capture(lambda: compute(places)))
            captured = self._captured[key]
            for name, tensor in inputs.items():
                captured.inputs[name].copy_(tensor)
            captured.replay()
            losses, columns, gradients = captured.results
        for parameter, gradient in zip(step.params, gradients):
            parameter.grad = gradient
        return losses, columns


def cuda_capture(compute: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
    """Capture as a CUDA graph; nothing is computed before the first replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute()
    return results, graph.replay
