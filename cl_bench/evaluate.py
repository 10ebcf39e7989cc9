"""One row of the accuracy matrix: task id unknown (Class-IL) and known (Task-IL), from the same weights, in one pass.

Test images of all tasks are shuffled together before they are cut into batches: batches of a single task would leak the
task id through BatchNorm or any batch-wise rule. Masking is done here, for every method alike: in Class-IL classes not
seen yet, in Task-IL classes outside the image's task.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl_bench.errors import ConfigError
from cl_bench.methods.base import Method, Predict
from cl_bench.scenarios.base import Scenario
from cl_bench.types import Data

MAX_BATCH = 500
"""Images an evaluation batch; changes the speed only, since networks are in evaluation mode."""

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
    """

    index: Tensor
    label: Tensor
    task: Tensor
    class_il: Tensor
    task_il: Tensor
    confidence: Tensor

    def correct(self, setting: str, num_tasks: int) -> list[float]:
        """Right answers a task; nan for a task with an unanswered image or with none."""
        answer = {"class_il": self.class_il, "task_il": self.task_il}[setting]
        right = torch.bincount(self.task, weights=(answer == self.label).double(), minlength=num_tasks)
        missing = torch.bincount(self.task, weights=(answer < 0).double(), minlength=num_tasks)
        asked = torch.bincount(self.task, minlength=num_tasks)
        return torch.where((missing > 0) | (asked == 0), torch.nan, right).tolist()


@torch.no_grad()  # not inference_mode: some methods differentiate in order to answer
def evaluate(
    method: Method,
    scenario: Scenario,
    *,
    learned: int,
    split: str,
    autocast: torch.autocast,
    rule: Predict | None = None,
    arrange: Arrange = lambda task: mixed(len(task)),
) -> Evaluation:
    """Ask ``method`` about the ``split`` ("test" or "val") images of the tasks learned and of the next one.

    Args:
        learned: number of tasks learned so far. The next task is asked in Task-IL only, for forward transfer.
        rule: one of the method's alternatives; None for its ``predict``.
        arrange: how the images come in batches; anything but the default is for audits.
    """
    tasks = scenario.tasks if learned == 0 else scenario.tasks[: learned + 1]
    data = Data.concatenate(task.asked(split) for task in tasks)
    device = data.labels.device
    task_of_class = torch.cat([torch.full((len(t.classes),), t.id) for t in scenario.tasks]).to(device)  # (K,)
    num_seen = tasks[learned - 1].classes.stop if learned else 0
    seen = torch.arange(scenario.num_classes, device=device) < num_seen  # (K,)
    batches = [which.to(device) for which in arrange(task_of_class[data.labels].cpu())]

    method.eval()
    answers = []
    for which in batches:
        x, label = scenario.transform.plain(data.images[which]), data.labels[which]
        task = task_of_class[label]
        own = task_of_class == task[:, None]  # (B, K)
        with autocast:
            unknown = _scores(method, rule, x, None, len(own[0]))
            known = unknown if method.task_id == "ignored" else _scores(method, rule, x, task, len(own[0]))
        class_il, confidence = _answer(unknown, seen.expand_as(own))
        class_il = torch.where(task < learned, class_il, -1)
        confidence = torch.where(class_il >= 0, confidence, torch.nan)
        answers.append((label, task, class_il, _answer(known, own)[0], confidence))
    columns = [torch.cat(column).cpu() for column in zip(*answers)]
    return Evaluation(data.index[torch.cat(batches)].cpu(), *columns)


def mixed(images: int) -> list[Tensor]:
    """Positions of all images, shuffled, in batches."""
    return list(torch.randperm(images, generator=torch.Generator().manual_seed(0)).split(MAX_BATCH))


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
