"""A data set in memory."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

Source = TypeVar("Source", bound=Callable[..., Any])

_FIXED: set[Callable[..., Any]] = set()


def fixed_by_settings(source: Source) -> Source:
    """Mark a source or scenario whose name and settings alone determine the images.

    Examples are bundled data and files that are checked against published checksums. A run on any other source is also
    identified by the digest of its images (decision 23).
    """
    _FIXED.add(source)
    return source


def is_fixed_by_settings(source: Callable[..., Any]) -> bool:
    """Whether :func:`fixed_by_settings` marks it; a subclass of a marked class is not marked."""
    return source in _FIXED


@dataclass(frozen=True)
class ImageSet:
    """Images and labels as arrays, in the data set's own order.

    Attributes:
        train_images, test_images: (N, C, H, W) uint8.
        train_labels, test_labels: (N,) int64, the data set's class ids.
        class_names: one name per class id.
        superclass: the superclass of each class id; None if the data set has none.
        mean, std: of the training pixels in [0, 1], one value per channel.
        checksums: of the bytes of the training and test images, if the source knows them already.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    superclass: list[int] | None
    mean: list[float]
    std: list[float]
    checksums: tuple[str, str] | None = None

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of a hash of images, labels and names: sets with one digest are the same set.

        Mean and standard deviation are not in it: they follow from the images, up to the rounding of a machine.
        """
        images = self.checksums or [_hash(self.train_images), _hash(self.test_images)]
        labels = [_hash(labels.astype("<i8")) for labels in (self.train_labels, self.test_labels)]
        shapes = [self.train_images.shape, self.test_images.shape]
        content = [self.class_names, self.superclass, labels, shapes, list(images)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
