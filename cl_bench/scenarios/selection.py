"""What scenarios share: the images of a data set that they use and hold out, and how pixels are normalised."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from cl_bench.core.errors import Built, ConfigError, require, require_fraction, void
from cl_bench.data.base import ImageSet
from cl_bench.data.rand_augment import RandAugment
from cl_bench.data.transform import Transform

Normalisation = Literal["standard", "unit", "symmetric", "mean_image"]
"""``standard``: minus the mean, divided by the standard deviation of the data set; ``unit``: [0, 1]; ``symmetric``:
[-1, 1]; ``mean_image``: [0, 1] minus the mean of all training images, pixel by pixel."""

ValChoice = Literal["random", "last", "file_start", "file_end"]
"""Which training images are held out: of each class ``random`` ones, or the ``last`` ones in the order of the file; of
all classes together those at the start or at the end of the file."""

Positions = list[np.ndarray]
"""For each class id the positions of some of its images in the data set's order."""


def check_seeds(**seeds: int) -> None:
    """Raise :class:`ConfigError` for the first of ``seeds`` that numpy would refuse; its name is the key."""
    for key, seed in seeds.items():
        require(0 <= seed < 2**32, key, expected="a whole number in [0, 2^32)", got=seed, fix="Use a smaller seed.")


def check_task_sizes(sizes: list[int], num_classes: int, fix: str) -> None:
    """Refuse ``classes_per_task`` that do not cut the classes into tasks."""
    require(
        len(sizes) > 0 and min(sizes) > 0 and sum(sizes) == num_classes,
        "classes_per_task",
        expected=f"positive numbers that add up to {num_classes} classes",
        got=f"{list(sizes)} (sum {sum(sizes)})",
        fix=fix,
    )


def choose_class_order(num_classes: int, order: Any, seed: int, others: Mapping[str, list[int]]) -> list[int]:
    """The data set's class ids in the order of learning.

    Args:
        num_classes: how many there are.
        order: ``natural``, ``random``, the name of one of ``others``, or a list of all class ids.
        seed: draws ``random``, by numpy's legacy permutation.
        others: the orders that a scenario has beside these.

    Raises:
        ConfigError: ``class_order`` is nothing of these.
    """
    known = {
        "natural": list(range(num_classes)),
        "random": np.random.RandomState(seed).permutation(num_classes).tolist(),
        **others,
    }
    if isinstance(order, str) and order in known:
        return known[order]
    explicit = not isinstance(order, str) and hasattr(order, "__iter__") and list(order)
    if explicit and all(type(c) is int for c in explicit) and sorted(explicit) == list(range(num_classes)):
        return explicit
    raise ConfigError(
        "class_order",
        expected=f"one of {', '.join(known)}, or a list of the {num_classes} class ids, each once",
        got=order if isinstance(order, str) else repr(explicit or order),
        fix="Use class_order=random with a class_order_seed for a random order.",
    )


def declare_void_choices(built: Built) -> Built:
    """Declare when the keys of :func:`choose_images` have no effect, see :func:`~cl_bench.core.errors.void`."""
    no_draw = void(
        "data_seed",
        when=lambda v: (
            (not v["val_fraction"] or v["val_choice"] != "random")
            and v["train_per_class"] is None
            and v["test_per_class"] is None
            and not (v.get("blurry") or v.get("repeat"))
        ),
        why="no images are drawn without val_fraction, train_per_class or test_per_class",
    )
    no_choice = void("val_choice", when=lambda v: not v["val_fraction"], why="val_fraction=0 holds out no images")
    return no_draw(no_choice(built))


def choose_images(
    source: ImageSet,
    *,
    data_seed: int,
    val_fraction: float,
    val_choice: ValChoice,
    train_per_class: int | None,
    test_per_class: int | None,
) -> tuple[Positions, Positions, Positions]:
    """The training, validation and test images of each class.

    Raises:
        ConfigError: a class would have no training image, or no validation image though some are held out.
    """
    require_fraction(val_fraction=val_fraction, below_one=True, fix="0.1 holds out a tenth of the training images.")
    names = source.class_names
    chosen = _draw_per_class(source.train_labels, names, train_per_class, "train_per_class", data_seed)
    train, val = _hold_out(chosen, val_fraction, val_choice, names)
    test = _draw_per_class(source.test_labels, names, test_per_class, "test_per_class", data_seed)
    return train, val, test


def _draw_per_class(labels: np.ndarray, names: list[str], per_class: int | None, key: str, data_seed: int) -> Positions:
    """The images of each class, drawn by ``data_seed``; all of them, or ``per_class``."""
    counts = np.bincount(labels, minlength=len(names))
    smallest = int(counts.min())
    require(
        smallest > 0 and len(counts) == len(names),
        "source",
        expected=f"training and test images of each of {len(names)} classes",
        got=f"{key.split('_')[0]} images of {np.count_nonzero(counts)}, none of {names[int(counts.argmin())]}",
        fix="Give every class training and test images.",
    )
    require(
        per_class is None or 0 < per_class <= smallest,
        key,
        expected=f"1 to {smallest} images per class, or null for all",
        got=per_class,
        fix=f"Set {key}=null to use every image.",
    )
    order = np.random.default_rng(data_seed).permutation(len(labels))
    return [order[labels[order] == c][:per_class] for c in range(len(names))]


def _hold_out(
    chosen: Positions, val_fraction: float, val_choice: ValChoice, names: list[str]
) -> tuple[Positions, Positions]:
    """The training and the validation images of each class."""
    if val_choice in ("file_start", "file_end"):
        every = np.sort(np.concatenate(chosen))
        count = max(1, round(val_fraction * len(every))) if val_fraction else 0
        held = every[:count] if val_choice == "file_start" else every[len(every) - count :]
        inside = [np.isin(own, held) for own in chosen]
        train = [own[~mask] for own, mask in zip(chosen, inside)]
        val = [own[mask] for own, mask in zip(chosen, inside)]
    else:
        counts = [max(1, round(val_fraction * len(own))) if val_fraction else 0 for own in chosen]
        ranked = [np.sort(own)[::-1] for own in chosen] if val_choice == "last" else chosen
        train = [own[n:] for own, n in zip(ranked, counts)]
        val = [own[:n] for own, n in zip(ranked, counts)]
    if val_fraction:
        _require_each_class(
            train,
            names,
            "val_fraction",
            expected="at least one training image per class beside the validation images",
            at=val_fraction,
            fix="Lower val_fraction, raise train_per_class, or give the class another image.",
        )
        _require_each_class(
            val,
            names,
            "val_choice",
            expected="at least one validation image per class",
            at=val_fraction,
            fix="Use val_choice=random or last, which hold out images of each class, or raise val_fraction.",
        )
    return train, val


def _require_each_class(parts: Positions, names: list[str], key: str, *, expected: str, at: float, fix: str) -> None:
    bare = [name for name, own in zip(names, parts) if not len(own)]
    got = f"none left of {', '.join(bare[:5])}{' and others' if len(bare) > 5 else ''} at {at}"
    require(not bare, key, expected=expected, got=got, fix=fix)


def build_transform(
    source: ImageSet, *, crop_padding: int, flip: bool, rand_augment: str | None, normalisation: Normalisation
) -> Transform:
    """Augmentation and normalisation of the images of ``source``."""
    side = min(source.train_images.shape[2:])
    require(
        crop_padding <= side,
        "crop_padding",
        expected=f"at most the side of an image, {side} pixels",
        got=crop_padding,
        fix="4 is usual for 32 x 32 pixels.",
    )
    mean, std, mean_image = source.mean, source.std, None
    channels = len(mean)
    if normalisation == "mean_image":
        images = source.train_images
        mean_image = torch.from_numpy(images.sum(axis=0, dtype=np.int64) / (255 * len(images))).float()
        mean, std = mean_image.mean(dim=(1, 2)).tolist(), [1.0] * channels
    elif normalisation != "standard":
        mean, std = ([0.0], [1.0]) if normalisation == "unit" else ([0.5], [0.5])
        mean, std = mean * channels, std * channels
    fill = [round(255 * value) for value in source.mean]
    return Transform(
        mean=mean,
        std=std,
        crop_padding=crop_padding,
        flip=flip,
        rand_augment=None if rand_augment is None else RandAugment.parse(rand_augment, fill),
        mean_image=mean_image,
    )
