"""Coloured shapes on dark, noisy ground, drawn here: detection without a download."""

import numpy as np

from cl_bench.core.errors import require, require_positive
from cl_bench.data.base import fixed_by_settings
from cl_bench.data.detection import DetectionSet, check_size, pad_objects

MOST_OBJECTS = 4
"""An image has one to four objects."""

SIDES = (0.16, 0.39)
"""Smallest and largest side of an object relative to that of the image: 10 to 25 of 64 pixels."""

GROUND, COLOUR = (0.0, 0.35), (0.4, 1.0)
"""Values of a pixel of the ground, drawn one by one, and of the colour of an object; each for every channel."""

CLEARANCE = 0.1
"""Largest part of the smaller box that another object may cover."""

TRIES = 20
"""Positions tried for an object; if none is free, it is left out."""

MASKS = {
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.ones_like(x, dtype=bool),
    "triangle": lambda x, y: 2 * np.abs(x) <= y + 1.2,
    "cross": lambda x, y: np.minimum(np.abs(x), np.abs(y)) <= 0.35,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.35),
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 1.01,
}
"""The shapes on [-1, 1] squared, whose sides they touch, also with an even number of pixels; y points down."""


@fixed_by_settings
def shapes(*, kinds: list[str], train_images: int, test_images: int, size: int, draw_seed: int) -> DetectionSet:
    """Images of ``size`` x ``size`` pixels with one to four shapes each, and a box around each shape.

    Args:
        kinds: the classes, names of :data:`MASKS`.
        train_images, test_images: how many.
        draw_seed: draws everything; the first images stay the same if more are asked for.
    """
    require(
        len(kinds) > 0 and set(kinds) <= set(MASKS) and len(set(kinds)) == len(kinds),
        "kinds",
        expected=f"different ones of {', '.join(MASKS)}",
        got=list(kinds),
        fix="configs/scenario/detr_shapes.yaml has all six.",
    )
    check_size(size, "64 suits backbone=detr_shapes.")
    require_positive(fix="2000 and 400 are usual.", train_images=train_images, test_images=test_images)
    require(0 <= draw_seed < 2**32, "draw_seed", expected="a whole number in [0, 2^32)", got=draw_seed, fix="Use 0.")
    drawn = [
        _draw_images(np.random.default_rng([draw_seed, split]), count, size, kinds)
        for split, count in enumerate((train_images, test_images))
    ]
    return DetectionSet(*drawn[0], *drawn[1], list(kinds))


def _draw_images(rng: np.random.Generator, count: int, size: int, kinds: list[str]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((count, 3, size, size), dtype=np.uint8)
    objects = []
    for number in range(count):
        images[number], own = _draw_image(rng, size, kinds)
        objects.append(own)
    return images, pad_objects(objects, MOST_OBJECTS)


def _draw_image(rng: np.random.Generator, size: int, kinds: list[str]) -> tuple[np.ndarray, list[tuple[float, ...]]]:
    image = rng.uniform(*GROUND, (3, size, size))
    placed: list[tuple[int, int, int]] = []
    objects: list[tuple[float, ...]] = []
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        kind, side = (
            int(rng.integers(len(kinds))),
            int(rng.integers(round(SIDES[0] * size), round(SIDES[1] * size) + 1)),
        )
        corners = rng.integers(0, size - side + 1, (TRIES, 2)).tolist()
        free = [(x, y) for x, y in corners if all(_covers_little((x, y, side), other) for other in placed)]
        colour = rng.uniform(*COLOUR, (3, 1))
        if not free:
            continue
        left, top = free[0]
        placed.append((left, top, side))
        middle = (np.arange(side) + 0.5) * 2 / side - 1
        inside = MASKS[kinds[kind]](*np.meshgrid(middle, middle))
        image[:, top : top + side, left : left + side][:, inside] = colour
        objects.append((kind, (left + side / 2) / size, (top + side / 2) / size, side / size, side / size))
    return (255 * image).astype(np.uint8), objects


def _covers_little(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
    """Whether two squares, left, top and side each, overlap by :data:`CLEARANCE` at most."""
    (left, top, side), (other_left, other_top, other_side) = first, second
    across = min(left + side, other_left + other_side) - max(left, other_left)
    down = min(top + side, other_top + other_side) - max(top, other_top)
    return max(0, across) * max(0, down) <= CLEARANCE * min(side, other_side) ** 2
