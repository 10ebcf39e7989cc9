"""Golden runs: a change of results cannot pass silently.

A tiny run of every method is kept in ``tests/golden``: its loss terms an epoch and its accuracies after each task
(of a detector average precisions, which are 0 here).
Another CPU or another torch rounds otherwise; :data:`LOSS` and :data:`IMAGES` leave room for that and for no more
(``docs/reliability.md`` says how they were chosen). A change that is meant to change results makes them anew:

    python tests/test_golden.py [METHOD ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DETECTORS, METHODS, parts_of

from cl_bench.core.record import replace_non_finite
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.loggers.base import Logger

pytestmark = pytest.mark.arithmetic

GOLDEN = Path(__file__).parent / "golden"

LOSS = 1e-4
"""Largest difference of a loss term, relative to the larger one (absolute below 1)."""

IMAGES = 1
"""Right answers of a task's 20 images that may differ: near ties."""

GOLDEN_METHODS = sorted([*METHODS, *DETECTORS])

KEYS = {method: ["optimizer.lr=0.0003"] for method in DETECTORS}
"""At a higher rate rounding decides which queries are matched.

A detector of so few epochs is certain of nothing, so all its answers are pseudo-labels.
"""
KEYS["detr_pseudo_labels"] += ["trainer.epochs=1", "method.threshold=null"]


class Curves(Logger):
    """Keeps the events of a run."""

    def __init__(self):
        self.events = []

    def start(self, run):
        pass

    def log_event(self, number, event):
        self.events.append(replace_non_finite(event))

    def finish(self, status, summary):
        pass


def golden(method: str, folder: Path, *overrides: str, jitter: float = 0.0) -> dict[str, Any]:
    """The run: {"losses": a dictionary of terms for each epoch, "class_il", "task_il": a row for each task}.

    Args:
        jitter: the first weights are scaled by 1 + jitter * noise, as another machine might round them.
    """
    parts = parts_of(method, *KEYS.get(method, []), *overrides)
    if jitter:
        noise = torch.Generator().manual_seed(7)
        for p in parts.method.parameters():
            p.data *= 1 + jitter * torch.randn(p.shape, generator=noise)
    logger = Curves()
    parts.build_trainer(logger, Checkpoint(folder), stop=lambda: False).run()
    epochs = [event["losses"] for event in logger.events if event["event"] == "epoch"]
    tasks = [event for event in logger.events if event["event"] == "task"]
    return {"losses": epochs} | {key: [event[key] for event in tasks] for key in ("class_il", "task_il")}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """The largest difference of a loss term, relative above 1, and of right answers in images."""
    assert len(found["losses"]) == len(expected["losses"])
    loss = images = 0.0
    for a, b in zip(found["losses"], expected["losses"]):
        assert a.keys() == b.keys()
        loss = max([loss, *(abs(a[name] - b[name]) / max(1.0, abs(a[name]), abs(b[name])) for name in a)])
    for key in ("class_il", "task_il"):
        for row, other in zip(found[key], expected[key], strict=True):
            for x, y in zip(row, other, strict=True):
                assert (x is None) == (y is None)
                if x is not None:
                    images = max(images, abs(x - y) / 100 * 20)
    return loss, images


@pytest.mark.slow
@pytest.mark.parametrize("method", GOLDEN_METHODS)
def test_a_golden_run_comes_again(method, tmp_path):
    found = golden(method, tmp_path)
    expected = json.loads((GOLDEN / f"{method}.json").read_text())
    loss, images = differences(found, expected)
    assert loss <= LOSS, f"python tests/test_golden.py {method} makes it anew where that was meant"
    assert round(images) <= IMAGES, f"python tests/test_golden.py {method} makes it anew where that was meant"


@pytest.mark.slow
def test_a_small_change_of_the_rate_is_seen_and_rounding_is_not(tmp_path):
    expected = json.loads((GOLDEN / "er.json").read_text())
    assert differences(golden("er", tmp_path / "rounded", jitter=1e-6), expected)[0] <= LOSS
    for rate in (0.098, 0.102):
        assert differences(golden("er", tmp_path / str(rate), f"optimizer.lr={rate}"), expected)[0] > 10 * LOSS


def test_there_is_a_golden_run_of_every_method():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == GOLDEN_METHODS


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or GOLDEN_METHODS:
        with tempfile.TemporaryDirectory() as place:
            (GOLDEN / f"{name}.json").write_text(json.dumps(golden(name, Path(place)), indent=1) + "\n")
