"""RanPAC, second phase: ridge regression on random features (McDonnell, Gong, Parvaneh, Abbasnejad, van den Hengel,
NeurIPS 2023, arXiv 2307.02251).

Nothing is trained by gradients. h are the network's features (D) of each image, W (D, M) is drawn once from N(0, 1), Y
has a row of 0 and 1 for each image:

    H = relu( h W )                                     H = h if M is 0
    G += H^T H,   Q += H^T Y                            sums over all tasks, so their order does not matter
    O = (G + lambda I)^-1 Q,   scores of an image = its row of H times O

lambda is the one of 10^-8, 10^-7, .., 10^8 with the least mean squared error on the last 20 % of the new task's images,
in random order, if O is fitted to the first 80 % of them alone. With the eigenvalues s and eigenvectors U of H H^T over
these images, all 17 cost one decomposition: O = H^T U (s + lambda)^-1 U^T Y.

Departures: docs/methods/ranpac.md.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import CHUNK
from cl_bench.core.errors import require_nonnegative
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import GradientFreeMethod, measure_width
from cl_bench.scenarios.base import Scenario

RIDGES = tuple(10.0**exponent for exponent in range(-8, 9))
"""The values of lambda that are tried."""

FITTED = 0.8
"""Part of a task's images that lambda is tried with; the others choose it."""


class RanPAC(GradientFreeMethod):
    """Ridge regression on randomly projected features of a frozen network.

    Args:
        projection: M, random features; 0 for the network's own.
    """

    shared_labels = True
    projection: Tensor
    gram: Tensor
    targets: Tensor
    weight: Tensor
    ridges: Tensor

    def __init__(self, *, net: Backbone, scenario: Scenario, projection: int) -> None:
        super().__init__(net=net, scenario=scenario)
        require_nonnegative(fix="The paper has 10,000.", projection=projection)
        width = measure_width(net, scenario.image_shape)
        features, classes = projection or width, scenario.num_classes
        self.projected = projection > 0
        if self.projected:
            self.register_buffer("projection", torch.randn(width, projection))
        self.register_buffer("gram", torch.zeros(features, features))
        self.register_buffer("targets", torch.zeros(features, classes))
        self.register_buffer("weight", torch.zeros(features, classes))
        self.register_buffer("ridges", torch.zeros(len(scenario.tasks), dtype=torch.float32))

    @torch.no_grad()
    def learn(self, task: Task) -> Iterator[Phase]:
        """No phase: G and Q grow by the task, then lambda and O."""
        parts = [self.project(self.transform.normalise(chunk.images)) for chunk in task.train.split(CHUNK)]
        h, y = torch.cat(parts), F.one_hot(task.train.labels, self.targets.shape[1]).float()
        self.gram += h.T @ h
        self.targets += h.T @ y
        order = torch.randperm(len(h)).to(h.device)
        ridge = choose_ridge(h[order], y[order])
        self.ridges[task.id] = ridge
        self.weight.copy_(fit_ridge(self.gram, self.targets, ridge))
        yield from ()

    def project(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, M), H."""
        features = self.net.features(x).float()
        return F.relu(features @ self.projection) if self.projected else features

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), the regression's targets."""
        return self.project(x) @ self.weight

    def facts(self) -> dict[str, Any]:
        """Where the network's weights come from, if it says so, and lambda after each task."""
        return super().facts() | {"ridges": [float(f"{r:.0e}") for r in self.ridges.tolist()]}

    def memory_bytes(self) -> int:
        """W, G, Q and O."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers(recurse=False) if name != "ridges")


def fit_ridge(gram: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """(M, M), (M, K) -> (M, K), the solution O; computed in double precision on the CPU."""
    regularised = gram.cpu().double()
    regularised.diagonal().add_(ridge)
    return torch.linalg.solve(regularised, targets.cpu().double()).to(targets)


def choose_ridge(h: Tensor, y: Tensor) -> float:
    """(N, M), (N, K) -> the value of :data:`RIDGES` with the least error on the last images."""
    h, y = h.cpu().double(), y.cpu().double()
    first = int(FITTED * len(h))
    errors = measure_errors(h[:first], y[:first], h[first:], y[first:])
    return RIDGES[int(torch.stack(errors).argmin())]


def measure_errors(h: Tensor, y: Tensor, held_out: Tensor, expected: Tensor) -> list[Tensor]:
    """(N, M), (N, K), (n, M), (n, K) -> mean squared error on the held-out images for each of :data:`RIDGES`."""
    if len(h) <= h.shape[1]:
        values, vectors = torch.linalg.eigh(h @ h.T)
        left, right = held_out @ (h.T @ vectors), vectors.T @ y
    else:
        values, vectors = torch.linalg.eigh(h.T @ h)
        left, right = held_out @ vectors, vectors.T @ (h.T @ y)
    values = values.clamp(min=0)  # negative ones are rounding
    return [F.mse_loss(left @ (right / (values + ridge)[:, None]), expected) for ridge in RIDGES]
