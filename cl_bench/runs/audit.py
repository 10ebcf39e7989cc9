"""Whether a finished run can be trusted: leaks of the task id, of test images, of labels, and hidden memory.

Each check states what it looked at and how many; none of them trusts what the run says of itself. Training is looked
at through a rehearsal of a few steps a phase, once with the test set as it is and once with another one in its place.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_bench.config.build import Parts
from cl_bench.core.record import SETTINGS
from cl_bench.core.types import Data
from cl_bench.engine.checkpoint import Checkpoint, clone_state
from cl_bench.engine.evaluate import Arrange, Evaluation, evaluate, shuffle_batches
from cl_bench.loggers.group import Loggers

ONE_BY_ONE = 400
"""Images that are asked about in batches of one."""

ROUNDING = 0.005
"""Part of the answers that another order of summation may change: near ties."""

STEPS = 2
"""Steps of each phase in the rehearsal."""


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: what should hold.
        passed: whether it does; None where this run could not fail it, so that passing would say nothing.
        found: the figures it was judged by, or why it could not fail.
    """

    name: str
    passed: bool | None
    found: str

    @classmethod
    def unless(cls, cannot_fail: str | None, name: str, passed: bool, found: str) -> "Check":
        """The check, skipped where there is a reason why it could not fail."""
        return cls(name, passed, found) if cannot_fail is None else cls(name, None, cannot_fail)

    @property
    def verdict(self) -> str:
        """``PASS``, ``FAIL`` or ``SKIP``."""
        return {True: "PASS", False: "FAIL", None: "SKIP"}[self.passed]


def audit(
    rebuild: Callable[[], Parts], learned: Mapping[str, Any], predictions: Mapping[str, np.ndarray]
) -> list[Check]:
    """Every check of a run.

    Args:
        rebuild: builds the run's parts anew, in the same way every time.
        learned: the method's state after the last task, from the checkpoint.
        predictions: the columns of ``predictions.npz``.
    """
    parts = rebuild()
    parts.method.load_state_dict(learned)
    return [
        *answers_hold(parts, predictions),
        labels_are_not_known(parts),
        *contents_are_training_images(parts),
        *rehearsal_is_clean(rebuild),
    ]


# -- evaluation ----------------------------------------------------------------------------------------------------


def answers_hold(parts: Parts, predictions: Mapping[str, np.ndarray]) -> list[Check]:
    """The stored answers come again, whatever batches the images come in, and answering changes nothing."""
    before = clone_state(parts.method.state_dict())
    gradients = [p.grad for p in parts.method.parameters()]
    with training_batchnorms(parts.method) as in_training:
        together = ask(parts, lambda task: shuffle_batches(len(task)))
    unchanged = same(before, clone_state(parts.method.state_dict()))
    quiet = all(p.grad is g for p, g in zip(parts.method.parameters(), gradients))
    order = np.argsort(together.index.numpy(), kind="stable")
    original = np.append(np.array(parts.scenario.class_order), -1)
    again = {of: original[getattr(together, of).numpy()[order]] for of in SETTINGS}
    unlike = int(np.any([again[of] != predictions[of] for of in SETTINGS], axis=0).sum())
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in parts.method.modules())

    by_one = ask(parts, lambda task: few_images(len(task)))
    by_task = ask(parts, one_task_a_batch)
    return [
        Check("the stored answers come again", unlike <= ROUNDING * len(order), f"{unlike} of {len(order)} differ"),
        agreement("one image a batch gives the same answers", together, by_one),
        agreement("batches of a single task give the same answers", together, by_task),
        Check.unless(
            None if normalised else "the method has no BatchNorm",
            "BatchNorm is in evaluation mode",
            not in_training,
            f"{len(in_training)} layers were not" + (f": {', '.join(sorted(in_training)[:3])}" if in_training else ""),
        ),
        Check("answering leaves the method's state as it was", unchanged, "compared bit by bit"),
        Check("answering leaves no gradient behind", quiet, "looked at every parameter"),
    ]


def labels_are_not_known(parts: Parts) -> Check:
    """With test labels exchanged inside each task the Task-IL accuracy falls to chance: nothing looks labels up."""
    tasks = parts.scenario.tasks
    kept = [task.asked(parts.settings.evaluate_on).labels.clone() for task in tasks]
    generator = torch.Generator().manual_seed(0)
    images = expected = spread = 0.0
    for task in tasks:
        labels = task.asked(parts.settings.evaluate_on).labels
        labels.copy_(labels[torch.randperm(len(labels), generator=generator).to(labels.device)])
        images += len(labels)
        expected += len(labels) / len(task.classes)
        spread += len(labels) / len(task.classes) * (1 - 1 / len(task.classes))
    answers = ask(parts, lambda task: shuffle_batches(len(task)))
    right = float((answers.task_il == answers.label).sum())
    for task, labels in zip(tasks, kept):
        task.asked(parts.settings.evaluate_on).labels.copy_(labels)
    limit = expected + 5 * math.sqrt(spread)
    figures = (
        f"{100 * right / images:.2f} % right, chance {100 * expected / images:.2f} %, "
        f"limit {100 * limit / images:.2f} % (five standard deviations)"
    )
    few = limit >= images  # which a method that looks every label up does not exceed
    return Check.unless(
        f"{images:.0f} test images are too few to tell: {figures}" if few else None,
        "exchanged test labels bring the accuracy down to chance",
        right <= limit,
        figures,
    )


def ask(parts: Parts, arrange: Arrange, learned: int | None = None) -> Evaluation:
    """The run's own evaluation, with other batches."""
    learned = len(parts.scenario.tasks) if learned is None else learned
    split = parts.settings.evaluate_on
    return evaluate(
        parts.method, parts.scenario, learned=learned, split=split, autocast=parts.autocast, arrange=arrange
    )


def few_images(images: int, size: int = 1) -> list[Tensor]:
    """Batches of ``size`` of at most ``ONE_BY_ONE`` images, drawn over all tasks."""
    return list(torch.cat(shuffle_batches(images))[:ONE_BY_ONE].split(size))


def one_task_a_batch(task: Tensor) -> list[Tensor]:
    """Batches of one task each."""
    return [which for t in task.unique() for which in torch.nonzero(task == t).flatten().split(100)]


def agreement(name: str, first: Evaluation, second: Evaluation) -> Check:
    """Both settings' answers on the images that both were asked about."""
    place = {int(index): i for i, index in enumerate(first.index)}
    at = torch.tensor([place[int(index)] for index in second.index])
    unlike = int(((first.class_il[at] != second.class_il) | (first.task_il[at] != second.task_il)).sum())
    return Check(name, unlike <= ROUNDING * len(at), f"{unlike} of {len(at)} differ")


@contextmanager
def training_batchnorms(method: nn.Module) -> Iterator[set[str]]:
    """Collect the names of BatchNorm layers that answer in training mode."""
    names: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any) -> None:
            if layer.training:
                names.add(name)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


# -- contents ------------------------------------------------------------------------------------------------------


def contents_are_training_images(parts: Parts) -> list[Check]:
    """What is remembered was in the training set, is within its budget, and is nowhere but in the buffer."""
    tasks, buffer = parts.scenario.tasks, parts.buffer
    train = prints(Data.concatenate(task.train for task in tasks).images)
    held_out = {"test": prints(Data.concatenate(task.test for task in tasks).images)}
    held_out["validation"] = prints(Data.concatenate(task.val for task in tasks).images)
    remembered = prints(buffer.images[: len(buffer)])
    foreign = remembered - train
    twins = {name: len(train & images) for name, images in held_out.items()}
    hidden = hidden_images(parts, train)
    return [
        Check.unless(
            None if remembered else "nothing is remembered",
            "every remembered image was in the training set",
            not foreign,
            f"{len(foreign)} of {len(remembered)} were not"
            + "".join(f", {len(foreign & images)} of them {name} images" for name, images in held_out.items() if images)
            + "; exact duplicates of training images, not the run's doing: "
            + ", ".join(f"{count} among the {name} images" for name, count in twins.items()),
        ),
        within_budget(parts),
        Check("no training image is kept outside the buffer", not hidden, ", ".join(hidden) or "none found"),
    ]


def within_budget(parts: Parts) -> Check:
    """Images and bytes of the buffer are those of its capacity.

    A place is an image, its label, and at most a confidence and a logit a class beside them.
    """
    buffer = parts.buffer
    rows = max([len(buffer.images), len(buffer.labels), *map(len, buffer.columns.values())])
    held = sum(tensor.nbytes for tensor in flat(buffer.state_dict()).values())
    place = math.prod(parts.scenario.image_shape) + 8 + 4 * (1 + parts.scenario.num_classes)
    return Check(
        "the buffer is within its budget",
        len(buffer) <= buffer.capacity and rows <= buffer.capacity and held <= buffer.capacity * place,
        f"{len(buffer)} images in {rows} places of {buffer.capacity}, {held:,} bytes of at most "
        f"{buffer.capacity * place:,}",
    )


def hidden_images(parts: Parts, train: set[bytes]) -> list[str]:
    """Tensors of the method outside the buffer's images that hold training images, in any shape.

    Looked for as bytes, as floating-point pixels of 0 to 255 or 0 to 1, and normalised.
    """
    shape = parts.scenario.image_shape
    found = []
    for name, tensor in flat(parts.method.state_dict()).items():
        if (
            tensor.data_ptr() == parts.buffer.images.data_ptr()
            or tensor.numel() < 1
            or tensor.numel() % math.prod(shape)
        ):
            continue
        rows = tensor.reshape(-1, *shape)
        if rows.is_floating_point():
            guesses = [rows.round(), (255 * rows).round(), parts.scenario.transform.pixels(rows)]
        else:
            guesses = [rows]
        if known := len(set().union(*(prints(guess.clamp(0, 255)) for guess in guesses)) & train):
            found.append(f"{name} holds {known}")
    return found


def prints(images: Tensor) -> set[bytes]:
    """A fingerprint of each image's pixels."""
    rows = images.cpu().numpy().astype(np.uint8)
    return {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows}


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested state, by its path."""
    if isinstance(state, Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


# -- training ------------------------------------------------------------------------------------------------------


def rehearsal_is_clean(rebuild: Callable[[], Parts]) -> list[Check]:
    """A few steps of every phase: on training images only, and the same whatever the test set is."""
    strangers: list[str] = []
    over: list[str] = []
    early: list[str] = []
    ends = []
    for scrambled in (False, True):
        parts = rebuild()
        seen = [task.classes.stop for task in parts.scenario.tasks]  # before the method can change them
        if scrambled:
            scramble_images_asked(parts)
        allowed = prints(Data.concatenate(task.train for task in parts.scenario.tasks).images)
        torch.manual_seed(0)
        trainer = parts.trainer(Loggers([]), Checkpoint(Path()), stop=lambda: False)
        trainer.settings = replace(parts.settings, checkpoint_seconds=math.inf, checkpoint_steps=None)
        for task in parts.scenario.tasks:
            parts.method.eval()
            for number, phase in enumerate(parts.method.learn(task)):
                if unknown := len(prints(phase.data.images) - allowed):
                    strangers.append(f"task {task.id}, phase {number}: {unknown}")
                short = phase.data.take(slice(STEPS * parts.settings.batch_size))
                trainer.run_phase(task, number, replace(phase, data=short, epochs=1, order=None), None)
                parts.method.eval()
            if (check := within_budget(parts)).passed is False:
                over.append(f"task {task.id}: {check.found}")
            answered = ask(parts, lambda task: few_images(len(task), size=100), learned=task.id + 1).class_il
            if unseen := int((answered >= seen[task.id]).sum()):
                early.append(f"task {task.id}: {unseen}")
        ends.append(clone_state(parts.method.state_dict()))
    return [
        Check("every phase trains on training images", not strangers, "; ".join(strangers) or "none else found"),
        Check(
            "training does not depend on the images it is measured on",
            same(*ends),
            f"{STEPS} steps a phase with these images and with others, weights compared bit by bit",
        ),
        Check("the buffer stays within its budget while learning", not over, "; ".join(over) or "after every task"),
        Check.unless(
            None if seen[0] < parts.scenario.num_classes else "the first task has every class",
            "no class is answered before it was seen",
            not early,
            "; ".join(early) or "asked after every task",
        ),
    ]


def scramble_images_asked(parts: Parts) -> None:
    """Put other images and labels in the place of those that the run is measured on, and of the test set."""
    generator = torch.Generator().manual_seed(1)
    for task in parts.scenario.tasks:
        for data in {id(data): data for data in (task.test, task.asked(parts.settings.evaluate_on))}.values():
            data.images.copy_(torch.randint(256, data.images.shape, dtype=torch.uint8, generator=generator))
            data.labels.copy_(data.labels.flip(0))


def same(first: Any, second: Any) -> bool:
    """Whether two states hold the same tensors, bit by bit."""
    a, b = flat(first), flat(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
