"""Our methods and Avalanche's on the same tasks, with the same first weights and hyperparameters.

python scripts/compare_avalanche.py [--rows er,ewc] [--seeds 5] [--minutes M] [--out results/avalanche]

Each row is a method. Its first line is Avalanche's strategy, and the others are compared with it, seed by seed: ours
with the keys that come nearest, ours as it usually is, and Avalanche's with a part replaced, which shows where a
difference comes from. Finished runs are skipped, and the same command goes on. It writes records.json and table.md,
and the table of docs/avalanche.md, which explains it. Exit status: 0 all runs are finished, 143 stopped with runs left.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch

from cl_bench.buffers.herding import compute_herding_order
from cl_bench.config.build import build
from cl_bench.config.schema import compose_config
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.report.statistics import MIN_SEEDS, Stat, run_paired_test
from cl_bench.scenarios.base import Scenario
from cl_bench.system.atomic import write_text
from cl_bench.testing import make_trainer

OUT = Path("results/avalanche")
PAGE = Path("docs/avalanche.md")
STOPPED = 143
SETTINGS = {"class_il": "Class-IL", "task_il": "Task-IL"}

BATCH, MEMORY, LAMBDA = 32, 200, 10.0
SETTING = [
    "scenario=mnist", "scenario.train_per_class=200", "scenario.test_per_class=100",
    "backbone=mlp", "backbone.hidden=[100,100]", "optimizer=sgd", "optimizer.lr=0.05",
    "trainer.epochs=5", f"trainer.batch_size={BATCH}", "device=cpu",
]  # fmt: skip
"""Split MNIST: five tasks of 400 images, 100 test images of each class; 65 steps a task."""

SUPERVISED, PLUGINS = "avalanche.training.supervised", "avalanche.training.plugins"

Patch = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Line:
    """One line of a row.

    Attributes:
        name: what it is.
        overrides: beside :data:`SETTING`.
        patch: replaces a part of Avalanche while it runs.
        against: the line that it is compared with; None for the row's first one.
    """

    name: str
    overrides: list[str]
    patch: Patch = contextlib.nullcontext
    against: str | None = None


@dataclass(frozen=True)
class Row:
    """A method: Avalanche's, and what is compared with it."""

    title: str
    theirs: Line
    others: list[Line] = field(default_factory=list)


def name_strategy(name: str, **arguments: Any) -> list[str]:
    """The overrides of a strategy of Avalanche."""
    values = (f"+method.arguments.{key}={json.dumps(value)}" for key, value in arguments.items())
    return ["method=avalanche", f"method.strategy={SUPERVISED}.{name}", *values]


def name_plugin(name: str, **arguments: Any) -> list[str]:
    """The overrides of Avalanche's plain strategy with one plugin."""
    values = "".join(f",{key}:{json.dumps(value)}" for key, value in arguments.items())
    return ["method=avalanche", f"method.plugins=[{{class:{PLUGINS}.{name}{values}}}]"]


def name_ours(method: str, buffer: str = "none", **values: Any) -> list[str]:
    """The overrides of a method of ours."""
    capacity = [] if buffer == "none" else [f"buffer.capacity={MEMORY}"]
    return [
        f"method={method}",
        f"buffer={buffer}",
        *capacity,
        *(f"method.{key}={json.dumps(v)}" for key, v in values.items()),
    ]


# -- parts of Avalanche, replaced --------------------------------------------------------------------------------------


@contextlib.contextmanager
def measure_fisher_image_by_image() -> Iterator[None]:
    """Avalanche's EWC squares the gradient of a batch's mean loss; here, that of each image."""
    from avalanche.training.plugins import EWCPlugin

    own = EWCPlugin.compute_importances

    def compute(self: Any, model: Any, criterion: Any, optimizer: Any, dataset: Any, device: Any, batch: int, **k: Any):
        return own(self, model, criterion, optimizer, dataset, device, 1, **k)

    with mock.patch.object(EWCPlugin, "compute_importances", compute):
        yield


@contextlib.contextmanager
def distil_each_task() -> Iterator[None]:
    """Avalanche's LwF distils one softmax over all old classes; here, one for each old task of two classes."""
    from avalanche.training.regularization import LearningWithoutForgetting as Lwf

    own = Lwf._distillation_loss

    def distil(self: Any, out: Any, old: Any, units: set[int]) -> Any:
        pairs = torch.tensor(sorted(units)).view(-1, 2).tolist()
        return sum(own(self, out, old, pair) for pair in pairs)

    with mock.patch.object(Lwf, "_distillation_loss", distil):
        yield


@contextlib.contextmanager
def leave_images_unmirrored() -> Iterator[None]:
    """Avalanche's iCaRL takes class means over the exemplars and their mirror images; here, over the exemplars."""
    from avalanche.training.supervised.icarl import _ICaRLPlugin

    own = _ICaRLPlugin.compute_class_means

    def compute(self: Any, strategy: Any) -> None:
        with mock.patch.object(torch, "flip", lambda x, dims: x):
            own(self, strategy)

    with mock.patch.object(_ICaRLPlugin, "compute_class_means", compute):
        yield


@contextlib.contextmanager
def pick_no_image_twice() -> Iterator[None]:
    """Avalanche's herding may pick an image again, and counts it again; here, it does not. Nor are images mirrored."""
    from avalanche.training.supervised.icarl import _ICaRLPlugin

    own = _ICaRLPlugin.construct_exemplar_set

    def construct(self: Any, strategy: Any) -> None:
        before = len(self.x_memory)
        own(self, strategy)
        images = strategy.experience.dataset.eval()
        labels = torch.tensor(list(images.targets))
        for i in range(before, len(self.x_memory)):
            (of_class,) = torch.nonzero(labels == self.y_memory[i][0], as_tuple=True)
            x = torch.stack([images[int(j)][0] for j in of_class])
            with torch.no_grad():
                features = torch.nn.functional.normalize(strategy.model.feature_extractor(x), dim=1)
            kept = compute_herding_order(features)[: len(self.x_memory[i])]
            self.x_memory[i], self.order[i] = x[kept], torch.arange(1.0, len(kept) + 1)

    with leave_images_unmirrored(), mock.patch.object(_ICaRLPlugin, "construct_exemplar_set", construct):
        yield


@contextlib.contextmanager
def replay_the_last_task_too() -> Iterator[None]:
    """Avalanche's MIR never replays the classes of a task's last batch in the next task; here, it does."""
    from avalanche.training.plugins import MIRPlugin

    own = MIRPlugin.after_training_exp

    def after(self: Any, strategy: Any, **kwargs: Any) -> None:
        strategy.mbatch[1] = torch.full_like(strategy.mb_y, -1)
        own(self, strategy, **kwargs)

    with mock.patch.object(MIRPlugin, "after_training_exp", after):
        yield


@contextlib.contextmanager
def draw_candidates_anew() -> Iterator[None]:
    """Avalanche's MIR goes through its memory before an image comes again; here, each step draws from all of it."""
    from avalanche.training.plugins import mir

    def draw(loader: Any) -> Iterator[Any]:
        while True:
            yield next(iter(loader))

    with replay_the_last_task_too(), mock.patch.object(mir, "cycle", draw):
        yield


ICARL_LR = "optimizer.lr=0.5"
"""The loss is a mean over ten outputs, so its gradient is about ten times smaller."""

MASKED = "+method.arguments.criterion={class:avalanche.training.losses.MaskedCrossEntropy,mask:new}"

ROWS: Mapping[str, Row] = {
    "naive": Row(
        "Plain training",
        Line("Avalanche `Naive`", name_strategy("Naive")),
        [Line("ours, `finetune`", name_ours("finetune"))],
    ),
    "er": Row(
        "ER, 200 exemplars, 32 replayed",
        Line("Avalanche `ReplayPlugin`", name_plugin("ReplayPlugin", mem_size=MEMORY)),
        [
            Line("ours, `fixed_memory`", name_ours("er", "fixed_memory")),
            Line("ours as usual, `reservoir`", name_ours("er", "reservoir")),
        ],
    ),
    "ewc": Row(
        f"EWC, lambda {LAMBDA:g}",
        Line("Avalanche `EWC`", name_strategy("EWC", ewc_lambda=LAMBDA)),
        [
            Line(
                "ours, `empirical`, strength 2 lambda / 32",
                name_ours("ewc", fisher="empirical", strength=2 * LAMBDA / BATCH),
            ),
            Line(
                "ours, `empirical`, strength 2 lambda",
                name_ours("ewc", fisher="empirical", strength=2 * LAMBDA),
                against="Avalanche, Fisher image by image",
            ),
            Line(
                "Avalanche, Fisher image by image",
                name_strategy("EWC", ewc_lambda=LAMBDA),
                measure_fisher_image_by_image,
            ),
            Line("ours as usual, `sampled`, strength lambda", name_ours("ewc", strength=LAMBDA)),
        ],
    ),
    "lwf": Row(
        "LwF, alpha 1, temperature 2",
        Line("Avalanche `LwF`", name_strategy("LwF", alpha=1.0, temperature=2.0)),
        [
            Line(
                "Avalanche, cross-entropy over the new classes",
                [*name_strategy("LwF", alpha=1.0, temperature=2.0), MASKED],
            ),
            Line(
                "Avalanche, the same, each old task distilled by itself",
                [*name_strategy("LwF", alpha=1.0, temperature=2.0), MASKED],
                distil_each_task,
            ),
            Line(
                "ours, no warm-up",
                name_ours("lwf", alpha=1.0, temperature=2.0, warm_up_epochs=0),
                against="Avalanche, the same, each old task distilled by itself",
            ),
            Line("ours as usual, a warm-up of 1 epoch", name_ours("lwf", alpha=1.0, temperature=2.0, warm_up_epochs=1)),
        ],
    ),
    "icarl": Row(
        "iCaRL, 200 exemplars",
        Line(
            "Avalanche `ICaRL`",
            [*name_strategy("ICaRL", memory_size=MEMORY, buffer_transform=None, fixed_memory=True), ICARL_LR],
        ),
        [
            Line(
                "Avalanche, class means without mirror images",
                [*name_strategy("ICaRL", memory_size=MEMORY, buffer_transform=None, fixed_memory=True), ICARL_LR],
                leave_images_unmirrored,
            ),
            Line(
                "Avalanche, the same, no exemplar picked twice",
                [*name_strategy("ICaRL", memory_size=MEMORY, buffer_transform=None, fixed_memory=True), ICARL_LR],
                pick_no_image_twice,
                against="Avalanche, class means without mirror images",
            ),
            Line(
                "ours, `mean_over=all`",
                [*name_ours("icarl", "herding", mean_over="all"), ICARL_LR],
                against="Avalanche, the same, no exemplar picked twice",
            ),
            Line("ours as usual, `mean_over=seen`", [*name_ours("icarl", "herding", mean_over="seen"), ICARL_LR]),
        ],
    ),
    "der": Row(
        "DER, 200 exemplars, alpha 0.5",
        Line("Avalanche `DER`", name_strategy("DER", mem_size=MEMORY, alpha=0.5, beta=0.0)),
        [
            Line("ours, `fixed_memory`", name_ours("derpp", "fixed_memory", alpha=0.5, beta=0.0)),
            Line("ours as usual, `reservoir`", name_ours("derpp", "reservoir", alpha=0.5, beta=0.0)),
        ],
    ),
    "agem": Row(
        "A-GEM, 200 exemplars, 64 for the reference",
        Line("Avalanche `AGEM`", name_strategy("AGEM", patterns_per_exp=MEMORY // 5, sample_size=64)),
        [Line("ours, `ring`", name_ours("agem", "ring", replay_size=64))],
    ),
    "mir": Row(
        "MIR, 200 exemplars, 32 of 100 candidates",
        Line("Avalanche `MIRPlugin`", name_plugin("MIRPlugin", mem_size=MEMORY, batch_size_mem=BATCH, subsample=100)),
        [
            Line(
                "Avalanche, which replays the last task's classes, too",
                name_plugin("MIRPlugin", mem_size=MEMORY, batch_size_mem=BATCH, subsample=100),
                replay_the_last_task_too,
            ),
            Line(
                "Avalanche, the same, candidates drawn anew at each step",
                name_plugin("MIRPlugin", mem_size=MEMORY, batch_size_mem=BATCH, subsample=100),
                draw_candidates_anew,
                against="Avalanche, which replays the last task's classes, too",
            ),
            Line(
                "ours, `fixed_memory`",
                name_ours("mir", "fixed_memory", replay_size=BATCH, candidates=100),
                against="Avalanche, the same, candidates drawn anew at each step",
            ),
            Line("ours as usual, `reservoir`", name_ours("mir", "reservoir", replay_size=BATCH, candidates=100)),
        ],
    ),
}

Records = dict[str, dict[str, dict[str, dict[str, float]]]]
"""By row, line and seed: the average accuracy of each setting, in percent."""


def run_line(line: Line, seed: int, setting: list[str], scenario: Scenario | None = None) -> dict[str, float]:
    """The average accuracies of one run, in percent.

    Args:
        scenario: what ``setting`` describes, if it was read before.
    """
    parts = build(compose_config([*setting, *line.overrides, f"seed={seed}"]), scenario)
    with tempfile.TemporaryDirectory() as folder, line.patch():
        record = make_trainer(parts, Path(folder)).run()
    return {name: record.compute(average_accuracy, name) for name in SETTINGS}


def make_table(records: Records) -> str:
    """The table of all rows, in Markdown."""
    titles = [f"{title}, {what}" for title in SETTINGS.values() for what in ("mean ± SD", "difference")]
    text = [
        f"| line | compared with | n | {' | '.join(titles)} |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in ROWS.items():
        lines = [line for line in [row.theirs, *row.others] if records.get(name, {}).get(line.name)]
        number = {line.name: f"{i + 1}" for i, line in enumerate(lines)}
        text += [f"| **{row.title}** | | | | | | |"] if lines else []
        for line in lines:
            found, against = pd.DataFrame(records[name][line.name]).T, line.against or row.theirs.name
            other = pd.DataFrame(records[name].get(against, {})).T
            compared = line is not row.theirs and len(found.index.intersection(other.index)) >= MIN_SEEDS
            cells = []
            for setting in SETTINGS:
                stat = Stat.of(found[setting])
                cells.append(f"{stat.mean:.1f}" if stat.std is None else f"{stat.mean:.1f} ± {stat.std:.1f}")
                both = pd.concat([found[setting], other[setting]], axis=1, join="inner") if compared else None
                cells.append("" if both is None else _format_difference(both))
            first = f"{number[line.name]}. {line.name}"
            text.append(f"| {first} | {number[against] if compared else ''} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def write_table(out: Path, records: Records) -> None:
    """Write the table of all rows, and put it on the page if ``out`` is the place of its records."""
    table = make_table(records)
    write_text(out / "table.md", table)
    if out == OUT:
        first, mark, rest = PAGE.read_text().partition("<!-- table -->\n")
        write_text(PAGE, first + mark + table + rest[rest.index("<!-- end of table -->") :])


def _format_difference(both: pd.DataFrame) -> str:
    """Mean difference with its 95 % interval over the seeds, marked if it does not contain 0."""
    test = run_paired_test(both)
    low, high = test["ci95_low"], test["ci95_high"]
    mark = "" if low <= 0 <= high else " *"
    return f"{test['mean_difference']:+.1f} [{low:+.1f}, {high:+.1f}]{mark}"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="names of rows, separated by commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run begins after this time")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    unknown = set(options.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"unknown rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    file = options.out / "records.json"
    options.out.mkdir(parents=True, exist_ok=True)
    records: Records = json.loads(file.read_text()) if file.exists() else {}
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    scenario = build(compose_config(SETTING)).scenario if options.seeds else None
    for seed in range(options.seeds):
        for name in options.rows.split(","):
            for line in [ROWS[name].theirs, *ROWS[name].others]:
                seeds = records.setdefault(name, {}).setdefault(line.name, {})
                if str(seed) in seeds:
                    continue
                if time.monotonic() > end:
                    return STOPPED
                began = time.monotonic()
                seeds[str(seed)] = run_line(line, seed, SETTING, scenario)
                write_text(file, json.dumps(records, indent=1) + "\n")
                write_table(options.out, records)
                seconds = time.monotonic() - began
                print(f"{name}, {line.name}, seed {seed}: {seeds[str(seed)]}, {seconds:.0f} s", flush=True)
    write_table(options.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
