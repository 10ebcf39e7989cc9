"""The trials of a search: a table, and a picture of what each value gave."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cl_bench.core.record import name_measure
from cl_bench.system.atomic import write_text

FACTS = ("number", "state", "value")
"""Columns of a trial that are no searched keys."""


def write_trials(trials: Sequence[Mapping[str, Any]], folder: Path, measure: str = "accuracy") -> None:
    """Write ``trials.csv`` and ``trials.png``.

    Args:
        trials: of each its number, state, value (accuracy in percent; None if there is none) and searched keys.
        folder: where to.
        measure: the word for accuracy.
    """
    columns = [*FACTS, *sorted({key for trial in trials for key in trial} - set(FACTS))]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(trials)
    write_text(folder / "trials.csv", text.getvalue())
    draw_trials(trials, measure).savefig(folder / "trials.png", dpi=100)


def draw_trials(trials: Sequence[Mapping[str, Any]], measure: str = "accuracy") -> Figure:
    """One panel with the accuracy of each trial and the best so far, and one for each searched key."""
    complete = [trial for trial in trials if trial["value"] is not None]
    keys = sorted({key for trial in trials for key in trial} - set(FACTS))
    figure = Figure(figsize=(3.2 * (1 + len(keys)), 3), layout="constrained")
    axes = figure.subplots(1, 1 + len(keys), sharey=True, squeeze=False)[0]
    values = [trial["value"] for trial in complete]
    best = [max(values[: n + 1]) for n in range(len(values))]
    axes[0].plot([trial["number"] for trial in complete], values, "o", label="trial")
    axes[0].step([trial["number"] for trial in complete], best, where="post", label="best so far")
    axes[0].set(xlabel="trial", ylabel=name_measure("Class-IL average accuracy (%),\nvalidation images", measure))
    axes[0].legend()
    for ax, key in zip(axes[1:], keys):
        shown = [trial for trial in complete if key in trial]
        numbers = all(isinstance(trial[key], int | float) and not isinstance(trial[key], bool) for trial in shown)
        places: list[Any] = [trial[key] if numbers else str(trial[key]) for trial in shown]
        ax.plot(places, [trial["value"] for trial in shown], "o")
        ax.set_xlabel(key)
        if numbers and shown and min(places) > 0 and max(places) > 20 * min(places):
            ax.set_xscale("log")
    return figure
