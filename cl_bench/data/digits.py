"""Handwritten digits, 8 x 8 grey pixels, bundled with scikit-learn (UCI optdigits): nothing to download."""

import importlib.util
from pathlib import Path

import numpy as np

from cl_bench.data.base import ImageSet, fixed_by_settings

TEST_EVERY = 5
"""Every fifth image is a test image: scikit-learn has no split, and a fixed one is the same for every seed."""


@fixed_by_settings
def digits() -> ImageSet:
    """1,437 training and 360 test images, (N, 1, 8, 8) uint8 (pixel values 0..16 stretched to 0..255), 10 classes."""
    # Read the file directly: importing sklearn.datasets takes three seconds, more than all else before the first step.
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    test = np.arange(len(labels)) % TEST_EVERY == 0
    pixels = images[~test] / 255.0
    return ImageSet(
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        class_names=[str(c) for c in range(10)],
        superclass=None,
        mean=[float(pixels.mean())],
        std=[float(pixels.std())],
    )
