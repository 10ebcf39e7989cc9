"""What methods for detection share: matching, the set loss, and what a detector answers.

Source: DETR (Carion et al., ECCV 2020), section 3.1, and its released code. For each image, N answers with class
probabilities p and boxes b are matched one to one with its objects (c_i, b_i) by the least sum of

    - a p(c_i) + l || b - b_i ||_1 + g (1 - GIoU(b, b_i))                                                   (Eq. 1)

(SciPy's Hungarian algorithm). Then

    classes = a sum w CE / sum w         over all N answers of the batch; one without object has class "no object" and
                                         weight w = ``no_object_weight``, all others w = 1
    boxes   = l sum || b - b_i ||_1 / objects of the batch                                                  (Eq. 2)
    giou    = g sum (1 - GIoU(b, b_i)) / objects of the batch

are summed over the decoder layers (``auxiliary``), each matched anew.

Shapes: L decoder layers, B images, Q queries, M objects at most, K classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.detr import DETR
from cl_bench.core.boxes import compute_overlaps
from cl_bench.core.errors import require, require_nonnegative
from cl_bench.core.images import send
from cl_bench.core.types import Batch, Losses
from cl_bench.methods.base import Method


class SetLoss:
    """The loss of a set of answers to the set of objects.

    Args:
        class_weight, box_weight, giou_weight: a, l, g of matching and loss.
        no_object_weight: weight of "no object" in the cross-entropy.
        auxiliary: whether every decoder layer has a loss, or the last one alone.
    """

    def __init__(
        self, *, class_weight: float, box_weight: float, giou_weight: float, no_object_weight: float, auxiliary: bool
    ) -> None:
        weights = {"class_weight": class_weight, "box_weight": box_weight, "giou_weight": giou_weight}
        require_nonnegative(fix="The article has 1, 5, 2 and 0.1.", **weights, no_object_weight=no_object_weight)
        require(
            sum(weights.values()) > 0,
            "class_weight",
            expected="a weight above 0 among class_weight, box_weight and giou_weight",
            got="0 for each, which trains nothing",
            fix="The article has 1, 5 and 2.",
        )
        self.class_weight, self.box_weight, self.giou_weight = class_weight, box_weight, giou_weight
        self.no_object_weight, self.auxiliary = no_object_weight, auxiliary
        from scipy.optimize import linear_sum_assignment  # only detectors need it; here, so that no step waits for it

        self._assign = linear_sum_assignment

    def __call__(self, logits: Tensor, boxes: Tensor, labels: Tensor) -> Losses:
        """Class logits (L, B, Q, K + 1), boxes (L, B, Q, 4), objects (B, M, 5) -> the three terms."""
        logits, boxes = (logits.float(), boxes.float()) if self.auxiliary else (logits[-1:].float(), boxes[-1:].float())
        layers, images, queries, classes = logits.shape
        match = self.match(logits, boxes, labels)
        there = match < queries
        answers = F.pad(boxes, (0, 0, 0, 1)).gather(2, match[..., None].expand(-1, -1, -1, 4))  # (L, B, M, 4)
        distance = (answers - labels[..., 1:]).abs().sum(dim=-1)
        _, giou = compute_overlaps(answers, labels[..., 1:])
        objects = (labels[..., 0] >= 0).sum().clamp(min=1)

        target = torch.full((layers, images, queries + 1), classes - 1, device=labels.device)
        target.scatter_(2, match, labels[..., 0].long().expand(layers, -1, -1))  # what has no match falls on the last
        target = target[..., :queries]
        entropy = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(target)
        weight = torch.where(target == classes - 1, self.no_object_weight, 1.0)
        means = (weight * entropy).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))
        return {
            "classes": self.class_weight * means.sum(),
            "boxes": self.box_weight * torch.where(there, distance, 0.0).sum() / objects,
            "giou": self.giou_weight * torch.where(there, 1 - giou, 0.0).sum() / objects,
        }

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """(L, B, M) int64: the query of each object; Q for none, or no object. Waits for the device."""
        layers, images, queries, _ = logits.shape
        found = np.full((layers, images, labels.shape[1]), queries)
        costs = np.nan_to_num(self.compute_costs(logits, boxes, labels).cpu().numpy())  # a diverged run says so later
        there = (labels[..., 0] >= 0).cpu().numpy()
        for layer in range(layers):
            for image in range(images):
                own = np.flatnonzero(there[image])
                query, column = self._assign(costs[layer, image][:, own])
                found[layer, image, own[column]] = query
        return send(torch.from_numpy(found), labels.device)

    def compute_costs(self, logits: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        """(L, B, Q, M) costs of each pair; those of no object mean nothing."""
        objects = labels[:, None, :, 1:]
        classes = labels[:, None, :, 0].long().clamp(min=0)
        probability = logits.softmax(dim=-1).gather(3, classes.expand(*logits.shape[:3], -1))
        distance = (boxes[..., None, :] - objects).abs().sum(dim=-1)
        _, giou = compute_overlaps(boxes[..., None, :], objects)
        return self.box_weight * distance - self.class_weight * probability - self.giou_weight * giou


class Detector(Method):
    """A method whose answer is a set of boxes. Its step waits for the device to match them, so it is not functional.

    Args:
        net: the network.
        set_loss: what is minimised.
    """

    def __init__(self, *, net: DETR, set_loss: SetLoss) -> None:
        super().__init__()
        self.net, self.set_loss = net, set_loss

    def observe(self, batch: Batch) -> Losses:
        """The set loss of the stream."""
        return self.set_loss(*self.net.detect(batch.x), batch.y)

    def detect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, Q, K) probabilities of each class, -inf for no answer, and (B, Q, 4) boxes.

        The evaluation masks classes not seen yet.
        """
        logits, boxes = self.net.detect(x)
        return logits[-1].float().softmax(dim=-1)[..., :-1], boxes[-1].float()

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the probability of the surest box of each class: whether the image shows it."""
        return self.detect(x)[0].amax(dim=1)
