"""GDumb: greedy sampler and dumb learner (Prabhu, Torr, Dokania, ECCV 2020).

Nothing is learned from the stream. The buffer is offered each image of a task once; with ``buffer=greedy`` it is the
paper's greedy sampler (Algorithm 1). Then a network with fresh weights is trained on the buffer alone, with CutMix:

    L = s CE( f(x~), y ) + (1 - s) CE( f(x~), y' ),

x~ is x with a box of another image x' of the batch, s the share of pixels that x keeps. In a batch the box is the same
for all images; its area is 1 - l of the image before it is cut at the border, l uniform in [0, 1]. A batch is mixed
with probability ``cutmix``, else s = 1.

Departures: the network is trained after every task, each time from scratch, so that every row of the accuracy matrix
is measured; ``train_after=last_task`` trains once, as the released code. That code stores the first images of each
class, without a stream, trains in half precision and reports the best pass on test images; here the stream is shuffled
and the last pass counts. The paper masks outputs of unseen classes; that is done when answers are measured.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import OnlineBuffer
from cl_bench.core.errors import require_fraction
from cl_bench.core.images import send
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms
from cl_bench.scenarios.base import Scenario


class GDumb(FunctionalMethod):
    """Trains from scratch on a balanced memory.

    Args:
        make_net: returns the network with fresh weights, drawn by torch's global generator.
        cutmix: probability that a batch is mixed; 0 for none.
        train_after: ``each_task``, or ``last_task``, with no answer before.
    """

    shared_labels = True
    learned: Tensor

    def __init__(
        self,
        *,
        net: Backbone,
        buffer: OnlineBuffer,
        scenario: Scenario,
        make_net: Callable[[], Backbone],
        cutmix: float,
        train_after: Literal["each_task", "last_task"],
    ) -> None:
        super().__init__()
        require_fraction(fix="0 is no CutMix, the paper has 0.5.", cutmix=cutmix)
        self.net, self.buffer, self.make_net, self.cutmix = net, buffer, make_net, cutmix
        self._first_trained = 0 if train_after == "each_task" else len(scenario.tasks) - 1
        self.register_buffer("learned", torch.tensor(False))

    def learn(self, task: Task) -> Iterator[Phase]:
        """The buffer is offered the task; then one phase on the buffer, from fresh weights."""
        self.buffer.offer(task.train, task.id)
        if task.id >= self._first_trained:
            self.net.load_state_dict(self.make_net().state_dict())
            yield Phase(self.buffer.data(), self.observe, self.net.parameters())
            self.learned.fill_(True)

    def inputs(self, batch: Batch) -> Inputs:
        """The batch; with CutMix the mixed images, the labels of the others, and the share of pixels kept."""
        if not self.cutmix:
            return {"x": batch.x, "y": batch.y}
        x, order, share = mix_boxes(batch.x, self.cutmix, self.buffer.generator)
        return {"x": x, "y": batch.y, "y'": batch.y.index_select(0, order), "share": share}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy to both labels, weighted by their shares of the pixels."""
        logits = self.net(inputs["x"])
        ce = F.cross_entropy(logits, inputs["y"])
        if "share" in inputs:
            share = inputs["share"]
            ce = share * ce + (1 - share) * F.cross_entropy(logits, inputs["y'"])
        return {"ce": ce}, {}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K); no answer before anything was learned."""
        return torch.where(self.learned, self.net(x), -torch.inf)


def mix_boxes(x: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """CutMix (Yun et al., ICCV 2019) of a batch (B, C, H, W) of images, drawn on the CPU.

    Returns:
        The mixed images; (B,) the image of the batch that each box comes from; a scalar, the share of pixels kept.
    """
    height, width = x.shape[2:]
    mixed, kept, down, across = torch.rand(4, generator=generator).tolist()
    order = send(torch.randperm(len(x), generator=generator), x.device)
    top, bottom = _cut_range(height, down, kept) if mixed < probability else (0, 0)
    left, right = _cut_range(width, across, kept)
    box = (slice(None), slice(None), slice(top, bottom), slice(left, right))
    mixture = x.clone()
    mixture[box] = x.index_select(0, order)[box]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixture, order, send(torch.tensor(share), x.device)


def _cut_range(size: int, position: float, kept: float) -> tuple[int, int]:
    """First pixel and end of a box along one side: sqrt(1 - kept) of it, around ``position`` in [0, 1)."""
    half, centre = int(size * (1 - kept) ** 0.5) // 2, int(position * size)
    return max(0, centre - half), min(size, centre + half)
