"""Additive Parameter Decomposition: its equations in numpy, and what the paper promises of it."""

import numpy as np
import pytest
import torch
from helpers import (
    SEED,
    array,
    batch_of,
    configure,
    cross_entropy,
    identity_transform,
    make_split,
    network_of,
    trainer_of,
)

from cl_bench.backbones.apd import NO_GROUP, APDNet, ResponseNorm
from cl_bench.config.build import Parts, build
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Data, Task
from cl_bench.methods.apd import APD, run_k_means, split
from cl_bench.metrics.forgetting import forgetting

pytestmark = pytest.mark.arithmetic

KEYS = {
    "variant": "apd1", "epochs": 7, "lambda1": 0.02, "lambda2": 3.0, "l2": 0.1, "consolidate_every": 3, "clusters": 1,
    "beta": 0.05,
}  # fmt: skip


def small(**changes) -> APD:
    """Four tasks of one class; weights away from their start."""
    torch.manual_seed(0)
    net = APDNet(channels=[3], kernel=3, hidden=[6, 5], num_classes=4, image_shape=(1, 8, 8))
    scenario = make_split(num_tasks=4)
    scenario.transform = identity_transform()
    return APD(net=net, scenario=scenario, **(KEYS | changes)).eval()


def with_tasks(count: int, **changes) -> APD:
    """``count`` tasks whose tau are drawn: far apart in the last task, else near each other or far, by element."""
    method = small(**changes)
    with torch.no_grad():
        for _ in range(count):
            method.net.add_task(1)
        common = [torch.randn_like(s) for s in method.net.sigma]
        for number, part in enumerate(method.net.parts):
            for tau, shared in zip(part.tau, common):
                noise = torch.where(torch.rand_like(tau) < 0.5, 0.01, 0.2) * torch.randn_like(tau)
                tau.copy_(shared + noise + (20.0 if number == count - 1 else 0.0))
                tau[torch.rand_like(tau) < 0.3] = 0.01  # below the threshold
            for v in part.v:
                v.normal_()
            for bias in part.bias:
                bias.normal_()
    return method


def cut(tau: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(np.abs(tau) > threshold, tau, 0)


def theta(method: APD, task: int, layer: int) -> np.ndarray:
    """sigma * sigmoid(v) + tau, without the threshold and without tau~."""
    sigma, part = array(method.net.sigma[layer]), method.net.parts[task]
    mask = 1 / (1 + np.exp(-array(part.v[layer])))
    return sigma * mask.reshape(-1, *[1] * (sigma.ndim - 1)) + array(part.tau[layer])


def at_test(method: APD) -> list[list[np.ndarray]]:
    """The weights that answer, [task][layer]."""
    return [[array(w) for w in method.net.compute_weights(i, method.lambda1)] for i in range(len(method.net.tasks))]


def opened(method: APD, task: int, y: torch.Tensor, raw: torch.Tensor) -> list[torch.nn.Parameter]:
    """Open a task as the trainer does; returns what its phase trains."""
    data = Data(raw, y, torch.arange(len(y)))
    phase = next(iter(method.learn(Task(task, method.classes[task], data, data, data))))
    return list(phase.params)


# ---- the network


def test_the_papers_network_has_2986500_shared_weights():
    net = network_of("backbone=apd")
    assert [tuple(s.shape) for s in net.sigma] == [(20, 3, 5, 5), (50, 20, 5, 5), (800, 3200), (500, 800)]
    assert sum(s.numel() for s in net.sigma) == 2_986_500
    net.add_task(10)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_a_tasks_weights_are_the_equation_and_a_new_tau_is_a_copy_of_sigma():
    method = with_tasks(2)
    for layer, weight in enumerate(method.net.compute_weights(1)):
        np.testing.assert_allclose(array(weight), theta(method, 1, layer), rtol=1e-5, atol=1e-6)
    method.net.add_task(1)
    new = method.net.parts[-1]
    for tau, sigma, v in zip(new.tau, method.net.sigma, new.v):
        assert torch.equal(tau, sigma)
        assert tau.data_ptr() != sigma.data_ptr()
        assert v.shape == (len(sigma),)
        assert 0 < v.abs().max() <= 2 * (2 / len(v)) ** 0.5


def test_response_normalisation_is_torchs():
    x = 20 * torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(ResponseNorm(16, 9, 1e-3)(x), torch.nn.LocalResponseNorm(9, 1e-3, 0.75, 1.0)(x))


def test_another_rule_on_this_network_is_refused():
    parts = build(configure("backbone=apd_digits", "method=finetune", "device=cpu"))
    with pytest.raises(ConfigError, match="method=apd"):
        parts.method.observe(batch_of(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1])))


# ---- losses


def test_losses_of_the_first_task(three_images):
    raw, _ = three_images
    method, y = small(), torch.tensor([0, 0, 0])
    opened(method, 0, y, raw)
    losses = method.observe(batch_of(raw, y))
    net, part = method.net, method.net.parts[0]
    assert set(losses) == {"ce", "sparsity", "l2"}
    assert losses["ce"].item() == pytest.approx(0, abs=1e-6)  # one class
    l1 = sum(np.abs(array(tau)).sum() for tau in part.tau)
    assert losses["sparsity"].item() == pytest.approx(0.02 * l1, rel=1e-5)
    squares = sum((array(p) ** 2).sum() for p in [*part.tau, *part.v, *net.sigma])
    assert losses["l2"].item() == pytest.approx(0.1 / 2 * squares, rel=1e-5)


@pytest.mark.parametrize("variant", ["fixed", "apd1", "apd2"])
def test_losses_of_a_later_task(three_images, variant):
    raw, _ = three_images
    method = with_tasks(2, variant=variant)
    method.classes = [range(0, 1), range(1, 2), range(2, 4)]
    y = torch.tensor([2, 3, 3])
    opened(method, 2, y, raw)
    net = method.net
    anchors = [[theta(method, i, layer) for layer in net.layers] for i in range(2)]
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn_like(p)
    losses = method.observe(batch_of(raw, y, task=2))
    assert set(losses) == {"ce", "sparsity", "drift", "l2"}
    logits = array(net.parts[2].head(net.extract_task_features(raw.float() / 255, 2)))
    assert losses["ce"].item() == pytest.approx(cross_entropy(logits, np.array([0, 1, 1])), rel=1e-5)
    l1 = sum(np.abs(array(tau)).sum() for part in net.parts for tau in part.tau)
    assert losses["sparsity"].item() == pytest.approx(0.02 * l1, rel=1e-5)
    drift = sum(((theta(method, i, n) - anchors[i][n]) ** 2).sum() for i in range(2) for n in net.layers)
    assert losses["drift"].item() == pytest.approx(3.0 / 2 * drift, rel=1e-4)
    squares = sum((array(p) ** 2).sum() for p in [*net.parts[2].tau, *net.parts[2].v])
    assert losses["l2"].item() == pytest.approx(0.1 / 2 * squares, rel=1e-5)


def test_the_network_computes_with_the_tasks_weights(three_images):
    """Convolution, ReLU, normalisation, pooling, two fully connected layers, head, with theta of the task."""
    method, x = with_tasks(2), three_images[0].float() / 255
    conv, first, second = (torch.from_numpy(theta(method, 1, layer)).float() for layer in range(3))
    biases = method.net.parts[1].bias
    h = torch.relu(torch.conv2d(x, conv, biases[0], padding=1))
    h = torch.nn.LocalResponseNorm(9, 1e-3, 0.75, 1.0)(h)
    padded = torch.nn.functional.pad(h, (0, 1, 0, 1), value=-torch.inf)  # 8 -> 4 pixels
    h = torch.nn.functional.max_pool2d(padded, 3, 2).flatten(1)
    h = torch.relu(torch.relu(h @ first.T + biases[1]) @ second.T + biases[2])
    torch.testing.assert_close(method.net.extract_task_features(x, 1), h, rtol=1e-4, atol=1e-4)


# ---- what is trained


@pytest.mark.parametrize("variant", ["fixed", "apd1"])
def test_old_masks_are_frozen_and_old_tau_only_in_fixed(variant, three_images):
    raw, _ = three_images
    method = with_tasks(2, variant=variant)
    trained = {id(p) for p in opened(method, 2, torch.tensor([2, 2, 2]), raw)}
    old, new = method.net.parts[:2], method.net.parts[2]
    assert {id(p) for p in [*method.net.sigma, *new.parameters()]} <= trained
    for part in old:
        assert all((id(tau) in trained) == (variant == "apd1") for tau in part.tau)
        assert not trained & {id(p) for p in [*part.v, *part.bias, *part.head.parameters()]}
    before = [tau.detach().clone() for part in old for tau in part.tau]
    optimizer = torch.optim.Adam([p for p in method.parameters() if id(p) in trained], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(method.observe(batch_of(raw, torch.tensor([2, 2, 2]), task=2)).values()).backward()
        optimizer.step()
    after = [tau for part in old for tau in part.tau]
    assert all(torch.equal(a, b) == (variant == "fixed") for a, b in zip(after, before))


def test_the_best_of_the_last_five_epochs_is_kept(three_images):
    raw, y = three_images[0], torch.tensor([0, 0, 0])
    data, none = Data(raw, y, torch.arange(3)), Data(raw[:0], y[:0], torch.arange(0))
    # the best of all comes too early; of equals the later one is kept
    for held_out, accuracies, kept in [(data, [9, 8, 0.2, 0.5, 0.1, 0.5, 0.3], 5), (none, [], 6)]:
        method = small()
        learning = method.learn(Task(0, range(0, 1), data, held_out, data))
        phase = next(learning)
        for epoch in range(7):
            with torch.no_grad():
                for p in method.net.sigma:
                    p.fill_(epoch)
            method._measure_accuracy = lambda *_, epoch=epoch, accuracies=accuracies: accuracies[epoch]
            phase.after_epoch(epoch)
        assert next(learning, None) is None
        assert all((p == kept).all() for p in method.net.sigma)
        assert method.facts()["epoch_kept"] == [kept]
        assert method.best == []


# ---- consolidation


def test_sharing_moves_no_member_by_more_than_half_of_beta():
    members = torch.tensor([[0.0, 1.00, -3.0, 0.5], [0.0, 1.04, 3.0, 0.5], [0.0, 1.01, 0.0, 0.551]])
    shared, own = split(members, 0.05)
    torch.testing.assert_close(shared, torch.tensor([0.0, 1.02, 0.0, 0.0]))
    torch.testing.assert_close(own, torch.tensor([[0.0, 0, -3, 0.5], [0, 0, 3, 0.5], [0, 0, 0, 0.551]]))
    assert (shared + own - members).abs().max() <= 0.025 + 1e-6


def test_consolidation_moves_weights_by_at_most_half_of_beta_and_no_singleton():
    method = with_tasks(3, consolidate_every=3, clusters=2)
    before, raw = at_test(method), [[array(w) for w in method.net.compute_weights(i)] for i in range(3)]
    size = method.capacity()
    method.consolidate()
    net = method.net
    for layer in net.layers:
        assert net.groups[layer][:2] == [layer, layer]  # the two near tasks share
        assert net.groups[layer][2] == NO_GROUP  # the far one is alone
        np.testing.assert_array_equal(array(net.compute_weights(2)[layer]), raw[2][layer])
    moved = [np.abs(a - b).max() for now, then in zip(at_test(method), before) for a, b in zip(now, then)]
    assert 0.01 < max(moved[:6]) <= 0.05 / 2 + 1e-6
    assert max(moved[6:]) == 0
    assert method.capacity() < size  # what two tasks had is kept once
    shared = [array(s) for s in net.local]
    for layer, both in enumerate(shared):
        for part in net.parts[:2]:
            assert not (array(part.tau[layer])[both != 0]).any()


def test_the_next_consolidation_starts_from_the_whole_tensors_and_drops_the_older_ones():
    method = with_tasks(3, consolidate_every=3, clusters=1)
    method.consolidate()  # one cluster of all three
    assert [len(c) for c in method.centroids] == [1, 1, 1]
    assert len(method.net.local) == 3
    for _ in range(3):
        method.net.add_task(1)
    with torch.no_grad():
        for number, part in enumerate(method.net.parts[3:]):
            for tau in part.tau:
                tau.copy_(50.0 * (number + 1) + torch.randn_like(tau))
    before = at_test(method)
    method.clusters = 2  # K = 2 * 6 / 3 = 4
    method.consolidate()
    assert [len(c) for c in method.centroids] == [4, 4, 4]
    for of_tasks in method.net.groups:
        assert of_tasks[3:] == [NO_GROUP] * 3
    moved = [np.abs(a - b).max() for now, then in zip(at_test(method), before) for a, b in zip(now, then)]
    assert max(moved) <= 0.05 / 2 + 1e-6


def test_later_consolidations_move_a_weight_by_half_of_beta_or_lambda1():
    """What is shared may fall below the threshold when it is shared no more; lambda1 is above beta / 2 here."""
    method, moved = small(clusters=1, lambda1=0.04), []
    for values in [(0.0, 0.05, 0.05), (0.05, 0.05, 0.05), (5.0, 5.0, 5.0)]:
        for value in values:
            method.net.add_task(1)
            for tau in method.net.parts[-1].tau:
                tau.data.fill_(value)
        before = at_test(method)
        method.consolidate_every = len(before)  # one cluster
        method.consolidate()
        moved.append(max(np.abs(a - b).max() for now, then in zip(at_test(method), before) for a, b in zip(now, then)))
    # the middle of 0 and 0.05; that of 0.025 and 0.05; 0.0375 alone is cut
    assert moved == pytest.approx([0.025, 0.0125, 0.0375], abs=1e-6)


def test_k_means_starts_where_it_is_told():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    labels, centroids = run_k_means(points, torch.tensor([[40.0], [0.0], [9.0]]))
    assert labels.tolist() == [1, 1, 2, 2, 0]
    assert centroids.flatten().tolist() == pytest.approx([30, 0.5, 10.5])


# ---- answers, capacity, state


def test_each_image_is_answered_by_its_task_with_tau_cut(three_images):
    method, x = with_tasks(2), three_images[0].float() / 255
    scores = method.predict(x, torch.tensor([1, 0, 3]))  # task 3 is not learned
    for row, task in enumerate([1, 0]):
        with torch.no_grad():
            for tau in method.net.parts[task].tau:
                tau.copy_(torch.from_numpy(cut(array(tau), 0.02)))
        expected = method.net.compute_task_logits(x[row : row + 1], task)
        torch.testing.assert_close(scores[row : row + 1, task : task + 1], expected)
        assert torch.isinf(scores[row]).sum() == 3
    assert torch.isneginf(scores[2]).all()


def test_capacity_counts_what_is_not_zero():
    method = with_tasks(3, consolidate_every=3, clusters=2)
    method.consolidate()
    count = base = 0
    for name, p in method.net.named_parameters():
        value = array(p)
        count += sum(1 for number in cut(value, 0.02 if ".tau." in name else 0).flat if number != 0)
        base += value.size if name.startswith("sigma") or name.endswith("head.weight") else 0
    assert base == 3 * 9 + 6 * 3 * 16 + 5 * 6 + 3 * 5
    assert method.capacity() == count / base
    zeros = np.mean([number == 0 for tau in method.net.parts[1].tau for number in cut(array(tau), 0.02).flat])
    assert method.measure_sparsity(1) == pytest.approx(zeros)
    assert small().capacity() is None


def test_capacity_as_released_counts_one_head_and_one_set_of_biases():
    method = with_tasks(3, consolidate_every=3, clusters=2)
    method.consolidate()
    assert len(method.net.local)
    method.net.local[0].data.flatten()[0] = 0.01  # below lambda1
    count = base = 0
    for name, p in method.net.named_parameters():
        value = array(p)
        if name.startswith("tasks") and not name.startswith("tasks.2") and ("bias" in name or "head" in name):
            base += value.size if name.endswith("head.weight") else 0
            continue
        threshold = 0.02 if ".tau." in name or name.startswith("local") else 0
        count += sum(1 for number in cut(value, threshold).flat if number != 0)
        base += value.size if name.startswith("sigma") else 0
    assert base == 3 * 9 + 6 * 3 * 16 + 5 * 6 + 2 * 5  # heads of all tasks but the newest
    assert method.measure_capacity_as_released() == method.facts()["capacity_as_released"] == count / base
    assert small().measure_capacity_as_released() is None


def test_state_grows_and_shrinks_with_what_is_loaded():
    method = with_tasks(3, consolidate_every=3, clusters=2)
    empty = small().state_dict()
    method.consolidate()
    method.history.append({"capacity": 1.0})
    other = small()
    other.load_state_dict(method.state_dict())
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in method.parameters()]
    for a, b in zip(at_test(other), at_test(method)):
        assert all((x == y).all() for x, y in zip(a, b))
    assert all(torch.equal(a, b) for a, b in zip(other.centroids, method.centroids))
    assert (other.history, other.net.groups) == (method.history, method.net.groups)
    other.load_state_dict(empty)
    assert (len(other.net.tasks), len(other.net.local), other.centroids) == (0, 0, [])


# ---- trained


def digits(*overrides: str) -> Parts:
    return build(
        configure(
            "backbone=apd_digits", "device=cpu", "optimizer=adamw", "optimizer.lr=0.003", "optimizer.weight_decay=0",
            "scenario.train_per_class=50", "scenario.test_per_class=20", "scenario.val_fraction=0.2",
            "trainer.epochs=8", "trainer.batch_size=16", "method.lambda1=0.003", *overrides,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fixed", "apd1", "apd2"])
def test_five_tasks_are_learned_and_not_forgotten(variant, tmp_path):
    consolidation = ["method.consolidate_every=2", "method.clusters=1"] if variant == "apd2" else []
    parts = digits(f"method.variant={variant}", f"seed={SEED}", *consolidation)
    record = trainer_of(parts, tmp_path).run()
    assert record.task_il.accuracy[-1].mean() > 90  # chance is 50
    assert forgetting(record.task_il) < 2
    facts = parts.method.facts()
    assert max(facts["drift_relative"][1:]) < 0.02
    assert record.cost.capacity == facts["capacity"][-1] > 1
    consolidated = {group for of_tasks in parts.method.net.groups for group in of_tasks} != {NO_GROUP}
    assert consolidated == (variant == "apd2")


def drifts(tmp_path, lambda2: float) -> tuple[float, float]:
    """Largest distance of old weights as reported after the second task, and as measured around it."""
    parts = digits("method.variant=apd1", f"method.lambda2={lambda2}")
    trainer, method = trainer_of(parts, tmp_path), parts.method
    for task in parts.scenario.tasks[:2]:
        before = [[array(w) for w in method.net.compute_weights(i)] for i in range(task.id)]
        for phase in method.eval().learn(task):
            trainer.run_phase(task, 0, phase, None)
    squares = [((array(now) - then) ** 2).sum() for now, then in zip(method.net.compute_weights(0), before[0])]
    return method.facts()["drift_max"][1], float(np.sqrt(sum(squares)))


@pytest.mark.slow
def test_the_reported_ball_is_what_old_weights_moved_and_lambda2_makes_it_small(tmp_path):
    reported, measured = drifts(tmp_path, 100.0)
    assert reported == pytest.approx(measured, rel=1e-4)
    free, measured = drifts(tmp_path, 0.0)
    assert free == pytest.approx(measured, rel=1e-4)
    assert reported < 0.1 * free


@pytest.mark.slow
def test_sparsity_grows_with_lambda1(tmp_path):
    shares, norms = [], []
    for lambda1 in (1e-3, 1e-2, 1e-1):
        parts = digits("method.variant=apd1", f"method.lambda1={lambda1}", "trainer.epochs=16")
        trainer = trainer_of(parts, tmp_path / str(lambda1))
        task = parts.scenario.tasks[0]
        for phase in parts.method.eval().learn(task):
            trainer.run_phase(task, 0, phase, None)
        shares.append(parts.method.measure_sparsity(0))
        norms.append(sum(float(tau.detach().abs().sum()) for tau in parts.method.net.parts[0].tau))
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.5
    assert norms == sorted(norms, reverse=True)  # not by the threshold alone
