"""Draw the average accuracy after each task of one run: python scripts/curve.py RUN_FOLDER OUT.png."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"task_il": "task id given (Task-IL)", "class_il": "task id unknown (Class-IL)"}


def main() -> None:
    """Read ``metrics.jsonl``, which a run writes as it goes, so an unfinished run can be drawn too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    events = map(json.loads, (chosen.run / "metrics.jsonl").read_text().splitlines())
    rows = [event for event in events if event["event"] == "task"]
    learned = [row["task"] + 1 for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for setting, label in LABELS.items():
        axes.plot(learned, [row[f"{setting}_average"] for row in rows], label=label)
    axes.set(xlabel="tasks learned", ylabel="average accuracy [%]", ylim=(0, 100), xlim=(1, learned[-1]))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(chosen.out, dpi=90)


if __name__ == "__main__":
    main()
