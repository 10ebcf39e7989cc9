"""The audit of a finished run: leaks of task id, test images or labels, and images hidden outside the buffer.

Each check states what it examined. No check trusts what the run reports about itself. Training is checked by a
rehearsal of a few steps per phase, once with the real test set and once with another one instead.
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
from cl_bench.core.images import RearrangedImages
from cl_bench.core.record import SETTINGS
from cl_bench.core.types import Data, list_seen_classes
from cl_bench.engine.checkpoint import Checkpoint, clone_state
from cl_bench.engine.evaluate import Arrange, Evaluation, evaluate, shuffle_batches
from cl_bench.loggers.group import Loggers

ONE_BY_ONE = 400
"""Images that are predicted in batches of one."""

ROUNDING = 0.005
"""Part of the predictions that another order of summation may change, where two scores are almost equal."""

CHUNK = 10_000
"""Images that are hashed together."""

STEPS = 2
"""Steps per phase in the rehearsal."""


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: what should be true.
        passed: whether it is; None if this run could not fail the check, so that passing would say nothing.
        found: the figures behind the verdict, or why the check could not fail.
    """

    name: str
    passed: bool | None
    found: str

    @classmethod
    def skip_if(cls, cannot_fail: str | None, name: str, passed: bool, found: str) -> "Check":
        """A check that is skipped if there is a reason why it could not fail."""
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
        rebuild: builds the run's parts again, in the same way every time.
        learned: the method's state after the last task, from the checkpoint.
        predictions: the columns of ``predictions.npz``.
    """
    parts = rebuild()
    parts.method.load_state_dict(learned)
    return [
        *check_answers(parts, predictions),
        check_labels_unknown(parts),
        *check_contents(parts),
        *check_rehearsal(rebuild),
    ]


# -- evaluation ----------------------------------------------------------------------------------------------------


def check_answers(parts: Parts, predictions: Mapping[str, np.ndarray]) -> list[Check]:
    """Checks that the stored predictions are reproduced, in any batches, and that predicting changes nothing."""
    before = clone_state(parts.method.state_dict())
    gradients = [p.grad for p in parts.method.parameters()]
    with watch_batchnorms(parts.method) as in_training:
        together = ask(parts, lambda task: shuffle_batches(len(task)))
    unchanged = are_equal(before, clone_state(parts.method.state_dict()))
    quiet = all(p.grad is g for p, g in zip(parts.method.parameters(), gradients))
    order = np.argsort(together.index.numpy(), kind="stable")
    original = np.append(np.array(parts.scenario.class_order), -1)
    again = {of: original[getattr(together, of).numpy()[order]] for of in SETTINGS}
    unlike = int(np.any([again[of] != predictions[of] for of in SETTINGS], axis=0).sum())
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in parts.method.modules())

    by_one = ask(parts, lambda task: draw_few_images(len(task)))
    by_task = ask(parts, split_by_task)
    return [
        Check("the stored answers come again", unlike <= ROUNDING * len(order), f"{unlike} of {len(order)} differ"),
        compare_answers("one image a batch gives the same answers", together, by_one),
        compare_answers("batches of a single task give the same answers", together, by_task),
        Check.skip_if(
            None if normalised else "the method has no BatchNorm",
            "BatchNorm is in evaluation mode",
            not in_training,
            f"{len(in_training)} layers were not" + (f": {', '.join(sorted(in_training)[:3])}" if in_training else ""),
        ),
        Check("answering leaves the method's state as it was", unchanged, "compared bit by bit"),
        Check("answering leaves no gradient behind", quiet, "looked at every parameter"),
    ]


def check_labels_unknown(parts: Parts) -> Check:
    """Check that shuffling the test labels inside each task brings Task-IL accuracy down to chance."""
    tasks = parts.scenario.tasks
    kept = [task.get_split(parts.settings.evaluate_on).labels.clone() for task in tasks]
    generator = torch.Generator().manual_seed(0)
    images = expected = spread = 0.0
    for task in tasks:
        labels = task.get_split(parts.settings.evaluate_on).labels
        labels.copy_(labels[torch.randperm(len(labels), generator=generator).to(labels.device)])
        images += len(labels)
        expected += len(labels) / len(task.classes)
        spread += len(labels) / len(task.classes) * (1 - 1 / len(task.classes))
    answers = ask(parts, lambda task: shuffle_batches(len(task)))
    right = float((answers.task_il == answers.label).sum())
    for task, labels in zip(tasks, kept):
        task.get_split(parts.settings.evaluate_on).labels.copy_(labels)
    limit = expected + 5 * math.sqrt(spread)
    figures = (
        f"{100 * right / images:.2f} % right, chance {100 * expected / images:.2f} %, "
        f"limit {100 * limit / images:.2f} % (five standard deviations)"
    )
    few = limit >= images  # not even a method that looks up every label exceeds it
    return Check.skip_if(
        f"{images:.0f} test images are too few to tell: {figures}" if few else None,
        "exchanged test labels bring the accuracy down to chance",
        right <= limit,
        figures,
    )


def ask(parts: Parts, arrange: Arrange, learned: int | None = None) -> Evaluation:
    """The predictions of the run's own evaluation, in other batches."""
    learned = len(parts.scenario.tasks) if learned is None else learned
    split = parts.settings.evaluate_on
    return evaluate(
        parts.method, parts.scenario, learned=learned, split=split, autocast=parts.autocast, arrange=arrange
    )


def draw_few_images(images: int, size: int = 1) -> list[Tensor]:
    """Batches of ``size`` images, at most ``ONE_BY_ONE`` in all, drawn from all tasks."""
    return list(torch.cat(shuffle_batches(images))[:ONE_BY_ONE].split(size))


def split_by_task(task: Tensor) -> list[Tensor]:
    """Batches that each have images of one task only."""
    return [which for t in task.unique() for which in torch.nonzero(task == t).flatten().split(100)]


def compare_answers(name: str, first: Evaluation, second: Evaluation) -> Check:
    """Check that two evaluations agree, in both settings, on the images that both have."""
    rows = {int(index): i for i, index in enumerate(first.index)}
    at = torch.tensor([rows[int(index)] for index in second.index])
    unlike = int(((first.class_il[at] != second.class_il) | (first.task_il[at] != second.task_il)).sum())
    return Check(name, unlike <= ROUNDING * len(at), f"{unlike} of {len(at)} differ")


@contextmanager
def watch_batchnorms(method: nn.Module) -> Iterator[set[str]]:
    """Collect the names of BatchNorm layers that predict in training mode."""
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


def check_contents(parts: Parts) -> list[Check]:
    """Checks that stored images are training images, within the budget, and only in the buffer."""
    tasks, buffer = parts.scenario.tasks, parts.buffer
    train = hash_images(Data.concatenate(task.train for task in tasks).images)
    held_out = {"test": hash_images(Data.concatenate(task.test for task in tasks).images)}
    held_out["validation"] = hash_images(Data.concatenate(task.val for task in tasks).images)
    remembered = hash_images(buffer.images[: len(buffer)])
    foreign = remembered - train
    twins = {name: len(train & images) for name, images in held_out.items()}
    hidden = find_hidden_images(parts, train)
    return [
        Check.skip_if(
            None if remembered else "nothing is remembered",
            "every remembered image was in the training set",
            not foreign,
            f"{len(foreign)} of {len(remembered)} were not"
            + "".join(f", {len(foreign & images)} of them {name} images" for name, images in held_out.items() if images)
            + "; exact duplicates of training images, not the run's doing: "
            + ", ".join(f"{count} among the {name} images" for name, count in twins.items()),
        ),
        check_budget(parts),
        Check("no training image is kept outside the buffer", not hidden, ", ".join(hidden) or "none found"),
    ]


def check_budget(parts: Parts) -> Check:
    """Check that the images and bytes of the buffer are within its capacity.

    A slot is an image, its label, and at most a confidence and one logit per class.
    """
    buffer = parts.buffer
    rows = max([len(buffer.images), len(buffer.labels), *map(len, buffer.columns.values())])
    held = sum(tensor.nbytes for tensor in flatten_state(buffer.state_dict()).values())
    slot = math.prod(parts.scenario.image_shape) + 8 + 4 * (1 + parts.scenario.num_classes)
    return Check(
        "the buffer is within its budget",
        len(buffer) <= buffer.capacity and rows <= buffer.capacity and held <= buffer.capacity * slot,
        f"{len(buffer)} images in {rows} slots of {buffer.capacity}, {held:,} bytes of at most "
        f"{buffer.capacity * slot:,}",
    )


def find_hidden_images(parts: Parts, train: set[bytes]) -> list[str]:
    """The tensors of the method, beside the buffer's images, that hold training images in any shape.

    They are searched as bytes, as floating-point pixels of 0 to 255 or 0 to 1, and as normalised images.
    """
    shape = parts.scenario.image_shape
    found = []
    for name, tensor in flatten_state(parts.method.state_dict()).items():
        if (
            tensor.data_ptr() == parts.buffer.images.data_ptr()
            or tensor.numel() < 1
            or tensor.numel() % math.prod(shape)
        ):
            continue
        rows = tensor.reshape(-1, *shape)
        if rows.is_floating_point():
            guesses = [rows.round(), (255 * rows).round(), parts.scenario.transform.recover_pixels(rows)]
        else:
            guesses = [rows]
        if known := len(set().union(*(hash_images(guess.clamp(0, 255)) for guess in guesses)) & train):
            found.append(f"{name} holds {known}")
    return found


def hash_images(images: Tensor) -> set[bytes]:
    """The set of hashes of the images' pixels."""
    parts = (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))
    rows = (row for part in parts for row in part.cpu().numpy().astype(np.uint8))
    return {hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows}


def flatten_state(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state, by their paths."""
    if isinstance(state, Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {
        k: v for key, value in items for k, v in flatten_state(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


# -- training ------------------------------------------------------------------------------------------------------


def check_rehearsal(rebuild: Callable[[], Parts]) -> list[Check]:
    """Checks that a few steps of every phase use only training images, and do not depend on the test set."""
    strangers: list[str] = []
    over: list[str] = []
    early: list[str] = []
    ends = []
    for scrambled in (False, True):
        parts = rebuild()
        tasks = parts.scenario.tasks
        seen = [torch.tensor(list_seen_classes(tasks[: task.id + 1])) for task in tasks]
        if scrambled:
            scramble_test_images(parts)
        training = [*(task.train for task in parts.scenario.tasks), parts.scenario.pretrain]
        allowed = hash_images(Data.concatenate(training).images)
        torch.manual_seed(0)
        trainer = parts.build_trainer(Loggers([]), Checkpoint(Path()), stop=lambda: False)
        trainer.settings = replace(
            parts.settings, checkpoint_seconds=math.inf, checkpoint_steps=None, evaluate_every=None
        )
        for task in parts.scenario.tasks:
            parts.method.eval()
            for number, phase in enumerate(parts.method.learn(task)):
                if unknown := len(hash_images(phase.data.images) - allowed):
                    strangers.append(f"task {task.id + 1}, phase {number + 1}: {unknown}")
                short = phase.data.take(slice(STEPS * (phase.batch_size or parts.settings.batch_size)))
                trainer.run_phase(task, number, replace(phase, data=short, epochs=1, order=None), None)
                parts.method.eval()
            if (check := check_budget(parts)).passed is False:
                over.append(f"task {task.id + 1}: {check.found}")
            answered = ask(parts, lambda task: draw_few_images(len(task), size=100), learned=task.id + 1).class_il
            if unseen := int((~torch.isin(answered[answered >= 0], seen[task.id])).sum()):
                early.append(f"task {task.id + 1}: {unseen}")
        ends.append(clone_state(parts.method.state_dict()))
    return [
        Check("every phase trains on training images", not strangers, "; ".join(strangers) or "none else found"),
        Check(
            "training does not depend on the images it is measured on",
            are_equal(*ends),
            f"{STEPS} steps a phase with these images and with others, weights compared bit by bit",
        ),
        Check("the buffer stays within its budget while learning", not over, "; ".join(over) or "after every task"),
        Check.skip_if(
            None if len(seen[0]) < parts.scenario.num_classes else "the first task has every class",
            "no class is answered before it was seen",
            not early,
            "; ".join(early) or "asked after every task",
        ),
    ]


def scramble_test_images(parts: Parts) -> None:
    """Replace the images and labels on which the run is measured, and the test set, by others."""
    generator = torch.Generator().manual_seed(1)
    for task in parts.scenario.tasks:
        for data in {id(data): data for data in (task.test, task.get_split(parts.settings.evaluate_on))}.values():
            others = torch.randint(256, data.images.shape, dtype=torch.uint8, generator=generator)
            if isinstance(data.images, RearrangedImages):  # in place: a method may have kept them
                data.images.source[data.images.rows] = others.to(data.images.source.device)
            else:
                data.images.copy_(others)
            data.labels.copy_(data.labels.flip(0))


def are_equal(first: Any, second: Any) -> bool:
    """Whether two states have the same tensors, bit by bit."""
    a, b = flatten_state(first), flatten_state(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
