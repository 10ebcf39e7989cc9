"""Boxes of objects, as tensors.

A box is (centre x, centre y, width, height) as fractions of the image's width and height. The annotation of an image is
(M, 5): for each of at most M objects its class, -1 for no object, and its box.
"""

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height -> (..., 4) left, top, right, bottom."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def compute_overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and generalised IoU (Rezatofighi et al., CVPR 2019), of boxes (..., 4) -> (...) each.

    GIoU = IoU - (C - U) / C, with the union U and the smallest box C around both.
    """
    a, b = to_corners(first), to_corners(second)
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - inside
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    tiny = torch.finfo(union.dtype).tiny  # two empty boxes: 0 instead of nan
    iou = inside / union.clamp(min=tiny)
    return iou, iou - (around - union) / around.clamp(min=tiny)
