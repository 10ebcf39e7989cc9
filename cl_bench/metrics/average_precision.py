"""Average precision of detections, as COCO's evaluation computes it.

Source: Lin et al., ECCV 2014, and the reference program pycocotools (``COCOeval``), with which tests compare it. Boxes
are (left, top, right, bottom). Objects of a crowd, which COCO ignores, are not known here.
"""

import math

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps (IoU) from which a detection is right. AP is the mean over them, AP50 and AP75 are entries 0 and 5."""

RECALLS = np.linspace(0, 1, 101)
"""The recalls at which precision is read."""


def average_precision(
    image: np.ndarray, score: np.ndarray, boxes: np.ndarray, true_image: np.ndarray, true_boxes: np.ndarray
) -> np.ndarray:
    """(10,) AP of one class in [0, 1] at each of :data:`THRESHOLDS`; nan if there is no object of the class.

    A detection, the surest first, is right if it overlaps enough with an object that no surer one has. It takes the
    object with the largest overlap. Precision at a recall is the largest one at this recall or above.

    Args:
        image, score, boxes: (D,), (D,), (D, 4) of the detections of the class.
        true_image, true_boxes: (G,), (G, 4) of its objects.
    """
    if not len(true_image):
        return np.full(len(THRESHOLDS), math.nan)
    order = np.argsort(-score, kind="stable")
    of_image = {number: np.flatnonzero(true_image == number) for number in np.unique(true_image)}
    taken = np.zeros((len(THRESHOLDS), len(true_image)), dtype=bool)
    right = np.zeros((len(THRESHOLDS), len(order)), dtype=bool)
    for rank, detection in enumerate(order):
        own = of_image.get(image[detection])
        if own is None:
            continue
        free = np.where(taken[:, own], -1.0, compute_iou(boxes[detection], true_boxes[own]))
        best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)  # of equal ones the last, as COCO
        hit = free.max(axis=1) >= THRESHOLDS
        right[hit, rank] = taken[hit, own[best[hit]]] = True
    found = right.cumsum(axis=1)
    precision = found / np.arange(1, len(order) + 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(THRESHOLDS), 1))], axis=1)  # 0 at a recall never reached
    at = [np.searchsorted(recall, RECALLS) for recall in found / len(true_image)]
    return np.array([values[positions].mean() for values, positions in zip(precision, at)])


def compute_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(4,), (G, 4) -> (G,) intersection over union."""
    inside = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None).prod(axis=1)
    area, areas = (box[2:] - box[:2]).prod(), (others[:, 2:] - others[:, :2]).prod(axis=1)
    return inside / (area + areas - inside)
