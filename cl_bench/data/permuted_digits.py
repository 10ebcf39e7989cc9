"""One data set under several permutations of its pixels, each with classes of its own (permuted MNIST, on digits).

Permuted MNIST: Goodfellow et al. 2013; with one set of classes a permutation: scenario GNu of Wortsman et al. 2020.
"""

import numpy as np

from cl_bench.core.errors import require
from cl_bench.data.base import ImageSet, fixed_by_settings


@fixed_by_settings
def permuted_digits(*, digits: ImageSet, permutations: int, permutation_seed: int) -> ImageSet:
    """Permutation i of the pixels of every image gives classes ``l i`` to ``l i + l - 1``, l the classes of ``digits``.

    Every permutation is drawn, number 0 too, each by a generator of its own: the first ten are the same whether ten or
    fifty are asked for.

    Args:
        digits: the images; a permutation moves the pixels of all channels together.
        permutations: how many.
        permutation_seed: which.
    """
    require(permutations > 0, "permutations", expected="1 or more", got=permutations, fix="10 and 50 are ready-made.")
    require(
        permutation_seed >= 0, "permutation_seed", expected="0 or more", got=permutation_seed, fix="Use another seed."
    )
    pixels, classes = digits.train_images[0, 0].size, len(digits.class_names)
    orders = [np.random.default_rng([permutation_seed, i]).permutation(pixels) for i in range(permutations)]

    def permuted(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(*images.shape[:2], -1)
        return np.concatenate([flat[:, :, order].reshape(images.shape) for order in orders])

    def labels(of: np.ndarray) -> np.ndarray:
        return np.concatenate([classes * i + of for i in range(permutations)])

    return ImageSet(
        train_images=permuted(digits.train_images),
        train_labels=labels(digits.train_labels),
        test_images=permuted(digits.test_images),
        test_labels=labels(digits.test_labels),
        class_names=[f"{name} under permutation {i}" for i in range(permutations) for name in digits.class_names],
        superclass=[i for i in range(permutations) for _ in digits.class_names],
        mean=digits.mean,
        std=digits.std,
    )
