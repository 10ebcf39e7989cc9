"""What the parts of the benchmark share: rows, repetitions in turn, runs on random pixels, facts of the machine."""

import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cl_bench
from cl_bench.config.build import Parts, build
from cl_bench.config.schema import compose_config
from cl_bench.core.types import Phase, Task
from cl_bench.data.base import ImageSet
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.trainer import Trainer
from cl_bench.loggers.base import Logger, RunInfo
from cl_bench.loggers.console import Console
from cl_bench.loggers.group import Loggers
from cl_bench.loggers.jsonl import JsonLines
from cl_bench.runs.run_dir import find_commit, find_version

BATCH = 32
"""Images of the stream a step, and images replayed beside them."""

ROOT = Path(__file__).parents[2]
Work = Callable[[], float]


@dataclass
class Row:
    """A line of the table.

    Attributes:
        part, what: which part measured what.
        unit: of the values; "x" is a ratio.
        values: one per repetition.
        least, most: the goal: the value should reach or stay under it; None if there is no goal.
        sides: the measurements that a ratio is made of, by name: seconds, one per repetition.
        note: what else a reader must know.
    """

    part: str
    what: str
    unit: str
    values: list[float]
    least: float | None = None
    most: float | None = None
    sides: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        """The row's figure."""
        return statistics.median(self.values)

    @property
    def reached(self) -> bool | None:
        """Whether the figure reaches its goal; None if there is none."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.median >= self.least) and (self.most is None or self.median <= self.most)


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        repetitions: counted repetitions of each figure.
        tell: shows what is being measured.
        small: tiny sizes, only to see that it runs; the figures mean nothing.
    """

    repetitions: int
    tell: Callable[[str], None]
    small: bool = False


def measure_in_turn(works: dict[str, Work], repetitions: int) -> dict[str, list[float]]:
    """Call each in turn (A B C A B C ...), one round to warm up and then ``repetitions`` that count."""
    values: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repetitions + 1):
        for name, work in works.items():
            value = work()
            if turn:
                values[name].append(value)
    return values


def repeat(work: Callable[[], Any], times: int) -> Work:
    """A measurement: the mean seconds of ``times`` calls of ``work``."""

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - began) / times

    return measure


def compute_ratio(values: dict[str, list[float]], above: str, below: str) -> list[float]:
    """``above`` / ``below``, repetition by repetition."""
    return [a / b for a, b in zip(values[above], values[below])]


def make_random_pixels(*, per_class: int) -> ImageSet:
    """Random images like CIFAR-100's, and a tenth as many for testing; the speed does not depend on pixel values."""
    rng = np.random.default_rng(0)

    def split(each: int) -> tuple[np.ndarray, np.ndarray]:
        pixels = rng.integers(0, 256, (100 * each, 3, 32, 32), dtype=np.uint8)
        return pixels, np.tile(np.arange(100), each)

    names = [str(c) for c in range(100)]
    return ImageSet(
        *split(per_class), *split(max(1, per_class // 10)), names, None, [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]
    )


def choose_random_pixels(per_class: int) -> list[str]:
    """Overrides that give CIFAR-100's scenario random pixels instead of CIFAR-100; they are augmented as usual."""
    return [
        "scenario=cifar100",
        "optimizer.lr=0.001",  # labels are random, and training must not diverge
        "allow_packages=[speed]",
        "scenario.source._target_=speed.common.make_random_pixels",
        "~scenario.source.root",
        "~scenario.source.download",
        f"+scenario.source.per_class={per_class}",
        "scenario.train_per_class=null",
        "scenario.test_per_class=null",
    ]


def build_parts(*overrides: str) -> Parts:
    """What the command would build with these overrides."""
    return build(compose_config(overrides))


def make_run_info(folder: Path, tasks: int) -> RunInfo:
    """What a logger is told when there is no real run."""
    return RunInfo(folder, "benchmark", "benchmark", 0, "", {}, tasks)


@contextmanager
def open_loop(parts: Parts, *others: Logger) -> Iterator[Trainer]:
    """The loop over ``parts`` as in a run: JSON lines on the disk, the console's bookkeeping, a checkpoint folder.

    ``others`` are further loggers.
    """
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        logger = Loggers([JsonLines(), Console(min_seconds=1e9), *others])
        logger.start(make_run_info(Path(folder), len(parts.scenario.tasks)))
        yield parts.build_trainer(logger, Checkpoint(Path(folder)), stop=lambda: False)
        logger.finish("finished", None)


def shorten(task: Task, images: int) -> Task:
    """The task with its first ``images`` training images only; make_random_pixels mixes the classes."""
    return replace(task, train=task.train.take(slice(0, images)))


def get_first_phase(parts: Parts, task: Task) -> Phase:
    """The method's first phase in ``task``, with one epoch; it can be run any number of times."""
    parts.method.eval()
    phase = next(parts.method.learn(task))
    return replace(phase, params=list(phase.params), epochs=1)


def close_task(parts: Parts, task: Task) -> None:
    """Open and close ``task`` without training: this fills the buffer and statistics, and leaves the weights."""
    parts.method.eval()
    for _ in parts.method.learn(task):
        pass


def time_steps(trainer: Trainer, task: Task, phase: Phase) -> Work:
    """A measurement: seconds per step while the loop runs ``phase``, with everything that an epoch does."""

    def measure() -> float:
        before, began = trainer.steps_done, time.perf_counter()
        trainer.run_phase(task, 0, phase, None)
        return (time.perf_counter() - began) / (trainer.steps_done - before)

    return measure


def run_command(*arguments: str, folder: Path, threads: int | None = None) -> Path:
    """Run ``python -m cl_bench`` to its end with its results in ``folder``; returns the run folder.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    line = [sys.executable, "-m", "cl_bench", *arguments, f"results_dir={folder}", "logger=none"]
    line += ["+logger.clock._target_=speed.clock.Clock"]
    done = subprocess.run(line, env=make_environment(threads), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return next(folder.rglob("summary.json")).parent


def make_environment(threads: int | None = None) -> dict[str, str]:
    """The environment of a command that can import this checkout and the parts of the benchmark."""
    path = [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
    chosen = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | chosen


def collect_facts() -> dict[str, Any]:
    """Versions and hardware."""
    packages = ("torch", "torchvision", "numpy", "hydra-core", "avalanche-lib", "timm")
    cuda = torch.cuda.is_available()
    return {
        "cl_bench": cl_bench.__version__,
        "commit": find_commit(),
        "python": platform.python_version(),
        "packages": {name: find_version(name) for name in packages},
        "processor": _find_processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_at_start": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
    }


def describe_machine() -> str:
    """The machine in words, for a table of figures that were measured on one thread."""
    facts = collect_facts()
    return f"{facts['processor']} ({facts['instructions']}), torch {facts['packages']['torch']}, one thread"


def _find_processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()
