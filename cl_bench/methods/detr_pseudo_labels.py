"""DETR with the old detector's boxes as further labels: the distillation of CL-DETR (Liu et al., CVPR 2023).

Before a task is learned, the detector of the tasks so far looks at its images. Of all pairs of a query and an old class
the ``most`` surest are taken; those that overlap a new object by IoU >= ``overlap`` are dropped (section 3.3). The rest
are labels like all others: the set loss of :mod:`cl_bench.methods.detection` is unchanged.

``threshold=null`` is the released rule, which keeps every one of the ``most``. A number drops boxes whose probability
is not above it. Departures: docs/methods/detr.md.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cl_bench.backbones.detr import DETR
from cl_bench.buffers.base import CHUNK
from cl_bench.core.boxes import compute_overlaps
from cl_bench.core.errors import require_fraction, require_positive
from cl_bench.core.types import Data, Phase, Task
from cl_bench.methods.detection import Detector, SetLoss
from cl_bench.scenarios.detection import Detection


class DETRPseudoLabels(Detector):
    """Joins the old detector's boxes to the labels of a new task.

    Args:
        most: boxes of an image at most.
        threshold: probability above which a box counts; None for every one.
        overlap: IoU with a new object from which a box is dropped.
    """

    def __init__(
        self, *, net: DETR, scenario: Detection, set_loss: SetLoss, most: int, threshold: float | None, overlap: float
    ) -> None:
        super().__init__(net=net, set_loss=set_loss)
        require_positive(fix="The released code has 10 and 0.7.", most=most, overlap=overlap)  # 0 would drop every box
        require_fraction(fix="The released code has 0.7.", overlap=overlap)
        require_fraction(fix="null keeps every box; nothing is above 1.", below_one=True, threshold=threshold)
        self._transform = scenario.transform
        self.most, self.threshold, self.overlap = most, threshold, overlap

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase, on the labels and the old detector's boxes."""
        data = task.train if task.id == 0 else self.add_boxes(task.train, old_classes=task.classes.start)
        yield Phase(data, self.observe, self.net.parameters())

    @torch.no_grad()
    def add_boxes(self, data: Data, old_classes: int) -> Data:
        """The images with labels (N, M + n, 5): n of the present detector's boxes, with class -1 where dropped."""
        parts = [self.find_boxes(part, old_classes) for part in data.split(CHUNK)]
        return replace(data, labels=torch.cat([data.labels, torch.cat(parts)], dim=1))

    def find_boxes(self, data: Data, old_classes: int) -> Tensor:
        """(N, n, 5), the surest boxes of the old classes on each image."""
        scores, boxes = self.detect(self._transform.normalise(data.images))
        scores = scores[..., :old_classes].flatten(1)  # (N, Q old), pairs of a query and a class
        best = scores.topk(min(self.most, scores.shape[1]))
        found = boxes.gather(1, (best.indices // old_classes)[..., None].expand(-1, -1, 4))
        overlaps, _ = compute_overlaps(found[:, :, None], data.labels[:, None, :, 1:])
        covered = torch.where(data.labels[:, None, :, 0] >= 0, overlaps, 0.0).amax(dim=2) >= self.overlap
        dropped = covered if self.threshold is None else covered | (best.values <= self.threshold)
        classes = torch.where(dropped, -1, best.indices % old_classes)
        return torch.cat([classes[..., None].float(), found], dim=2)
