"""One step of gradient descent, and the ways to perform it: the only place that steps an optimizer.

The trainer says *what* a step is (:class:`Step`). A :class:`StepExecutor` performs it: eagerly, with compiled loss
terms, or with the forward and backward pass captured as a CUDA graph. Only the ``terms`` of a
:class:`FunctionalMethod` are compiled or captured. Its ``inputs`` and ``remember`` stay ordinary Python, so the random
draws are the same in every case.

A step returns loss terms and columns without their autograd graph. That graph would keep a node of every parameter
alive, and the node remembers the stream that it was made on. A capture that meets such a node fails.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from cl_bench.buffers.base import Buffer
from cl_bench.core.errors import RunError
from cl_bench.core.types import Batch, Losses, Phase
from cl_bench.methods.base import FunctionalMethod, Inputs, Method, Terms

T = TypeVar("T")

Choice = Literal["auto", "eager", "compile", "graph"]

RECOMPILE_LIMIT = 256
"""How many combinations of shapes and task one method's step is compiled for. Beyond it, steps are eager."""

NO_CUDA = "a graph needs a CUDA device"
NOT_FUNCTIONAL = "the step of this method is not a function of tensors alone"
"""Why a step cannot be a graph."""

Results = tuple[Losses, dict[str, Tensor], list[Tensor | None]]
"""Loss terms, columns to remember, and the gradient of each trained parameter."""


@dataclass(frozen=True, kw_only=True)
class PhaseContext:
    """What stays the same in all steps of a phase.

    Attributes:
        params: the parameters that the optimizer trains.
        all_params: all parameters of the method. They are listed once per phase, because a search through all modules
            at every step takes longer than a small step. Parameters that this phase does not train must not collect
            gradients.
        clip_norm: largest norm of the gradient of all ``params`` together; None for no clipping.
    """

    method: Method
    phase: Phase
    params: list[torch.nn.Parameter]
    all_params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip_norm: float | None
    autocast: torch.autocast

    @property
    def functional(self) -> FunctionalMethod | None:
        """The method if its steps are those of a functional method; None if the method or the phase has its own."""
        method = self.method
        if not isinstance(method, FunctionalMethod) or type(method).observe is not FunctionalMethod.observe:
            return None
        return method if self.phase.observe == method.observe else None

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameter in self.all_params:
            parameter.grad = None

    def update(self) -> None:
        """Change the parameters by their gradients."""
        self.method.after_backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip_norm)
        self.optimizer.step()
        if self.phase.after_step:
            self.phase.after_step()


@dataclass(frozen=True)
class Step:
    """What the trainer asks for: the loss terms of ``batch``, and the parameters changed by their gradients."""

    context: PhaseContext
    batch: Batch


StepGenerator = Generator[tuple[Step, "StepExecutor"], Losses, T]
"""A run that is performed by its caller: it yields each step with its executor, is sent the loss terms, returns T."""


def perform_eagerly(step: Step) -> Losses:
    """Perform a step as it is written. Every other way is compared with this one."""
    context = step.context
    with context.autocast:
        losses = context.phase.observe(step.batch)
    context.zero_grad()
    sum_losses(losses.values()).backward()
    context.update()
    return detach(losses)


def sum_losses(losses: Iterable[Tensor]) -> Tensor:
    """The sum of the loss terms, which is minimised."""
    losses = list(losses)
    return sum(losses[1:], losses[0]) if losses else torch.zeros(())


def detach(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values without their autograd graph."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def match_strides(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` with the strides of its parameter, as ``backward`` leaves it.

    A fused optimizer reads both in the order of their memory. With other strides it would pair the wrong numbers.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def get_state(method: Method) -> dict[str, Tensor]:
    """The registered tensors, by name, that :meth:`FunctionalMethod.terms` may read, without the parameters.

    The contents of the rehearsal buffer are not among them: a step gets them as its inputs.
    """
    rehearsal = tuple(f"{name}." for name, module in method.named_modules() if isinstance(module, Buffer))
    return {name: tensor for name, tensor in method.named_buffers() if not name.startswith(rehearsal)}


def find_obstacle_to_graphs(method: Method, device: torch.device) -> str | None:
    """Why the steps of a method cannot be CUDA graphs; None if they can."""
    if device.type != "cuda":
        return NO_CUDA
    if not isinstance(method, FunctionalMethod):
        return NOT_FUNCTIONAL
    return None


class StepExecutor:
    """Performs the steps of a run.

    Args:
        choice: ``eager``; ``compile`` (torch.compile of the loss terms); ``graph`` (forward and backward pass as a CUDA
            graph, or an error that says why not); ``auto``: a graph on a CUDA device if the method's steps can be
            captured, else eager. On a CPU ``auto`` is eager: compiled steps were measured and are no faster
            (docs/speed.md), and eager results stay equal bit by bit.
        device: of the run.
        capture: how ``graph`` captures; None for CUDA graphs, which need a CUDA device.

    Attributes:
        why: why some steps are not performed as ``choice`` asks; None if all are.
        joint: how the steps are computed together with those of other replicas; None if they are not.
    """

    def __init__(self, choice: Choice, device: torch.device, capture: "Capture | None" = None) -> None:
        self.choice, self.device = choice, device
        self.why: str | None = None
        self.joint: str | None = None
        self._used: Choice = choice
        self._phase: Phase | None = None
        self._compiled: Callable[[Inputs, int], Terms] | None = None
        self._capture = capture or CudaCapture(device)
        self.graphs = self.make_graphs()
        if choice == "auto":
            self._used = "graph" if device.type == "cuda" or capture is not None else "eager"
            if self._used == "eager":
                self.why = "on a CPU a compiled step is no faster" if device.type == "cpu" else NO_CUDA

    @property
    def used(self) -> Choice:
        """How steps are performed now."""
        return "eager" if self._used == "graph" and self.graphs.failed else self._used

    def describe(self) -> dict[str, str | None]:
        """What ``summary.json`` says about it: ``asked``, ``used``, ``why``."""
        if self.joint:
            return {"asked": self.choice, "used": "joint", "why": self.joint}
        return {"asked": self.choice, "used": self.used, "why": self.graphs.failed or self.why}

    def make_graphs(self) -> "Graphs":
        """New graphs as this run asks for them."""
        return Graphs(self._capture, demanded=self.choice == "graph")

    def perform(self, step: Step, inputs: Inputs | None = None) -> Losses:
        """Perform a step and return its loss terms; ``inputs`` are those of the method, if they were made before."""
        context = step.context
        method = context.functional
        if method is None and self.used != "eager" and self.why is None:
            self.why = f"some steps are eager: {NOT_FUNCTIONAL}"
            warn(f"trainer.speed={self.choice}: {self.why}")
        if method is None or (self.used == "eager" and inputs is None):
            return perform_eagerly(step)
        if inputs is None:
            with context.autocast:
                inputs = method.inputs(step.batch)
        if context.phase is not self._phase:  # other parameters, perhaps another network
            self._phase, self._compiled = context.phase, None
            self.graphs.clear()
        losses, columns = self._differentiate(step, method, inputs)
        with context.autocast:
            method.offer(step.batch, columns)
        context.update()
        return losses

    def _differentiate(self, step: Step, method: FunctionalMethod, inputs: Inputs) -> Terms:
        """Loss terms and columns; the gradients are left on the parameters."""
        context = step.context
        if self._used == "compile":
            try:
                self._compiled = self._compiled or _compile(method)
                return _differentiate_directly(step, self._compiled, inputs)
            except Exception as error:  # whatever a compiler may raise; if it is ours, the eager step raises it again
                self._used, self.why = "eager", f"compile failed: {describe_error(error)}"
            warn(f"trainer.speed={self.choice}: {self.why}; steps are eager from here on")
        if self._used == "eager":
            return _differentiate_directly(step, method.terms, inputs)

        def compute(inputs: Inputs) -> Results:
            with context.autocast:
                losses, columns = method.terms(inputs, step.batch.task)
            found = torch.autograd.grad(sum_losses(losses.values()), context.params, allow_unused=True)
            gradients = (None if g is None else match_strides(p, g) for p, g in zip(context.params, found))
            return detach(losses), detach(columns), [*gradients]

        context.zero_grad()
        losses, columns, gradients = self.graphs.run(compute, inputs)
        for parameter, gradient in zip(context.params, gradients):
            parameter.grad = gradient
        return losses, columns


def _differentiate_directly(step: Step, terms: Callable[[Inputs, int], Terms], inputs: Inputs) -> Terms:
    """Loss terms and columns by an ordinary backward pass; the gradients are left on the parameters."""
    context = step.context
    with context.autocast:
        losses, columns = terms(inputs, step.batch.task)
    context.zero_grad()
    sum_losses(losses.values()).backward()
    return detach(losses), detach(columns)


def _compile(method: FunctionalMethod) -> Callable[[Inputs, int], Terms]:
    """The method's terms, which are compiled at their first call.

    Shapes are static: the last batch of an epoch is one more shape, not a variable one. A method may read the task's
    number, so each task is one more compilation. Beyond the limit torch would be eager without a message.
    """
    import torch._dynamo  # seconds, so only where something is compiled

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(method.terms, dynamic=False)


def warn(line: str) -> None:
    """Say on standard error, at once, what is not done as it was asked for."""
    print(f"cl_bench: {line}", file=sys.stderr, flush=True)


def describe_error(error: BaseException) -> str:
    """Kind and message of the first cause of an error, in one line."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -- graphs ------------------------------------------------------------------------------------------------------------


class NotCaptured(Exception):
    """A computation could not be captured; the state of torch and CUDA is the one before the attempt."""


class Capture(Protocol):
    """A way to capture computations."""

    def use_side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Run on the capture's stream, as a computation must that is captured later."""

    def __call__(self, compute: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """A computation -> its result tensors, and a function that computes them again from the current inputs.

        Raises:
            NotCaptured: it cannot be captured.
        """


@dataclass
class Captured:
    """A captured computation: its input and result tensors, and a function that runs it again."""

    inputs: Inputs
    results: Results
    replay: Callable[[], None]


class Graphs:
    """A computation that is captured once for each shape of its inputs, and then replayed.

    The first steps of each shape are ordinary eager steps. After them every library has chosen its algorithm and
    allocated its workspace, which a capture needs. The optimizer, clipping and the method's hooks stay outside: a
    learning rate is a plain number, and a new one costs nothing.

    Args:
        capture: how to capture.
        demanded: if true, a capture that fails is an error; else all later steps are eager.

    Attributes:
        failed: why nothing is captured any more; None while captures work.
    """

    WARM_UP = 3

    def __init__(self, capture: Capture, *, demanded: bool) -> None:
        self.capture, self.demanded = capture, demanded
        self.failed: str | None = None
        self._seen: Counter[tuple] = Counter()
        self._captured: dict[tuple, Captured] = {}

    def clear(self) -> None:
        """Delete every graph and free its memory."""
        self._seen.clear()
        self._captured.clear()

    def run(self, compute: Callable[[Inputs], Results], inputs: Inputs) -> Results:
        """The results of a computation, valid until the next call.

        Between two calls of :meth:`clear`, only ``inputs`` may change, not the computation.
        """
        if self.failed:
            return compute(inputs)
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        self._seen[key] += 1
        if self._seen[key] <= self.WARM_UP:
            with self.capture.use_side_stream():
                return compute(inputs)
        if key not in self._captured:
            own = {name: tensor.clone() for name, tensor in inputs.items()}
            try:
                self._captured[key] = Captured(own, *self.capture(lambda: compute(own)))
            except NotCaptured as error:
                self._give_up(str(error))
        if self.failed:  # not in the handler: there the error's frames still hold the autograd graph
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
        warn(f"{self.failed}; steps are eager from here on")


class CudaCapture:
    """Captures a computation as a CUDA graph, on a side stream of its own.

    A capture computes nothing. A replay runs on the caller's stream, after the inputs have been copied. Tensors may be
    made on one stream and used on the other: each use of the side stream begins and ends with one stream waiting for
    the other, and callers keep the inputs until it has ended.

    Args:
        device: a CUDA device with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The side stream, for warm-up and capture.

        A parameter's autograd node belongs to the stream it is made on, and a capture may not wait for another stream.
        """
        return torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def use_side_stream(self) -> Iterator[None]:
        """Run on the side stream, after all earlier work and before all later work of the caller's stream."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    def __call__(self, compute: Callable[[], Results]) -> tuple[Results, Callable[[], None]]:
        """Capture one computation, with a memory pool of its own.

        Raises:
            NotCaptured: it cannot be captured; stream, generator and allocator are restored.
            RunError: they could not be restored, so nothing can be computed in this process any more.
        """
        here, index = torch.cuda.current_stream(self.device), self.device.index
        generator = torch.cuda.default_generators[index]
        before = generator.clone_state()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # thread_local: the thread that reads images ahead pins memory, which a global capture forbids to all threads
        capturing = torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with self.use_side_stream(), capturing:
                results = compute()
        except Exception as error:
            # If the end of a capture fails, torch leaves the generator and the allocator in capture mode.
            generator.graphsafe_set_state(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            if not self._is_usable(here):
                raise RunError(
                    f"a step could not be captured as a CUDA graph ({describe_error(error)}), and CUDA cannot be used "
                    "in this process any more. "
                    "With trainer.speed=eager the same command goes on from the last checkpoint."
                ) from error
            raise NotCaptured(describe_error(error)) from error
        return results, graph.replay

    def _is_usable(self, here: torch.cuda.Stream) -> bool:
        """Whether ``here`` is the current stream and torch can draw and compute on it; the draw is undone."""
        try:
            state = torch.cuda.get_rng_state(self.device)
            torch.rand(1, device=self.device)
            torch.cuda.set_rng_state(state, self.device)
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return torch.cuda.current_stream(self.device) == here
