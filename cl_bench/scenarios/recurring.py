"""Tasks that share classes: some training images of a class come in other tasks than its own.

*Blurry task borders.* Blurry-M of Bang et al. (CVPR 2021, Rainbow Memory; the split of Aljundi et al. 2019): each task
has its own classes, and M % of its images are of the classes of other tasks. i-Blurry-N-M of Koh et al. (ICLR 2022):
N % of the classes of each task stay disjoint, and only the others are blurry. Here M % of the images of each blurry
class are drawn and divided evenly among the *other* tasks. Departures: in the lists that Bang et al. released and in
the public code of Si-Blurry (Moon et al. 2023), which repeats i-Blurry, a task also gets some of its own M % back; Koh
et al. choose the disjoint classes at random, here they come first in each task's part of the class order, which is the
same for ``class_order=random``.

*Repetition.* Class-incremental with repetition (Hemati et al., CoLLAs 2023): after its first task, a class comes back
in each later task with the probability P_r, the same for all classes (``fixed`` in their sampling-based generator). Its
images are divided evenly among the tasks that have it, and each image comes once (as in their slot-based generator).
Departure: the tasks where classes are new are given by the class order, not drawn, so that every task has new classes.

An image comes in one task only. Validation and test images stay in the task of their class.
"""

import numpy as np

from cl_bench.core.errors import require, require_fraction
from cl_bench.scenarios.selection import Positions


def spread_over_tasks(
    train: Positions, tasks: list[list[int]], *, blurry: float, blurry_classes: float, repeat: float, data_seed: int
) -> list[Positions]:
    """For each task the training images of each class id that come in it.

    Args:
        train: the training images of each class id.
        tasks: the class ids of each task.
        blurry: part of the images of a blurry class that comes in other tasks, M / 100.
        blurry_classes: part of each task's classes that are blurry, 1 - N / 100; the last ones.
        repeat: probability that a class comes back in a later task, P_r.
        data_seed: draws which images and which tasks.
    """
    require_fraction(blurry=blurry, below_one=True, fix="0.1 moves a tenth of the images of a class to other tasks.")
    require_fraction(blurry_classes=blurry_classes, fix="1 makes all classes blurry, 0.5 half of each task's.")
    require_fraction(repeat=repeat, fix="0.2 brings a class back in every fifth later task.")
    require(
        not (blurry and repeat), "repeat", expected="0 beside blurry tasks", got=repeat, fix="Leave one of them out."
    )
    require(
        len(tasks) > 1 or not (blurry or repeat),
        "blurry" if blurry else "repeat",
        expected="0, since there is one task only",
        got=blurry or repeat,
        fix="Raise num_tasks.",
    )
    rng = np.random.default_rng([data_seed, len(tasks)])
    found: list[Positions] = [[own[:0] for own in train] for _ in tasks]
    for number, classes in enumerate(tasks):
        first_blurry = len(classes) - round(blurry_classes * len(classes))
        for place, c in enumerate(classes):
            images = train[c]
            if blurry and place >= first_blurry:
                images = rng.permutation(images)
                moved = min(round(blurry * len(images)), len(images) - 1)
                others = rng.permutation([t for t in range(len(tasks)) if t != number])
                portions = {number: images[moved:], **dict(zip(others, np.array_split(images[:moved], len(others))))}
            elif repeat:
                later = number + 1 + np.flatnonzero(rng.random(len(tasks) - number - 1) < repeat)
                portions = dict(zip([number, *later], np.array_split(rng.permutation(images), 1 + len(later))))
            else:
                portions = {number: images}
            for task, portion in portions.items():
                found[task][c] = portion
    return found
