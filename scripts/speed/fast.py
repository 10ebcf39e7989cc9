"""(h): the gain of each ``trainer.speed``, measured through the command line, and of several seeds computed as one.

For a ``trainer.speed`` each epoch of the first task is a repetition; the first epoch, in which a step is compiled or
captured, does not count. These runs follow one another and do not take turns, so look at the spread of their ratios.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.replicas import Joint
from cl_bench.engine.step import sum_losses
from cl_bench.loggers.group import Loggers
from cl_bench.methods.base import FunctionalMethod
from speed.clock import read_step_seconds
from speed.common import (
    BATCH,
    Options,
    Row,
    build_parts,
    choose_random_pixels,
    compute_ratio,
    get_first_phase,
    measure_in_turn,
    repeat,
    run_command,
)
from speed.loop import CASES

SPEEDS = ("eager", "compile", "graph")

REPLICAS = {
    "mlp": ["backbone=mlp", "method=er", "buffer=reservoir"],
    "resnet18_slim": ["backbone=resnet18_slim", "method=er", "buffer=reservoir"],
}


def measure_speeds(options: Options) -> Iterator[Row]:
    """Rate, images a second and memory of each ``trainer.speed``; the wall time of the full LVT and DyTox runs is left
    to the one who has the hours."""
    if not torch.cuda.is_available():
        raise RuntimeError("not measured: no GPU here")
    for name in ("resnet18", "lvt"):
        values: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for speed in SPEEDS:
            options.tell(f"{name}, {speed}")
            base = [*choose_random_pixels(100), *CASES[name][0], "scenario.num_tasks=2", "device=cuda"]
            values[speed], peaks[speed] = _run_command(options, *base, f"trainer.speed={speed}")
        for speed in SPEEDS[1:]:
            what = f"{speed} step's rate / eager's, {name}"
            note = f"{BATCH / min(values[speed]):.0f} images/s at best, {peaks[speed] / 2**20:.0f} MiB"
            least = 3.0 if speed == "graph" else None
            yield Row("gpu", what, "x", compute_ratio(values, "eager", speed), least=least, sides=values, note=note)


def measure_replicas(options: Options) -> Iterator[Row]:
    """Gradients of five networks computed as one, as :mod:`cl_bench.engine.replicas` does it, against those of one.

    Draws and optimizers are each replica's own and are left out: stacking can speed up only the arithmetic.
    """
    for name, overrides in REPLICAS.items():
        options.tell(f"{name}, five seeds as one")
        built = [build_parts(*choose_random_pixels(2), *overrides, f"seed={seed}") for seed in range(5)]
        steps, executors, methods, inputs = [], [], [], []
        for parts in built:
            method, task = parts.method, parts.scenario.tasks[0]
            assert isinstance(method, FunctionalMethod)
            trainer = parts.build_trainer(Loggers([]), Checkpoint(Path()), stop=lambda: False)
            step, executor = next(trainer.generate_phase_steps(task, 0, get_first_phase(parts, task), None))
            steps.append(step)
            executors.append(executor)
            x = torch.randn(2 * BATCH, *parts.scenario.image_shape)
            inputs.append({"x": x, "y": torch.randint(100, (2 * BATCH,))})
            methods.append(method)
        joint = Joint()

        def alone(number: int = 0, methods: list = methods, inputs: list = inputs) -> None:
            methods[number].zero_grad()
            sum_losses(methods[number].terms(inputs[number], 0)[0].values()).backward()

        def stacked(joint: Joint = joint, of_all: tuple = (steps, executors, methods, inputs)) -> None:
            joint.differentiate(*of_all)

        def in_a_row(alone: Callable[[int], None] = alone) -> None:
            for number in range(5):
                alone(number)

        times = 1 if options.small else {"mlp": 30, "resnet18_slim": 2}[name]
        works: dict[str, Callable[[], None]] = {"one": alone, "five as one": stacked, "five in a row": in_a_row}
        values = measure_in_turn({label: repeat(work, times) for label, work in works.items()}, options.repetitions)
        for label, most in (("five as one", 2.5), ("five in a row", None)):
            what = f"gradients of {label} / of one, {name}"
            yield Row("replicas", what, "x", compute_ratio(values, label, "one"), most=most, sides=values)


def _run_command(options: Options, *overrides: str) -> tuple[list[float], int]:
    """Seconds of a step in each counted epoch of a run, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_command(*overrides, f"trainer.epochs={options.repetitions + 1}", folder=Path(folder))
        return read_step_seconds(run), json.loads((run / "summary.json").read_text())["cost"]["peak_memory_bytes"]
