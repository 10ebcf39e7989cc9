"""What is measured of detectors: average precision by class, in one pass over the images (decision 36).

The counterpart of :mod:`cl_bench.engine.evaluate`. A query answers with its surest class among those seen so far and
with one box; nothing else is suppressed. Images that show no class seen so far are left out, as in CL-DETR.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.boxes import to_corners
from cl_bench.core.types import Task
from cl_bench.methods.detection import Detector
from cl_bench.metrics.average_precision import average_precision
from cl_bench.scenarios.base import Scenario

BATCH = 100
"""Images per evaluation batch. It changes the speed only."""

EXAMPLES = 8
"""Images that are kept for the report."""


@dataclass(frozen=True)
class Detections:
    """Answers on N images after ``learned`` tasks: tensors on the CPU.

    Attributes:
        index: (N,) each image's position in the data set's own order.
        labels: (N, M, 5) the objects of all classes.
        classes, confidence, boxes: (N, Q), (N, Q), (N, Q, 4) of each query: position of its class in the class order
            (-1 for no answer), the probability, and the box.
        examples: (E, C, H, W) uint8, the first images.
        tasks: of the scenario.
        count: images that each task is asked on, also those without a class seen so far.
        precision: (K, 10) AP of each class in [0, 1] at each IoU threshold; nan for a class not seen or not shown.
    """

    index: Tensor
    labels: Tensor
    classes: Tensor
    confidence: Tensor
    boxes: Tensor
    examples: Tensor
    tasks: list[Task]
    count: int
    learned: int
    precision: np.ndarray

    def count_correct(self, setting: str, num_tasks: int) -> list[float]:
        """AP of each task's classes times its images; nan for a task not learned, and in Task-IL."""
        found = [math.nan] * num_tasks
        if setting == "class_il":
            for task in self.tasks[: min(self.learned, num_tasks)]:
                found[task.id] = self.count * _mean(self.precision[list(task.classes)])
        return found

    def compute_auroc(self, tasks: list[Task]) -> list[float]:
        """Not defined for boxes."""
        return [math.nan] * len(tasks)

    def summarise(self) -> list[dict[str, Any]]:
        """AP, AP50 and AP75 in percent of ``all`` classes seen, the ``old`` ones, and the last task's ``new`` ones."""
        last = self.tasks[self.learned - 1].classes
        groups = {"all": range(last.stop), "old": range(last.start), "new": last}
        return [
            {"after_task": self.learned - 1, "classes": name}
            | {key: 100 * _mean(self.precision[list(own)][:, at]) for key, at in COLUMNS.items()}
            for name, own in groups.items()
            if len(own)
        ]


COLUMNS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
"""Which IoU thresholds each number is the mean of."""


def _mean(values: np.ndarray) -> float:
    """Mean without nan; nan if nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


@torch.no_grad()
def evaluate_detection(
    method: Detector, scenario: Scenario, *, learned: int, split: str, autocast: torch.autocast
) -> Detections:
    """The method's boxes on the ``split`` ("test" or "val") images, which all tasks share, and their average precision.

    Raises:
        FloatingPointError: a score or a box is not a number.
    """
    every = scenario.tasks[0].get_split(split)
    seen = scenario.tasks[learned - 1].classes.stop if learned else 0
    shown = ((every.labels[..., 0] >= 0) & (every.labels[..., 0] < max(seen, 1))).any(dim=1)
    data = every.take(torch.nonzero(shown).flatten())
    method.eval()
    answers = []
    for part in data.split(BATCH):
        with autocast:
            scores, boxes = method.detect(scenario.transform.normalise(part.images))
        best = scores[..., : max(seen, 1)].float().max(dim=2)
        answers.append((best.indices, best.values, boxes.float()))
    classes, confidence, boxes = (torch.cat(column).cpu() for column in zip(*answers)) if answers else _no_answers()
    broken = confidence.isnan() | ~boxes.isfinite().all(dim=-1)
    if broken.any():
        raise FloatingPointError(f"{int(broken.sum())} of {broken.numel()} boxes or scores are not numbers")
    classes = torch.where((confidence > -torch.inf) & (seen > 0), classes, -1)
    labels = data.labels.cpu()
    precision = compute_precision(labels, classes, confidence, boxes, seen, scenario.num_classes)
    return Detections(
        index=data.index.cpu(),
        labels=labels,
        classes=classes,
        confidence=confidence,
        boxes=boxes,
        examples=data.images[:EXAMPLES].cpu(),
        tasks=scenario.tasks,
        count=len(every),
        learned=learned,
        precision=precision,
    )


def _no_answers() -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0), torch.empty(0, 0, 4)


def compute_precision(
    labels: Tensor, classes: Tensor, confidence: Tensor, boxes: Tensor, seen: int, num_classes: int
) -> np.ndarray:
    """(K, 10) AP of each of the first ``seen`` classes, nan for the others, and for all if nothing was answered.

    The arguments are those of :class:`Detections`.
    """
    precision = np.full((num_classes, 10), math.nan)
    answer, truth = classes.numpy(), labels[..., 0].numpy()
    corners, true_corners = to_corners(boxes).double().numpy(), to_corners(labels[..., 1:]).double().numpy()
    if not (answer >= 0).any():
        return precision
    for c in range(seen):
        image, query = np.nonzero(answer == c)
        true_image, row = np.nonzero(truth == c)
        score = confidence.numpy()[image, query]
        precision[c] = average_precision(image, score, corners[image, query], true_image, true_corners[true_image, row])
    return precision
