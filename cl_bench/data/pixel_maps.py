"""Where the pixels of an image go in each of several views of it: permuted, or rotated.

Shapes: V views, H x W pixels. A map has, for each pixel of a view, the position of the original's pixel that it shows;
H W means black.
"""

import numpy as np
from PIL import Image


def draw_permutation(pixels: int, seed: int, number: int) -> np.ndarray:
    """(pixels,) permutation ``number`` of a seed; each has its own generator, whatever their number."""
    return np.random.default_rng([seed, number]).permutation(pixels)


def rotate_positions(height: int, width: int, angle: float) -> np.ndarray:
    """(H W,) map of a rotation by ``angle`` degrees counter-clockwise about the centre.

    A pixel shows its nearest neighbour, or black, as in Pillow's ``Image.rotate``, which the rotated MNIST of GEM
    (Lopez-Paz and Ranzato 2017) uses.
    """
    positions = np.arange(1, height * width + 1, dtype=np.int32).reshape(height, width)  # 0 is Pillow's black
    shown = np.asarray(Image.fromarray(positions).rotate(angle, Image.Resampling.NEAREST)).astype(np.int64).reshape(-1)
    return np.where(shown > 0, shown - 1, height * width)


def spread_angles(views: int) -> list[float]:
    """Angles from 0 to below 180 degrees, equally far apart."""
    return [180 * view / views for view in range(views)]
