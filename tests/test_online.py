"""The methods and protocol keys of online continual learning, each equation in numpy on three samples."""

import colorsys
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TwoTasks,
    array,
    batch_of,
    buffer_context,
    configure,
    cross_entropy,
    network_of,
    parts_of,
    softmax,
)

from cl_bench.backbones.mlp import MLP
from cl_bench.buffers.ordered import Ordered
from cl_bench.buffers.reservoir import Reservoir
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Batch, Data, Task
from cl_bench.data.views import DRAWS, draw_view, make_view
from cl_bench.methods.agem import AGEM
from cl_bench.methods.base import ClassLoss
from cl_bench.methods.er import ER
from cl_bench.methods.er_ace import ERACE
from cl_bench.methods.ewc import EWC
from cl_bench.methods.ewc_pp import EWCpp
from cl_bench.methods.gdumb import mix_boxes
from cl_bench.methods.mir import MIR
from cl_bench.methods.ocs import OCS
from cl_bench.methods.scr import supervised_contrastive_loss
from cl_bench.optim import WarmRestarts

pytestmark = pytest.mark.arithmetic

REPLAY = {"replay_size": 3, "loss_classes": "all", "replay_current_task": True}


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(hidden=[8], norm="none", init="default", num_classes=4, image_shape=(1, 8, 8))


def make(method: type, **keys):
    """The method on a small network with a reservoir of six images."""
    buffer = Reservoir(capacity=6, context=buffer_context())
    scenario = {"scenario": TwoTasks()} if "scenario" in inspect.signature(method).parameters else {}
    return method(net=mlp(), buffer=buffer, **scenario, **keys)


def remember(method, labels: list[int], task: int, seed: int = 8) -> torch.Tensor:
    """Put images of their own into the buffer; returns them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (len(labels), 1, 8, 8), dtype=torch.uint8, generator=generator)
    method.buffer.add(batch_of(raw, torch.tensor(labels), task))
    return raw


def logits(method, raw: torch.Tensor) -> np.ndarray:
    return array(method.net(raw.float() / 255))


def numpy_step(net: MLP, x: np.ndarray, y: np.ndarray, lr: float) -> list[np.ndarray]:
    """The weights of a network with one hidden layer after a step of gradient descent."""
    w1, b1, w2, b2 = (array(p) for p in net.parameters())
    h = np.maximum(x @ w1.T + b1, 0)
    dz = (softmax(h @ w2.T + b2) - np.eye(4)[y]) / len(y)
    dh = (dz @ w2) * (h > 0)
    return [w1 - lr * dh.T @ x, b1 - lr * dh.sum(axis=0), w2 - lr * dz.T @ h, b2 - lr * dz.sum(axis=0)]


def numpy_losses(weights: list[np.ndarray], x: np.ndarray, y: list[int]) -> np.ndarray:
    w1, b1, w2, b2 = weights
    z = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    return np.array([cross_entropy(z[i : i + 1], [label]) for i, label in enumerate(y)])


# the outputs that a loss compares


def test_masked_cross_entropies():
    y = torch.tensor([0, 1, 3])
    z = torch.tensor([[1.0, -1.0, 0.5, 2.0], [0.0, 3.0, -2.0, 1.0], [0.3, 0.2, 0.1, 0.0]])
    numbers = z.double().numpy()
    own = [numbers[:2, :2], numbers[2:, 2:]]
    by_task = np.array([cross_entropy(own[0][:1], [0]), cross_entropy(own[0][1:], [1]), cross_entropy(own[1], [1])])
    assert ClassLoss(TwoTasks(), "task")(z, y, 1, reduction="none").tolist() == pytest.approx(by_task, rel=1e-5)
    assert ClassLoss(TwoTasks(), "task")(z, y, 1).item() == pytest.approx(by_task.mean(), rel=1e-5)
    assert ClassLoss(TwoTasks(), "seen")(z, y, 1).item() == pytest.approx(cross_entropy(numbers, y), rel=1e-5)
    assert ClassLoss(TwoTasks(), "seen")(z[:2], y[:2], 0).item() == pytest.approx(
        cross_entropy(numbers[:2, :2], y[:2]), rel=1e-5
    )


def test_a_head_over_seen_classes_is_one_that_grows_and_one_with_unseen_outputs_at_minus_1000(three_images):
    raw, y = three_images
    net = mlp().double()
    x = raw.double() / 255

    def gradients(loss):
        return torch.autograd.grad(loss, list(net.parameters()))

    seen = gradients(ClassLoss(TwoTasks(), "seen")(net(x), y, 0))
    low = net(x).clone()
    low[:, 2:] = -1000
    grown = torch.nn.functional.linear(net.features(x), net.head.weight[:2], net.head.bias[:2])
    for other in (gradients(torch.nn.functional.cross_entropy(z, y)) for z in (low, grown)):
        for a, b in zip(seen, other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert not seen[-2][2:].any()
    assert not seen[-1][2:].any()


@pytest.mark.parametrize("classes", ["all", "task"])
def test_ewc_compares_the_same_outputs_in_loss_and_fisher_information(classes, three_images):
    raw, _ = three_images
    y, net = torch.tensor([2, 3, 3]), mlp()
    keys = {"strength": 1.0, "online": False, "decay": 1.0, "fisher": "empirical", "fisher_images": None}
    method = EWC(net=net, scenario=TwoTasks(), loss_classes=classes, **keys).eval()
    first = 2 if classes == "task" else 0
    loss = method.observe(batch_of(raw, y, task=1))["ce"].item()
    assert loss == pytest.approx(cross_entropy(logits(method, raw)[:, first:], y - first), rel=1e-5)
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for image, label in zip(raw, y):
        one = torch.nn.functional.cross_entropy(net(image[None].float() / 255)[:, first:], label[None] - first)
        for total, g in zip(expected, torch.autograd.grad(one, list(net.parameters()))):
            total += g.square() / 3
    data = Data(raw, y, torch.arange(3))
    for a, b in zip(method.measure_fisher_information(Task(1, range(2, 4), data, data, data)), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


# ER


def test_er_summed_is_two_means_from_two_passes(three_images):
    raw, y = three_images
    method = make(ER, loss="summed", **REPLAY)
    old = remember(method, [2, 3], task=0)
    passes = []
    method.net.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    losses = method.observe(batch_of(raw, y, task=1))
    assert passes == [3, 2]  # so BatchNorm sees each batch by itself
    assert losses["ce"].item() == pytest.approx(cross_entropy(logits(method, raw), y), rel=1e-5)
    assert losses["replay_ce"].item() == pytest.approx(cross_entropy(logits(method, old), [2, 3]), rel=1e-5)


def test_er_summed_is_joint_at_twice_the_rate_for_batches_of_one_size(three_images):
    raw, y = three_images
    totals = []
    for loss in ("joint", "summed"):
        method = make(ER, loss=loss, **REPLAY)
        remember(method, [2, 3, 2], task=0)
        totals.append(sum(method.observe(batch_of(raw, y, task=1)).values()).item())
    assert totals[1] == pytest.approx(2 * totals[0], rel=1e-5)


@pytest.mark.parametrize("current", [True, False])
def test_er_replays_the_current_task_or_leaves_it_out(current, three_images):
    raw, y = three_images
    method = make(ER, loss="summed", **(REPLAY | {"replay_current_task": current, "replay_size": 6}))

    def replayed(task) -> list[int]:
        return sorted(method.inputs(batch_of(raw, y, task)).get("y'", torch.tensor([])).tolist())

    assert replayed(0) == []
    remember(method, [0, 1, 0], task=0)
    assert replayed(0) == ([0, 0, 1] if current else [])
    remember(method, [2, 3], task=1)
    assert replayed(1) == ([0, 0, 1, 2, 3] if current else [0, 0, 1])
    resumed = make(ER, loss="summed", **(REPLAY | {"replay_current_task": current, "replay_size": 6}))
    resumed.load_state_dict(method.state_dict())  # the task of a stored image is part of the state
    assert sorted(resumed.draw(6, 1).y.tolist()) == replayed(1)


def test_labels_on_the_host_are_those_of_the_batch(three_images):
    raw, y = three_images
    assert Batch(x=raw, y=y, raw=raw, task=0, host_y=y + 1).list_labels() == (y + 1).tolist()
    assert batch_of(raw, y).list_labels() == y.tolist()


# networks


def test_a_cosine_head_is_ten_cosines_without_a_bias():
    net = network_of("backbone=resnet18_slim", "backbone.head=cosine", "backbone.width=2")
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    features, weight = array(net.eval().features(x)), array(net.head.weight)
    assert weight.shape == (100, 16)
    assert set(dict(net.head.named_parameters())) == {"weight"}
    lengths = np.linalg.norm(features, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(array(net(x)), 10 * features @ weight.T / lengths, rtol=1e-4, atol=1e-5)


def test_the_networks_of_agem():
    resnet = network_of("backbone=resnet18_agem")
    convolutions = [m for m in resnet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions[:5]] == [20] * 5
    assert len(convolutions) == 20
    norms = [m for m in resnet.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 20  # after each convolution, the three shortcuts' too
    assert {m.eps for m in norms} == {1e-3}
    for c in convolutions[1:]:  # the first one has few weights
        bound = (c.kernel_size[0] * c.in_channels) ** -0.5
        assert 0.9 * bound < c.weight.abs().max().item() <= bound * (1 + 1e-6)
    mlp = network_of("backbone=mlp_agem", num_classes=10, image_shape=(1, 28, 28))
    linear = [m for m in mlp.modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [256, 256, 10]
    for m in linear:
        assert (m.bias == 0.1).all()
        assert 0.17 < m.weight.abs().max().item() <= 0.2
        assert m.weight.std().item() == pytest.approx(0.088, abs=0.004)  # a normal distribution cut at two deviations


def test_the_network_of_gdumb():
    net = network_of("backbone=mlp_gdumb", num_classes=10, image_shape=(1, 28, 28))
    assert [name for name, _ in net.head.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert sum(p.numel() for p in net.parameters()) == 784 * 100 + 100 * 100 + 100 * 10 + 2 * (100 + 100 + 10)
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(net(x).mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "keys", [["backbone=mlp", "backbone.norm=batch"], ["backbone=resnet18_slim", "backbone.head=cosine"]]
)
def test_supsup_refuses_a_head_that_is_not_linear(keys):
    with pytest.raises(ConfigError, match="a network whose last layer is linear"):
        build(configure("scenario=digits", "method=supsup", "buffer=none", *keys))


# ER-ACE


def test_er_ace_compares_the_stream_over_its_own_classes_and_later_ones(three_images):
    raw, _ = three_images
    y = torch.tensor([2, 2, 2])
    method = make(ERACE, replay_size=3)
    old = remember(method, [0, 1, 0], task=0)
    losses = method.observe(batch_of(raw, y, task=1))
    z = logits(method, raw)
    assert losses["ce"].item() == pytest.approx(cross_entropy(z[:, 2:], y - 2), rel=1e-5)  # 3 is to come
    assert losses["replay_ce"].item() == pytest.approx(cross_entropy(logits(method, old), [0, 1, 0]), rel=1e-5)
    method = make(ERACE, replay_size=3)
    method.observe(batch_of(raw, torch.tensor([0, 2, 3]), task=1))
    again = method.observe(batch_of(raw, torch.tensor([1, 1, 1]), task=1))["ce"]  # the newest is 3, and 2 is absent
    assert again.item() == pytest.approx(cross_entropy(z[:, [1, 3]], [0, 0, 0]), rel=1e-5)


def test_er_ace_sends_no_gradient_of_new_images_to_old_outputs(three_images):
    raw, _ = three_images
    method = make(ERACE, replay_size=3)
    remember(method, [0, 1, 0], task=0)
    losses = method.observe(batch_of(raw, torch.tensor([2, 3, 2]), task=1))
    of_stream, of_memory = (
        torch.autograd.grad(losses[name], method.net.head.weight, retain_graph=True)[0] for name in ("ce", "replay_ce")
    )
    assert not of_stream[:2].any()
    assert (of_stream[2:].abs().sum(dim=1) > 0).all()
    assert (of_memory.abs().sum(dim=1) > 0).all()


# A-GEM


def flat(tensors) -> np.ndarray:
    return np.concatenate(
        [np.asarray(t.detach().double() if isinstance(t, torch.Tensor) else t).ravel() for t in tensors]
    )


@pytest.mark.parametrize("against", [True, False])
def test_agem_projects_a_gradient_that_points_against_the_reference(against, three_images):
    raw, y = three_images
    method = make(AGEM, replay_size=6, loss_classes="all")
    old = remember(method, [0, 1, 0], task=0)
    remember(method, [2], task=1, seed=9)  # not an earlier task's
    new_y = torch.tensor([2, 3, 2]) if against else y  # the same images with other labels
    images = old if against else raw
    losses = method.observe(batch_of(images, new_y, task=1))
    net = method.net
    reference = flat(numpy_step(net, old.flatten(1).double().numpy() / 255, [0, 1, 0], -1.0)) - flat(net.parameters())
    losses["ce"].backward()
    g = flat(p.grad for p in net.parameters())
    method.after_backward()
    found = flat(p.grad for p in net.parameters())
    dot = g @ reference
    assert (dot < 0) == against
    if against:
        np.testing.assert_allclose(found, g - dot / (reference @ reference) * reference, rtol=1e-4, atol=1e-7)
        assert abs(found @ reference) < 1e-6 * np.linalg.norm(g) * np.linalg.norm(reference)
    else:
        np.testing.assert_array_equal(found, g)


def test_agem_is_plain_in_the_first_task(three_images):
    raw, y = three_images
    method = make(AGEM, replay_size=6, loss_classes="all")
    remember(method, [0, 1, 0], task=0)
    method.observe(batch_of(raw, y, task=0))["ce"].backward()
    g = flat(p.grad for p in method.net.parameters())
    method.after_backward()
    np.testing.assert_array_equal(flat(p.grad for p in method.net.parameters()), g)


# MIR


MIR_KEYS = {"loss_classes": "all", "replay_current_task": True, "virtual_lr": 0.5}


def test_mir_replays_the_candidates_whose_loss_a_virtual_step_raises_most(three_images):
    raw, y = three_images
    method = make(MIR, replay_size=2, candidates=6, **MIR_KEYS)
    labels = [2, 3, 2, 0, 1, 3]
    old = remember(method, labels, task=0)
    before = [p.clone() for p in method.net.parameters()]
    batch = batch_of(raw, y, task=1)
    inputs = method.inputs(batch)
    pixels, stored = raw.flatten(1).double().numpy() / 255, old.flatten(1).double().numpy() / 255
    weights = [array(p) for p in method.net.parameters()]
    moved = numpy_step(method.net, pixels, y.numpy(), 0.5)
    scores = numpy_losses(moved, stored, labels) - numpy_losses(weights, stored, labels)
    whole = Batch(x=old.float() / 255, y=torch.tensor(labels), raw=old, task=-1)
    np.testing.assert_allclose(array(method.score(batch, whole)), scores, rtol=1e-3, atol=1e-5)
    best = np.argsort(-scores)[:2]
    torch.testing.assert_close(inputs["x'"], old[best].float() / 255)
    assert inputs["y'"].tolist() == [labels[i] for i in best]
    assert all(torch.equal(p, q) for p, q in zip(before, method.net.parameters()))
    assert all(p.grad is None for p in method.net.parameters())


def test_mir_without_a_choice_is_er_summed(three_images):
    raw, y = three_images
    found = []
    for method in (make(ER, loss="summed", **REPLAY), make(MIR, replay_size=3, candidates=3, **MIR_KEYS)):
        remember(method, [2, 3, 2, 0, 1, 3], task=0)
        found.append(method.observe(batch_of(raw, y, task=1)))
    assert found[0] == found[1]


def test_mir_scores_by_the_candidates_statistics_and_the_virtual_network_leaves_none():
    parts = parts_of("mir", "backbone=mlp", "backbone.norm=batch", "method.replay_size=4", "method.candidates=8")
    method, task = parts.method.train(), parts.scenario.tasks[0]
    raw, y = task.train.images, task.train.labels
    method.buffer.add(batch_of(raw[:10], y[:10]))
    norm = method.net.trunk[1][1]
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean(dim=0)))
    before = norm.running_mean.clone()
    method.inputs(batch_of(raw[10:16], y[10:16]))
    assert len(seen) == 3  # the stream, the virtual network, the real one
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * seen[2])
    assert norm.num_batches_tracked == 1


# OCS


OCS_KEYS = {"replay_size": 6, "tau": 2.0, "replay_weight": 0.5, "candidates": 4, "loss_classes": "all"}


def numpy_image_gradients(net: MLP, x: np.ndarray, y: list[int]) -> np.ndarray:
    lr = 1.0
    weights = [array(p) for p in net.parameters()]
    moved = [numpy_step(net, x[i : i + 1], np.array(y[i : i + 1]), lr) for i in range(len(y))]
    return np.stack([np.concatenate([(w - m).ravel() for w, m in zip(weights, one)]) for one in moved])


def numpy_cosines(g: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return g @ direction / np.linalg.norm(g, axis=1) / np.linalg.norm(direction)


def numpy_similarity_and_diversity(g: np.ndarray) -> np.ndarray:
    return numpy_cosines(g, g.mean(axis=0)) - np.stack([numpy_cosines(g, one) for one in g]).mean(axis=0)


def test_ocs_learns_the_images_whose_gradients_suit_the_batch_and_the_memory(three_images):
    raw, y = three_images
    method = make(OCS, select=2, **OCS_KEYS)
    pixels = raw.flatten(1).double().numpy() / 255
    g = numpy_image_gradients(method.net, pixels, y.tolist())
    np.testing.assert_allclose(array(method.compute_image_gradients(raw.float() / 255, y, 1)), g, rtol=1e-3, atol=1e-5)
    first = np.argsort(-numpy_similarity_and_diversity(g))[:2]
    batch = batch_of(raw, y, task=1)
    inputs = method.inputs(batch)
    assert set(inputs) == {"x", "y"}
    torch.testing.assert_close(inputs["x"], batch.x[first])

    labels = [2, 3, 2, 0, 1, 3]
    old = remember(method, labels, task=0)
    stored = numpy_image_gradients(method.net, old.flatten(1).double().numpy() / 255, labels)
    both = np.argsort(-numpy_similarity_and_diversity(g) - 2 * numpy_cosines(g, stored.mean(axis=0)))[:2]
    inputs = method.inputs(batch)
    torch.testing.assert_close(inputs["x"], batch.x[both])
    assert inputs["y"].tolist() == y[both].tolist()
    losses, _ = method.terms(inputs, 1)
    by_label = sorted(inputs["y'"].tolist())
    assert by_label == sorted(labels)
    assert losses["ce"].item() == pytest.approx(cross_entropy(logits(method, raw[both]), y[both]), rel=1e-4)
    assert losses["replay_ce"].item() == pytest.approx(0.5 * cross_entropy(logits(method, old), labels), rel=1e-4)
    assert all(p.grad is None for p in method.net.parameters())


def test_ocs_stores_the_best_of_the_images_picked_in_the_last_epoch(three_images):
    raw, y = three_images
    method = make(OCS, select=2, **OCS_KEYS)
    method.buffer = Ordered(capacity=4, context=buffer_context())
    offered = []
    phase = next(method.learn(SimpleNamespace(id=0, train=None)))
    for epoch in range(2):
        batch = batch_of(raw, y)
        inputs = method.inputs(batch)
        _, columns = method.terms(inputs, 0)
        method.offer(batch, columns)
        offered = (inputs["x"] * 255).round().to(torch.uint8)
        phase.after_epoch(epoch)
    assert len(method.picked) == 2  # not those of the first epoch
    assert len(method.buffer) == 0  # until the task ends
    other = make(OCS, select=2, **OCS_KEYS)
    other.observe(batch_of(raw, y))
    assert len(other.buffer) == 2  # a reservoir is offered the picked images at once
    torch.testing.assert_close(method.picked.data().images, offered)
    whole = Data(raw, y, torch.arange(3))
    g = numpy_image_gradients(method.net, raw.flatten(1).double().numpy() / 255, y.tolist())
    expected = numpy_similarity_and_diversity(g)
    np.testing.assert_allclose(array(method.rank(whole, 0)), expected, rtol=1e-3, atol=1e-4)


def test_the_ordered_buffer_keeps_the_first_images_of_a_class():
    buffer = Ordered(capacity=4, context=buffer_context())
    raw = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 8, 8)
    train = Data(raw, torch.tensor([1, 0, 1, 0, 1, 0]), torch.arange(6))
    buffer.close_task(Task(id=0, classes=range(2), train=train, val=train, test=train), lambda x, y: {})
    assert buffer.images[:4, 0, 0, 0].tolist() == [1, 3, 0, 2]
    assert buffer.labels[:4].tolist() == [0, 0, 1, 1]


# GDumb


def test_cutmix_puts_a_box_of_another_image_into_each():
    x = torch.arange(3.0).view(3, 1, 1, 1) + torch.zeros(3, 2, 8, 6)
    shares, whole = [], 0
    for seed in range(200):
        mixed, order, share = mix_boxes(x, 0.5, torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == [0, 1, 2]
        box = np.zeros((8, 6), dtype=bool)
        for image, other in enumerate(order.tolist()):
            replaced = (mixed[image] == other).numpy() & (other != image)
            assert (mixed[image].numpy() == np.where(replaced, other, image)).all()
            box |= replaced.any(axis=0)
        rows, columns = np.flatnonzero(box.any(axis=1)), np.flatnonzero(box.any(axis=0))
        if box.any():
            assert box.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            assert share.item() == pytest.approx(1 - box.sum() / 48)
            shares.append(share.item())
        whole += not box.any()
    assert 60 < whole < 140  # half of the batches, and boxes of no pixel
    assert 0 < min(shares) < 0.6
    assert (x == torch.arange(3.0).view(3, 1, 1, 1)).all()  # the batch itself is as it was


def test_gdumb_weights_both_labels_by_their_pixels(three_images):
    raw, y = three_images
    method = parts_of("gdumb").method
    other, x = torch.tensor([3, 2, 1]), raw.float() / 255
    given = {"x": x, "y": y, "y'": other, "share": torch.tensor(0.7)}
    z = array(method.net(x))
    losses, _ = method.terms(given, 0)
    assert losses["ce"].item() == pytest.approx(0.7 * cross_entropy(z, y) + 0.3 * cross_entropy(z, other), rel=1e-5)
    losses, _ = method.terms({"x": x, "y": y}, 0)
    assert losses["ce"].item() == pytest.approx(cross_entropy(z, y), rel=1e-5)


@pytest.mark.parametrize("train_after", ["each_task", "last_task"])
def test_gdumb_trains_from_scratch_on_the_buffer_alone(train_after):
    parts = parts_of("gdumb", f"method.train_after={train_after}")
    method, weights = parts.method, []
    first = array(method.net.head.weight)
    for task in parts.scenario.tasks:
        for phase in method.learn(task):
            weights.append(array(method.net.head.weight))
            assert phase.data.labels.tolist() == method.buffer.data().labels.tolist()
            assert len(method.buffer) == 20
            assert set(phase.data.labels.tolist()) <= set(range(task.classes.stop))
        answers = method.predict(parts.scenario.transform.normalise(task.test.images), None)
        assert answers.isfinite().all() == (train_after == "each_task" or task.id == 1)
    assert len(weights) == (2 if train_after == "each_task" else 1)
    assert all((w != first).all() for w in weights)
    assert train_after == "last_task" or (weights[0] != weights[1]).all()
    assert sorted(torch.bincount(method.buffer.labels).tolist()) == [2] * 10


def test_warm_restarts_are_those_of_gdumb():
    schedule = WarmRestarts(warmup_epochs=1, warmup_factor=0.1, cycle=1, growth=2, min_factor=0.01)
    net = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=0.0005)
    expected = [0.005, 0.05]
    for _ in range(2, 40):
        optimizer.step()
        torchs.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert [0.05 * schedule(epoch, 40) for epoch in range(40)] == pytest.approx(expected)


# EWC++


def test_ewc_pp_against_numpy(three_images):
    raw, y = three_images
    net = mlp()
    method = EWCpp(net=net, scenario=TwoTasks(), strength=3.0, rate=0.9, every=2, loss_classes="all")
    x, lr = raw.flatten(1).double().numpy() / 255, 0.1
    data = Data(raw, y, torch.arange(3))
    running, precision = [np.zeros(p.shape) for p in net.parameters()], [np.zeros(p.shape) for p in net.parameters()]
    centre = [array(p) for p in net.parameters()]
    for number, steps in enumerate((3, 5)):
        recent = [np.zeros(p.shape) for p in net.parameters()]
        for _ in method.learn(Task(number, range(4), data, data, data)):
            for step in range(1, steps + 1):
                weights = [array(p) for p in net.parameters()]
                g = [moved - w for moved, w in zip(numpy_step(net, x, y.numpy(), -1.0), weights)]
                drifts = [w - c for w, c in zip(weights, centre)]
                losses = method.observe(batch_of(raw, y, number))
                assert set(losses) == ({"ce", "pull"} if number else {"ce"})
                if number:
                    pull = 3.0 * sum((p * d**2).sum() for p, d in zip(precision, drifts))
                    assert losses["pull"].item() == pytest.approx(pull, rel=1e-4, abs=1e-12)
                method.zero_grad()
                sum(losses.values()).backward()
                method.after_backward()
                for p, gradient, q, d in zip(net.parameters(), g, precision, drifts):
                    np.testing.assert_allclose(array(p.grad), gradient + 6.0 * q * d, rtol=1e-4, atol=1e-6)
                    p.data -= lr * p.grad
                if step % 2 == 0:  # the update that is due comes before the step's own gradient
                    running = [0.1 * f + 0.45 * r for f, r in zip(running, recent)]
                    recent = [np.zeros_like(r) for r in recent]
                recent = [r + gradient**2 for r, gradient in zip(recent, g)]
        low, high = min(f.min() for f in running), max(f.max() for f in running)
        precision, centre = [(f - low) / (high - low) for f in running], [array(p) for p in net.parameters()]
        for found, expected in zip(method.pull.importance, precision):
            np.testing.assert_allclose(array(found), expected, rtol=1e-3, atol=1e-6)
        assert all(not r.any() for r in method.fisher.importance)


# SCR


def test_the_supervised_contrastive_loss_pair_by_pair():
    generator = torch.Generator().manual_seed(2)
    z = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=1)
    y = torch.tensor([0, 1, 1, 0, 1, 1])  # three images in two views
    numbers, terms = z.double().numpy(), []
    for i in range(6):
        others = [a for a in range(6) if a != i]
        total = sum(np.exp(numbers[i] @ numbers[a] / 0.1) for a in others)
        same = [a for a in others if y[a] == y[i]]
        terms.append(-np.mean([numbers[i] @ numbers[p] / 0.1 - np.log(total) for p in same]))
    assert supervised_contrastive_loss(z, y, 0.1).item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_scr_compares_both_views_of_stream_and_memory_and_answers_by_the_nearest_mean():
    parts = parts_of("scr", "method.replay_size=8")
    method, task = parts.method, parts.scenario.tasks[0]
    raw, y = task.train.images, task.train.labels
    method.buffer.add(batch_of(raw[:10], y[:10]))
    batch = batch_of(raw[10:16], y[10:16])
    inputs = method.inputs(batch)
    assert inputs["x"].shape == inputs["view"].shape == (14, *raw.shape[1:])
    assert inputs["y"][:6].tolist() == y[10:16].tolist()
    losses, _ = method.terms(inputs, 0)
    z = [method.projection(method.net.features(inputs[name])) for name in ("x", "view")]
    z = torch.nn.functional.normalize(torch.cat(z), dim=1)
    expected = supervised_contrastive_loss(z, torch.cat([inputs["y"]] * 2), 0.1)
    assert losses["contrast"].item() == pytest.approx(expected.item(), rel=1e-5)
    for _ in method.learn(task):
        pass

    def phi(images):
        features = array(method.net.features(parts.scenario.transform.normalise(images)))
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    held = method.buffer.data()
    scores = array(method.predict(parts.scenario.transform.normalise(raw[:3]), None))
    for c in range(10):
        if not (held.labels == c).any():
            assert np.isneginf(scores[:, c]).all()
            continue
        mean = phi(held.images[held.labels == c]).mean(axis=0)
        distances = np.linalg.norm(phi(raw[:3]) - mean / np.linalg.norm(mean), axis=1)
        np.testing.assert_allclose(-scores[:, c], distances, atol=1e-4)


def test_scr_reviews_the_memory_after_a_task_with_a_tenth_of_the_gradient():
    parts = parts_of("scr", "method.replay_size=6")  # of 20 stored images, three batches of six
    method, task = parts.method, parts.scenario.tasks[0]
    steps = method.learn(task)
    stream = next(steps)
    method.buffer.add(batch_of(task.train.images[:20], task.train.labels[:20]))
    review = next(steps)
    assert (len(stream.data), len(review.data)) == (len(task.train), 20)
    assert (review.epochs, review.batch_size, review.lr, review.optimizer) == (1, 6, None, None)
    order = review.order(torch.Generator().manual_seed(0))
    assert len(order) == len(set(order.tolist())) == 18
    assert list(map(id, review.params)) == list(map(id, stream.params))

    raw, y = review.data.images[order[:6]], review.data.labels[order[:6]]
    batch, state = batch_of(raw, y), method.buffer.generator.get_state()
    (loss,) = review.observe(batch).values()
    method.buffer.generator.set_state(state)
    view = method.buffer.transform.normalise(255 * draw_view(raw.float() / 255, method.buffer.generator))
    z = torch.cat([method.projection(method.net.features(x)) for x in (batch.x, view)])
    whole = supervised_contrastive_loss(torch.nn.functional.normalize(z, dim=1), torch.cat([y, y]), 0.1)
    expected = torch.autograd.grad(whole, review.params)
    for found, gradient in zip(torch.autograd.grad(loss, review.params), expected, strict=True):
        np.testing.assert_allclose(array(found), array(gradient) / 10, rtol=1e-4, atol=1e-7)
    assert (len(method.buffer), bool(method.known.any())) == (20, False)
    assert (next(steps, None), bool(method.known.any())) == (None, True)
    for keys in ("method.review=false", "method.replay_size=21"):  # not asked for; no whole batch
        parts = parts_of("scr", keys)
        steps = parts.method.learn(parts.scenario.tasks[0])
        next(steps)
        parts.method.buffer.add(batch_of(task.train.images[:20], task.train.labels[:20]))
        assert next(steps, None) is None


def a_view(**changes: float) -> torch.Tensor:
    """Draws of the view that is the image itself, with some changed by their position."""
    still = [1.0, 0.5, 0.0, 0.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0]
    for position, value in changes.items():
        still[int(position[1:])] = value
    return torch.tensor([still])


def test_views_crop_mirror_and_change_colours():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(make_view(image, a_view()), image, rtol=0, atol=2e-6)
    torch.testing.assert_close(make_view(image, a_view(_4=0.0)), image.flip(3), rtol=0, atol=2e-6)
    quarter = torch.nn.functional.interpolate(image[:, :, :4, :4], scale_factor=2, mode="bilinear")
    found = make_view(image, a_view(_0=0.0625))  # 0.2 + 0.8 * 0.0625 = 1/4 of the area, at the top left
    torch.testing.assert_close(found[:, :, :7, :7], quarter[:, :, :7, :7], rtol=0, atol=1e-5)
    torch.testing.assert_close(make_view(image, a_view(_5=0.0)), 0.6 * image, rtol=0, atol=2e-6)
    grey = 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]
    torch.testing.assert_close(make_view(image, a_view(_6=0.0)), 0.6 * image + 0.4 * grey.mean(), rtol=0, atol=2e-6)
    torch.testing.assert_close(make_view(image, a_view(_7=0.0)), 0.6 * image + 0.4 * grey[:, None], rtol=0, atol=2e-6)
    torch.testing.assert_close(make_view(image, a_view(_10=0.1)), grey[:, None].expand(1, 3, 8, 8), rtol=0, atol=2e-6)
    turned = make_view(image, a_view(_8=0.75))  # by 0.05 of the circle
    for row, column in ((0, 0), (3, 5), (7, 2)):
        h, s, v = colorsys.rgb_to_hsv(*image[0, :, row, column].tolist())
        assert turned[0, :, row, column].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + 0.05) % 1, s, v), abs=1e-5)


def test_views_are_drawn_for_each_image():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4)).expand(64, 3, 8, 8)
    views = draw_view(image, torch.Generator().manual_seed(0))
    assert torch.equal(views, draw_view(image, torch.Generator().manual_seed(0)))
    assert len({tuple(view.flatten().tolist()) for view in views}) == 64
    assert 0 <= views.min() <= views.max() <= 1
    colourless = (views.amax(dim=1) - views.amin(dim=1)).flatten(1).amax(dim=1) < 1e-6
    assert 4 <= colourless.sum() <= 24  # a fifth
    assert draw_view(image[:, :1], torch.Generator().manual_seed(0)).shape == (64, 1, 8, 8)
    assert a_view().shape == (1, DRAWS)
