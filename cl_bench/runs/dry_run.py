"""What a run would be and cost, without running it.

A dry run ends in about a minute on any network. It opens the first two tasks and the last one with few images, times
some steps and some answers in each, and opens and closes the tasks between without a step. What does not fit into its
seconds is timed with fewer images and scaled by counted operations (``torch.utils.flop_counter``).
"""

import copy
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cl_bench.config.build import Parts
from cl_bench.core.record import Record
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.evaluate import MAX_BATCH, evaluate
from cl_bench.engine.step import Graphs, StepGenerator
from cl_bench.engine.trainer import count_parameters
from cl_bench.loggers.group import Loggers
from cl_bench.methods.base import Predict
from cl_bench.system.memory import peak_bytes

SECONDS = 20.0
"""Seconds for everything that is timed. Nothing is cut off, so the smallest pieces of work come on top where even they
take long: one step of :data:`SMALLEST` images a phase, one pass of :data:`OPENED` images, of one task at most."""

STEPS_UNTIL, ANSWERS_UNTIL, WALK_UNTIL = (0.3, 0.6, 0.9), (0.35, 0.65, 1.0), 0.7
"""When the steps and the answers of the first, second and last probed task, and the tasks between, are over: a part of
the seconds."""

SMALLEST = 4
"""Images of the first timed batch."""

TIMED = 5
"""Most calls that are timed with batches of one size."""

LEAST_GAIN, GAIN = 0.5, 0.7
"""Seconds an image in a full batch relative to those in the smallest one, where no larger batch was timed yet: at
least, and expected. Found were 0.36 to 0.87 on ResNets and ViTs."""

OPENED, BETWEEN = 32, 2
"""Images that a task is opened and closed with: one whose steps are timed, and one between."""

SLACK = 1.3
"""The range of the hours is wider than the timings by this factor at both ends (docs/speed.md says how far off they
were)."""

LATER = 4.0
"""What a later task may cost relative to the first, where only that was timed: DyTox in 50 tasks has three times the
images in its second, a teacher, and fine-tuning."""

Span = np.ndarray
"""(3,) seconds: at least, expected, at most."""


class Budget:
    """Seconds that something may take, from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] | None = None) -> None:
        self.seconds, self.clock = seconds, clock or time.perf_counter
        self._began = self.clock()

    def left(self) -> float:
        """Seconds until its end, negative after it."""
        return self._began + self.seconds - self.clock()

    def share(self, part: float, until: float = 1.0) -> "Budget":
        """A part of what is left of its first ``until``."""
        return Budget(part * max(0.0, self.left() - (1 - until) * self.seconds), self.clock)


def dry_run(parts: Parts, summary: dict[str, Any], budget: Budget | None = None) -> None:
    """Print tasks, parameters, memory and expected hours; the same as one JSON object on the last line.

    The hours leave out checkpoints, loggers, and what a method does after each epoch.
    """
    budget = budget or Budget(SECONDS)
    probe = Probe(parts, budget)
    probe.run()
    training, evaluation = probe.training(), probe.evaluation()
    cost = asdict(Record.empty(1).cost) | {
        "train_seconds": float(training[1]),
        "evaluate_seconds": float(evaluation[1]),
        "samples_seen": None,
        "peak_memory_bytes": peak_bytes(parts.device),
        "parameters": count_parameters(parts.method),
        "parameters_trainable": count_parameters(parts.method, trainable=True),
        "buffer_bytes": parts.buffer.nbytes,
        "method_bytes": parts.method.memory_bytes(),
    }
    low, expected, high = ((training + evaluation) / 3600).tolist()
    if probe.probed[-1].id == 0 < len(probe.tasks) - 1:
        high *= LATER
    phases = [phase for task in probe.probed for phase in task.phases]
    summary = summary | parts.facts()
    summary |= {
        "status": "dry_run",
        "class_il": None,
        "task_il": None,
        "cost": cost,
        "step_seconds": [float(phase.step.seconds[1]) for phase in phases],
        "data_bytes": sum(d.images.numel() for t in parts.scenario.tasks for d in (t.train, t.val, t.test)),
        "expected_hours": expected,
        "expected_hours_range": [low / SLACK, high * SLACK],
        "probe_seconds": budget.seconds - budget.left(),
        "probe_batches": [phase.step.size for phase in phases],
        "assumptions": probe.assumptions(),
    }
    _print(parts, summary)
    print(json.dumps(summary, allow_nan=False))


def _print(parts: Parts, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    scenario = parts.scenario
    table = Table(title=f"{summary['experiment']}: {summary['name']}, nothing is trained")
    for column in ("task", "classes", "training", "validation", "test images"):
        table.add_column(column, justify="left" if column == "classes" else "right")
    for task in scenario.tasks:
        named = [(str(c), scenario.class_names[c]) for c in scenario.original(task)]
        names = ", ".join(c if c == name else f"{c} {name}" for c, name in named)
        table.add_row(str(task.id), names, *(str(len(d)) for d in (task.train, task.val, task.test)))
    console = Console()
    console.print(table)
    cost, steps = summary["cost"], summary["step_seconds"]
    console.print(f"parameters: {cost['parameters']:,} ({4 * cost['parameters'] / 2**20:.1f} MiB as fp32)")
    console.print(f"data on {parts.device}: {summary['data_bytes'] / 2**20:.1f} MiB")
    console.print(f"buffer: {parts.buffer.capacity} images, {cost['buffer_bytes'] / 2**20:.2f} MiB")
    console.print(f"step: {1000 * steps[0]:.1f} ms in the first task, {1000 * steps[-1]:.1f} ms in the last one timed")
    console.print(f"memory at the peak of the probe: {cost['peak_memory_bytes'] / 2**20:.0f} MiB")
    low, high = summary["expected_hours_range"]
    console.print(
        f"expected: {summary['expected_hours']:.2f} hours on {parts.device}, from {low:.2f} to {high:.2f} "
        f"(training {cost['train_seconds']:.0f} s, evaluation {cost['evaluate_seconds']:.0f} s)"
    )
    for assumption in summary["assumptions"]:
        console.print(f"  - {assumption}")


class Operations(TorchDispatchMode):
    """Counts floating-point operations while it is entered.

    By the formulas of ``torch.utils.flop_counter``; its ``FlopCounterMode`` cannot stand around ``torch.func.grad``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Perform and count one operation."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.count += formula(*args, **kwargs, out_val=result)
        return result


@dataclass(frozen=True)
class Measured:
    """Seconds of a call with ``full`` images, of which at most ``size`` at once were timed.

    Attributes:
        gain: seconds an image in a full batch relative to those in the smallest one.
    """

    seconds: Span
    size: int
    full: int
    gain: float


def measure(
    work: Callable[[int], int], full: int, budget: Budget, *, gain: float = GAIN, only_full: bool = False
) -> Measured:
    """Time ``work(images)``, with ``full`` images where the budget allows, else scaled from what it does allow.

    It returns the images that it drew beside those, which stay as many whatever its size.
    What is scaled lies between two limits: the seconds grow with the counted operations from the largest timed size on
    (as if nothing were spent a call), or on a line through the smallest and the largest one. Their geometric mean is
    expected.

    Args:
        gain: of what was measured before, by which the smallest size is scaled where no other could be timed.
        only_full: no other size, for work that has to be compiled for each; the first calls are thrown away.
    """

    drawn = 0

    def seconds(size: int) -> float:
        nonlocal drawn
        began = budget.clock()
        drawn = work(size)
        return budget.clock() - began

    def timed(size: int, part: float, slowest: float = 0.0) -> list[float]:
        taken: list[float] = []
        until = (1 - part) * budget.left()
        while len(taken) < TIMED and budget.left() - max([slowest, *taken]) > until:
            taken.append(seconds(size))
        return taken or [slowest or seconds(size)]

    def counted(size: int, part: float) -> tuple[int, list[float]]:
        with Operations() as operations:
            slower = seconds(size)  # than without counting
        return operations.count, timed(size, part, slower)

    size = small = full if only_full else min(full, SMALLEST)
    first = max(seconds(size) for _ in range(Graphs.WARM_UP + 1 if only_full else 1))
    small_count, taken = 0, [first]
    if size == full:
        taken = timed(size, 1)
    elif budget.left() > first:
        small_count, taken = counted(size, 1 / 8)
    count, small_taken = small_count, taken
    images = (full + drawn) / (small + drawn)
    while small_count and size < full:
        room = int(budget.left() / (1.5 * statistics.median(taken) / size))  # an image takes less in a larger batch
        if room < 1.25 * size:
            break
        size = min(room, full)
        count, taken = counted(size, 1)
    spread = np.array([min(taken), statistics.median(taken), max(taken)])
    alone = statistics.median(small_taken) * images  # as if every image cost what it does in the smallest batch
    if size == small:
        if size < full:
            spread = spread * images * [min(gain, LEAST_GAIN), gain, 1]
        return Measured(spread, size, full, gain)
    if size < full:
        full_count = small_count + (count - small_count) / (size - small) * (full - small)
        slope = max(0.0, statistics.median(taken) - statistics.median(small_taken)) / (size - small)
        line, scaled = spread + slope * (full - size), spread * full_count / count
        low, high = np.minimum(line, scaled), np.maximum(line, scaled)
        spread = np.array([low[0], math.sqrt(low[1] * high[1]), high[2]])
    return Measured(spread, size, full, min(1.0, float(spread[1]) / alone))


@dataclass(frozen=True)
class ProbedPhase:
    """A phase whose steps were timed.

    Attributes:
        step: of the whole batch.
        epochs: at most, where it ``may_end`` before.
        visited: images of an epoch relative to those of the phase.
        stream: images of its own; None for those of the task, however many they are.
        remembered: the tasks whose images its memory was offered, relative to the phase's task; None without memory.
    """

    step: Measured
    epochs: int
    may_end: bool
    visited: float
    stream: int | None
    remembered: int | None


@dataclass(frozen=True)
class ProbedTask:
    """A task that was opened, timed and closed with few images.

    Attributes:
        fixed: seconds of the method's code between phases that computes with no image.
        growing: seconds an image of its other code there.
        answer: seconds an image of the evaluation after it.
    """

    id: int
    phases: list[ProbedPhase]
    fixed: float
    growing: float
    answer: Span


class Steps:
    """The steps of a phase, one a call, with batches of the size that is asked for."""

    def __init__(self, probe: "Probe", task: Task, phase: Phase) -> None:
        self._probe, self._task, self._phase = probe, task, replace(phase, params=list(phase.params))
        self._size = 0
        self._steps: StepGenerator[None] | None = None
        self._losses: Losses = {}

    def __call__(self, size: int) -> int:
        """Perform a step; returns the images that it drew from the buffer."""
        before = self._probe.drawn
        if size != self._size:
            self.close()
            trainer, self._size = self._probe.trainer, size
            trainer.settings = replace(trainer.settings, batch_size=size)
            order = torch.arange(size).repeat(2 * (Graphs.WARM_UP + TIMED))  # more steps than are ever asked for
            phase = replace(self._phase, data=few(self._phase.data, size), epochs=1, order=lambda generator: order)
            self._steps = trainer.generate_phase_steps(self._task, 0, phase, None)
            step, executor = next(self._steps)
        else:
            assert self._steps is not None
            step, executor = self._steps.send(self._losses)
        self._losses = executor.perform(step)
        self._probe.wait()
        return self._probe.drawn - before

    def close(self) -> None:
        """Leave the phase."""
        if self._steps:
            self._steps.close()


class Probe:
    """Goes through the tasks with few images, and keeps what it timed."""

    def __init__(self, parts: Parts, budget: Budget) -> None:
        self.parts, self.budget, self.method, self.tasks = parts, budget, parts.method, parts.scenario.tasks
        unsaved = replace(parts.settings, checkpoint_seconds=math.inf, checkpoint_steps=None)
        self.eager = parts.device.type == "cpu"  # a compiler would take minutes, for steps that are no faster there
        settings = replace(unsaved, speed="eager") if self.eager else unsaved
        self.trainer = replace(parts, settings=settings).trainer(Loggers([]), Checkpoint(Path()), stop=lambda: False)
        self.probed: list[ProbedTask] = []
        self.alternatives: list[Span] = []
        self._step_gain = self._answer_gain = GAIN
        self._offered = self.drawn = 0
        sample = parts.buffer.sample

        def counting(size: int) -> Batch:
            batch = sample(size)
            self.drawn += len(batch)
            return batch

        parts.buffer.sample = counting  # type: ignore[method-assign]

    def run(self) -> None:
        """Time the first two tasks, and the last one or one before it; nothing is begun after the budget's end."""
        for task in self.tasks:
            timed = any(probed.phases for probed in self.probed)  # joint training has steps in the last task only
            if timed and self.budget.left() <= 0:
                break
            third = len(self.probed) == 2 and timed and self.budget.share(1, WALK_UNTIL).seconds <= 0
            if len(self.probed) < 2 or third or task is self.tasks[-1]:
                self.probed.append(self._task(task))
            else:
                for _ in self._learn(task, BETWEEN):
                    pass
            if len(self.probed) == 3:
                break
        for rule in self.method.alternatives().values():
            spare = self.budget.left() > 0
            self.alternatives.append(self._answer(len(self.tasks), rule) if spare else self.probed[-1].answer)

    def wait(self) -> None:
        """Wait for the device."""
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize(self.parts.device)
        elif self.parts.device.type == "mps":
            torch.mps.synchronize()

    # -- what a run comes to ---------------------------------------------------------------------------------------

    def training(self) -> Span:
        """Seconds of all training."""
        return sum((self._over_tasks(t, self._training) for t in range(len(self.tasks))), np.zeros(3))

    def evaluation(self) -> Span:
        """Seconds of all evaluations: before the first task, after each, and by the other rules at the end."""
        sizes = [len(task.asked(self.parts.settings.evaluate_on)) for task in self.tasks]
        seconds = sum(sizes) * self.probed[0].answer
        for t in range(len(sizes)):
            seconds = seconds + sum(sizes[: t + 2]) * self._over_tasks(t, lambda probed, t: probed.answer)
        return sum(sizes) * sum(self.alternatives, np.zeros(3)) + seconds

    def assumptions(self) -> list[str]:
        """What the hours rest on beside what was timed."""
        found = []
        phases = [phase for task in self.probed for phase in task.phases]
        scaled = [phase.step for phase in phases if phase.step.size < phase.step.full]
        if scaled:
            sizes = ", ".join(f"{step.size} of {step.full}" for step in scaled)
            found.append(f"Steps were timed with fewer images ({sizes}) and scaled by counted operations.")
            found.append("A whole batch needs more memory than the peak of the probe.")
        if self.eager and self.parts.settings.speed == "compile":
            found.append("Steps were timed eagerly; compiled ones take as long on a CPU, and compiling was not timed.")
        timed, last = ", ".join(str(task.id) for task in self.probed), len(self.tasks) - 1
        if self.probed[-1].id < last:
            found.append(
                f"No time was left after task {self.probed[-1].id} of 0 to {last}; later ones are taken as equal."
            )
            if self.probed[-1].id == 0:
                found.append("Later tasks have a memory or an old network beside: they may cost several times as much.")
        elif len(self.probed) < len(self.tasks):
            found.append(f"Tasks {timed} of 0 to {last} were timed; those between are taken to lie between.")
        if any(phase.may_end for phase in phases):
            found.append(
                "Phases end when they have converged: the hours are those of all epochs, the least are of one."
            )
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
        if load > 1.5 * cores and self.parts.device.type == "cpu":
            found.append(f"Other work slowed it down: the load was {load:.1f} on {cores} processors.")
        return found

    def _over_tasks(self, t: int, cost: Callable[[ProbedTask, int], Span]) -> Span:
        """The cost of task ``t``, by the probed tasks on both sides of it."""
        before = next(task for task in reversed(self.probed) if task.id <= t)
        after = next((task for task in self.probed if task.id >= t), before)
        if before is after or len(before.phases) != len(after.phases):
            return cost(before, t)
        weight = (t - before.id) / (after.id - before.id)
        return (1 - weight) * cost(before, t) + weight * cost(after, t)

    def _training(self, probed: ProbedTask, t: int) -> Span:
        """Seconds of task ``t`` if it is as a probed one."""
        seconds = np.full(3, probed.fixed + probed.growing * len(self.tasks[t].train))
        for phase in probed.phases:
            steps = self._images(phase, t) * phase.visited / phase.step.full
            epochs = np.array([1 if phase.may_end else phase.epochs, phase.epochs, phase.epochs])
            # the last step of an epoch has fewer images and takes at most as long as the others
            seconds = seconds + epochs * np.array([steps, steps, math.ceil(steps)]) * phase.step.seconds
        return seconds

    def _images(self, phase: ProbedPhase, t: int) -> int:
        """Images of a phase if it is one of task ``t``."""
        images = len(self.tasks[t].train) if phase.stream is None else phase.stream
        if phase.remembered is not None:
            offered = sum(len(task.train) for task in self.tasks[: t + phase.remembered])
            images += min(self.parts.buffer.capacity, offered)
        return images

    # -- timing ----------------------------------------------------------------------------------------------------

    def _learn(self, task: Task, images: int) -> Iterator[Phase]:
        short = replace(task, train=few(task.train, images), val=few(task.val, min(images, len(task.val))))
        self.method.eval()
        self._offered += images
        yield from self.method.learn(short)

    def _task(self, task: Task) -> ProbedTask:
        """Open a task with few images, time the steps of its phases, close it, and time its evaluation."""
        phases: list[ProbedPhase] = []
        fixed = growing = 0.0
        before = self._offered
        learning = self._learn(task, OPENED)
        while True:
            began = self.budget.clock()
            with Operations() as operations:
                phase = next(learning, None)
            self.wait()
            seconds = self.budget.clock() - began
            if operations.count:
                growing += seconds / OPENED
            else:
                fixed += seconds
            if phase is None:
                return ProbedTask(task.id, phases, fixed, growing, self._answer(task.id + 1))
            phases.append(self._phase(task, len(phases), phase, before))
            self.method.eval()

    def _phase(self, task: Task, number: int, phase: Phase, before: int) -> ProbedPhase:
        """Time the steps of a phase; the memory had been offered ``before`` images when the task was opened."""
        settings = self.parts.settings
        remembered = int((phase.data.index < 0).sum())  # a buffer does not keep where an image stood
        stream = len(phase.data) - remembered
        found = ProbedPhase(
            step=Measured(np.zeros(3), 0, 0, GAIN),
            epochs=phase.epochs or settings.epochs,
            may_end=False,
            visited=len(phase.order(torch.Generator())) / len(phase.data) if phase.order else 1.0,
            stream=None if stream == OPENED else stream,
            remembered=int(remembered > before) if remembered else None,
        )
        steps = Steps(self, task, phase)
        whole = min(settings.batch_size, self._images(found, task.id))
        only_full = not self.eager  # a batch is quick, every size might be compiled
        share = 1 / 2 if len(self.probed) < 2 else 1 / max(1, len(self.probed[1].phases) - number)
        budget = self.budget.share(share, STEPS_UNTIL[len(self.probed)])
        step = measure(steps, whole, budget, gain=self._step_gain, only_full=only_full)
        self._step_gain = step.gain
        steps.close()
        may_end = phase.after_epoch is not None and phase.after_epoch(0) is not None
        return replace(found, step=step, may_end=may_end)

    def _answer(self, learned: int, rule: Predict | None = None) -> Span:
        """Seconds an image of an evaluation after ``learned`` tasks."""
        split = self.parts.settings.evaluate_on
        sizes = [len(task.asked(split)) for task in self.tasks[: learned + 1]]
        full = min(MAX_BATCH, sum(sizes))

        def ask(size: int) -> int:
            probe = copy.copy(self.parts.scenario)
            probe.tasks = list(self.tasks)
            for t in range(len(sizes)):
                part = few(self.tasks[t].asked(split), size * (t + 1) // len(sizes) - size * t // len(sizes))
                probe.tasks[t] = replace(self.tasks[t], test=part, val=part)
            evaluate(self.method, probe, learned=learned, split=split, autocast=self.parts.autocast, rule=rule)
            return 0

        budget = self.budget.share(1 / 2, ANSWERS_UNTIL[min(len(self.probed), 2)])
        found = measure(ask, full, budget, gain=self._answer_gain)
        self._answer_gain = found.gain
        return found.seconds / full


def few(data: Data, size: int) -> Data:
    """``size`` images spread over the whole set; some of them twice where there are fewer."""
    return data.take(torch.linspace(0, len(data) - 1, size).long().to(data.labels.device))
