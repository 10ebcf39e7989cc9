"""One data set in several views, one task per view: its pixels are permuted or rotated.

Permuted MNIST: Goodfellow et al. 2013; rotated MNIST: Lopez-Paz and Ranzato 2017. With shared labels the tasks differ
in their images only (domain-incremental, the third scenario of van de Ven and Tolias 2019); with disjoint labels each
task has classes of its own (GNu of Wortsman et al. 2020).

Only the originals are stored; a batch is permuted or rotated when it is looked up.
"""

import hashlib
import json
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cl_bench.core.errors import require, void
from cl_bench.core.images import HostImages, RearrangedImages
from cl_bench.core.types import Data, Task
from cl_bench.data.base import ImageSet, fixed_by_settings
from cl_bench.data.pixel_maps import draw_permutation, rotate_positions, spread_angles
from cl_bench.scenarios.base import Scenario
from cl_bench.scenarios.selection import (
    Positions,
    ValChoice,
    build_transform,
    check_seeds,
    choose_images,
    declare_void_choices,
)

MOST_TASKS = 1000


@fixed_by_settings
@void("permutation_seed", when=lambda v: v["change"] != "permuted", why="rotations are not drawn")
@void("angles", when=lambda v: v["change"] != "rotated", why="permutations have no angle")
@declare_void_choices
class Domains(Scenario):
    """The images of ``source`` in ``num_tasks`` views; every task has the same images.

    Image i of n becomes ``index`` n t + i in task t, in training and in test images.

    Args:
        source: the data set, with l classes.
        change: ``permuted``: every task has a random permutation of the pixels, also the first one; ``rotated``: every
            task has an angle.
        num_tasks: number of views.
        labels: ``shared``: K = l; ``disjoint``: task t has the classes ``l t`` to ``l t + l - 1``.
        permutation_seed: draws the permutations; None for the run's ``seed``. Permutation t does not depend on
            ``num_tasks``.
        angles: degrees counter-clockwise, one per task; None for ``180 t / num_tasks``.
        data_seed, val_fraction, val_choice, train_per_class, test_per_class: as in
            :class:`~cl_bench.scenarios.split.Split`; the images are the same ones in each task.
        crop_padding, flip, rand_augment: augmentation of the permuted or rotated images.
        normalisation: as in Split, without ``mean_image``, which would be another one in each task.
        run_seed: the run's ``seed``.
    """

    def __init__(
        self,
        *,
        source: ImageSet,
        change: Literal["permuted", "rotated"],
        num_tasks: int,
        labels: Literal["shared", "disjoint"],
        permutation_seed: int | None,
        angles: list[float] | None,
        data_seed: int,
        val_fraction: float,
        val_choice: ValChoice,
        train_per_class: int | None,
        test_per_class: int | None,
        crop_padding: int,
        flip: bool,
        rand_augment: str | None,
        normalisation: Literal["standard", "unit", "symmetric"],
        run_seed: int,
    ) -> None:
        require(
            0 < num_tasks <= MOST_TASKS, "num_tasks", expected=f"1 to {MOST_TASKS}", got=num_tasks, fix="10 is usual."
        )
        check_seeds(data_seed=data_seed, permutation_seed=permutation_seed or 0)
        channels, height, width = source.train_images.shape[1:]
        self.image_shape = (channels, height, width)
        self.shared_labels = labels == "shared"
        self.follows_seed = change == "permuted" and permutation_seed is None
        self.transform = build_transform(
            source, crop_padding=crop_padding, flip=flip, rand_augment=rand_augment, normalisation=normalisation
        )
        if change == "permuted":
            seed = run_seed if permutation_seed is None else permutation_seed
            maps = np.stack([draw_permutation(height * width, seed, t) for t in range(num_tasks)])
            views = [f"under permutation {t}" for t in range(num_tasks)]
        else:
            degrees = _choose_angles(angles, num_tasks)
            maps = np.stack([rotate_positions(height, width, angle) for angle in degrees])
            views = [f"at {angle:g} degrees" for angle in degrees]
        self._identify(source, views, maps)
        train, val, test = choose_images(
            source,
            data_seed=data_seed,
            val_fraction=val_fraction,
            val_choice=val_choice,
            train_per_class=train_per_class,
            test_per_class=test_per_class,
        )
        self._view(source, torch.from_numpy(maps), train, val, test)

    def _identify(self, source: ImageSet, views: list[str], maps: np.ndarray) -> None:
        """Set the names of the classes, and :attr:`data`.

        Permutations that follow the seed are not in ``data``, so that the seeds of a row have one.
        """
        names = source.class_names
        self.class_names = names if self.shared_labels else [f"{name} {view}" for view in views for name in names]
        self.class_order = list(range(len(self.class_names)))
        moved = None if self.follows_seed else hashlib.sha256(maps.astype("<i8").tobytes()).hexdigest()
        content = json.dumps([source.digest, maps.shape, moved, self.class_names])
        self.data = hashlib.sha256(content.encode()).hexdigest()[:16]

    def _view(self, source: ImageSet, maps: Tensor, train: Positions, val: Positions, test: Positions) -> None:
        """Set :attr:`tasks`. They share originals, rows and maps; only labels and index are their own."""
        num_classes = len(source.class_names)
        pixels = {"train": _to_images(source.train_images), "test": _to_images(source.test_images)}
        labels = {"train": torch.from_numpy(source.train_labels), "test": torch.from_numpy(source.test_labels)}
        rows = {
            name: torch.from_numpy(np.sort(np.concatenate(own)))
            for name, own in (("train", train), ("val", val), ("test", test))
        }

        def view(name: str, task: int) -> Data:
            of = "test" if name == "test" else "train"
            own = rows[name]
            images = RearrangedImages.of_view(pixels[of], own, task, maps)
            shift = 0 if self.shared_labels else num_classes * task
            return Data(images, labels[of][own] + shift, own + len(labels[of]) * task)

        nothing = torch.empty(0, dtype=torch.int64)
        self.pretrain = Data(torch.empty(0, *self.image_shape, dtype=torch.uint8), nothing, nothing)
        self.pretrain_order = []
        self.tasks = []
        for t in range(len(maps)):
            first = 0 if self.shared_labels else num_classes * t
            classes = range(first, first + num_classes)
            self.tasks.append(Task(t, classes, view("train", t), view("val", t), view("test", t)))


def _choose_angles(angles: list[float] | None, num_tasks: int) -> list[float]:
    require(
        angles is None or len(angles) == num_tasks,
        "angles",
        expected=f"{num_tasks} angles in degrees, one per task, or null for equal steps",
        got=f"{len(angles or [])}",
        fix="Give as many angles as num_tasks.",
    )
    return spread_angles(num_tasks) if angles is None else list(angles)


def _to_images(images: np.ndarray) -> Tensor:
    """The originals; those of a memory-mapped file may be larger than the RAM and stay there."""
    whole = torch.from_numpy(images)
    if isinstance(images, np.memmap):
        return HostImages.from_rows(whole, torch.arange(len(whole)), torch.device("cpu"))
    return whole
