"""(g): seconds from the command to its first answer, and to the first training step of a run.

The first step is seen from outside: a task has as many images as a batch, so its first epoch is one step, and then
``metrics.jsonl`` gets its first line. The time includes the imports, the data, the evaluation of the untrained network
and the first checkpoint.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from speed.common import ROOT, Options, Row, choose_random_pixels, make_environment, measure_in_turn

STARTS = {
    "quickstart": ["+experiment=quickstart", "scenario.train_per_class=16"],
    "lvt_cifar100_10split, mini": [
        "+experiment=lvt_cifar100_10split", "+scale=mini", *choose_random_pixels(500), "scenario.train_per_class=3",
        "scenario.test_per_class=20",
    ],
}  # fmt: skip
"""Runs whose first epoch is one step; ``choose_random_pixels(500)`` makes as many images as CIFAR-100 has."""

LIMIT = 300.0
"""Seconds after which the measurement fails."""


def measure_startup(options: Options) -> Iterator[Row]:
    """``--help``, and the first step of two runs."""
    options.tell("--help")
    answers = measure_in_turn({"help": _time_help}, 1 if options.small else options.repetitions)["help"]
    yield Row("start", "python -m cl_bench --help", "s", answers, most=2.0)
    for name, overrides in STARTS.items():
        options.tell(f"first step of {name}")
        runs = measure_in_turn({name: partial(_time_first_step, overrides)}, options.repetitions)[name]
        yield Row("start", f"from the command to the first step, {name}", "s", runs, most=10.0)
        if options.small:
            return


def _time_help() -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "cl_bench", "--help"],
        env=make_environment(),
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def _time_first_step(overrides: list[str]) -> float:
    """Seconds until the run has taken its first step; then it is killed."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        line = [sys.executable, "-m", "cl_bench", *overrides, f"results_dir={folder}"]
        run = subprocess.Popen(line, env=make_environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while not any(path.stat().st_size for path in Path(folder).rglob("metrics.jsonl")):
                if run.poll() is not None:
                    errors.seek(0)
                    raise RuntimeError(errors.read().decode().strip().rpartition("\n")[2] or "the run ended at once")
                if time.perf_counter() - began > LIMIT:
                    raise RuntimeError(f"no step within {LIMIT:.0f} s")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            run.kill()
            run.wait()
