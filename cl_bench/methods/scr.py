"""SCR: supervised contrastive replay (Mai, Li, Kim, Sanner, CVPR Workshops 2021).

    L = mean over anchors i of  - 1 / |P(i)| sum over p in P(i) of  z_i . z_p / T - log sum_{a != i} exp(z_i . z_a / T)

The anchors are the stream's batch and a draw from the buffer, each image in two views: as the scenario gives it, and a
crop with changed colours (:mod:`cl_bench.data.views`). P(i) are the other anchors of the same class. z is a projection
of the features by a small network, of unit length. The two views have forward passes of their own.

After each task the memory is reviewed: one pass over all stored images in batches of ``replay_size``, both views, with
a tenth of the gradient. A last batch of fewer images is left out.

An image gets the class whose stored images' mean feature is nearest. Features and means have unit length; the means are
computed after every task, and after its review. The head of the network is not used.

Departures: the first batch, when the buffer is empty, is learned from alone; the released code skips it.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.buffers.base import Buffer
from cl_bench.core.errors import require_positive
from cl_bench.core.types import Batch, Losses, Phase, Task
from cl_bench.data.views import draw_view
from cl_bench.methods.base import (
    Inputs,
    RehearsalMethod,
    Terms,
    check_replay_size,
    measure_class_means,
    repeat_passes,
    score_by_nearest_mean,
)
from cl_bench.scenarios.base import Scenario

PROJECTION = 128
"""Width of the projection."""

REVIEW = 0.1
"""Factor of the gradient in a review."""


class SCR(RehearsalMethod):
    """Contrastive learning of features on stream and memory, and the nearest class mean.

    Args:
        replay_size: images drawn from the buffer at each step.
        temperature: T.
        review: whether the memory is reviewed after each task.
    """

    shared_labels = True
    net: SingleHead
    means: Tensor
    known: Tensor

    def __init__(
        self,
        *,
        net: SingleHead,
        buffer: Buffer,
        scenario: Scenario,
        replay_size: int,
        temperature: float,
        review: bool,
    ) -> None:
        super().__init__(net=net, buffer=buffer)
        check_replay_size(replay_size)
        require_positive(fix="The paper has 0.1.", temperature=temperature)
        self.replay_size, self.temperature, self.review = replay_size, temperature, review
        with torch.no_grad():
            blank = torch.zeros(1, *scenario.image_shape, device=next(net.parameters()).device)
            width = net.eval().features(blank).shape[1]
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, PROJECTION))
        self.register_buffer("means", torch.zeros(scenario.num_classes, width))  # (K, D)
        self.register_buffer("known", torch.zeros(scenario.num_classes, dtype=torch.bool))  # (K,)

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase on the stream, the review of the memory, then the class means."""
        head = {id(p) for p in self.net.head.parameters()}
        trained = [p for p in self.parameters() if id(p) not in head]
        yield Phase(task.train, self.observe, trained)
        self.buffer.close_task(task, self.describe)
        stored = self.buffer.data()
        whole = len(stored) // self.replay_size * self.replay_size
        if self.review and whole:
            yield Phase(
                stored,
                self.observe_stored,
                trained,
                epochs=1,
                batch_size=self.replay_size,
                order=partial(repeat_passes, len(stored), whole),
            )
        means, known = measure_class_means(self.buffer, self._normalise_features, len(self.means))
        self.means.copy_(means)
        self.known.copy_(known)

    def inputs(self, batch: Batch) -> Inputs:
        """Both views of the stream's batch and a draw, with their labels."""
        x, y, raw = batch.x, batch.y, batch.raw
        drawn = self.draw(self.replay_size, batch.task)
        if drawn is not None:
            x, y, raw = torch.cat([x, drawn.x]), torch.cat([y, drawn.y]), torch.cat([raw, drawn.raw])
        return self._add_view(x, y, raw)

    def observe_stored(self, batch: Batch) -> Losses:
        """The loss of stored images in a review, so scaled that its gradient is."""
        losses, _ = self.terms(self._add_view(batch.x, batch.y, batch.raw), batch.task)
        return {"review": REVIEW * losses["contrast"]}

    def _add_view(self, x: Tensor, y: Tensor, raw: Tensor) -> Inputs:
        view = draw_view(raw.float() / 255, self.buffer.generator)
        return {"x": x, "y": y, "view": self.buffer.transform.normalise(255 * view)}

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """The supervised contrastive loss."""
        z = torch.cat([F.normalize(self.projection(self.net.features(inputs[v])), dim=1) for v in ("x", "view")])
        return {"contrast": supervised_contrastive_loss(z, inputs["y"].repeat(2), self.temperature)}, {}

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), minus the distance to each class's mean."""
        return score_by_nearest_mean(self._normalise_features(x), self.means, self.known)

    def memory_bytes(self) -> int:
        """The class means."""
        return self.means.nbytes

    def _normalise_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D) of unit length."""
        return F.normalize(self.net.features(x).to(self.means.dtype), dim=1)


def supervised_contrastive_loss(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """(N, D) of unit length and labels (N,), at least two of each that occurs -> scalar (Khosla et al. 2020, Eq. 2)."""
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    logits = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    positive = (y[:, None] == y) & ~itself
    log_probability = torch.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)
    return -(log_probability.sum(dim=1) / positive.sum(dim=1)).mean()
