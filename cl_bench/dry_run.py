"""What a run would be and cost, without running it."""

import copy
import json
import math
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cl_bench.build import Parts
from cl_bench.checkpoint import Checkpoint
from cl_bench.evaluate import evaluate
from cl_bench.loggers.base import Logger, Progress, RunInfo
from cl_bench.memory import peak_bytes
from cl_bench.record import Record
from cl_bench.trainer import count_parameters
from cl_bench.types import Data

WARM_UP, TIMED = 2, 5
"""Optimizer steps that are thrown away (first calls are slow) and that are timed, a phase."""

PROBED_IMAGES = 100
"""Images of the timed evaluation."""


def dry_run(parts: Parts, summary: dict[str, Any]) -> None:
    """Print tasks, parameters, memory and expected hours; the same as one JSON object on the last line.

    The hours come from a few timed steps of the first two tasks (the second one replays) and of one evaluation batch;
    they leave out what a method does between phases (importance, memory) and the checkpoints.
    """
    data_bytes = sum(d.images.numel() for t in parts.scenario.tasks for d in (t.train, t.val, t.test))
    train_seconds, step_seconds = _training_seconds(parts)
    evaluate_seconds = _evaluation_seconds(parts)
    cost = asdict(Record.empty(1).cost) | {
        "train_seconds": train_seconds,
        "evaluate_seconds": evaluate_seconds,
        "samples_seen": None,
        "peak_memory_bytes": peak_bytes(parts.device),
        "parameters": count_parameters(parts.method),
        "parameters_trainable": count_parameters(parts.method, trainable=True),
        "buffer_bytes": parts.buffer.nbytes,
        "method_bytes": parts.method.memory_bytes(),
    }
    summary = summary | parts.facts()
    summary |= {
        "status": "dry_run",
        "class_il": None,
        "task_il": None,
        "cost": cost,
        "step_seconds": step_seconds,
        "data_bytes": data_bytes,
        "expected_hours": (train_seconds + evaluate_seconds) / 3600,
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
    console.print(f"step: {1000 * steps[0]:.1f} ms in the first task, {1000 * steps[-1]:.1f} ms after it")
    console.print(f"memory at the peak of the probe: {cost['peak_memory_bytes'] / 2**20:.0f} MiB")
    console.print(
        f"expected: {summary['expected_hours']:.2f} hours on {parts.device} "
        f"(training {cost['train_seconds']:.0f} s, evaluation {cost['evaluate_seconds']:.0f} s)"
    )


class Stopwatch(Logger):
    """Notes when each step ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, list[float]()

    def start(self, run: RunInfo) -> None:
        """Nothing."""

    def event(self, number: int, event: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Nothing."""

    def step(self, progress: Progress) -> None:
        """Wait for the device and look at the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    def take(self) -> float:
        """Median seconds of a step since the last call, without the warm-up."""
        gaps = [b - a for a, b in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:])]
        self.ends.clear()
        return statistics.median(gaps)


def _training_seconds(parts: Parts) -> tuple[float, list[float]]:
    """Expected seconds of all training, and the seconds of a step in each probed phase.

    The first, the second (which replays) and the last task are probed, with few images each; the tasks between are
    opened and closed only, and taken to cost what the second one does.
    """
    watch = Stopwatch(parts.device)
    unsaved = replace(parts.settings, checkpoint_seconds=math.inf, checkpoint_steps=None)
    trainer = replace(parts, settings=unsaved).trainer(watch, Checkpoint(Path()), stop=lambda: False)
    tasks = parts.scenario.tasks
    seconds: dict[int, float] = {}
    steps: list[float] = []
    for number, task in enumerate(tasks):
        probed = number in (0, 1, len(tasks) - 1)
        few = replace(task, train=_few(task.train, (WARM_UP + TIMED) * parts.settings.batch_size))
        total = 0.0
        parts.method.eval()
        for phase in parts.method.learn(few):
            if not probed:
                continue
            images = len(phase.data)
            if images <= len(few.train) + parts.buffer.capacity:  # built on the shortened task
                images += len(task.train) - len(few.train)
            visited = len(phase.order(torch.Generator())) / len(phase.data) if phase.order else 1.0
            short = _few(phase.data, (WARM_UP + TIMED) * parts.settings.batch_size)
            trainer.run_phase(few, 0, replace(phase, data=short, epochs=1, order=None), None)
            steps.append(watch.take())
            epochs = phase.epochs or parts.settings.epochs
            total += epochs * math.ceil(images * visited / parts.settings.batch_size) * steps[-1]
            parts.method.eval()
        if probed:
            seconds[number] = total
    between = [seconds.get(i, seconds[min(1, len(tasks) - 1)]) for i in range(len(tasks))]
    return sum(between), steps


def _few(data: Data, size: int) -> Data:
    """``size`` images from the whole set, so that every class is there; some of them twice where there are fewer."""
    return data.take(torch.linspace(0, len(data) - 1, size).long().to(data.labels.device))


def _evaluation_seconds(parts: Parts) -> float:
    """Expected seconds of all evaluations: the time of one image times the images asked about."""
    scenario = parts.scenario
    sizes = [len(task.asked(parts.settings.evaluate_on)) for task in scenario.tasks]
    asked = sum(sizes) + sum(sum(sizes[: row + 2]) for row in range(len(sizes)))
    probe, num_tasks = copy.copy(scenario), len(scenario.tasks)
    each = math.ceil(PROBED_IMAGES / num_tasks)
    probe.tasks = [replace(task, test=_few(task.test, each)) for task in scenario.tasks]
    evaluate(parts.method, probe, learned=num_tasks, split="test", autocast=parts.autocast)  # warm up
    began = time.perf_counter()
    evaluate(parts.method, probe, learned=num_tasks, split="test", autocast=parts.autocast)
    return (time.perf_counter() - began) / sum(len(task.test) for task in probe.tasks) * asked
