"""One data set under several permutations of its pixels, each with its own classes (permuted MNIST, with digits).

Permuted MNIST: Goodfellow et al. 2013; with one set of classes per permutation: scenario GNu of Wortsman et al. 2020.

:mod:`cl_bench.scenarios.domains` gives the same tasks without storing each permutation. This source stores them; it
keeps the settings, and so the fingerprints, of the runs that were made with it.
"""

import numpy as np

from cl_bench.core.errors import require
from cl_bench.data.base import ImageSet, fixed_by_settings
from cl_bench.data.pixel_maps import draw_permutation


@fixed_by_settings
def permuted_digits(*, digits: ImageSet, permutations: int, permutation_seed: int) -> ImageSet:
    """A data set in which permutation i of the pixels has classes ``l i`` to ``l i + l - 1``; ``digits`` has l classes.

    Every permutation is random, also number 0, and has its own generator: the first ten are the same with ten or fifty
    permutations.

    Args:
        digits: the images; a permutation is the same for all channels.
        permutations: their number.
        permutation_seed: draws them.
    """
    require(permutations > 0, "permutations", expected="1 or more", got=permutations, fix="10 and 50 are ready-made.")
    require(
        permutation_seed >= 0, "permutation_seed", expected="0 or more", got=permutation_seed, fix="Use another seed."
    )
    pixels, classes = digits.train_images[0, 0].size, len(digits.class_names)
    orders = [draw_permutation(pixels, permutation_seed, i) for i in range(permutations)]

    def permute(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(*images.shape[:2], -1)
        return np.concatenate([flat[:, :, order].reshape(images.shape) for order in orders])

    def shift_labels(labels: np.ndarray) -> np.ndarray:
        return np.concatenate([classes * i + labels for i in range(permutations)])

    return ImageSet(
        train_images=permute(digits.train_images),
        train_labels=shift_labels(digits.train_labels),
        test_images=permute(digits.test_images),
        test_labels=shift_labels(digits.test_labels),
        class_names=[f"{name} under permutation {i}" for i in range(permutations) for name in digits.class_names],
        superclass=[i for i in range(permutations) for _ in digits.class_names],
        mean=digits.mean,
        std=digits.std,
    )
