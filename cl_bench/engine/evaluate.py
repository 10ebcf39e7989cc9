"""One row of the accuracy matrix: task id unknown (Class-IL) and known (Task-IL), from the same weights, in one pass.

Test images of all tasks are shuffled together before they are cut into batches: batches of a single task would leak the
task id through BatchNorm or any batch-wise rule. A method that is defined by such batches asks for them by name
(:attr:`cl_bench.methods.base.Method.test_batches`).

Masking is done here, for every method alike: in Class-IL classes not seen yet, in Task-IL classes outside the image's
task.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Data, Task
from cl_bench.methods.base import Method, Predict
from cl_bench.metrics.auroc import one_vs_rest
from cl_bench.scenarios.base import Scenario

MAX_BATCH = 500
"""Images an evaluation batch; changes the speed only, since networks are in evaluation mode."""

SINGLE_TASK_BATCH = 128
"""Images of a batch of one task: as many as Wortsman et al. 2020 have."""

Arrange = Callable[[Tensor], list[Tensor]]
"""(N,) the task of each image -> positions of the images of each batch, every image once."""


@dataclass(frozen=True)
class Evaluation:
    """Answers on test images, all tensors (N,) on the CPU, -1 = not answered or not asked.

    Attributes:
        index: each image's place in the data set's own order.
        label, class_il, task_il: positions in the class order.
        task: each image's task.
        confidence: softmax probability of the Class-IL answer among the classes seen, nan where there is none.
        of_task: (N, classes of the largest task) softmax probability of each class of the image's task among them, in
            Task-IL; nan where there is no answer, and beyond the classes of a smaller task.
    """

    index: Tensor
    label: Tensor
    task: Tensor
    class_il: Tensor
    task_il: Tensor
    confidence: Tensor
    of_task: Tensor

    def correct(self, setting: str, num_tasks: int) -> list[float]:
        """Right answers a task; nan for a task with an unanswered image or with none."""
        answer = {"class_il": self.class_il, "task_il": self.task_il}[setting]
        right = torch.bincount(self.task, weights=(answer == self.label).double(), minlength=num_tasks)
        missing = torch.bincount(self.task, weights=(answer < 0).double(), minlength=num_tasks)
        asked = torch.bincount(self.task, minlength=num_tasks)
        return torch.where((missing > 0) | (asked == 0), torch.nan, right).tolist()

    def auroc(self, tasks: list[Task]) -> list[float]:
        """Area under the ROC curve of each task in Task-IL, in percent, see :mod:`cl_bench.metrics.auroc`."""
        values = []
        for task in tasks:
            own = self.task == task.id
            scores = self.of_task[own, : len(task.classes)].double().numpy()
            values.append(100 * one_vs_rest(scores, (self.label[own] - task.classes.start).numpy()))
        return values


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
    """Ask ``method`` about the ``split`` ("test" or "val") images of the tasks learned and of the next one.

    Args:
        learned: number of tasks learned so far. The next task is asked in Task-IL only, for forward transfer.
        rule: one of the method's alternatives; None for its ``predict``.
        arrange: how the images come in batches; None as the method has it, anything else is for audits.

    Raises:
        FloatingPointError: a score is nan, which is neither an answer nor the lack of one.
    """
    tasks = scenario.tasks if learned == 0 else scenario.tasks[: learned + 1]
    data = Data.concatenate(task.get_split(split) for task in tasks)
    device = data.labels.device
    tasks_of_images = torch.cat([torch.full((len(t.get_split(split)),), t.id) for t in tasks])
    classes_of = torch.zeros(len(scenario.tasks), scenario.num_classes, dtype=torch.bool, device=device)  # (T, K)
    for t in scenario.tasks:
        classes_of[t.id, t.classes.start : t.classes.stop] = True
    num_seen = tasks[learned - 1].classes.stop if learned else 0
    seen = torch.arange(scenario.num_classes, device=device) < num_seen  # (K,)
    arrange = arrange or {"mixed": lambda task: mixed(len(task)), "single_task": single_task}[method.test_batches]
    batches = [which.to(device) for which in arrange(tasks_of_images)]
    tasks_of_images = tasks_of_images.to(device)

    largest = int(classes_of.sum(dim=1).max())

    method.eval()
    answers, unknowable = [], torch.zeros((), dtype=torch.int64, device=device)
    for which in batches:
        x, label = scenario.transform.normalise(data.images.index_select(0, which)), data.labels[which]
        task = tasks_of_images[which]
        own = classes_of[task]  # (B, K)
        with autocast:
            unknown = _scores(method, rule, x, None, len(own[0]))
            known = unknown if method.task_id == "ignored" else _scores(method, rule, x, task, len(own[0]))
        unknowable += (unknown.isnan() | known.isnan()).any(dim=1).sum()  # waited for once, at the end
        class_il, confidence = _answer(unknown, seen.expand_as(own))
        class_il = torch.where(task < learned, class_il, -1)
        confidence = torch.where(class_il >= 0, confidence, torch.nan)
        answers.append((label, task, class_il, _answer(known, own)[0], confidence, _of_task(known, own, largest)))
    columns = [torch.cat(column).cpu() for column in zip(*answers)]
    if unknowable:
        raise FloatingPointError(f"the scores of {int(unknowable)} of {len(data)} images are not numbers")
    return Evaluation(data.index[torch.cat(batches)].cpu(), *columns)


def mixed(images: int) -> list[Tensor]:
    """Positions of all images, shuffled, in batches."""
    return list(torch.randperm(images, generator=torch.Generator().manual_seed(0)).split(MAX_BATCH))


def single_task(task: Tensor) -> list[Tensor]:
    """(N,) the task of each image -> positions of all images, shuffled, in batches of one task each."""
    shuffled = torch.cat(mixed(len(task)))
    return [b for t in task.unique() for b in shuffled[task[shuffled] == t].split(SINGLE_TASK_BATCH)]


def _scores(method: Method, rule: Predict | None, x: Tensor, task: Tensor | None, num_classes: int) -> Tensor:
    """(B, K) fp32 scores; -inf throughout where the method needs a task id and gets none."""
    if task is None and method.task_id == "needed":
        return x.new_full((len(x), num_classes), -torch.inf)
    return (rule or method.predict)(x, task).float()


def _answer(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) scores and mask -> (B,) best allowed class, -1 where none has a score; (B,) its softmax probability."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    best = scores.max(dim=1)
    answered = best.values > -torch.inf
    confidence = torch.softmax(scores, dim=1).gather(1, best.indices[:, None]).squeeze(1)
    return torch.where(answered, best.indices, -1), torch.where(answered, confidence, torch.nan)


def _of_task(scores: Tensor, own: Tensor, largest: int) -> Tensor:
    """(B, K) scores and which classes are of the image's task -> (B, largest) their probabilities, nan beyond them."""
    probability = torch.softmax(scores.masked_fill(~own, -torch.inf), dim=1)
    first = own.int().argmax(dim=1, keepdim=True)
    places = first + torch.arange(largest, device=own.device)
    inside = places - first < own.sum(dim=1, keepdim=True)
    return probability.gather(1, places.clamp(max=own.shape[1] - 1)).masked_fill(~inside, torch.nan)


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """The columns of ``predictions.npz``; numbers only, nothing in it is ever unpickled."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(
            str(path),
            expected="the arrays of a finished run",
            got=" ".join(str(error).split()),
            fix="Put the file back, or make the run anew with overwrite=true.",
        ) from error
