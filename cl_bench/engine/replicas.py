"""Several seeds of one configuration side by side, each of their steps computed as one.

Every replica is a run of its own: its trainer, generators, buffer, loggers, checkpoint and folder. What they share is
the arithmetic of a step: the parameters of all networks are stacked, and forward and backward pass are computed for all
of them by ``torch.func.vmap``. The draws before it and the optimizer after it are each replica's own, so its result is
that of a separate run up to rounding.

It wants a method whose step is a function of tensors (:class:`~cl_bench.methods.base.FunctionalMethod`) and a network
without dropout, whose draws could not be a separate run's. :func:`obstacle` says what is in the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from cl_bench.core.types import Losses, Phase
from cl_bench.engine.checkpoint import set_torch_rng_state, torch_rng_state
from cl_bench.engine.step import NOT_FUNCTIONAL, Graphs, Results, Step, detached, laid_out_as, state_of, total
from cl_bench.engine.trainer import Course
from cl_bench.methods.base import FunctionalMethod, Inputs, Method, Terms
from cl_bench.system.signals import Interrupted


def obstacle(method: Method, device: torch.device) -> str | None:
    """Why replicas of a method are not computed as one, None where they are."""
    if not isinstance(method, FunctionalMethod):
        return NOT_FUNCTIONAL
    if not method.self_contained:
        return "this method keeps a network aside, which cannot be stacked"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in method.modules()):
        return "the network has dropout, whose draws would not be those of a separate run"
    if device.type == "cpu":
        return "a CPU computes stacked networks no faster than one after the other (docs/speed.md)"
    return None


class Lane:
    """One replica on its way: its course, the step it waits for, and the state of torch's generators for it."""

    def __init__(self, course: Course[Step, Losses, Any]) -> None:
        self.course = course
        self.step: Step | None = None
        self.result: Any = None
        self.error: Exception | Interrupted | None = None
        self._rng = torch_rng_state()

    def go_on(self, losses: Losses | Exception | None) -> None:
        """Up to the next step, or to the end: a result or an error. What a step failed with is raised in the course."""
        set_torch_rng_state(self._rng)
        self.step = None
        try:
            if isinstance(losses, Exception):
                self.step = self.course.throw(losses)
            else:
                self.step = next(self.course) if losses is None else self.course.send(losses)
        except StopIteration as end:
            self.result = end.value
        except (Exception, Interrupted) as error:  # the others go on; it is raised when they are through
            self.error = error
        self._rng = torch_rng_state()

    def perform(self, step: Step, inputs: Inputs | None) -> Losses | Exception:
        """The step by itself; an error of it is this lane's only."""
        set_torch_rng_state(self._rng)
        try:
            return step.speed.perform(step, inputs)
        except Exception as error:
            return error
        finally:
            self._rng = torch_rng_state()


def lead(courses: Sequence[Course[Step, Losses, Any]]) -> list[Any]:
    """Follow all courses side by side; returns what each comes to.

    Raises:
        Exception: the first error of a course, once the others have ended.
    """
    lanes = [Lane(course) for course in courses]
    joint = Joint()
    for lane in lanes:
        lane.go_on(None)
    while waiting := [(lane, lane.step) for lane in lanes if lane.step is not None]:
        for (lane, _), losses in zip(waiting, _perform(joint, waiting)):
            lane.go_on(losses)
    for lane in lanes:
        if lane.error is not None:
            raise lane.error
    return [lane.result for lane in lanes]


def _perform(joint: "Joint", waiting: list[tuple[Lane, Step]]) -> list[Losses | Exception]:
    """The loss terms of each step, or what it failed with."""
    methods = [step.functional for _, step in waiting]
    inputs = [m.inputs(step.batch) if m is not None else None for m, (_, step) in zip(methods, waiting)]
    known = [(m, i) for m, i in zip(methods, inputs) if m is not None and i is not None]
    steps = [step for _, step in waiting]
    if len(known) < len(steps) or len({_shape(step, i) for step, (_, i) in zip(steps, known)}) > 1:
        return [lane.perform(step, i) for (lane, step), i in zip(waiting, inputs)]
    try:
        results = joint.differentiate(steps, [m for m, _ in known], [i for _, i in known])
    except Exception as error:
        return [error for _ in steps]
    return [_finish(step, m, terms, joint.how) for step, (m, _), terms in zip(steps, known, results)]


def _finish(step: Step, method: FunctionalMethod, terms: Terms, how: str) -> Losses | Exception:
    losses, columns = terms
    step.speed.joint = how
    try:
        with step.autocast:
            method.remember(step.batch, columns)
        step.update()
    except Exception as error:
        return error
    return losses


def _shape(step: Step, inputs: Inputs) -> tuple:
    """What must be alike for steps to be computed as one."""
    return step.batch.task, len(step.params), tuple((name, t.shape, t.dtype) for name, t in inputs.items())


class Joint:
    """Loss terms and gradients of several methods as one computation over stacked parameters.

    Shapes: N replicas; a tensor of shape S of each of them is stacked to (N, S). The modules' own tensors become views
    of the stacks, so that an optimizer's step on one of them, or a loaded checkpoint, is seen here. Where the replicas'
    steps are graphs, so is this computation.
    """

    def __init__(self) -> None:
        self._phases: list[Phase] = []
        self._parameters: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        self._graphs: Graphs | None = None

    @property
    def how(self) -> str:
        """How the replicas' steps are performed, for their summaries."""
        graph = self._graphs is not None and not self._graphs.failed
        return "computed with other replicas" + (", as a CUDA graph" if graph else "")

    def differentiate(self, steps: list[Step], methods: list[FunctionalMethod], inputs: list[Inputs]) -> list[Terms]:
        """Each replica's loss terms and columns, and its gradients on its parameters."""
        phases = [step.phase for step in steps]
        if list(map(id, phases)) != list(map(id, self._phases)):  # within a phase no tensor takes another's place
            self._phases = phases
            self._open(steps, methods)
        task, module, trained = steps[0].batch.task, self._module, self._trained

        def terms(parameters: dict[str, Tensor], state: dict[str, Tensor], inputs: Inputs) -> Terms:
            named = {f"method.{name}": tensor for name, tensor in {**parameters, **state}.items()}
            return functional_call(module, named, (inputs, task))

        def compute(together: Inputs) -> Results:
            leaves = {name: stack.detach().requires_grad_(trained[name]) for name, stack in self._parameters.items()}
            with steps[0].autocast:
                losses, columns = vmap(terms, randomness="error")(leaves, self._state, together)
            wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
            gradients = torch.autograd.grad(total(losses.values()).sum(), wanted, allow_unused=True)
            return detached(losses), detached(columns), [*gradients]

        together = {name: torch.stack([i[name] for i in inputs]) for name in inputs[0]}
        losses, columns, gradients = self._graphs.run(compute, together) if self._graphs else compute(together)
        for n, step in enumerate(steps):
            step.zero_grad()
            for parameter, gradient in zip((p for p in step.all_params if p.requires_grad), gradients):
                parameter.grad = None if gradient is None else laid_out_as(parameter, gradient[n])
        return [
            ({k: v[n] for k, v in losses.items()}, {k: v[n] for k, v in columns.items()}) for n in range(len(steps))
        ]

    def _open(self, steps: list[Step], methods: list[FunctionalMethod]) -> None:
        """Stack what the methods are made of by now."""
        self._parameters = _stacked([dict(m.named_parameters()) for m in methods], self._parameters)
        self._state = _stacked([state_of(m) for m in methods], self._state)
        self._module = _Terms(methods[0])
        self._trained = {name: p.requires_grad for name, p in methods[0].named_parameters()}
        if steps[0].speed.used == "graph":
            self._graphs = self._graphs or steps[0].speed.new_graphs()
            for graphs in (self._graphs, *(step.speed.graphs for step in steps)):
                graphs.clear()  # they look for the parameters where these were before


class _Terms(nn.Module):
    """A method whose ``forward`` is its :meth:`FunctionalMethod.terms`, which is what functional_call calls."""

    def __init__(self, method: FunctionalMethod) -> None:
        super().__init__()
        self.method = method

    def forward(self, inputs: Inputs, task: int) -> Terms:
        """(inputs, task) -> loss terms and columns."""
        return self.method.terms(inputs, task)


def _stacked(owned: list[dict[str, Tensor]], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each name's tensors as one, (N, ...), of which the owners' tensors are views from now on."""
    stacks = {}
    for name in owned[0]:
        tensors, stack = [tensors[name] for tensors in owned], before.get(name)
        if (
            stack is None
            or len(stack) != len(tensors)
            or any(t.data_ptr() != s.data_ptr() for t, s in zip(tensors, stack))
        ):
            stack = torch.stack([t.detach() for t in tensors])
            for tensor, place in zip(tensors, stack):
                tensor.data = place
        stacks[name] = stack
    return stacks
