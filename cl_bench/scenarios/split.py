"""Class-disjoint tasks: the classes of one data set, cut into consecutive groups.

One training stream serves both settings: Class-IL and Task-IL differ only in what is known at test time
(van de Ven and Tolias 2019), so both are measured in every run.
"""

from typing import Any

import numpy as np
import torch

from cl_bench.core.errors import ConfigError, require, void
from cl_bench.core.images import HostImages
from cl_bench.core.types import Data, Task
from cl_bench.data.base import ImageSet, fixed_by_settings
from cl_bench.scenarios.base import Scenario
from cl_bench.scenarios.recurring import spread_over_tasks
from cl_bench.scenarios.selection import (
    Normalisation,
    Positions,
    ValChoice,
    build_transform,
    check_seeds,
    check_task_sizes,
    choose_class_order,
    choose_images,
    declare_void_choices,
)

SEED_ORDERS = ("ocl_survey", "agem")
"""Orders that the run's ``seed`` draws, as in the code of published experiments."""

AGEM_SEED, AGEM_FIRST = 1234, 15
"""agem's ``conv_split_cifar.py``: its random seed, and the classes of the three tasks that tune its learning rates."""


@fixed_by_settings
@void(
    "num_tasks",
    when=lambda v: v["classes_per_task"] is not None and len(v["classes_per_task"]) != v["num_tasks"],
    why="classes_per_task says how many tasks there are",
)
@void("class_order_seed", when=lambda v: v["class_order"] != "random", why="only class_order=random is drawn")
@void("blurry_classes", when=lambda v: not v["blurry"], why="blurry=0 makes no class blurry")
@declare_void_choices
class Split(Scenario):
    """The classes of ``source`` in ``class_order``, cut into tasks.

    Args:
        source: the data set.
        pretrain_classes: this many first classes of the order are in no task, but in :attr:`Scenario.pretrain`.
        num_tasks: number of equal tasks; must divide the number of classes. Not used if ``classes_per_task`` is given.
        classes_per_task: sizes of the tasks, adding up to the number of classes; None for equal tasks.
        class_order: ``natural`` (0, 1, ...), ``random`` (numpy's legacy permutation of ``class_order_seed``, so that
            1993 gives iCaRL's order), ``superclass`` (classes of a superclass side by side), or a list of class ids.
            Two orders follow the run's ``seed``: ``ocl_survey`` (torch's permutation, Soutif et al. 2023) and ``agem``
            (Chaudhry et al. 2019: numpy shuffles classes 15 to 99; classes 0 to 14 come first, for
            ``pretrain_classes=15``).
        class_order_seed: used only by ``random``.
        data_seed: draws which images are held out, which are used if a number per class is given, and which come in
            other tasks.
        val_fraction: part of the training images held out for validation, in [0, 1); above 0 it is at least one image
            of each class.
        val_choice: which ones, see :data:`~cl_bench.scenarios.selection.ValChoice`.
        train_per_class, test_per_class: images used of each class; None for all.
        crop_padding, flip: augmentation, see :class:`~cl_bench.data.transform.Transform`.
        rand_augment: ``rand-m{M}-mstd{S}-inc1`` adds timm's RandAugment of that name, see
            :mod:`cl_bench.data.rand_augment`; None for none.
        normalisation: see :data:`~cl_bench.scenarios.selection.Normalisation`.
        blurry: part of the training images of each blurry class that come in other tasks; 0 for disjoint tasks
            (:mod:`cl_bench.scenarios.recurring`).
        blurry_classes: part of each task's classes that are blurry.
        repeat: probability that a class comes back in a later task.
        run_seed: the run's ``seed``.
    """

    def __init__(
        self,
        *,
        source: ImageSet,
        pretrain_classes: int,
        num_tasks: int,
        classes_per_task: list[int] | None,
        class_order: Any,
        class_order_seed: int,
        data_seed: int,
        val_fraction: float,
        val_choice: ValChoice,
        train_per_class: int | None,
        test_per_class: int | None,
        crop_padding: int,
        flip: bool,
        rand_augment: str | None,
        normalisation: Normalisation,
        blurry: float,
        blurry_classes: float,
        repeat: float,
        run_seed: int,
    ) -> None:
        check_seeds(class_order_seed=class_order_seed, data_seed=data_seed)
        num_classes = len(source.class_names)
        _check_held_out_classes(num_classes, pretrain_classes)
        sizes = choose_task_sizes(num_classes - pretrain_classes, num_tasks, classes_per_task)
        order = order_classes(source, class_order, class_order_seed, run_seed)
        self.follows_seed = class_order in SEED_ORDERS
        self.pretrain_order, self.class_order = order[:pretrain_classes], order[pretrain_classes:]
        self.data, self.class_names = source.digest, source.class_names
        channels, height, width = source.train_images.shape[1:]
        self.image_shape = (channels, height, width)
        self.transform = build_transform(
            source, crop_padding=crop_padding, flip=flip, rand_augment=rand_augment, normalisation=normalisation
        )
        train, val, test = choose_images(
            source,
            data_seed=data_seed,
            val_fraction=val_fraction,
            val_choice=val_choice,
            train_per_class=train_per_class,
            test_per_class=test_per_class,
        )
        ends = np.cumsum(sizes).tolist()
        groups = [range(end - size, end) for size, end in zip(sizes, ends)]
        portions = spread_over_tasks(
            train,
            [[self.class_order[c] for c in group] for group in groups],
            blurry=blurry,
            blurry_classes=blurry_classes,
            repeat=repeat,
            data_seed=data_seed,
        )
        self.pretrain = _gather(
            source.train_images, source.train_labels, train, self.pretrain_order, self.pretrain_order
        )
        self._cut(source, groups, portions, val, test)

    def _cut(
        self, source: ImageSet, groups: list[range], train: list[Positions], val: Positions, test: Positions
    ) -> None:
        """Set :attr:`tasks`; ``train`` has the training images of each task."""
        training, testing = (source.train_images, source.train_labels), (source.test_images, source.test_labels)
        self.tasks = []
        for number, group in enumerate(groups):
            ids = [self.class_order[c] for c in group]
            present = [position for position, c in enumerate(self.class_order) if len(train[number][c])]
            task = Task(
                id=number,
                classes=group,
                train=_gather(*training, train[number], [self.class_order[c] for c in present], self.class_order),
                val=_gather(*training, val, ids, self.class_order),
                test=_gather(*testing, test, ids, self.class_order),
                other_classes=tuple(c for c in present if c not in group),
            )
            self.tasks.append(task)


def _check_held_out_classes(num_classes: int, pretrain_classes: int) -> None:
    require(
        0 <= pretrain_classes < num_classes,
        "pretrain_classes",
        expected=f"0 to {num_classes - 1} classes, so that some are left for the tasks",
        got=pretrain_classes,
        fix="0 holds none out.",
    )


def choose_task_sizes(num_classes: int, num_tasks: int, classes_per_task: list[int] | None) -> list[int]:
    """The number of classes of each task."""
    if classes_per_task is not None:
        ways = f"For equal tasks set classes_per_task=null and num_tasks to one of {_list_divisors(num_classes)}."
        check_task_sizes(classes_per_task, num_classes, ways)
        return list(classes_per_task)
    if not 0 < num_tasks <= num_classes or num_classes % num_tasks:
        fix = "Choose one of them."
        if 0 < num_tasks < num_classes:
            small, larger = divmod(num_classes, num_tasks)
            unequal = [small + 1] * larger + [small] * (num_tasks - larger)
            fix = f"Choose one of them, or unequal tasks: 'scenario.classes_per_task={unequal}'."
        raise ConfigError(
            "num_tasks",
            expected=f"a number that divides {num_classes} classes, one of {_list_divisors(num_classes)}",
            got=num_tasks,
            fix=fix,
        )
    return [num_classes // num_tasks] * num_tasks


def order_classes(source: ImageSet, order: Any, seed: int, run_seed: int = 0) -> list[int]:
    """The data set's class ids in the order of learning.

    Args:
        order: see :class:`Split`.
        seed: draws ``random``.
        run_seed: draws :data:`SEED_ORDERS`.
    """
    num_classes = len(source.class_names)
    others: dict[str, list[int]] = {}
    if source.superclass is not None:
        parent = source.superclass
        others["superclass"] = sorted(range(num_classes), key=lambda c: (parent[c], c))
    others["ocl_survey"] = torch.randperm(num_classes, generator=torch.Generator().manual_seed(run_seed)).tolist()
    if num_classes > AGEM_FIRST:
        shuffled = np.random.RandomState((AGEM_SEED + run_seed) % 2**32).permutation(range(AGEM_FIRST, num_classes))
        others["agem"] = [*range(AGEM_FIRST), *shuffled.tolist()]
    return choose_class_order(num_classes, order, seed, others)


def _list_divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _gather(
    images: np.ndarray, labels: np.ndarray, chosen: list[np.ndarray], ids: list[int], class_order: list[int]
) -> Data:
    """The images of the classes ``ids`` at their ``chosen`` positions, in the data set's order."""
    which = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *(chosen[c] for c in ids)]))
    position = np.full(int(labels.max()) + 1, -1)  # class id -> position in the order
    position[class_order] = np.arange(len(class_order))
    rows = torch.from_numpy(which)
    if isinstance(images, np.memmap):  # it may be larger than the RAM, so nothing is read yet
        pixels = HostImages.from_rows(torch.from_numpy(images), rows, torch.device("cpu"))
    else:
        pixels = torch.from_numpy(images[which])
    return Data(pixels, torch.from_numpy(position[labels[which]]), rows)
