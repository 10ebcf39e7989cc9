"""A data set in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImageSet:
    """Images and labels as arrays, in the data set's own order.

    Attributes:
        train_images, test_images: (N, C, H, W) uint8.
        train_labels, test_labels: (N,) int64, the data set's class ids.
        class_names: a name a class id.
        superclass: the superclass of each class id, None where the data set has none.
        mean, std: of the training pixels in [0, 1], a value a channel.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: list[str]
    superclass: list[int] | None
    mean: list[float]
    std: list[float]
