"""The first hour with cl_bench: one run, three seeds of two methods, a look, a sweep, a comparison, an export.

    python examples/first_hour.py [--folder DIR] [--page FILE]

It executes the commands one after the other, as a newcomer would type them, and shows what they print. ``--page``
writes all of it as a Markdown page, docs/first_hour.md. It needs no download, no account, and two free cores for some
minutes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

EXPERIMENT = "+experiment=quickstart backbone=mlp buffer=reservoir buffer.capacity=100"
PARALLEL = "hydra/launcher=joblib hydra.launcher.n_jobs=2 threads=1"
METHODS = ("er", "derpp")


Execute = Callable[[list[str], Path], str]
"""Runs the words of a command in a folder; returns what it prints."""


class Step(NamedTuple):
    """One step: what it is for, and a command."""

    title: str
    text: str
    command: str


class Done(NamedTuple):
    """A step that was executed."""

    step: Step
    output: str
    seconds: float
    cpu_seconds: float


def list_steps(folder: Path) -> Iterator[Step]:
    """The steps in their order. The last ones depend on what the sweep has found in ``folder``."""
    yield Step(
        "One run",
        "A small Lifelong Vision Transformer learns ten digits, two at a time. The table says how well it knows them "
        "all at the end; the report has the rest: open it in a browser.",
        "python -m cl_bench +experiment=quickstart",
    )
    yield Step(
        "Three seeds of two methods",
        "Experience replay and DER++ on a plain network, with a memory of 100 images. `-m` makes a run of each "
        "combination, two at a time.",
        f"python -m cl_bench -m {EXPERIMENT} method={','.join(METHODS)} seed=0,1,2 {PARALLEL}",
    )
    yield Step("Look", "Which runs there are, and their state.", "cl_bench status results")
    yield Step(
        "Compare",
        "A row is a setting, its numbers are means over seeds.",
        "cl_bench compare results/quickstart --metrics average_accuracy,forgetting",
    )
    yield Step(
        "Sweep the learning rate",
        "For both methods, and on validation images: a rate that is chosen on test images makes the result look better "
        "than it is.",
        f"python -m cl_bench -m {EXPERIMENT} results_dir=results/rates method={','.join(METHODS)} "
        f"optimizer.lr=0.03,0.1,0.3 seed=0,1,2 scenario.val_fraction=0.1 trainer.evaluate_on=val {PARALLEL}",
    )
    yield Step(
        "Choose",
        "The first row of each method has its best rate.",
        "cl_bench compare results/rates --metrics average_accuracy --group method --sort average_accuracy",
    )
    for method, rate in find_best_rates(folder / "results" / "rates").items():
        yield Step(
            f"{method} with its best rate",
            "On all training images, measured on test images. A run that is finished is not made again.",
            f"python -m cl_bench -m {EXPERIMENT} method={method} optimizer.lr={rate} seed=0,1,2 {PARALLEL}",
        )
    yield Step(
        "Compare again",
        "`comparison/compare.html` is the page with plots and paired tests.",
        "cl_bench compare results/quickstart --metrics average_accuracy,forgetting --out comparison",
    )
    yield Step(
        "Export",
        "A table for a paper, and curves for TensorBoard (`tensorboard --logdir results`); also W&B, MLflow, Trackio.",
        "cl_bench compare results/quickstart --metrics average_accuracy,forgetting --format latex",
    )
    yield Step("", "", "cl_bench export tensorboard results/quickstart")


def find_best_rates(results: Path) -> dict[str, str]:
    """Of each method the learning rate with the best mean Class-IL accuracy."""
    accuracies: dict[tuple[str, float], list[float]] = defaultdict(list)
    for path in results.glob("quickstart/*/seed*/summary.json"):
        summary = json.loads(path.read_text())
        key = summary["method"], summary["comparable"]["optimizer.lr"]
        accuracies[key].append(summary["class_il"]["average_accuracy"])
    means = {key: sum(values) / len(values) for key, values in accuracies.items()}
    methods = sorted({method for method, _ in means})
    return {m: str(max((mean, rate) for (method, rate), mean in means.items() if method == m)[1]) for m in methods}


def execute(words: list[str], folder: Path) -> str:
    """Run a command in a process of its own; :class:`SystemExit` if it fails."""
    words = [sys.executable, "-m", "cl_bench", *words[words.index("cl_bench") + 1 :]]
    wide = {**os.environ, "COLUMNS": "100"}  # tables are as wide on every terminal
    done = subprocess.run(words, cwd=folder, env=wide, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stdout}\nstatus {done.returncode}")
    return done.stdout


def follow(folder: Path, execute: Execute = execute) -> Iterator[Done]:
    """Execute the steps in ``folder``."""
    for step in list_steps(folder):
        clock, before = time.monotonic(), os.times()
        output = execute(shlex.split(step.command), folder)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        yield Done(step, output, time.monotonic() - clock, cpu)


def shorten(output: str, longest: int = 60, first: int = 12, last: int = 28) -> str:
    """A long output's beginning and end, without the lines in which Hydra repeats the commands."""
    lines = [line.rstrip() for line in output.strip().splitlines() if "][HYDRA]" not in line]
    if len(lines) > longest:
        lines = [*lines[:first], f"... {len(lines) - first - last} lines ...", *lines[-last:]]
    return "\n".join(lines)


def make_page(steps: list[Done]) -> str:
    """The Markdown page of the executed steps."""
    seconds, cpu = sum(done.seconds for done in steps), sum(done.cpu_seconds for done in steps)
    parts = [
        "# The first hour",
        "Three seeds of two methods, a look at them, a sweep of the learning rate, a comparison and an export.\n"
        "Nothing is downloaded and no account is needed.",
        "    make first_hour",
        "executes these commands and writes this page. Here, on "
        f"{os.cpu_count()} cores with a load of {os.getloadavg()[2]:.0f},\n"
        f"all of it took {seconds / 60:.1f} minutes, and {cpu / 60:.1f} minutes of CPU time.\n"
        "Hydra's own lines and the middle of long outputs are left out.",
    ]
    for step, output, took, _ in steps:
        parts += [f"## {step.title}", textwrap.fill(step.text, 110)] if step.title else []
        command = " \\\n        ".join(textwrap.wrap(step.command, 100, break_long_words=False, break_on_hyphens=False))
        parts += [f"    {command}", f"{took:.0f} s. It prints:" if output.strip() else f"{took:.0f} s."]
        parts += [f"```text\n{shorten(output)}\n```"] if output.strip() else []
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where results/ is made (default: a temporary folder)")
    parser.add_argument("--page", type=Path, help="Markdown file that gets the transcript")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        steps = []
        for done in follow(folder):
            print(f"\n$ {done.step.command}\n{done.output}({done.seconds:.0f} s)", flush=True)
            steps.append(done)
    if options.page is not None:
        options.page.write_text(make_page(steps))


if __name__ == "__main__":
    main()
