"""Whether a run of many tasks gets slower or larger: the cost of a step and the memory at each task.

    python scripts/growth.py [--only online_er_cifar100_20split] [--images 60] [--out results/growth]

Each experiment is trained on real data with fewer images per class, in a process of its own, and nothing is evaluated
before the end. A step is measured in CPU time on one thread, so that other programs disturb it little; the first step
of a task is left out, because it begins the task. Memory is the resident set of the process when the training of a task
ends.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cl_bench.config.build import build
from cl_bench.config.schema import compose_config
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.loggers.base import Logger, Progress, RunInfo
from cl_bench.loggers.group import Loggers
from cl_bench.report.tables import Table, format_markdown

sys.path.insert(0, str(Path(__file__).parent))

from speed.clock import read_resident_bytes
from speed.common import describe_machine

EXPERIMENTS = (
    *("online_er_cifar100_20split", "online_er_ace_cifar100_20split", "online_mir_cifar100_20split"),
    *("agem_cifar100_17split", "agem_permuted_mnist_17"),
)
MORE = {"agem_cifar100_17split": ["method.replay_size=20"], "agem_permuted_mnist_17": ["method.replay_size=20"]}
"""Smaller reference batches, since their size would only cost time."""

SMALL = ["trainer.evaluate_after=last_task", "scenario.test_per_class=2", "device=cpu"]


class Watch(Logger):
    """Keeps CPU seconds of each step, and bytes of memory at the end of training of each task."""

    def __init__(self) -> None:
        self.seconds: dict[int, list[float]] = {}
        self.memory: dict[int, int] = {}
        self._latest: float | None = None

    def start(self, run: RunInfo) -> None:
        """Nothing is opened."""

    def log_step(self, progress: Progress) -> None:
        """Count the time since the step before, if it was of the same task."""
        now = time.process_time()
        if self._latest is not None:
            self.seconds.setdefault(progress.task, []).append(now - self._latest)
        self._latest = now

    def log_event(self, number: int, event: dict[str, Any]) -> None:
        """An epoch ends, the only one of its task, or an evaluation."""
        self._latest = None
        if event["event"] != "epoch":
            return
        self.memory[event["task"]] = read_resident_bytes() or 0

    def finish(self, status: str, summary: dict[str, Any] | None) -> None:
        """Nothing is open."""


def measure(experiment: str, images: int) -> list[dict[str, float]]:
    """Train one experiment: of each task the median milliseconds of CPU time of a step, and MiB of memory."""
    torch.set_num_threads(1)
    keys = [f"+experiment={experiment}", f"scenario.train_per_class={images}", *SMALL, *MORE.get(experiment, [])]
    parts, watch = build(compose_config(keys)), Watch()
    with tempfile.TemporaryDirectory() as folder:
        parts.build_trainer(Loggers([watch]), Checkpoint(Path(folder)), lambda: False).run()
    return [
        {"step_ms": 1000 * statistics.median(watch.seconds[task]), "memory_mib": watch.memory[task] / 2**20}
        for task in sorted(watch.seconds)
    ]


def draw(found: dict[str, list[dict[str, float]]]) -> Figure:
    """Step and memory over tasks, each relative to the second task: the first one has no exemplars to replay."""
    figure = Figure((10.0, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("step_ms", "memory_mib"), ("CPU time of a step", "memory of the process")):
        for name, tasks in found.items():
            axes.plot(range(1, len(tasks) + 1), [t[key] / tasks[1][key] for t in tasks], ".-", label=name)
        axes.set(title=f"{title}, relative to task 2", xlabel="task", ylim=(0, 1.6))
        axes.grid(color="0.9")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main() -> int:
    """Measure and write the table and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="NAME[,NAME]", default=",".join(EXPERIMENTS), help="these experiments")
    parser.add_argument("--images", type=int, default=60, help="training images of each class")
    parser.add_argument("--out", type=Path, default=Path("results/growth"), help="folder of table.md and growth.png")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)  # in a process of its own, for its memory
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.images)))
        return 0
    found: dict[str, list[dict[str, float]]] = {}
    for name in options.only.split(","):
        call = [sys.executable, __file__, "--one", name, "--images", str(options.images)]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, *(f"{task['step_ms']:.1f}" for task in found[name]), flush=True)
    lines = []
    for name, tasks in found.items():
        last, middle = tasks[-1], tasks[len(tasks) // 2]
        steps = [f"{tasks[i]['step_ms']:.1f}" for i in (0, 1, len(tasks) // 2)]
        sizes = [f"{t['memory_mib']:,.0f}" for t in (tasks[1], middle, last)]
        ratio = last["step_ms"] / tasks[1]["step_ms"]
        lines.append([name, str(len(tasks)), *steps, f"{last['step_ms']:.1f}", f"{ratio:.2f}", *sizes])
    header = ["experiment", "tasks", *(f"step, {n} task [ms]" for n in ("first", "second", "middle", "last"))]
    header += ["last / second", *(f"memory, {n} task [MiB]" for n in ("second", "middle", "last"))]
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/growth.py", *sys.argv[1:]])
    text = f"Made by `{command}`: {options.images} training images of each class.\n\n"
    text += f"{format_markdown(Table('', '', header, lines, numbers=range(1, len(header))))}\n\n"
    text += "A step: the median over a task, in CPU time. The first task has no exemplars to replay. Machine: "
    (options.out / "table.md").write_text(f"{text}{describe_machine()}.\n", encoding="utf-8")
    draw(found).savefig(options.out / "growth.png", dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
