"""SLCA, slow learner with classifier alignment (Zhang, Wang, Kang, Chen, Wei, ICCV 2023, arXiv 2303.05118).

The whole network is trained on the classes of task t alone, its trunk h at a small learning rate and its linear head at
a larger one. z_s are the logits W h(x) + b of the classes of task s; the rows of W and b of other tasks stay:

    L = CE( z_t, y )

Then each class k of the task gets a Gaussian of its features h(x), x un-augmented:

    mu_k = mean of h(x),    Sigma_k = covariance of h(x) + 10^-4 I

From the second task on the head is then aligned on draws from the Gaussians of all classes so far, k being of task s:

    h ~ N( (0.9 + 0.1 (s + 1) / (t + 1)) mu_k, Sigma_k )
    L = CE( [ z_0 .. z_t ] / (tau n), k )                   n = mean of |z_0|, .., |z_t|, the lengths for each draw

The aligned head answers. The next task goes on from the head that was not aligned, which is the alternative
``unaligned``. Departures: docs/methods/slca.md.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cl_bench.backbones.base import SingleHead
from cl_bench.buffers.base import CHUNK
from cl_bench.core.errors import require, require_positive, void
from cl_bench.core.images import send
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import (
    FunctionalMethod,
    Inputs,
    ParameterSnapshot,
    Predict,
    Terms,
    describe_weights,
    measure_width,
)
from cl_bench.optim import Cosine
from cl_bench.scenarios.base import Scenario

JITTER = 1e-4
"""Added to the diagonal of every covariance."""

LEAST_SCALE = 0.9
"""Of the mean of a class that was learned long ago."""

LEAST_LENGTH = 1e-7
"""Added to the length of a task's logits."""


@void(
    *("alignment_epochs", "alignment_draws", "alignment_lr", "alignment_temperature"),
    when=lambda v: not v["alignment"],
    why="method.alignment=false trains the head on images only",
)
@void(
    "trunk_lr", when=lambda v: bool(v["config"].backbone.get("frozen")), why="backbone.frozen=true trains the head only"
)
class SLCA(FunctionalMethod):
    """Trains a whole network slowly, and then its head on Gaussians of the classes.

    Args:
        make_optimizer: parameters -> the configured optimizer; its rate is that of the head.
        trunk_lr: learning rate of everything but the head.
        alignment: False for the slow rate alone.
        alignment_epochs, alignment_lr: of the alignment, with half a cosine down to 0.
        alignment_draws: features that an epoch draws for each class, and that a step is computed on.
        alignment_temperature: tau.
    """

    net: SingleHead
    means: Tensor
    factors: Tensor
    task_of: Tensor

    def __init__(
        self,
        *,
        net: SingleHead,
        scenario: Scenario,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        trunk_lr: float,
        alignment: bool,
        alignment_epochs: int,
        alignment_draws: int,
        alignment_lr: float,
        alignment_temperature: float,
    ) -> None:
        super().__init__()
        linear, fix = isinstance(net.head, nn.Linear), "Use another network, or backbone.head=linear."
        require(linear, "backbone.head", expected="a linear head", got=type(net.head).__name__, fix=fix)
        require_positive(fix="The released code has 0.0001 and 0.01.", trunk_lr=trunk_lr, alignment_lr=alignment_lr)
        fix = "The released code has 5 epochs of 256 draws, and 0.1."
        counts = {"alignment_epochs": alignment_epochs, "alignment_draws": alignment_draws}
        require_positive(fix=fix, **counts, alignment_temperature=alignment_temperature)
        self.net, self.transform, self.make_optimizer = net, scenario.transform, make_optimizer
        self.trunk_lr, self.alignment, self.tau = trunk_lr, alignment, alignment_temperature
        self.epochs, self.draws, self.alignment_lr = alignment_epochs, alignment_draws, alignment_lr
        self._classes = [task.classes for task in scenario.tasks]
        self.unaligned = ParameterSnapshot(self, net.head.parameters(), values="unaligned")
        self.unaligned.take(net.head.parameters())
        if alignment:
            classes, width = scenario.num_classes, measure_width(net, scenario.image_shape)
            self.register_buffer("means", torch.zeros(classes, width))
            self.register_buffer("factors", torch.zeros(classes, width, width))  # of Cholesky: Sigma = factor factor^T
            sizes = torch.tensor([len(c) for c in self._classes])
            self.register_buffer("task_of", torch.arange(len(sizes)).repeat_interleave(sizes), persistent=False)

    def learn(self, task: Task) -> Iterator[Phase]:
        """A phase on the whole network; then the Gaussians and, after the first task, a phase on the head."""
        head = list(self.net.head.parameters())
        with torch.no_grad():
            for p, old in zip(head, self.unaligned.values):
                p.copy_(old)
        hold = partial(self._hold_other_rows, task.classes)
        yield Phase(
            task.train,
            self.observe,
            self.net.parameters(),
            optimizer=self._make_optimizer_of_two_rates,
            after_step=hold,
        )
        self.unaligned.take(head)
        if self.alignment:
            self.measure(task)
            if task.id > 0:
                yield Phase(
                    self._list_draws(task),
                    self.observe_draws,
                    head,
                    epochs=self.epochs,
                    lr=self.alignment_lr,
                    batch_size=self.draws,
                    schedule=Cosine(warmup_epochs=0, warmup_factor=1.0, min_factor=0.0),
                )

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Cross-entropy over the task's classes."""
        classes = self._classes[task]
        logits = self.net(inputs["x"])[:, classes.start : classes.stop]
        return {"ce": F.cross_entropy(logits, inputs["y"] - classes.start)}, {}

    def _make_optimizer_of_two_rates(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        of_head = {id(p) for p in self.net.head.parameters()}
        optimizer = self.make_optimizer([p for p in params if id(p) in of_head])
        trunk = [p for p in params if id(p) not in of_head]
        for group in self.make_optimizer(trunk).param_groups if trunk else ():
            optimizer.add_param_group(group | {"lr": self.trunk_lr})
        return optimizer

    @torch.no_grad()
    def _hold_other_rows(self, classes: range) -> None:
        """Undo what weight decay and momentum did to the rows of other tasks."""
        for p, old in zip(self.net.head.parameters(), self.unaligned.values):
            p[: classes.start] = old[: classes.start]
            p[classes.stop :] = old[classes.stop :]

    @torch.no_grad()
    def measure(self, task: Task) -> None:
        """Mean and covariance of the features of each class of the task; in double precision on the CPU."""
        parts = [self.net.features(self.transform.normalise(chunk.images)) for chunk in task.train.split(CHUNK)]
        found, labels = torch.cat(parts).cpu().double(), task.train.labels.cpu()
        for k in labels.unique().tolist():
            of_class = found[labels == k]
            mean = of_class.mean(dim=0)
            centred = of_class - mean
            covariance = centred.T @ centred / max(1, len(of_class) - 1)
            covariance.diagonal().add_(JITTER)
            self.means[k] = mean
            self.factors[k] = torch.linalg.cholesky(covariance)

    def _list_draws(self, task: Task) -> Data:
        """What an epoch of the alignment visits: each class so far as often as it is drawn.

        A phase has images. This one reads only their labels, so all are the same view of one image.
        """
        one = task.train.take(slice(1))
        labels = torch.arange(task.classes.stop, device=one.labels.device).repeat_interleave(self.draws)
        return Data(one.images.expand(len(labels), -1, -1, -1), labels, one.index.expand(len(labels)))

    def draw(self, y: Tensor, task: int) -> Tensor:
        """Classes (B,) -> (B, D), a feature of each, while ``task`` is learned; torch's generator of the CPU draws."""
        noise = send(torch.randn(len(y), self.means.shape[1]), y.device)
        scale = LEAST_SCALE + (1 - LEAST_SCALE) * (self.task_of.index_select(0, y) + 1) / (task + 1)
        means = scale[:, None] * self.means.index_select(0, y)
        return means + (self.factors.index_select(0, y) @ noise[:, :, None]).squeeze(2)

    def observe_draws(self, batch: Batch) -> Losses:
        """Cross-entropy of normalised logits over all classes so far, on a feature drawn for each label."""
        classes = self._classes[: batch.task + 1]
        logits = self.net.head(self.draw(batch.y, batch.task)).float()
        lengths = torch.stack([logits[:, c.start : c.stop].norm(dim=1) for c in classes]) + LEAST_LENGTH  # (tasks, B)
        normalised = logits[:, : classes[-1].stop] / (self.tau * lengths.mean(dim=0)[:, None])
        return {"alignment": F.cross_entropy(normalised, batch.y)}

    def alternatives(self) -> dict[str, Predict]:
        """``unaligned``: the head that was not aligned."""
        return {"unaligned": self._predict_unaligned} if self.alignment else {}

    def _predict_unaligned(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        names = (name for name, _ in self.net.head.named_parameters())
        return functional_call(self.net.head, dict(zip(names, self.unaligned.values)), (self.net.features(x),))

    def facts(self) -> dict[str, Any]:
        """Where the network's weights come from, if it says so, and how many bytes the covariances have."""
        trunk = {"trunk": getattr(self.net, "source", None)} | describe_weights(self.net)
        return trunk | {"covariance_bytes": self._count_bytes("factors")}

    def memory_bytes(self) -> int:
        """The head that was not aligned, means and covariances."""
        return self.unaligned.nbytes + self._count_bytes("means") + self._count_bytes("factors")

    def _count_bytes(self, name: str) -> int:
        return self.get_buffer(name).nbytes if self.alignment else 0
