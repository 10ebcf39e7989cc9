"""A data set for detection, in memory."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cl_bench.core.errors import require

NOTHING = (-1.0, 0.0, 0.0, 0.0, 0.0)
"""The row of an annotation that is no object."""


@dataclass(frozen=True)
class DetectionSet:
    """Images and their objects as arrays, in the data set's own order.

    Attributes:
        train_images, test_images: (N, C, H, W) uint8.
        train_objects, test_objects: (N, M, 5) float32, for each image its objects: class id, or -1 for none, and box
            (:mod:`cl_bench.core.boxes`).
        class_names: one name per class id.
    """

    train_images: np.ndarray
    train_objects: np.ndarray
    test_images: np.ndarray
    test_objects: np.ndarray
    class_names: list[str]

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of a hash of images, objects and names."""
        content = hashlib.sha256(json.dumps([self.class_names, self.train_images.shape]).encode())
        for array in (self.train_images, self.train_objects, self.test_images, self.test_objects):
            content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()[:16]

    def measure_moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the training pixels in [0, 1], one value per channel."""
        some = self.train_images[:: max(1, len(self.train_images) // 1000)] / 255.0
        std = np.maximum(some.std(axis=(0, 2, 3)), 1e-3)  # it is 0 if all images have one colour
        return some.mean(axis=(0, 2, 3)).round(4).tolist(), std.round(4).tolist()


def pad_objects(objects: list[list[tuple[float, ...]]], most: int) -> np.ndarray:
    """The objects of each image, five numbers each, as (N, most, 5) float32."""
    padded = np.full((len(objects), most, 5), NOTHING, dtype=np.float32)
    for row, own in zip(padded, objects):
        row[: len(own)] = own if own else np.empty((0, 5))
    return padded


def check_size(size: int, fix: str) -> None:
    """Refuse a side of images that is none."""
    require(16 <= size <= 2048, "size", expected="16 to 2048 pixels", got=size, fix=fix)
