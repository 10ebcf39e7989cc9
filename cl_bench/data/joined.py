"""Several data sets as one, with images of one size and labels of their own.

So tasks can come from different data sets. The best-known sequence is that of Ebrahimi et al. (ECCV 2020, adversarial
continual learning; "5-datasets" in later papers): CIFAR-10, MNIST, SVHN, notMNIST and Fashion-MNIST, ten classes each.
They pad MNIST and its like to 32 x 32 pixels and repeat the grey channel three times. Departure: they normalise each
set by its own mean and standard deviation; here all images have the same.
"""

import hashlib
import json
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from cl_bench.core.errors import require
from cl_bench.data.base import ImageSet
from cl_bench.data.decoded import LARGEST_SIDE, measure_moments

VERSION = 1
"""Version of what is done to the images."""

CHUNK = 5000
"""Images that are changed together."""


def joined(  # not fixed by its settings, which say nothing of the order of the sets
    *, sources: dict[str, ImageSet], size: int, fit: Literal["pad", "resize"], channels: Literal[1, 3]
) -> ImageSet:
    """The images of all ``sources``, (N, channels, size, size) uint8, one set after the other; labels are shifted.

    A class is called by its set and its name, ``mnist 3``, and the sets are the superclasses. Mean and standard
    deviation are those of all training images together. The images are kept in the RAM.

    Args:
        sources: data sets by name, in their order.
        size: side of the images in pixels.
        fit: how other sizes become this one. ``pad``: black pixels around smaller images, and larger ones are refused;
            ``resize``: the shorter side is scaled, bilinear, and the centre is cropped.
        channels: 3 repeats a grey channel; 1 turns colours to grey (ITU-R 601).

    Raises:
        ConfigError: fewer than two data sets, or images that cannot be padded to ``size``.
    """
    require(
        isinstance(sources, dict) and len(sources) > 1,
        "sources",
        expected="two or more data sets, each with its _target_ and keys",
        got=(", ".join(sources) or "none") if isinstance(sources, dict) else sources,
        fix="See configs/scenario/datasets.yaml.",
    )
    require(0 < size <= LARGEST_SIDE, "size", expected=f"1 to {LARGEST_SIDE} pixels", got=size, fix="32 is usual.")
    for name, source in sources.items():
        side = max(source.train_images.shape[2:])
        require(
            fit == "resize" or side <= size,
            "size",
            expected=f"{side} pixels or more, since fit=pad makes no image smaller",
            got=f"{size} with {name}",
            fix="Raise it, or use fit=resize.",
        )
    sets = list(sources.values())
    starts = np.cumsum([0, *(len(source.class_names) for source in sets)])
    train, test = (
        np.concatenate([change_images(getattr(source, f"{part}_images"), size, fit, channels) for source in sets])
        for part in ("train", "test")
    )
    train_labels, test_labels = (
        np.concatenate([getattr(source, f"{part}_labels") + start for source, start in zip(sets, starts)])
        for part in ("train", "test")
    )
    content = json.dumps([VERSION, [source.digest for source in sets], size, fit, channels])
    checksum = hashlib.sha256(content.encode()).hexdigest()
    mean, std = measure_moments(train)
    return ImageSet(
        train_images=train,
        train_labels=train_labels,
        test_images=test,
        test_labels=test_labels,
        class_names=[f"{name} {label}" for name, source in sources.items() for label in source.class_names],
        superclass=[number for number, source in enumerate(sets) for _ in source.class_names],
        mean=mean,
        std=std,
        checksums=(checksum, checksum),
    )


def change_images(images: np.ndarray, size: int, fit: str, channels: int) -> np.ndarray:
    """(N, C, H, W) uint8 -> (N, channels, size, size) uint8; the same on every machine."""
    height, width = images.shape[2:]
    found = np.zeros((len(images), channels, size, size), dtype=np.uint8)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        if part.shape[1] == 3 and channels == 1:
            red, green, blue = part.astype(np.uint32).transpose(1, 0, 2, 3)
            part = ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).astype(np.uint8)[:, None]
        if fit == "resize" and (height, width) != (size, size):
            part = np.stack([_resize(image, size) for image in part])
        top, left = ((size - side) // 2 for side in part.shape[2:])
        found[start : start + CHUNK, :, top : top + part.shape[2], left : left + part.shape[3]] = part
    return found


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """(C, H, W) -> (C, size, size), by PIL, which computes in whole numbers."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    fitted = np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR))
    return fitted[None] if fitted.ndim == 2 else fitted.transpose(2, 0, 1)
