"""Several seeds of one configuration side by side; each of their steps is computed together.

Every replica is a run of its own, with its own trainer, generators, buffer, loggers, checkpoint and folder. What they
share is the arithmetic of a step: the parameters of all networks are stacked, and ``torch.func.vmap`` computes the
forward and backward pass for all of them. Each replica draws by itself before that, and steps its own optimizer after
it. So its result is that of a separate run up to rounding.

This needs a method whose step is a function of tensors (:class:`~cl_bench.methods.base.FunctionalMethod`) and a network
without dropout, whose draws would differ from those of a separate run. :func:`find_obstacle` says what is missing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cl_bench.backbones.base import Backbone
from cl_bench.core.types import Losses, Phase
from cl_bench.engine.checkpoint import get_torch_rng_state, set_torch_rng_state
from cl_bench.engine.step import (
    NOT_FUNCTIONAL,
    Graphs,
    Results,
    Step,
    StepExecutor,
    StepGenerator,
    detach,
    get_state,
    match_strides,
    sum_losses,
)
from cl_bench.methods.base import FunctionalMethod, Inputs, Method, Terms
from cl_bench.system.signals import Interrupted


def find_obstacle(method: Method, device: torch.device) -> str | None:
    """Why the steps of replicas of a method are not computed together; None if they are."""
    if not isinstance(method, FunctionalMethod):
        return NOT_FUNCTIONAL
    if not method.self_contained:
        return "this method keeps a network aside, which cannot be stacked"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in method.modules()):
        return "the network has dropout, whose draws would not be those of a separate run"
    if any(isinstance(module, Backbone) and module.draws for module in method.modules()):
        return "the network draws in training, which would not be the draws of a separate run"
    if device.type == "cpu":
        return "a CPU computes stacked networks no faster than one after the other (docs/speed.md)"
    return None


class Replica:
    """One run among several: its generator, the step that it waits for, and its state of torch's random generators."""

    def __init__(self, steps: StepGenerator[Any]) -> None:
        self.steps = steps
        self.waiting: tuple[Step, StepExecutor] | None = None
        self.result: Any = None
        self.error: Exception | Interrupted | None = None
        self._rng = get_torch_rng_state()

    def advance(self, losses: Losses | Exception | None) -> None:
        """Run up to the next step, or to the end with a result or an error.

        Args:
            losses: of the step that it waited for, or the error of that step, which is raised in the run.
        """
        set_torch_rng_state(self._rng)
        self.waiting = None
        try:
            if isinstance(losses, Exception):
                self.waiting = self.steps.throw(losses)
            else:
                self.waiting = next(self.steps) if losses is None else self.steps.send(losses)
        except StopIteration as end:
            self.result = end.value
        except (Exception, Interrupted) as error:  # the others go on; it is raised when they have ended
            self.error = error
        self._rng = get_torch_rng_state()

    def perform(self, step: Step, executor: StepExecutor, inputs: Inputs | None) -> Losses | Exception:
        """Perform the step by itself; its error concerns this replica only."""
        set_torch_rng_state(self._rng)
        try:
            return executor.perform(step, inputs)
        except Exception as error:
            return error
        finally:
            self._rng = get_torch_rng_state()


def run_together(runs: Sequence[StepGenerator[Any]]) -> list[Any]:
    """Perform the steps of all runs side by side, and return the result of each.

    Raises:
        Exception: the first error of a run, when the others have ended.
    """
    replicas = [Replica(steps) for steps in runs]
    joint = Joint()
    for replica in replicas:
        replica.advance(None)
    while waiting := [replica for replica in replicas if replica.waiting is not None]:
        for replica, losses in zip(waiting, _perform(joint, waiting)):
            replica.advance(losses)
    for replica in replicas:
        if replica.error is not None:
            raise replica.error
    return [replica.result for replica in replicas]


def _perform(joint: "Joint", replicas: list[Replica]) -> list[Losses | Exception]:
    """The loss terms of the step that each replica waits for, or the error of the step."""
    requests = [replica.waiting for replica in replicas if replica.waiting is not None]
    steps, executors = [step for step, _ in requests], [executor for _, executor in requests]
    methods = [step.context.functional for step in steps]
    inputs = [m.inputs(step.batch) if m is not None else None for m, step in zip(methods, steps)]
    known = [(m, i) for m, i in zip(methods, inputs) if m is not None and i is not None]
    if len(known) < len(steps) or len({_get_shape(step, i) for step, (_, i) in zip(steps, known)}) > 1:
        return [replica.perform(*request, i) for replica, request, i in zip(replicas, requests, inputs)]
    try:
        results = joint.differentiate(steps, executors, [m for m, _ in known], [i for _, i in known])
    except Exception as error:
        return [error for _ in steps]
    for executor in executors:
        executor.joint = joint.describe()
    return [_finish(step, m, terms) for step, (m, _), terms in zip(steps, known, results)]


def _finish(step: Step, method: FunctionalMethod, terms: Terms) -> Losses | Exception:
    losses, columns = terms
    try:
        with step.context.autocast:
            method.offer(step.batch, columns)
        step.context.update()
    except Exception as error:
        return error
    return losses


def _get_shape(step: Step, inputs: Inputs) -> tuple:
    """What must be equal for steps to be computed together."""
    return step.batch.task, len(step.context.params), tuple((name, t.shape, t.dtype) for name, t in inputs.items())


class Joint:
    """Loss terms and gradients of several methods, in one computation over stacked parameters.

    Shapes: N replicas; N tensors of shape S are stacked to (N, S). The modules' own tensors become views of the stacks,
    so an optimizer step on one of them, or a loaded checkpoint, changes the stack. If the replicas' steps are CUDA
    graphs, this computation is one too.
    """

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._parameters: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        self._graphs: Graphs | None = None

    def describe(self) -> str:
        """How the replicas' steps are performed, for their summaries."""
        graph = self._graphs is not None and not self._graphs.failed
        return "computed with other replicas" + (", as a CUDA graph" if graph else "")

    def differentiate(
        self,
        steps: list[Step],
        executors: list[StepExecutor],
        methods: list[FunctionalMethod],
        inputs: list[Inputs],
    ) -> list[Terms]:
        """Each replica's loss terms and columns; its gradients are left on its parameters."""
        phases = [step.context.phase for step in steps]
        if list(map(id, phases)) != list(map(id, self._phases)):  # within a phase no tensor is replaced by another
            self._phases = phases
            self._open(executors, methods)
        task, autocast = steps[0].batch.task, steps[0].context.autocast
        module, trained = self._module, self._trained

        def terms(parameters: dict[str, Tensor], state: dict[str, Tensor], inputs: Inputs) -> Terms:
            named = {f"method.{name}": tensor for name, tensor in {**parameters, **state}.items()}
            return functional_call(module, named, (inputs, task))

        def compute(together: Inputs) -> Results:
            leaves = {name: stack.detach().requires_grad_(trained[name]) for name, stack in self._parameters.items()}
            with autocast:
                losses, columns = vmap(terms, randomness="error")(leaves, self._state, together)
            differentiated = [leaf for leaf in leaves.values() if leaf.requires_grad]
            total = sum_losses(losses.values()).sum()
            gradients = torch.autograd.grad(total, differentiated, allow_unused=True)
            return detach(losses), detach(columns), [*gradients]

        together = {name: torch.stack([i[name] for i in inputs]) for name in inputs[0]}
        losses, columns, gradients = self._graphs.run(compute, together) if self._graphs else compute(together)
        for n, step in enumerate(steps):
            step.context.zero_grad()
            for parameter, gradient in zip((p for p in step.context.all_params if p.requires_grad), gradients):
                parameter.grad = None if gradient is None else match_strides(parameter, gradient[n])
        return [
            ({k: v[n] for k, v in losses.items()}, {k: v[n] for k, v in columns.items()}) for n in range(len(steps))
        ]

    def _open(self, executors: list[StepExecutor], methods: list[FunctionalMethod]) -> None:
        """Stack the tensors that the methods have now."""
        self._parameters = _stack([dict(m.named_parameters()) for m in methods], self._parameters)
        self._state = _stack([get_state(m) for m in methods], self._state)
        self._module = _Terms(methods[0])
        self._trained = {name: p.requires_grad for name, p in methods[0].named_parameters()}
        if executors[0].used == "graph":
            self._graphs = self._graphs or executors[0].make_graphs()
            for graphs in (self._graphs, *(executor.graphs for executor in executors)):
                graphs.clear()  # their parameters lie elsewhere now


class _Terms(nn.Module):
    """A method whose ``forward`` is its :meth:`FunctionalMethod.terms`, since functional_call calls ``forward``."""

    def __init__(self, method: FunctionalMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, inputs: Inputs, task: int) -> Terms:
        """(inputs, task) -> loss terms and columns."""
        return self.method.terms(inputs, task)


def _stack(owned: list[dict[str, Tensor]], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of each name as one, (N, ...); from now on the owners' tensors are views of it."""
    stacks = {}
    for name in owned[0]:
        tensors, stack = [tensors[name] for tensors in owned], before.get(name)
        if (
            stack is None
            or len(stack) != len(tensors)
            or any(t.data_ptr() != s.data_ptr() for t, s in zip(tensors, stack))
        ):
            stack = torch.stack([t.detach() for t in tensors])
            for tensor, view in zip(tensors, stack):
                tensor.data = view
        stacks[name] = stack
    return stacks
