"""(f): whether the cost of a step, memory and evaluation stay constant while the sequence grows to 50 tasks.

Steps and evaluations: the method learns 50 tasks of two classes on a few images each. When it begins task 1, 2, 10, 25
and 50, its state is loaded into a twin, like a checkpoint. The twins then take the same number of steps in turn, so
other load on the machine affects all of them alike. The networks of er, derpp and lvt are small, so that the work of a
method outside its network is a large part of the step, and its growth would show.

Memory: a process of its own runs the whole sequence, as the command does, and reports its memory after each task.
"""

import copy
import math
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Generator, Tensor

import cl_bench.engine.evaluate as evaluation
from cl_bench.config.build import Parts
from cl_bench.engine.evaluate import evaluate
from speed.clock import Clock, read_resident_bytes
from speed.common import (
    BATCH,
    Options,
    Row,
    Work,
    build_parts,
    choose_random_pixels,
    close_task,
    compute_ratio,
    get_first_phase,
    measure_in_turn,
    open_loop,
    repeat,
    time_steps,
)

TASKS = 50
POINTS = (1, 2, 10, 25, 50)
"""The tasks that are measured, counted from 1."""

PER_CLASS = 16
"""Training images per class; 32 per task, so one step per epoch."""

EVALUATED = 10
"""Images per batch of evaluation while memory is measured: the same from the fifth task to the last."""


@dataclass(frozen=True)
class Case:
    """One method on one network.

    Attributes:
        overrides: what the command line would say.
        steps: that a repetition takes.
        trained: whether the tasks between are trained (one step each), or only opened and closed.
        first: the task that the others are compared with.
        most: the limit of step 50 / step ``first``; None if the growth per task is limited instead.
        brief: further overrides that make 50 tasks short when memory is measured.
    """

    overrides: list[str]
    steps: int
    trained: bool = True
    first: int = 1
    most: float | None = 1.10
    brief: tuple[str, ...] = ()


LINEAR = ["backbone=mlp", "backbone.hidden=[]", "buffer=reservoir", "buffer.capacity=200"]
CASES = {
    "er": Case(["method=er", *LINEAR], steps=100),
    "derpp": Case(["method=derpp", *LINEAR], steps=50),
    "lvt": Case(["backbone=lvt", "+scale=mini", "buffer.capacity=500"], steps=4, first=2),
    "dytox": Case(
        ["backbone=dytox", "buffer.capacity=500"],
        steps=1,
        trained=False,
        most=None,
        brief=("buffer.capacity=100", "method.finetune_epochs=1"),
    ),
}
NOTES = {
    "lvt": "against task 2: in the first task its buffer is empty, so a step has half the images",
    "dytox": "full network; with task 2 its teacher comes along, once: a forward pass, a third of the step",
}


def measure_steps(options: Options) -> Iterator[Row]:
    """Step and evaluation time at the chosen tasks of each method."""
    for name, case in CASES.items():
        options.tell(f"{name}, opening {TASKS} tasks")
        points = (1, 2, 4) if options.small else POINTS
        overrides = [
            *case.overrides,
            *(["+scale=mini"] if options.small and "+scale=mini" not in case.overrides else []),
        ]
        base = [
            *choose_random_pixels(PER_CLASS),
            *overrides,
            f"scenario.num_tasks={TASKS}",
            f"trainer.batch_size={BATCH}",
        ]
        with ExitStack() as stack:
            twins = _make_twins(base, case, points, stack)
            options.tell(f"{name}, timing")
            values = measure_in_turn({label: work for label, (work, _) in twins.items()}, options.repetitions)
            evaluations = measure_in_turn({label: work for label, (_, work) in twins.items()}, options.repetitions)
        last, first = f"task {points[-1]}", f"task {case.first}"
        if case.most is None:
            for begin in (1, 2):
                what = f"{name}: growth of a step a task, tasks {begin} to {points[-1]}, of the first task's step"
                apart, first_task = points[-1] - begin, values["task 1"]
                growth = [
                    100 * (b - a) / c / apart for a, b, c in zip(values[f"task {begin}"], values[last], first_task)
                ]
                yield Row("sequence", what, "%", growth, most=5.0, sides=values, note=NOTES[name])
        else:
            what = f"{name}: step at {last} / {first}"
            grown = compute_ratio(values, last, first)
            yield Row("sequence", what, "x", grown, most=case.most, sides=values, note=NOTES.get(name, ""))
        what = f"{name}: evaluation at {last} / {first}"
        yield Row("sequence", what, "x", compute_ratio(evaluations, last, first), sides=evaluations)


def _make_twins(base: list[str], case: Case, points: tuple[int, ...], stack: ExitStack) -> dict[str, tuple[Work, Work]]:
    """For each point two measurements: a step, and the evaluation of an image."""
    walking = build_parts(*base)
    trainer = stack.enter_context(open_loop(walking))
    twins: dict[str, tuple[Work, Work]] = {}
    for task in walking.scenario.tasks[: points[-1]]:
        number = task.id + 1
        if number in points:
            twin = build_parts(*base)
            twin.method.load_state_dict(walking.method.state_dict())
            looped = stack.enter_context(open_loop(twin))
            at = twin.scenario.tasks[task.id]
            long = replace(get_first_phase(twin, at), order=partial(_draw_positions, case.steps, len(at.train)))
            twins[f"task {number}"] = (
                time_steps(looped, at, long),
                _time_evaluation(twin, number, 10 if case.trained else 1),
            )
        if not case.trained:
            close_task(walking, task)
            continue
        walking.method.eval()
        for number, phase in enumerate(walking.method.learn(task)):
            trainer.run_phase(task, number, phase, None)
            walking.method.eval()
    return twins


def _draw_positions(steps: int, images: int, generator: Generator) -> Tensor:
    """The positions of one epoch of ``steps`` steps, also if there are fewer images."""
    return torch.randint(images, (steps * BATCH,), generator=generator)


def _time_evaluation(parts: Parts, learned: int, times: int) -> Work:
    """Seconds of an evaluation of about 50 images from all tasks learned and the next one."""
    probe = copy.copy(parts.scenario)
    each = math.ceil(50 / (min(learned, TASKS - 1) + 1))
    probe.tasks = [replace(task, test=task.test.take(torch.arange(each) % len(task.test))) for task in probe.tasks]
    images = sum(len(task.test) for task in probe.tasks[: learned + 1])

    def once() -> None:
        evaluate(parts.method, probe, learned=learned, split="test", autocast=parts.autocast)

    seconds = repeat(once, times)
    return lambda: seconds() / images


def measure_memory(options: Options) -> Iterator[Row]:
    """Resident memory after 50 tasks over that after 5, on small networks."""
    if read_resident_bytes() is None:
        raise RuntimeError("this system does not tell a process's resident memory")
    tasks, early = (4, 2) if options.small else (TASKS, 5)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cl_bench.config.build", "torch._dynamo"])  # once, not in every process
    # a second process does not change memory
    with context.Pool(2, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for name in CASES:
            options.tell(f"{name}, {options.repetitions} runs of {tasks} tasks")
            runs = pool.map(partial(_measure_held_bytes, tasks=tasks), [name] * options.repetitions, chunksize=1)
            held = [(run[early] / 2**20, run[tasks] / 2**20) for run in runs]
            sides = {f"task {early}": [a for a, _ in held], f"task {tasks}": [b for _, b in held]}
            what = f"{name}: resident memory after task {tasks} / {early}"
            note = f"{statistics.median(b - a for a, b in held):.1f} MiB more"
            yield Row("memory", what, "x", [b / a for a, b in held], most=1.03, sides=sides, note=note)


def _measure_held_bytes(name: str, tasks: int) -> dict[int, int]:
    """Bytes that this process holds after each of ``tasks`` tasks, counted from 1."""
    case = CASES[name]
    scale = [] if "+scale=mini" in case.overrides else ["+scale=mini"]
    overrides = [*case.overrides, *scale, f"scenario.num_tasks={tasks}", "trainer.epochs=1", *case.brief]
    clock = Clock()
    parts = build_parts(*choose_random_pixels(PER_CLASS), *overrides)
    # With so few test images an evaluation's batch, and with it the memory of its activations, would grow from 12
    # images to 100; on CIFAR-100 it is 500 from the first tasks on.
    with mock.patch.object(evaluation, "MAX_BATCH", EVALUATED), open_loop(parts, clock) as trainer:
        trainer.run()
        return {note["task"] + 1: note["resident_bytes"] for note in clock.notes if note["event"] == "task"}
