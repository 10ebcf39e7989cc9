"""FRCL: each term in numpy on three samples, the inducing points, the answers, and where the images are kept."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    DIGITS_INSTEAD,
    SUITS,
    array,
    batch_of,
    buffer_context,
    configure,
    make_split,
    parts_of,
    toy_images,
    trainer_of,
)

from cl_bench.backbones.mlp import MLP
from cl_bench.buffers.per_task import PerTask
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.methods.frcl import FRCL
from cl_bench.runs.audit import check_contents

pytestmark = pytest.mark.arithmetic

KEYS = {
    "choice": "random", "proposals": 50, "samples": 2, "test_samples": 20, "prior_variance": 0.7, "jitter": 0.01,
    "mean_scale": 1.0,
}  # fmt: skip


class Net(MLP):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return super().features(x.double())


def make(points: int = 3, classes_per_task: int = 2, **keys) -> FRCL:
    """In float64, on an MLP of four features, after two tasks of two classes or of three."""
    classes = 2 * classes_per_task
    split = make_split(source=toy_images(num_classes=classes), num_tasks=2)
    context = buffer_context(num_classes=classes)
    torch.manual_seed(0)
    net = Net(hidden=[4], norm="none", init="default", num_classes=classes, image_shape=(1, 8, 8)).double()
    buffer = PerTask(capacity=2 * points, context=type(context)(**(vars(context) | {"num_tasks": 2})))
    method = FRCL(net=net, buffer=buffer, scenario=split, **(KEYS | keys)).double().eval()
    for task in split.tasks:
        for _ in method.learn(task):
            method.root.data += 0.3 * torch.randn_like(method.root)
        method.net.trunk[1][0].weight.data *= 1.1  # today's features are not those of q(u)
    return method


def features(method: FRCL, x: torch.Tensor) -> np.ndarray:
    layer = method.net.trunk[1][0]
    hidden = np.maximum(array(x).reshape(len(x), -1) @ array(layer.weight).T + array(layer.bias), 0)
    return np.concatenate([hidden, np.ones((len(x), 1))], axis=1)


def images(method: FRCL, count: int = 3) -> torch.Tensor:
    raw = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    return method.buffer.transform.normalise(raw).double()


def kl(mean, covariance, other_mean, other_covariance) -> float:
    """KL of two Gaussians, from its definition."""
    inverse, difference = np.linalg.inv(other_covariance), other_mean - mean
    determinants = np.linalg.slogdet(other_covariance)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + difference @ inverse @ difference - len(mean) + determinants)


def points_of(method: FRCL, task: int) -> np.ndarray:
    """(N, D) phi of a task's inducing points today."""
    of_task = slice(task * method.points, (task + 1) * method.points)
    return features(method, method.buffer.transform.normalise(method.buffer.images[of_task]).double())


@pytest.mark.parametrize("classes_per_task", [2, 3])
def test_the_terms_of_the_loss_are_those_of_the_paper(classes_per_task):
    method = make(classes_per_task=classes_per_task)
    outputs = 1 if classes_per_task == 2 else 3
    x, y = images(method), torch.tensor([0, 1, 1]) + classes_per_task
    batch = batch_of(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), y, task=1)
    batch = type(batch)(**(vars(batch) | {"x": x}))
    torch.manual_seed(3)
    noise = array(torch.randn(2, 3, outputs))
    torch.manual_seed(3)
    losses = {name: float(loss.detach()) for name, loss in method.observe(batch).items()}

    phi, s, n, size = features(method, x), 0.7, 12 if classes_per_task == 2 else 18, method.mu.shape[1]
    mu, roots = array(method.mu), [np.tril(root) for root in array(method.root)]
    f = np.stack([
        phi @ mu[h] + np.sqrt(np.einsum("bd,de,be->b", phi, roots[h] @ roots[h].T, phi)) * noise[:, :, h]
        for h in range(outputs)
    ], axis=2)  # fmt: skip
    logits = np.concatenate([np.zeros_like(f), f], axis=2) if outputs == 1 else f  # softmax of (0, f) is the sigmoid
    log_p = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    nll = -np.mean([log_p[:, b, int(y[b]) - classes_per_task] for b in range(3)])
    weights = sum(kl(mu[h], roots[h] @ roots[h].T, np.zeros(size), s * np.eye(size)) for h in range(outputs))
    old = points_of(method, 0)
    prior = s * old @ old.T + 0.01 * np.eye(3)
    functions = sum(
        kl(array(method.means)[0, h], array(method.roots)[0, h] @ array(method.roots)[0, h].T, np.zeros(3), prior)
        for h in range(outputs)
    )
    expected = {"nll": nll, "kl_weights": weights / n, "kl_functions": functions / n}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_the_first_task_has_no_functions_to_keep():
    method = make()
    batch = batch_of(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]))
    assert method.observe(type(batch)(**(vars(batch) | {"x": images(method)}))).keys() == {"nll", "kl_weights"}


def test_what_a_task_leaves_is_its_function_at_the_inducing_points():
    method = make()
    method.net.trunk[1][0].weight.data /= 1.1  # as at the end of the second task
    phi, root = points_of(method, 1), np.tril(array(method.root)[0])
    np.testing.assert_allclose(array(method.means)[1, 0], phi @ array(method.mu)[0], atol=1e-12)
    covariance = phi @ root @ root.T @ phi.T + 0.01 * np.eye(3)
    np.testing.assert_allclose(array(method.roots)[1, 0] @ array(method.roots)[1, 0].T, covariance, atol=1e-12)


@pytest.mark.parametrize("classes_per_task", [2, 3])
def test_an_answer_is_the_conditional_of_the_process_at_every_image_alone(classes_per_task):
    method = make(classes_per_task=classes_per_task)
    outputs = 1 if classes_per_task == 2 else 3
    x = images(method, 5)
    with torch.no_grad():
        scores = array(method.predict(x, torch.tensor([0, 1, 0, 1, 1])))
        alone = array(method.predict(x[2:3], torch.tensor([0])))
    np.testing.assert_allclose(scores[2:3], alone, atol=1e-12)
    assert np.isneginf(scores[0, classes_per_task:]).all()
    assert np.isneginf(scores[1, :classes_per_task]).all()

    phi, old = features(method, x[2:3]), points_of(method, 0)
    crossed, inverse = 0.7 * phi @ old.T, np.linalg.inv(0.7 * old @ old.T + 0.01 * np.eye(3))
    draws, probabilities = array(method.draws)[:, 0], 0
    f = np.empty((20, outputs))
    for h in range(outputs):
        covariance = array(method.roots)[0, h] @ array(method.roots)[0, h].T
        mean = crossed @ inverse @ array(method.means)[0, h]
        variance = (
            0.7 * phi @ phi.T - crossed @ inverse @ crossed.T + crossed @ inverse @ covariance @ inverse @ crossed.T
        )
        f[:, h] = mean + np.sqrt(variance[0]) * draws[:, h]
    logits = np.concatenate([np.zeros_like(f), f], axis=1) if outputs == 1 else f
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(np.exp(scores[2, :classes_per_task]), probabilities, rtol=1e-8)


def test_the_trace_is_the_variance_that_the_points_leave():
    method = make()
    phi = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    all_, chosen = array(phi), array(phi[[1, 4, 6]])
    inverse = np.linalg.inv(0.7 * chosen @ chosen.T + 0.01 * np.eye(3))
    expected = np.trace(0.7 * all_ @ all_.T - 0.49 * all_ @ chosen.T @ inverse @ chosen @ all_.T)
    assert method.measure_trace(phi[[1, 4, 6]], phi.T @ phi) == pytest.approx(expected, rel=1e-9)


def test_points_are_exchanged_in_turn_where_the_trace_falls():
    method = make(proposals=5)
    phi = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 7, 0, 8, 2, 5, 4, 6])
    trace = lambda which: method.measure_trace(phi[which], phi.T @ phi)  # noqa: E731
    best, accepted = [3, 1, 7], 0
    for nth, candidate in enumerate([0, 8, 2, 5, 4]):  # the sixth is not tried
        changed = [candidate if place == nth % 3 else point for place, point in enumerate(best)]
        if trace(changed) < trace(best):
            best, accepted = changed, accepted + 1
    found, count = method.exchange(phi, order)
    assert (found.tolist(), count) == (best, accepted)
    assert 0 < accepted < 5


def test_a_run_with_exchanged_points_keeps_all_its_images_in_the_buffer(tmp_path):
    parts = parts_of("frcl", "method.choice=trace", "trainer.epochs=1")
    trainer_of(parts, tmp_path).run()
    method, buffer = parts.method, parts.buffer
    assert len(buffer) == 20
    assert [int(label) // 5 for label in buffer.labels] == [0] * 10 + [1] * 10
    assert min(method.facts()["accepted_exchanges"]) > 0
    assert method.memory_bytes() == 2 * (5 * 10 + 5 * 10 * 10) * 8
    assert all(check.passed for check in check_contents(parts))


def test_the_task_in_progress_is_answered_by_its_weights():
    method = make()
    x, task = images(method), torch.ones(3, dtype=torch.int64)
    method.learned.fill_(1)
    with torch.no_grad():
        scores = method.predict(x, task)
        mean, variance = method.compute_marginals(method.compute_features(x), 1)
        f = mean + variance.sqrt() * method.draws
        np.testing.assert_allclose(array(scores[:, 3].exp()), array(f.sigmoid().mean(dim=0)[:, 0]), rtol=1e-9)
        method.opened.fill_(1)
        assert method.predict(x, task).isneginf().all()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["buffer=reservoir"], "buffer"),
        (["buffer.capacity=200"], "buffer.capacity"),  # a task has 50 images
        (["method.jitter=0"], "method.jitter"),
    ],
)
def test_wrong_keys_are_refused(overrides, key):
    with pytest.raises(ConfigError) as caught:
        parts_of("frcl", *overrides)
    assert caught.value.key == key
    if key == "buffer":
        assert caught.value.fix == "Use buffer=per_task."


def test_split_mnist_has_one_output_for_two_classes_and_forty_points():
    config = configure("+experiment=frcl_mnist_5split")
    assert config.buffer.capacity == 200
    parts = build(
        configure(
            *("+experiment=frcl_mnist_5split", "scenario.source._target_=cl_bench.data.digits.digits"),
            *("~scenario.source.root", "~scenario.source.download", "device=cpu"),
        )
    )
    assert parts.method.mu.shape == (1, 257)
    assert parts.buffer.quota == 40


def test_tasks_that_share_their_labels_have_functions_of_their_own(tmp_path):
    keys = ["scenario=permuted_mnist", "scenario.num_tasks=2", "scenario.train_per_class=10", *DIGITS_INSTEAD]
    parts = build(configure(*keys, *SUITS["frcl"], "method=frcl", "trainer.epochs=1", "device=cpu"))
    record = trainer_of(parts, tmp_path).run()
    assert parts.method.outputs == [10, 10]
    assert np.isfinite(record.task_il.accuracy[-1]).all()
    assert np.isnan(record.class_il.accuracy[-1]).all()


def test_a_quota_of_a_task_holds_for_other_methods(tmp_path):
    parts = parts_of("derpp", "buffer=per_task", "buffer.capacity=21", "trainer.epochs=1")
    trainer_of(parts, tmp_path).run()
    first = partial(slice, 0)
    assert len(parts.buffer) == 20
    for task, slots in zip(parts.scenario.tasks, (first(10), slice(10, 20))):
        assert torch.equal(parts.buffer.images[slots], task.train.images[first(10)])
    assert parts.buffer.columns["logits"].shape == (21, 10)
