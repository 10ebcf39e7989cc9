"""One step of gradient descent, and the ways to perform it: the only place that steps an optimizer.

The trainer says *what* a step is (:class:`Step`), :class:`Speed` performs it: eagerly, with the loss terms compiled, or
with forward and backward pass captured as a CUDA graph. Only the middle of a :class:`FunctionalMethod` can be anything
but eager: what is looked up before it and remembered after it stays ordinary Python in every case, so the random draws
are the same.

Loss terms and columns leave a step without their autograd graph. Whatever keeps that graph alive keeps a node of every
parameter alive, which remembers the stream it was made on; a capture that meets such a node fails.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer
from cl_bench.core.errors import RunError
from cl_bench.core.types import Batch, Losses, Phase
from cl_bench.methods.base import FunctionalMethod, Inputs, Method, Terms

Choice = Literal["auto", "eager", "compile", "graph"]

RECOMPILE_LIMIT = 256
"""Shapes and tasks that one method's step is compiled for before it is left to eager."""

NO_CUDA = "a graph wants a CUDA device"
NOT_FUNCTIONAL = "the step of this method is not a function of tensors alone"
"""Why a step is no graph."""

Results = tuple[Losses, dict[str, Tensor], list[Tensor | None]]
"""Loss terms, columns to remember, and the gradient of each trained parameter."""


@dataclass(frozen=True)
class Step:
    """What the trainer asks for: the loss terms of ``batch`` under ``phase.observe``, and ``params`` changed by them.

    Attributes:
        params: what the optimizer trains and ``clip_norm``, the largest norm of their whole gradient, looks at.
        all_params: all parameters of the method, listed once a phase: what this phase leaves alone must not pile up
            gradients, and looking for them in every module at every step takes longer than a small step.
        speed: how the run's steps are performed.
    """

    method: Method
    phase: Phase
    batch: Batch
    params: list[torch.nn.Parameter]
    all_params: list[torch.nn.Parameter]
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

    def zero_grad(self) -> None:
        """Take all gradients away."""
        for parameter in self.all_params:
            parameter.grad = None

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
    step.zero_grad()
    total(losses.values()).backward()
    step.update()
    return detached(losses)


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of the loss terms, which is minimised."""
    losses = list(losses)
    return sum(losses[1:], losses[0]) if losses else torch.zeros(())


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values without the autograd graph that they come from."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


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


def obstacle_to_graphs(method: Method, device: torch.device) -> str | None:
    """Why the steps of a method cannot be CUDA graphs, None where they can."""
    if device.type != "cuda":
        return NO_CUDA
    if not isinstance(method, FunctionalMethod):
        return NOT_FUNCTIONAL
    return None


class Speed:
    """How the steps of a run are performed.

    Args:
        choice: ``eager``; ``compile`` (torch.compile of the loss terms); ``graph`` (forward and backward pass as a CUDA
            graph, or an error that says why not); ``auto`` is a graph on a CUDA device, as far as the method's steps
            can be captured, and eager elsewhere. On a CPU compiled steps were measured and are no faster
            (docs/speed.md), and eager results stay bit-equal.
        device: of the run.
        capture: how ``graph`` captures; None for CUDA's own way, which wants a CUDA device.

    Attributes:
        why: why not every step is performed as was asked for, None where it is.
        joint: how steps are computed as one with those of other replicas, outside of this; None where they are not.
    """

    def __init__(self, choice: Choice, device: torch.device, capture: "Capture | None" = None) -> None:
        self.asked, self.device = choice, device
        self.why: str | None = None
        self.joint: str | None = None
        self._used: Choice = choice
        self._phase: Phase | None = None
        self._compiled: Callable[[Inputs, int], Terms] | None = None
        self._capture = capture or CudaCapture(device)
        self.graphs = self.new_graphs()
        if choice == "auto":
            self._used = "graph" if device.type == "cuda" or capture is not None else "eager"
            if self._used == "eager":
                self.why = "on a CPU a compiled step is no faster" if device.type == "cpu" else NO_CUDA

    @property
    def used(self) -> Choice:
        """What steps are performed by."""
        return "eager" if self._used == "graph" and self.graphs.failed else self._used

    def facts(self) -> dict[str, str | None]:
        """What ``summary.json`` says of it."""
        if self.joint:
            return {"asked": self.asked, "used": "joint", "why": self.joint}
        return {"asked": self.asked, "used": self.used, "why": self.graphs.failed or self.why}

    def new_graphs(self) -> "Graphs":
        """Graphs as this run wants them."""
        return Graphs(self._capture, demanded=self.asked == "graph")

    def perform(self, step: Step, inputs: Inputs | None = None) -> Losses:
        """Perform a step, whose inputs may have been looked up before; returns its loss terms."""
        method = step.functional
        if method is None and self.used != "eager" and self.why is None:
            self.why = f"some steps are eager: {NOT_FUNCTIONAL}"
            tell(f"trainer.speed={self.asked}: {self.why}")
        if method is None or (self.used == "eager" and inputs is None):
            return eager(step)
        if inputs is None:
            with step.autocast:
                inputs = method.inputs(step.batch)
        if step.phase is not self._phase:  # other parameters, perhaps another network
            self._phase, self._compiled = step.phase, None
            self.graphs.clear()
        losses, columns = self._differentiate(step, method, inputs)
        with step.autocast:
            method.remember(step.batch, columns)
        step.update()
        return losses

    def _differentiate(self, step: Step, method: FunctionalMethod, inputs: Inputs) -> Terms:
        """Loss terms and columns, and the gradients left on the parameters."""
        if self._used == "compile":
            try:
                self._compiled = self._compiled or _compiled(method)
                return _backward(step, self._compiled, inputs)
            except Exception as error:  # whatever a compiler may raise; eager raises it again if it is ours
                self._used, self.why = "eager", f"compile failed: {in_one_line(error)}"
            tell(f"trainer.speed={self.asked}: {self.why}; steps are eager from here on")
        if self._used == "eager":
            return _backward(step, method.terms, inputs)

        def compute(inputs: Inputs) -> Results:
            with step.autocast:
                losses, columns = method.terms(inputs, step.batch.task)
            found = torch.autograd.grad(total(losses.values()), step.params, allow_unused=True)
            laid_out = (None if g is None else laid_out_as(p, g) for p, g in zip(step.params, found))
            return detached(losses), detached(columns), [*laid_out]

        step.zero_grad()
        losses, columns, gradients = self.graphs.run(compute, inputs)
        for parameter, gradient in zip(step.params, gradients):
            parameter.grad = gradient
        return losses, columns


def _backward(step: Step, terms: Callable[[Inputs, int], Terms], inputs: Inputs) -> Terms:
    """Loss terms and columns, and the gradients left on the parameters."""
    with step.autocast:
        losses, columns = terms(inputs, step.batch.task)
    step.zero_grad()
    total(losses.values()).backward()
    return detached(losses), detached(columns)


def _compiled(method: FunctionalMethod) -> Callable[[Inputs, int], Terms]:
    """Its terms, compiled when they are first called.

    Static: the last batch of an epoch is one more shape, not an unknown one. A method may look at the task's number, so
    every task is one compilation more; past the limit torch would be eager without a word.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(method.terms, dynamic=False)


def tell(line: str) -> None:
    """A line on standard error: what is not as it was asked for is said at once."""
    print(f"cl_bench: {line}", file=sys.stderr, flush=True)


def in_one_line(error: BaseException) -> str:
    """Kind and words of what an error began with, on one line."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- graphs ------------------------------------------------------------------------------------------------------------


class NotCaptured(Exception):
    """A computation could not be captured; everything is as it was before."""


class Capture(Protocol):
    """A way to capture computations."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Where a computation runs that is to be captured later."""

    def __call__(self, compute: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """A computation -> its results' places, and a call that computes them anew from what its inputs hold by then.

        Raises:
            NotCaptured: it cannot be captured.
        """


@dataclass
class Captured:
    """A captured computation: where its inputs and results lie, and how to run it again."""

    inputs: Inputs
    results: Results
    replay: Callable[[], None]


class Graphs:
    """A computation captured once for each shape of its inputs, and replayed from then on.

    The first steps of a shape are eager: ordinary training steps, after which every library has chosen its algorithm
    and made its workspace, as a capture needs it. Optimizer, clipping and the method's own hooks stay outside, so that
    a learning rate is a plain number and a new one costs nothing.

    Args:
        capture: how to capture.
        demanded: whether a capture that fails is an error; else everything is computed eagerly from then on.

    Attributes:
        failed: why nothing is captured any more, None as long as it is.
    """

    WARM_UP = 3

    def __init__(self, capture: Capture, *, demanded: bool) -> None:
        self.capture, self.demanded = capture, demanded
        self.failed: str | None = None
        self._seen: Counter[tuple] = Counter()
        self._captured: dict[tuple, Captured] = {}

    def clear(self) -> None:
        """Forget every graph, and free its memory."""
        self._seen.clear()
        self._captured.clear()

    def run(self, compute: Callable[[Inputs], Results], inputs: Inputs) -> Results:
        """The results of a computation, valid until the next call. Between two calls of :meth:`clear` it must be the
        same computation, but for ``inputs``."""
        if self.failed:
            return compute(inputs)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        self._seen[key] += 1
        if self._seen[key] <= self.WARM_UP:
            with self.capture.aside():
                return compute(inputs)
        if key not in self._captured:
            places = {name: tensor.clone() for name, tensor in inputs.items()}
            try:
                self._captured[key] = Captured(places, *self.capture(lambda: compute(places)))
            except NotCaptured as error:
                self._give_up(str(error))
        if self.failed:  # only here is the error gone, and with it the autograd graph that its frames held
            return compute(inputs)
        captured = self._captured[key]
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor)
        captured.replay()
        return captured.results

    def _give_up(self, why: str) -> None:
        self.failed = f"the step could not be captured as a CUDA graph: {why}"
        self.clear()
        if self.demanded:
            raise RunError(f"trainer.speed=graph: {self.failed}. With trainer.speed=eager the same command goes on.")
        tell(f"{self.failed}; steps are eager from here on")


class CudaCapture:
    """Captures as a CUDA graph, on a stream of its own.

    Nothing is computed at a capture; replays run on the stream that asks for them, after the copies into the inputs.
    What is made aside and used on the asking stream, or the other way round, needs no more care: every stay aside
    begins and ends with one stream waiting for the other, and callers hold the inputs until it has ended.

    Args:
        device: a CUDA device with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Where warm-up and capture run. A parameter's node in an autograd graph belongs to the stream it is made on,
        and a capture may wait for no other stream."""
        return torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream of its own, after all that was asked for before, and before all that is asked for later."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    def __call__(self, compute: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Capture one computation, with a memory pool of its own.

        Raises:
            NotCaptured: it cannot be captured; stream, generator and allocator are as they were before.
            RunError: and they are not: nothing can be computed in this process any more.
        """
        here, index = torch.cuda.current_stream(self.device), self.device.index
        generator = torch.cuda.default_generators[index]
        before = generator.clone_state()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # thread_local: the thread that looks images up ahead pins memory, which a global capture forbids to all threads
        capturing = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with self.aside(), capturing:
                results = compute()
        except Exception as error:
            # Where the end of a capture fails, torch leaves the generator and the allocator in it.
            generator.graphsafe_set_state(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            if not self._is_usable(here):
                raise RunError(
                    f"a step could not be captured as a CUDA graph ({in_one_line(error)}), and CUDA cannot be used in "
                    "this process any more. With trainer.speed=eager the same command goes on from the last checkpoint."
                ) from error
            raise NotCaptured(in_one_line(error)) from error
        return results, graph.replay

    def _is_usable(self, here: torch.cuda.Stream) -> bool:
        """Whether the stream is the one of before, and torch draws and computes on it; the draw is taken back."""
        try:
            state = torch.cuda.get_rng_state(self.device)
            torch.rand(1, device=self.device)
            torch.cuda.set_rng_state(state, self.device)
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return torch.cuda.current_stream(self.device) == here
