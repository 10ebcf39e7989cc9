"""The picture of docs/scenarios.md: how many training images of each class come in each task, in some streams.

    python scripts/streams.py [--out docs/images/streams.png]

Any scenario with class-disjoint tasks can be drawn: ``--scenario "scenario=cifar100 scenario.repeat=0.2"``.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cl_bench.config.build import build_scenario
from cl_bench.config.schema import compose_config
from cl_bench.scenarios.base import Scenario

STREAMS = {
    "disjoint": "scenario=digits",
    "blurry=0.1": "scenario=digits scenario.blurry=0.1",
    "blurry=0.3, blurry_classes=0.5": "scenario=digits scenario.blurry=0.3 scenario.blurry_classes=0.5",
    "repeat=0.3": "scenario=digits scenario.repeat=0.3",
}
"""Titles and overrides: the bundled digits in five tasks."""


def count_images(scenario: Scenario) -> np.ndarray:
    """(K, T) training images of each class, in the order of learning, in each task."""
    counts = [np.bincount(task.train.labels.numpy(), minlength=scenario.num_classes) for task in scenario.tasks]
    return np.stack(counts, axis=1)


def draw_streams(streams: dict[str, np.ndarray], out: Path) -> None:
    """A heat map for each stream, with numbers if it is small; the darker, the more images of the class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, row = plt.subplots(1, len(streams), figsize=(3 * len(streams), 3.6), squeeze=False, layout="constrained")
    for axes, (title, counts) in zip(row[0], streams.items()):
        axes.imshow(counts / counts.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if counts.size <= 100:
            for (c, t), number in np.ndenumerate(counts):
                if number:
                    dark = number > 0.6 * counts[c].sum()
                    axes.text(t, c, number, ha="center", va="center", size=7, color="white" if dark else "black")
        axes.set_title(title, size=9)
        axes.set_xlabel("task")
        axes.set_xticks(range(counts.shape[1]) if counts.shape[1] <= 10 else [0, counts.shape[1] - 1])
    row[0][0].set_ylabel("class, in the order of learning")
    figure.savefig(out, dpi=100, metadata={"Software": None})


def main(arguments: Sequence[str]) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images/streams.png"))
    parser.add_argument("--scenario", action="append", help="overrides of a stream to draw instead; several times")
    options = parser.parse_args(arguments)
    chosen = STREAMS if options.scenario is None else {words: words for words in options.scenario}
    scenarios = {title: build_scenario(compose_config(shlex.split(words))) for title, words in chosen.items()}
    draw_streams({title: count_images(scenario) for title, scenario in scenarios.items()}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
