"""(h) and replicas: what ``trainer.speed`` and ``trainer.replicas`` are worth, measured through the command line.

An epoch of the first task is a repetition; the first one, in which a step is compiled or captured, does not count. The
runs follow one another, so these ratios are not of interleaved repetitions: read their spread.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from speed.clock import seconds_a_step
from speed.common import BATCH, Options, Row, command, on_random_pixels, ratio
from speed.loop import CASES

SPEEDS = ("eager", "compile", "graph")

REPLICAS = {
    "mlp": ["backbone=mlp", "method=er", "buffer=reservoir"],
    "resnet18_slim": ["backbone=resnet18_slim", "method=er", "buffer=reservoir"],
}


def gpu(options: Options) -> Iterator[Row]:
    """Rate, images a second and memory of each ``trainer.speed``; the wall time of the full LVT and DyTox runs is left
    to the one who has the hours."""
    if not torch.cuda.is_available():
        raise RuntimeError("not measured: no GPU here")
    for name in ("resnet18", "lvt"):
        values: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for speed in SPEEDS:
            options.tell(f"{name}, {speed}")
            base = [*on_random_pixels(100), *CASES[name][0], "scenario.num_tasks=2", "device=cuda"]
            values[speed], peaks[speed] = _run(options, *base, f"trainer.speed={speed}")
        for speed in SPEEDS[1:]:
            what = f"{speed} step's rate / eager's, {name}"
            note = f"{BATCH / min(values[speed]):.0f} images/s at best, {peaks[speed] / 2**20:.0f} MiB"
            least = 3.0 if speed == "graph" else None
            yield Row("gpu", what, "x", ratio(values, "eager", speed), least=least, sides=values, note=note)


def replicas(options: Options) -> Iterator[Row]:
    """Cost of five seeds at once in runs of one seed."""
    for name, overrides in REPLICAS.items():
        options.tell(f"{name}, five seeds at once")
        base = [*on_random_pixels(4 if options.small else 20), *overrides, "scenario.num_tasks=2", "device=cpu"]
        values = {f"{count}": _run(options, *base, f"trainer.replicas={count}")[0] for count in (1, 5)}
        what = f"a step of five seeds / of one, {name}"
        yield Row("replicas", what, "x", ratio(values, "5", "1"), most=2.5, sides=values)


def _run(options: Options, *overrides: str) -> tuple[list[float], int]:
    """Seconds of a step in each counted epoch of a run, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run = command(*overrides, f"trainer.epochs={options.repetitions + 1}", folder=Path(folder))
        return seconds_a_step(run), json.loads((run / "summary.json").read_text())["cost"]["peak_memory_bytes"]
