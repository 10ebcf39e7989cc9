"""One row of the accuracy matrix: task id unknown (Class-IL) and known (Task-IL), from the same weights, in one pass.

Test images of all tasks are shuffled together before they are cut into batches. Batches of a single task would leak the
task id through BatchNorm or any other rule that looks at a whole batch. A method that is defined by such batches asks
for them by name (:attr:`cl_bench.methods.base.Method.test_batches`).

Masking is done here, in the same way for every method: in Class-IL the classes not seen yet, in Task-IL the classes of
other tasks.
"""

import copy
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Data, Task, list_seen_classes
from cl_bench.engine.detection import Detections, evaluate_detection
from cl_bench.methods.base import Method, Predict
from cl_bench.methods.detection import Detector
from cl_bench.metrics.auroc import one_vs_rest
from cl_bench.scenarios.base import Scenario

MAX_BATCH = 500
"""Images per evaluation batch. It changes the speed only, since networks are in evaluation mode."""

SINGLE_TASK_BATCH = 128
"""Images per batch of one task, as in Wortsman et al. 2020."""

Arrange = Callable[[Tensor], list[Tensor]]
"""(N,) the task of each image -> positions of the images of each batch; every image comes once."""


@dataclass(frozen=True)
class Evaluation:
    """Answers on N test images: tensors (N,) on the CPU, -1 = not answered or not asked.

    Attributes:
        index: each image's position in the data set's own order.
        label, class_il, task_il: positions in the class order.
        task: each image's task.
        confidence: softmax probability of the Class-IL answer among the classes seen; nan if there is no answer.
        of_task: (N, classes of the largest task) in Task-IL, the softmax probability of each class among the classes
            of the image's task; nan if there is no answer, and beyond the classes of a smaller task.
    """

    index: Tensor
    label: Tensor
    task: Tensor
    class_il: Tensor
    task_il: Tensor
    confidence: Tensor
    of_task: Tensor

    def count_correct(self, setting: str, num_tasks: int) -> list[float]:
        """Number of correct answers for each task; nan for a task with an unanswered image, or without images."""
        answer = {"class_il": self.class_il, "task_il": self.task_il}[setting]
        right = torch.bincount(self.task, weights=(answer == self.label).double(), minlength=num_tasks)
        missing = torch.bincount(self.task, weights=(answer < 0).double(), minlength=num_tasks)
        asked = torch.bincount(self.task, minlength=num_tasks)
        return torch.where((missing > 0) | (asked == 0), torch.nan, right).tolist()

    def compute_auroc(self, tasks: list[Task]) -> list[float]:
        """Area under the ROC curve of each task in Task-IL, in percent; see :mod:`cl_bench.metrics.auroc`."""
        values = []
        for task in tasks:
            own = self.task == task.id
            scores = self.of_task[own, : len(task.classes)].double().numpy()
            values.append(100 * one_vs_rest(scores, (self.label[own] - task.classes.start).numpy()))
        return values


def measure(
    method: Method,
    scenario: Scenario,
    *,
    learned: int,
    split: str,
    autocast: torch.autocast,
    rule: Predict | None = None,
) -> Evaluation | Detections:
    """:func:`evaluate`, or its counterpart for a detector, whose only rule is :meth:`Detector.detect`."""
    if isinstance(method, Detector):
        return evaluate_detection(method, scenario, learned=learned, split=split, autocast=autocast)
    return evaluate(method, scenario, learned=learned, split=split, autocast=autocast, rule=rule)


@torch.no_grad()  # not inference_mode: some methods differentiate in order to answer
def evaluate(
    method: Method,
    scenario: Scenario,
    *,
    learned: int,
    split: str,
    autocast: torch.autocast,
    rule: Predict | None = None,
    arrange: Arrange | None = None,
) -> Evaluation:
    """The method's answers on the ``split`` ("test" or "val") images of the tasks learned and of the next task.

    Args:
        learned: number of tasks learned so far. The next task is asked in Task-IL only, for forward transfer.
        rule: one of the method's alternatives; None for its ``predict``.
        arrange: how the images are cut into batches; None for the method's way. Audits use other ways.

    Raises:
        FloatingPointError: a score is nan, which is neither an answer nor a missing one.
    """
    tasks = scenario.tasks if learned == 0 else scenario.tasks[: learned + 1]
    data = Data.concatenate(task.get_split(split) for task in tasks)
    device = data.labels.device
    tasks_of_images = torch.cat([torch.full((len(t.get_split(split)),), t.id) for t in tasks])
    classes_of = torch.zeros(len(scenario.tasks), scenario.num_classes, dtype=torch.bool, device=device)  # (T, K)
    for t in scenario.tasks:
        classes_of[t.id, t.classes.start : t.classes.stop] = True
    seen = torch.zeros(scenario.num_classes, dtype=torch.bool)  # (K,)
    seen[list_seen_classes(tasks[:learned])] = True
    seen = seen.to(device)
    if arrange is None:
        ways: dict[str, Arrange] = {
            "mixed": lambda task: shuffle_batches(len(task)),
            "single_task": shuffle_within_tasks,
        }
        arrange = ways[method.test_batches]
    batches = [which.to(device) for which in arrange(tasks_of_images)]
    tasks_of_images = tasks_of_images.to(device)

    largest = int(classes_of.sum(dim=1).max())

    method.eval()
    answers, not_numbers = [], torch.zeros((), dtype=torch.int64, device=device)
    for which in batches:
        x, label = scenario.transform.normalise(data.images.index_select(0, which)), data.labels[which]
        task = tasks_of_images[which]
        own = classes_of[task]  # (B, K)
        with autocast:
            unknown = compute_scores(method, rule, x, None, len(own[0]))
            known = unknown if method.task_id == "ignored" else compute_scores(method, rule, x, task, len(own[0]))
        not_numbers += (unknown.isnan() | known.isnan()).any(dim=1).sum()  # read once, at the end
        class_il, confidence = choose_classes(unknown, seen.expand_as(own))
        class_il = torch.where(task < learned, class_il, -1)
        confidence = torch.where(class_il >= 0, confidence, torch.nan)
        answers.append(
            (label, task, class_il, choose_classes(known, own)[0], confidence, _score_in_task(known, own, largest))
        )
    columns = [torch.cat(column).cpu() for column in zip(*answers)]
    if not_numbers:
        raise FloatingPointError(f"the scores of {int(not_numbers)} of {len(data)} images are not numbers")
    return Evaluation(data.index[torch.cat(batches)].cpu(), *columns)


def draw_sample(scenario: Scenario, split: str, images: int) -> Scenario:
    """The scenario with at most this number of ``split`` images of each task, on the training device.

    The same images are drawn in every run, by a generator of their own.
    """
    generator = torch.Generator().manual_seed(0)
    sample = copy.copy(scenario)
    sample.tasks = []
    for task in scenario.tasks:
        data = task.get_split(split)
        which = torch.randperm(len(data), generator=generator)[:images].sort().values.to(data.labels.device)
        few = Data(data.images.index_select(0, which), data.labels[which], data.index[which])
        sample.tasks.append(replace(task, val=few, test=few))
    return sample


def shuffle_batches(images: int) -> list[Tensor]:
    """Positions of all images, shuffled, in batches."""
    return list(torch.randperm(images, generator=torch.Generator().manual_seed(0)).split(MAX_BATCH))


def shuffle_within_tasks(task: Tensor) -> list[Tensor]:
    """(N,) the task of each image -> positions of all images, shuffled, in batches of one task each."""
    shuffled = torch.cat(shuffle_batches(len(task)))
    return [b for t in task.unique() for b in shuffled[task[shuffled] == t].split(SINGLE_TASK_BATCH)]


def compute_scores(method: Method, rule: Predict | None, x: Tensor, task: Tensor | None, num_classes: int) -> Tensor:
    """(B, K) fp32 scores; all -inf if the method needs a task id and gets none."""
    if task is None and method.task_id == "needed":
        return x.new_full((len(x), num_classes), -torch.inf)
    return (rule or method.predict)(x, task).float()


def choose_classes(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) scores and mask -> (B,) best allowed class, -1 if none has a score; (B,) its softmax probability."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    best = scores.max(dim=1)
    answered = best.values > -torch.inf
    confidence = torch.softmax(scores, dim=1).gather(1, best.indices[:, None]).squeeze(1)
    return torch.where(answered, best.indices, -1), torch.where(answered, confidence, torch.nan)


def _score_in_task(scores: Tensor, own: Tensor, largest: int) -> Tensor:
    """(B, K) scores, and mask of the classes of the image's task -> (B, largest) their probabilities, nan beyond."""
    probability = torch.softmax(scores.masked_fill(~own, -torch.inf), dim=1)
    first = own.int().argmax(dim=1, keepdim=True)
    positions = first + torch.arange(largest, device=own.device)
    inside = positions - first < own.sum(dim=1, keepdim=True)
    return probability.gather(1, positions.clamp(max=own.shape[1] - 1)).masked_fill(~inside, torch.nan)


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """The columns of ``predictions.npz``: numbers only; a pickle in the file is never loaded."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            str(path),
            expected="the arrays of a finished run",
            got=" ".join(str(error).split()),
            fix="Put the file back, or run again with overwrite=true.",
        ) from error
