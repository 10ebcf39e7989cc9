"""SLCA: equations, what each phase changes, the two heads, and a run that is stopped between them."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import SUITS, TINY, array, batch_of, configure, make_split, network_of, parts_of, toy_images, trainer_of

from cl_bench.backbones.base import turn_into_buffers
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import clone_state
from cl_bench.engine.trainer import Interrupted
from cl_bench.methods.slca import SLCA
from cl_bench.optim import sgd
from cl_bench.runs.audit import check_rehearsal

pytestmark = pytest.mark.arithmetic

KEYS = {"trunk_lr": 0.01, "alignment_epochs": 2, "alignment_draws": 5, "alignment_lr": 0.1}
KEYS |= {"alignment_temperature": 0.1}
DECAY = partial(sgd, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=False)


@pytest.fixture
def made():
    """On six toy classes in three tasks, with the Gaussians of the first two tasks."""
    torch.manual_seed(0)
    net = network_of("backbone=mlp", "backbone.hidden=[7]", num_classes=6, image_shape=(1, 8, 8))
    scenario = make_split(source=toy_images(num_classes=6), num_tasks=3)
    method = SLCA(net=net, scenario=scenario, make_optimizer=DECAY, alignment=True, **KEYS).eval()
    method.tasks = scenario.tasks
    for task in scenario.tasks[:2]:
        method.measure(task)
    return method


def features_of(method, k):
    train = method.tasks[k // 2].train
    return array(method.net.features(method.transform.normalise(train.images[train.labels == k])))


def test_gaussians_are_mean_and_covariance(made):
    for k in range(4):
        h = features_of(made, k)
        np.testing.assert_allclose(array(made.means[k]), h.mean(0), rtol=1e-5, atol=1e-6)
        factor = array(made.factors[k])
        np.testing.assert_allclose(factor @ factor.T, np.cov(h.T) + 1e-4 * np.eye(7), rtol=1e-4, atol=1e-6)
    assert not made.factors[4:].any()


def test_draws_have_scaled_means(made):
    y = torch.tensor([3, 0, 2])
    torch.manual_seed(5)
    found = array(made.draw(y, task=1))
    torch.manual_seed(5)
    noise = array(torch.randn(3, 7))
    for row, k, z, scale in zip(found, y, noise, (1.0, 0.95, 1.0)):  # the second of two tasks, the first, the second
        expected = scale * array(made.means[k]) + array(made.factors[k]) @ z
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_both_losses_are_the_equations(made, three_images):
    weight, bias = (array(p) for p in made.net.head.parameters())
    raw, y = three_images[0], torch.tensor([3, 2, 3])
    batch = batch_of(raw, y, task=1)
    z = array(made.net.features(batch.x)) @ weight.T + bias
    own = z[:, 2:4] - np.log(np.exp(z[:, 2:4]).sum(1, keepdims=True))
    expected = -own[[0, 1, 2], [1, 0, 1]].mean()
    assert made.observe(batch)["ce"].item() == pytest.approx(expected, rel=1e-5)

    torch.manual_seed(5)
    z = array(made.draw(y, task=1)) @ weight.T + bias
    n = (np.linalg.norm(z[:, :2], axis=1) + np.linalg.norm(z[:, 2:4], axis=1)) / 2
    z = z[:, :4] / (0.1 * n[:, None])
    expected = (np.log(np.exp(z).sum(1)) - z[[0, 1, 2], y]).mean()
    torch.manual_seed(5)
    assert made.observe_draws(batch)["alignment"].item() == pytest.approx(expected, rel=1e-4)


def test_a_draw_has_the_gaussian_of_its_class(made):
    h = array(made.draw(torch.full((20_000,), 1), task=3))
    np.testing.assert_allclose(h.mean(0), 0.925 * array(made.means[1]), atol=0.02)
    factor = array(made.factors[1])
    np.testing.assert_allclose(np.cov(h.T), factor @ factor.T, atol=0.02)


def test_each_phase_changes_what_it_should(made):
    phases = made.learn(made.tasks[1])
    training = next(phases)
    before = clone_state(made.net.state_dict())
    optimizer = training.optimizer(list(training.params))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    for _ in range(2):
        optimizer.zero_grad()
        sum(training.observe(batch_of(training.data.images, training.data.labels, task=1)).values()).backward()
        optimizer.step()
        training.after_step()
    trained = clone_state(made.net.state_dict())
    for name in ("head.weight", "head.bias"):
        same = [torch.equal(trained[name][k], before[name][k]) for k in range(6)]
        assert same == [True, True, False, False, True, True]
    assert any(not torch.equal(trained[name], before[name]) for name in trained if not name.startswith("head"))

    alignment = next(phases)
    assert alignment.data.labels.bincount().tolist() == [5] * 4
    assert [id(p) for p in alignment.params] == [id(p) for p in made.net.head.parameters()]
    assert (alignment.batch_size, alignment.epochs, alignment.lr) == (5, 2, 0.1)
    assert [alignment.schedule(epoch, 4) for epoch in (0, 2)] == pytest.approx([1, 0.5])
    made.net.head.weight.data += 1
    assert next(phases, None) is None
    next(made.learn(made.tasks[2]))  # goes on from the head that was not aligned
    assert torch.equal(made.net.head.weight, trained["head.weight"])


def test_without_alignment_the_same_network_is_learned(tmp_path):
    """Up to the last task's alignment nothing differs; its head before that is an alternative."""
    aligned = parts_of("slca")
    slow = build(configure(*TINY, *SUITS["slca"][:3], "method=slca", "method.alignment=false"))
    trainers = [trainer_of(parts, tmp_path / str(n)) for n, parts in enumerate((aligned, slow))]
    for trainer in trainers:
        trainer.run()
    one, other = (clone_state(parts.method.net.state_dict()) for parts in (aligned, slow))
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["head.weight", "head.bias"]
    x = aligned.scenario.transform.normalise(aligned.scenario.tasks[0].test.images)
    with torch.no_grad():
        assert torch.equal(aligned.method.alternatives()["unaligned"](x, None), slow.method.predict(x, None))
    # 50 images a task in steps of 16, two epochs; then two epochs with a step a class
    assert [trainer.steps_done for trainer in trainers] == [16 + 20, 16]
    assert trainers[0].alternatives["unaligned"].keys() == {"class_il", "task_il"}
    assert (slow.method.alternatives(), slow.method.facts()["covariance_bytes"]) == ({}, 0)
    assert aligned.method.facts()["covariance_bytes"] == 10 * 32 * 32 * 4
    assert aligned.method.memory_bytes() == 4 * (10 * 32 * 32 + 10 * 32 + 10 * 33)


def test_resumes_between_the_alignment_and_the_next_task(tmp_path):
    """Stops in the middle of both phases are among those of the contract (``test_methods.py``)."""
    three_tasks = partial(parts_of, "slca", "scenario.classes_per_task=[4,3,3]", "trainer.epochs=1")
    expected = three_tasks()
    trainer_of(expected, tmp_path / "straight").run()
    trainer = trainer_of(three_tasks(), tmp_path)
    last = 3 + 2 + 2 * 7  # 40 and 30 images in steps of 16, then two epochs with a step a class
    trainer.stop = lambda: trainer.steps_done == last
    with pytest.raises(Interrupted):
        trainer.run()
    torch.manual_seed(99)
    parts = three_tasks()
    resumed = trainer_of(parts, tmp_path)
    resumed.run()
    assert resumed.steps_done == last + 2 + 2 * 10
    for name, tensor in expected.method.state_dict().items():
        assert torch.equal(parts.method.state_dict()[name], tensor), name


def test_the_audit_lets_it_pass():
    checks = {check.name: check for check in check_rehearsal(lambda: parts_of("slca"))}
    assert {"every phase trains on training images", "training does not depend on the images it is measured on"} < {
        *checks
    }
    assert all(check.passed for check in checks.values()), checks


def test_a_frozen_trunk_trains_the_head_alone(made):
    turn_into_buffers(made.net.trunk)
    phase = next(made.learn(made.tasks[1]))
    assert len(phase.optimizer(list(phase.params)).param_groups) == 1


def test_another_head_is_refused():
    with pytest.raises(ConfigError, match=r"backbone\.head: expected a linear head; got CosineHead"):
        build(configure("method=slca", "backbone=resnet18_slim", "backbone.width=4", "backbone.head=cosine"))
