"""Functional regularisation for continual learning with Gaussian processes (Titsias, Schwarz, Matthews, Pascanu, Teh,
ICLR 2020, arXiv 1901.11356).

The last layer is Bayesian. phi (D) are the network's features of an image and a constant 1; task k has weights w of its
own for each output, and f(x) = w^T phi(x) is a Gaussian process:

    w ~ N(0, s I)                                    prior, s = ``prior_variance``
    q(w) = N(mu, L L^T)                              learned with the network, L lower triangular
    p(y | f) = sigmoid(+-f) with two classes and one output; softmax(f) with more classes, an output for each

    nll          = - mean over batch and ``samples`` draws of log p(y | f),   f ~ N(phi^T mu, |L^T phi|^2)
    kl_weights   = KL( q(w) || N(0, s I) ) / n       summed over the outputs; n images in the task
    kl_functions = sum_{i<k} KL( q(u_i) || N(0, K_i) ) / n,   K_i = s Phi_i Phi_i^T + j I,   j = ``jitter``

After task k, N of its images go to the buffer, the inducing points Z_k. u_k is f at them, Phi are their features:

    q(u_k) = N( Phi mu, Phi L L^T Phi^T + j I )      at the end of task k, and fixed from then on

K_i is computed with the features of today, so the third term holds the network to functions that it has learned. The
N points are random, or then exchanged one by one with other images where this lowers the trace (``choice=trace``)

    sum_x [ k(x, x) - k(x, Z) K^-1 k(Z, x) ],        k(x, z) = s phi(x)^T phi(z), over all images x of the task

A test image of task k is answered by the process given u_k, with m and S the moments of q(u_k):

    f ~ N( k(x, Z) K^-1 m,   k(x, x) - k(x, Z) K^-1 k(Z, x) + k(x, Z) K^-1 S K^-1 k(Z, x) )

p(y) is the mean of p(y | f) over ``test_samples`` draws. So the task id is needed.

Departures: docs/methods/frcl.md.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead, check_single_images
from cl_bench.buffers.base import CHUNK
from cl_bench.buffers.per_task import PerTask
from cl_bench.core.errors import require, require_positive, void
from cl_bench.core.images import send
from cl_bench.core.types import Batch, Data, Losses, Phase, Task
from cl_bench.methods.base import Method, measure_width
from cl_bench.scenarios.base import Scenario


@void("proposals", when=lambda v: v["choice"] == "random", why="method.choice=random exchanges no point")
class FRCL(Method):
    """A Bayesian last layer for each task, and its function at a few images, which later tasks may not change.

    N is ``buffer.capacity`` divided by the number of tasks.

    Args:
        choice: ``random``, or ``trace``: exchanged where this lowers the trace.
        proposals: exchanges that are tried.
        samples, test_samples: draws of f for each image, in training and for an answer.
        prior_variance: s.
        jitter: j, the variance of noise in u; the covariances have an inverse only with it.
        mean_scale: standard deviation of the first mu of a task; the first L is I.
    """

    task_id: ClassVar[Literal["ignored", "used", "needed"]] = "needed"
    shared_labels = True
    recurring_classes = False  # a task's outputs are those of its own classes
    means: Tensor
    roots: Tensor
    draws: Tensor
    used: Tensor
    accepted: Tensor
    opened: Tensor
    learned: Tensor

    def __init__(
        self,
        *,
        net: SingleHead,
        buffer: PerTask,
        scenario: Scenario,
        choice: Literal["random", "trace"],
        proposals: int,
        samples: int,
        test_samples: int,
        prior_variance: float,
        jitter: float,
        mean_scale: float,
    ) -> None:
        super().__init__()
        require_positive(fix="See configs/method/frcl.yaml.", proposals=proposals, samples=samples)
        require_positive(fix="The paper has 20.", test_samples=test_samples)
        require_positive(fix="Leave it out.", prior_variance=prior_variance, jitter=jitter, mean_scale=mean_scale)
        device, exact = buffer.labels.device.type, "cpu or cuda, since mps has no double precision"
        require(device != "mps", "device", expected=exact, got=device, fix="Set device=cpu.")
        self.sizes, points = [len(task.train) for task in scenario.tasks], buffer.quota
        fix = "A task has no more images."
        most = min(self.sizes) * len(self.sizes)
        require(points <= min(self.sizes), "buffer.capacity", expected=f"at most {most}", got=buffer.capacity, fix=fix)
        if points == 1:
            check_single_images(net, scenario.image_shape, "buffer.capacity")
        self.net, self.buffer, self.points, self.num_classes = net, buffer, points, scenario.num_classes
        self.choice, self.proposals, self.samples = choice, proposals, samples
        self.prior_variance, self.jitter, self.mean_scale = prior_variance, jitter, mean_scale
        self.classes = [task.classes for task in scenario.tasks]
        self.outputs = [1 if len(classes) == 2 else len(classes) for classes in self.classes]
        net.head.requires_grad_(False)  # not used
        width, tasks, most = measure_width(net, scenario.image_shape) + 1, len(self.classes), max(self.outputs)
        self.mu, self.root = nn.Parameter(torch.zeros(most, width)), nn.Parameter(torch.eye(width).repeat(most, 1, 1))
        self.register_buffer("means", torch.zeros(tasks, most, points, dtype=torch.float64))
        self.register_buffer("roots", torch.eye(points, dtype=torch.float64).repeat(tasks, most, 1, 1))
        self.register_buffer("draws", torch.randn(test_samples, 1, most))
        self.register_buffer("used", torch.arange(most) < torch.tensor(self.outputs)[:, None], persistent=False)
        self.register_buffer("accepted", torch.zeros(tasks, dtype=torch.int64))
        for name in ("opened", "learned"):  # how many tasks
            self.register_buffer(name, torch.tensor(0))

    def learn(self, task: Task) -> Iterator[Phase]:
        """New weights, one phase on them and the network without its head, then the inducing points."""
        with torch.no_grad():
            self.mu.copy_(self.mean_scale * torch.randn(self.mu.shape))
            self.root.copy_(torch.eye(self.root.shape[1]))
        self.opened.fill_(task.id + 1)
        head = {id(p) for p in self.net.head.parameters()}
        trunk = [p for p in self.net.parameters() if id(p) not in head]
        yield Phase(task.train, self.observe, [*trunk, self.mu, self.root])
        self.summarise(task)

    def observe(self, batch: Batch) -> Losses:
        """The three terms of the loss."""
        task, outputs = batch.task, self.outputs[batch.task]
        noise = send(torch.randn(self.samples, len(batch), outputs), batch.x.device)
        phi, y = self.compute_features(batch.x), batch.y - self.classes[task].start
        with torch.autocast(phi.device.type, enabled=False):
            mean, variance = self.compute_marginals(phi, outputs)
            log_p = compute_log_probabilities(mean + variance.sqrt() * noise, binary=len(self.classes[task]) == 2)
            losses = {"nll": -log_p.gather(2, y.expand(self.samples, -1)[..., None]).mean()}
            losses["kl_weights"] = self.compute_weight_divergence(outputs) / self.sizes[task]
        if task:
            losses["kl_functions"] = self.compute_function_divergences(task).sum() / self.sizes[task]
        return losses

    def predict(self, x: Tensor, task_id: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, K), log p(y); the task that is being learned is answered by q(w), -inf for later ones.

        All images of a run share the draws of f, so an image's answer does not depend on the batch.
        """
        assert task_id is not None  # the evaluation asks no method that needs a task id without one
        scores, learned = x.new_full((len(x), self.num_classes), -torch.inf), int(self.learned)
        phi = self.compute_features(x)
        with torch.autocast(phi.device.type, enabled=False):
            for task, classes in enumerate(self.classes[: int(self.opened)]):
                rows, outputs = torch.nonzero(task_id == task).flatten(), self.outputs[task]
                if len(rows):
                    own = phi[rows]
                    moments = self.condition(own, task) if task < learned else self.compute_marginals(own, outputs)
                    mean, variance = moments
                    f = mean + variance.clamp(min=0).sqrt() * self.draws[:, :, :outputs]
                    log_p = compute_log_probabilities(f, binary=len(classes) == 2)
                    answer = log_p.logsumexp(dim=0) - math.log(len(f))
                    scores[rows, classes.start : classes.stop] = answer.to(scores.dtype)
        return scores

    def compute_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), phi: the network's features and 1."""
        return F.pad(self.net.features(x).to(self.mu.dtype), (0, 1), value=1.0)

    def compute_point_features(self, first: int, last: int) -> Tensor:
        """(last - first, N, D), phi of the inducing points of these tasks, un-augmented."""
        images = self.buffer.images[first * self.points : last * self.points]
        phi = self.compute_features(self.buffer.transform.normalise(images))
        return phi.view(last - first, self.points, -1)

    def compute_marginals(self, phi: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        """(B, D) -> mean and variance of f under q(w), (B, outputs) each."""
        spread = torch.einsum("bd,hde->bhe", phi, self.root[:outputs].tril())
        return phi @ self.mu[:outputs].T, spread.square().sum(dim=2)

    def compute_weight_divergence(self, outputs: int) -> Tensor:
        """KL( q(w) || N(0, s I) ), summed over the outputs: a scalar."""
        mu, root, s = self.mu[:outputs], self.root[:outputs].tril(), self.prior_variance
        log_determinant = 2 * root.diagonal(dim1=1, dim2=2).abs().log().sum()
        length = (root.square().sum() + mu.square().sum()) / s
        return (length + mu.numel() * (math.log(s) - 1) - log_determinant) / 2

    def compute_function_divergences(self, tasks: int) -> Tensor:
        """(tasks,) KL( q(u_i) || N(0, K_i) ) of the first tasks, each summed over the outputs."""
        phi = self.compute_point_features(0, tasks)
        with torch.autocast(phi.device.type, enabled=False):
            prior = decompose(self.compute_covariance(phi))[:, None]
            root = self.roots[:tasks]
            spread = torch.linalg.solve_triangular(prior, root, upper=False).square().sum(dim=(2, 3))
            mean = torch.linalg.solve_triangular(prior, self.means[:tasks, :, :, None], upper=False)
            divergence = spread + mean.square().sum(dim=(2, 3)) - self.points
            divergence = divergence + 2 * (sum_log_diagonal(prior) - sum_log_diagonal(root))
            return (divergence * self.used[:tasks]).sum(dim=1) / 2

    def compute_covariance(self, phi: Tensor) -> Tensor:
        """(.., N, D) -> K (.., N, N) in double precision: it is close to singular."""
        phi = phi.double()
        noise = self.jitter * torch.eye(phi.shape[-2], dtype=phi.dtype, device=phi.device)
        return self.prior_variance * phi @ phi.mT + noise

    def condition(self, phi: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """(B, D) -> mean and variance of f given q(u) of a learned task, (B, outputs) each, in double precision."""
        outputs = self.outputs[task]
        points = self.compute_point_features(task, task + 1)[0].double()
        root = decompose(self.compute_covariance(points))
        phi = phi.double()
        crossed = torch.linalg.solve_triangular(root, self.prior_variance * points @ phi.T, upper=False)  # (N, B)
        weights = torch.linalg.solve_triangular(root.T, crossed, upper=True)  # K^-1 k(Z, x)
        rest = self.prior_variance * phi.square().sum(dim=1) - crossed.square().sum(dim=0)  # (B,)
        spread = (self.roots[task, :outputs].mT @ weights).square().sum(dim=1)  # (outputs, B)
        return (self.means[task, :outputs] @ weights).T, (rest + spread).T

    @torch.no_grad()
    def summarise(self, task: Task) -> None:
        """Choose the inducing points of a learned task, and keep q(u)."""
        order = torch.randperm(len(task.train))
        chosen = order[: self.points]
        if self.choice == "trace":
            chosen, accepted = self.exchange(self.measure_features(task.train), order)
            self.accepted[task.id] = accepted
        best_first = task.train.take(chosen.to(task.train.labels.device))
        self.buffer.close_task(replace(task, train=best_first), lambda x, y: {})
        phi = self.compute_point_features(task.id, task.id + 1)[0].double()
        spread = phi @ self.root.tril().double()  # (outputs, N, D)
        noise = self.jitter * torch.eye(self.points, dtype=phi.dtype, device=phi.device)
        self.means[task.id] = self.mu.double() @ phi.T
        self.roots[task.id] = decompose(spread @ spread.mT + noise)
        self.learned.fill_(task.id + 1)

    def measure_features(self, data: Data) -> Tensor:
        """(n, D) phi of all images of a set, in double precision on the CPU."""
        parts = [self.compute_features(self.buffer.transform.normalise(chunk.images)) for chunk in data.split(CHUNK)]
        return torch.cat([part.cpu() for part in parts]).double()

    def exchange(self, phi: Tensor, order: Tensor) -> tuple[Tensor, int]:
        """The first N images of ``order`` (n,), after each following one was tried in place of one of them, in turn.

        Args:
            phi: (n, D).

        Returns:
            (N,) the points, and how many exchanges lowered the trace.
        """
        gram = phi.T @ phi
        chosen, accepted = order[: self.points].clone(), 0
        least = self.measure_trace(phi[chosen], gram)
        for nth, candidate in enumerate(order[self.points :][: self.proposals]):
            changed = chosen.clone()
            changed[nth % self.points] = candidate
            trace = self.measure_trace(phi[changed], gram)
            if trace < least:
                chosen, least, accepted = changed, trace, accepted + 1
        return chosen, accepted

    def measure_trace(self, points: Tensor, gram: Tensor) -> float:
        """The sum over x of the variance of f(x) that is left if u is known.

        Args:
            points: (N, D), phi of the points.
            gram: (D, D), the sum of phi phi^T over all x, from which the sum over x follows without a pass over them.
        """
        crossed = torch.linalg.solve_triangular(decompose(self.compute_covariance(points)), points, upper=False)
        explained = ((crossed @ gram) * crossed).sum()
        return float(self.prior_variance * gram.trace() - self.prior_variance**2 * explained)

    def memory_bytes(self) -> int:
        """q(u) of the tasks learned."""
        return int(self.learned) * self.count_bytes()

    def count_bytes(self) -> int:
        """Of q(u) of one task."""
        return self.means[0].nbytes + self.roots[0].nbytes

    def facts(self) -> dict[str, Any]:
        """Inducing points of a task, bytes of its q(u), and how many exchanges of points lowered the trace."""
        facts: dict[str, Any] = {"points_a_task": self.points, "posterior_bytes_a_task": self.count_bytes()}
        return facts | ({"accepted_exchanges": self.accepted.tolist()} if self.choice == "trace" else {})


def compute_log_probabilities(f: Tensor, *, binary: bool) -> Tensor:
    """(.., outputs) -> (.., classes) log p(y | f): the second of two classes has the probability sigmoid(f)."""
    return F.logsigmoid(torch.cat([-f, f], dim=-1)) if binary else f.log_softmax(dim=-1)


def decompose(covariance: Tensor) -> Tensor:
    """The lower Cholesky factor of (.., N, N); unlike ``cholesky`` it does not wait for the device."""
    return torch.linalg.cholesky_ex(covariance).L


def sum_log_diagonal(root: Tensor) -> Tensor:
    """(.., N, N) -> (..), half the logarithm of the determinant of root root^T."""
    return root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
