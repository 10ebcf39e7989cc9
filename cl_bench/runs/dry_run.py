"""What a run would be and cost, without training it.

A dry run takes about a minute with any network. It starts the first two tasks and the last one with few images, and
times some steps and some predictions in each. The tasks between are started and ended without a step. What does not fit
into its seconds is timed with fewer images and scaled (:mod:`cl_bench.runs.timing`).
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cl_bench.config.build import Parts
from cl_bench.core.record import Record
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.evaluate import MAX_BATCH, SINGLE_TASK_BATCH
from cl_bench.engine.evaluate import measure as measure_answers
from cl_bench.engine.probe import PASSES
from cl_bench.engine.step import Graphs, StepGenerator
from cl_bench.engine.trainer import count_parameters
from cl_bench.loggers.group import Loggers
from cl_bench.methods.base import Predict
from cl_bench.runs.timing import GAIN, TIMED, Budget, Measured, Operations, Span, measure
from cl_bench.system.memory import get_peak_bytes

SECONDS = 20.0
"""Seconds for everything that is timed. Nothing is cut off, so a dry run takes longer if the smallest work is slow: one
step of ``SMALLEST`` images per phase, and one pass of :data:`OPENED` images, of one task at most."""

STEPS_UNTIL, ANSWERS_UNTIL, WALK_UNTIL = (0.3, 0.6, 0.9), (0.35, 0.65, 1.0), 0.7
"""By which part of the seconds must end: the steps, and the predictions, of the first, second and last probed task; and
the tasks between."""

OPENED, BETWEEN = 32, 2
"""Images of a task whose steps are timed, and of a task between."""

SLACK = 1.3
"""The range of hours is wider than the timings by this factor at both ends (docs/speed.md has the errors measured)."""

LATER = 4.0
"""Cost of a later task relative to the first, at most, if only the first was timed. In 50 tasks, DyTox has three times
the images in its second task, a teacher, and fine-tuning."""


def dry_run(parts: Parts, summary: dict[str, Any], budget: Budget | None = None) -> None:
    """Print tasks, parameters, memory and expected hours, and the same as one JSON object on the last line.

    The hours do not include checkpoints, loggers, and what a method does after each epoch.
    """
    budget = budget or Budget(SECONDS)
    probe = Probe(parts, budget)
    probe.run()
    training, evaluation, curve = probe.estimate_training(), probe.estimate_evaluation(), probe.estimate_curve()
    cost = asdict(Record.empty(1).cost) | {
        "train_seconds": float(training[1]),
        "evaluate_seconds": float(evaluation[1]),
        "curve_seconds": float(curve[1]),
        "samples_seen": None,
        "peak_memory_bytes": get_peak_bytes(parts.device),
        "parameters": count_parameters(parts.method),
        "parameters_trainable": count_parameters(parts.method, trainable=True),
        "buffer_bytes": parts.buffer.nbytes,
        "method_bytes": parts.method.memory_bytes(),
    }
    low, expected, high = ((training + evaluation + curve) / 3600).tolist()
    if probe.probed[-1].id == 0 < len(probe.tasks) - 1:
        high *= LATER
    phases = [phase for task in probe.probed for phase in task.phases]
    summary = summary | parts.describe()
    summary |= {
        "status": "dry_run",
        "class_il": None,
        "task_il": None,
        "cost": cost,
        "step_seconds": [float(phase.step.seconds[1]) for phase in phases],
        "data_bytes": parts.scenario.nbytes,
        "expected_hours": expected,
        "expected_hours_range": [low / SLACK, high * SLACK],
        "probe_seconds": budget.seconds - budget.get_left(),
        "probe_batches": [phase.step.size for phase in phases],
        "assumptions": probe.list_assumptions(),
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
        named = [(str(c), scenario.class_names[c]) for c in scenario.list_class_ids(task)]
        names = ", ".join(c if c == name else f"{c} {name}" for c, name in named)
        table.add_row(str(task.id + 1), names, *(str(len(d)) for d in (task.train, task.val, task.test)))
    console = Console()
    console.print(table)
    cost, steps = summary["cost"], summary["step_seconds"]
    console.print(f"parameters: {cost['parameters']:,} ({4 * cost['parameters'] / 2**20:.1f} MiB as fp32)")
    console.print(f"data on {parts.device}: {summary['data_bytes'] / 2**20:.1f} MiB")
    console.print(f"buffer: {parts.buffer.capacity} images, {cost['buffer_bytes'] / 2**20:.2f} MiB")
    if steps:
        first, last = 1000 * steps[0], 1000 * steps[-1]
        console.print(f"step: {first:.1f} ms in the first task, {last:.1f} ms in the last one timed")
    console.print(f"memory at the peak of the probe: {cost['peak_memory_bytes'] / 2**20:.0f} MiB")
    low, high = summary["expected_hours_range"]
    curve = f", evaluation while learning {cost['curve_seconds']:.0f} s" if cost["curve_seconds"] else ""
    console.print(
        f"expected: {summary['expected_hours']:.2f} hours on {parts.device}, from {low:.2f} to {high:.2f} "
        f"(training {cost['train_seconds']:.0f} s, evaluation {cost['evaluate_seconds']:.0f} s"
        f"{curve})"
    )
    for assumption in summary["assumptions"]:
        console.print(f"  - {assumption}")


@dataclass(frozen=True)
class ProbedPhase:
    """A phase whose steps were timed.

    Attributes:
        step: seconds of a step with a full batch.
        epochs: at most, if it ``may_end`` earlier.
        visited: images of an epoch relative to the images of the phase.
        stream: images that are not from the buffer; None for all images of the task.
        remembered: the tasks whose images its buffer was offered, relative to the phase's task; None without buffer.
    """

    step: Measured
    epochs: int
    may_end: bool
    visited: float
    stream: int | None
    remembered: int | None


@dataclass(frozen=True)
class ProbedTask:
    """A task that was started, timed and ended with few images.

    Attributes:
        fixed: seconds of the method's code between phases that uses no image.
        growing: seconds per image of its other code there.
        answer: seconds per image of the evaluation after it.
    """

    id: int
    phases: list[ProbedPhase]
    fixed: float
    growing: float
    answer: Span


class Steps:
    """The steps of a phase, one per call, with batches of the requested size."""

    def __init__(self, probe: "Probe", task: Task, phase: Phase) -> None:
        self._probe, self._task, self._phase = probe, task, replace(phase, params=list(phase.params))
        self._size = 0
        self._steps: StepGenerator[None] | None = None
        self._losses: Losses = {}

    def __call__(self, size: int) -> int:
        """Perform a step; the number of images that it drew from the buffer is returned."""
        before = self._probe.drawn
        if size != self._size:
            self.close()
            trainer, self._size = self._probe.trainer, size
            order = torch.arange(size).repeat(2 * (Graphs.WARM_UP + TIMED))  # more steps than are ever asked for
            data = take_few(self._phase.data, size)
            phase = replace(self._phase, data=data, epochs=1, batch_size=size, order=lambda generator: order)
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
    """Runs through the tasks with few images, and keeps the times measured."""

    def __init__(self, parts: Parts, budget: Budget) -> None:
        self.parts, self.budget, self.method, self.tasks = parts, budget, parts.method, parts.scenario.tasks
        unsaved = replace(parts.settings, checkpoint_seconds=math.inf, checkpoint_steps=None, evaluate_every=None)
        self.eager = parts.device.type == "cpu"  # compiling takes minutes, and compiled steps are not faster there
        settings = replace(unsaved, speed="eager") if self.eager else unsaved
        self.trainer = replace(parts, settings=settings).build_trainer(
            Loggers([]), Checkpoint(Path()), stop=lambda: False
        )
        self.probed: list[ProbedTask] = []
        self.alternatives: list[Span] = []
        self._step_gain = self._answer_gain = GAIN
        self._offered = self.drawn = 0
        sample = parts.buffer.sample

        def sample_and_count(size: int, without: int | None = None) -> Batch:
            batch = sample(size, without)
            self.drawn += len(batch)
            return batch

        parts.buffer.sample = sample_and_count  # type: ignore[method-assign]

    def run(self) -> None:
        """Time the first two tasks, and the last one or one before it; nothing starts after the budget's end."""
        for task in self.tasks:
            timed = any(probed.phases for probed in self.probed)  # joint training has steps in the last task only
            if timed and self.budget.get_left() <= 0:
                break
            third = len(self.probed) == 2 and timed and self.budget.take_share(1, WALK_UNTIL).seconds <= 0
            if len(self.probed) < 2 or third or task is self.tasks[-1]:
                self.probed.append(self._probe_task(task))
            else:
                for _ in self._learn(task, BETWEEN):
                    pass
            if len(self.probed) == 3:
                break
        for rule in self.method.alternatives().values() if self.parts.settings.alternatives else ():
            spare = self.budget.get_left() > 0
            self.alternatives.append(self._time_answers(len(self.tasks), rule) if spare else self.probed[-1].answer)

    def wait(self) -> None:
        """Wait for the device."""
        if self.parts.device.type == "cuda":
            torch.cuda.synchronize(self.parts.device)
        elif self.parts.device.type == "mps":
            torch.mps.synchronize()

    # -- what a run comes to ---------------------------------------------------------------------------------------

    def estimate_training(self) -> Span:
        """Seconds of all training."""
        return sum((self._interpolate(t, self._estimate_task) for t in range(len(self.tasks))), np.zeros(3))

    def estimate_evaluation(self) -> Span:
        """Seconds of all evaluations: of the rows of the accuracy matrices, and with the other rules at the end."""
        sizes = [len(task.get_split(self.parts.settings.evaluate_on)) for task in self.tasks]
        each = self.parts.settings.evaluate_after == "each_task"
        seconds = each * sum(sizes) * self.probed[0].answer
        for t in range(len(sizes)) if each else [len(sizes) - 1]:
            seconds = seconds + sum(sizes[: t + 2]) * self._interpolate(t, lambda probed, t: probed.answer)
        if self.parts.settings.linear_probe:
            seconds = (
                seconds + (PASSES * sum(len(task.train) for task in self.tasks) + sum(sizes)) * self.probed[-1].answer
            )
        return sum(sizes) * sum(self.alternatives, np.zeros(3)) + seconds

    def estimate_curve(self) -> Span:
        """Seconds of all evaluations on the sample: every ``evaluate_every`` steps, and at the end of each task."""
        settings, seconds = self.parts.settings, np.zeros(3)
        if settings.evaluate_every is None:
            return seconds
        images = 0
        for t, task in enumerate(self.tasks):
            images += min(settings.evaluate_sample, len(task.get_split(settings.evaluate_on)))
            evaluations = 1 + self._interpolate(t, self._count_steps) / settings.evaluate_every
            seconds = seconds + evaluations * images * self._interpolate(t, lambda probed, t: probed.answer)
        return seconds

    def list_assumptions(self) -> list[str]:
        """The assumptions behind the expected hours, one sentence each."""
        found = []
        phases = [phase for task in self.probed for phase in task.phases]
        scaled = [phase.step for phase in phases if phase.step.size < phase.step.full]
        if scaled:
            sizes = ", ".join(f"{step.size} of {step.full}" for step in scaled)
            found.append(f"Steps were timed with fewer images ({sizes}) and scaled by counted operations.")
            found.append("A full batch needs more memory than the peak of the probe.")
        if self.eager and self.parts.settings.speed == "compile":
            found.append("Steps were timed eagerly; compiled ones take as long on a CPU. Compiling was not timed.")
        timed, count = ", ".join(str(task.id + 1) for task in self.probed), len(self.tasks)
        if self.probed[-1].id + 1 < count:
            found.append(
                f"No time was left after task {self.probed[-1].id + 1} of {count}; later ones are assumed equal."
            )
            if self.probed[-1].id == 0:
                found.append(
                    "Later tasks may also use a buffer or an old network: they may cost several times as much."
                )
        elif len(self.probed) < count:
            found.append(f"Tasks {timed} of {count} were timed; the others are interpolated.")
        if self.parts.settings.linear_probe:
            found.append("The fit of the linear probe is not included, only its passes over the images.")
        if any(phase.may_end for phase in phases):
            found.append(
                "Phases end when they have converged: the expected hours are for all epochs, the fewest for one."
            )
        load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
        if load > 1.5 * cores and self.parts.device.type == "cpu":
            found.append(f"Other programs slowed the timing down: the load was {load:.1f} on {cores} processors.")
        return found

    def _interpolate(self, t: int, cost: Callable[[ProbedTask, int], Span]) -> Span:
        """The cost of task ``t``, interpolated between the probed tasks on both sides of it."""
        before = next(task for task in reversed(self.probed) if task.id <= t)
        after = next((task for task in self.probed if task.id >= t), before)
        if before is after or len(before.phases) != len(after.phases):
            return cost(before, t)
        weight = (t - before.id) / (after.id - before.id)
        return (1 - weight) * cost(before, t) + weight * cost(after, t)

    def _estimate_task(self, probed: ProbedTask, t: int) -> Span:
        """Seconds of training task ``t`` if it is like a probed one."""
        seconds = np.full(3, probed.fixed + probed.growing * len(self.tasks[t].train))
        for phase in probed.phases:
            seconds = seconds + self._count_phase_steps(phase, t) * phase.step.seconds
        return seconds

    def _count_steps(self, probed: ProbedTask, t: int) -> Span:
        """Optimizer steps of task ``t`` if it is like a probed one."""
        return sum((self._count_phase_steps(phase, t) for phase in probed.phases), np.zeros(3))

    def _count_phase_steps(self, phase: ProbedPhase, t: int) -> Span:
        """Optimizer steps of a phase in task ``t``: at least, expected, at most.

        The last step of an epoch has fewer images and takes at most as long as the others.
        """
        steps = self._count_images(phase, t) * phase.visited / phase.step.full * self.parts.settings.steps_per_batch
        epochs = np.array([1 if phase.may_end else phase.epochs, phase.epochs, phase.epochs])
        limit = self.parts.settings.max_steps or math.inf
        return np.minimum(epochs * np.array([steps, steps, math.ceil(steps)]), limit)

    def _count_images(self, phase: ProbedPhase, t: int) -> int:
        """Images of a phase if it belongs to task ``t``."""
        images = len(self.tasks[t].train) if phase.stream is None else phase.stream
        if phase.remembered is not None:
            offered = sum(len(task.train) for task in self.tasks[: t + phase.remembered])
            images += min(self.parts.buffer.capacity, offered)
        return images

    # -- timing ----------------------------------------------------------------------------------------------------

    def _learn(self, task: Task, images: int) -> Iterator[Phase]:
        short = replace(task, train=take_few(task.train, images), val=take_few(task.val, min(images, len(task.val))))
        self.method.eval()
        self._offered += images
        yield from self.method.learn(short)

    def _probe_task(self, task: Task) -> ProbedTask:
        """Start a task with few images, time the steps of its phases, end it, and time its evaluation."""
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
                return ProbedTask(task.id, phases, fixed, growing, self._time_answers(task.id + 1))
            phases.append(self._probe_phase(task, len(phases), phase, before))
            self.method.eval()

    def _probe_phase(self, task: Task, number: int, phase: Phase, before: int) -> ProbedPhase:
        """Time the steps of a phase; ``before`` images had been offered to the buffer when the task started."""
        settings = self.parts.settings
        remembered = int((phase.data.index < 0).sum())  # a buffer does not store the index of an image
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
        whole = min(phase.batch_size or settings.batch_size, self._count_images(found, task.id))
        only_full = not self.eager  # a batch is fast there, and every new size may be compiled
        share = 1 / 2 if len(self.probed) < 2 else 1 / max(1, len(self.probed[1].phases) - number)
        budget = self.budget.take_share(share, STEPS_UNTIL[len(self.probed)])
        step = measure(steps, whole, budget, gain=self._step_gain, only_full=only_full)
        self._step_gain = step.gain
        steps.close()
        may_end = phase.after_epoch is not None and phase.after_epoch(0) is not None
        return replace(found, step=step, may_end=may_end)

    def _time_answers(self, learned: int, rule: Predict | None = None) -> Span:
        """Seconds per image of an evaluation after ``learned`` tasks."""
        split = self.parts.settings.evaluate_on
        sizes = [len(task.get_split(split)) for task in self.tasks[: learned + 1]]
        full = min(MAX_BATCH, sum(sizes))

        def ask(size: int) -> int:
            shares = len(sizes)
            if self.method.test_batches == "single_task":  # each batch costs as much with one image as with all
                shares = math.ceil(size / SINGLE_TASK_BATCH)
            images = [0] * len(sizes)
            for share in range(shares):
                images[share * len(sizes) // shares] += size * (share + 1) // shares - size * share // shares
            probe = copy.copy(self.parts.scenario)
            probe.tasks = list(self.tasks)
            for t, count in enumerate(images):
                part = take_few(self.tasks[t].get_split(split), count)
                probe.tasks[t] = replace(self.tasks[t], test=part, val=part)
            measure_answers(self.method, probe, learned=learned, split=split, autocast=self.parts.autocast, rule=rule)
            return 0

        budget = self.budget.take_share(1 / 2, ANSWERS_UNTIL[min(len(self.probed), 2)])
        found = measure(ask, full, budget, gain=self._answer_gain)
        self._answer_gain = found.gain
        return found.seconds / full


def take_few(data: Data, size: int) -> Data:
    """``size`` images spread over the whole set; some of them twice if there are fewer."""
    return data.take(torch.linspace(0, len(data) - 1, size).long().to(data.labels.device))
