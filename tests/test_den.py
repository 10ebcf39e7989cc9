"""DEN: its terms against numpy, its graph search against brute force, and what growing may and may not change."""

from collections import deque

import numpy as np
import pytest
import torch
from helpers import SEED, SUITS, TINY, array, batch_of, configure, cross_entropy, trainer_of
from torch import Tensor

from cl_bench.backbones.den import DEN
from cl_bench.config.build import Parts, build
from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import Checkpoint, clone_state
from cl_bench.engine.trainer import Interrupted
from cl_bench.loggers.group import Loggers
from cl_bench.methods.den import (
    DynamicallyExpandable,
    apply_soft_threshold,
    duplicate,
    find_connected,
    find_most_drifted,
    select_between,
    select_connections,
    shrink_groups,
)
from cl_bench.optim import Exponential

pytestmark = pytest.mark.arithmetic

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))

DOUBLE = 1e-12
"""Room for the rounding of double precision, relative and absolute."""


@pytest.fixture
def doubles():
    """New parameters have double precision, also those that a network adds later."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mlp(*hidden: int) -> DEN:
    torch.manual_seed(0)
    shape = (1, 8, 8)
    return DEN(channels=[], kernel_size=5, pool_after=[], hidden=list(hidden), num_classes=10, image_shape=shape)


def convolutional() -> DEN:
    torch.manual_seed(0)
    keys = {"channels": [3, 4], "kernel_size": 3, "pool_after": [2], "hidden": [6, 5]}
    return DEN(**keys, num_classes=10, image_shape=(1, 8, 8))


def parts_of(*overrides: str) -> Parts:
    return build(configure(*TINY, "method=den", *SUITS["den"], *overrides))


def method_of(parts: Parts) -> DynamicallyExpandable:
    assert isinstance(parts.method, DynamicallyExpandable)
    return parts.method


def snapshot(net: DEN) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in net.list_hidden()]


def disturb(net: DEN, size: float = 0.3) -> None:
    """Training, as far as the shapes are concerned: every entry on the newest task's path moves."""
    with torch.no_grad():
        for layer in net.list_path():
            layer.weight += size * torch.randn_like(layer.weight)
            layer.bias += size * torch.randn_like(layer.bias)


@torch.no_grad()
def answers_to_the_first_task(net: DEN, x: Tensor) -> Tensor:
    """Always without gradients, for the same kernels."""
    return net.answer(x, 0)


# -- the terms ---------------------------------------------------------------------------------------------------------


def test_soft_threshold_and_group_shrinkage_against_numpy():
    w = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    w[1] *= 0.1
    expected = np.sign(array(w)) * np.maximum(np.abs(array(w)) - 0.2, 0)
    np.testing.assert_allclose(array(apply_soft_threshold(w, 0.2)), expected, rtol=1e-6)
    assert (apply_soft_threshold(w, 0.2) == 0).any()

    expected = array(w)
    for g in range(4):
        norm = np.sqrt((expected[g] ** 2).sum())
        expected[g] = expected[g] * (1 - 0.4 / norm) if norm > 0.4 else 0.0
    assert (expected[1] == 0).all()
    assert (expected[0] != 0).all()
    np.testing.assert_allclose(array(shrink_groups(w, 0.4)), expected, rtol=1e-5)
    assert not shrink_groups(torch.zeros(2, 3), 0.4).isnan().any()


@pytest.mark.parametrize("kind", ["ce", "head", "l2", "drift"])
def test_loss_terms_against_numpy(kind, three_images):
    raw, _ = three_images
    y = torch.tensor([7, 5, 9])  # of the second task's classes 5..9
    method = method_of(parts_of("backbone.hidden=[4,3]", "method.l2=0.3", "method.drift=0.7"))
    net = method.net
    net.add_head(5)
    method._old = snapshot(net)
    net.add_head(5)
    net.grow(2)
    disturb(net)
    method._chosen = select_between(
        net.list_path(), [torch.tensor([1, 0, 1, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 0, 1]).bool()]
    )

    h = array(raw.flatten(1).float() / 255)
    for layer in net.list_hidden():
        h = np.maximum(h @ array(layer.weight).reshape(len(layer.bias), -1).T + array(layer.bias), 0)
    z = h @ array(net.list_path()[-1].weight).T + array(net.list_path()[-1].bias)
    expected = {"ce": cross_entropy(z, y.numpy() - 5)}
    if kind == "l2":
        chosen = [[0, 2, 3], [0, 1, 4]]
        w1, w2, head = (array(layer.weight) for layer in net.list_path())
        squares = (
            (w1[chosen[0]] ** 2).sum() + (w2[np.ix_(chosen[1], chosen[0])] ** 2).sum() + (head[:, chosen[1]] ** 2).sum()
        )
        expected["l2"] = 0.3 / 2 * squares
    if kind == "drift":
        squares = 0.0
        for layer, (w, b) in zip(net.list_hidden(), method._old):
            squares += ((array(layer.weight)[: w.shape[0], : w.shape[1]] - array(w)) ** 2).sum()
            squares += ((array(layer.bias)[: len(b)] - array(b)) ** 2).sum()
        expected["drift"] = 0.7 / 2 * squares
    observe = {
        "ce": method.observe, "head": method.observe_head, "l2": method.observe_selected, "drift": method.observe_drift
    }[kind]  # fmt: skip
    losses = observe(batch_of(raw, y, task=1))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name


def test_the_head_is_fitted_on_frozen_layers(three_images):
    raw, _ = three_images
    method = method_of(parts_of())
    method.net.add_head(5)
    method.observe_head(batch_of(raw, torch.tensor([0, 1, 2])))["ce"].backward()
    assert all(layer.weight.grad is None for layer in method.net.list_hidden())
    assert method.net.get_head(0).weight.grad is not None


# -- selection ---------------------------------------------------------------------------------------------------------


def reachable(weights: list[np.ndarray]) -> list[set[int]]:
    """Breadth-first search over single nodes (layer, unit), from every output."""
    last = len(weights)
    queue = deque((last, j) for j in range(len(weights[-1])))
    seen = set(queue)
    while queue:
        level, j = queue.popleft()
        if level == 1:
            continue
        for i in range(weights[level - 1].shape[1]):
            if np.any(weights[level - 1][j, i] != 0) and (level - 1, i) not in seen:
                seen.add((level - 1, i))
                queue.append((level - 1, i))
    return [{i for level, i in seen if level == number} for number in range(1, last)]


@pytest.mark.parametrize("seed", range(5))
def test_selection_is_reachability(seed):
    rng = np.random.default_rng(seed)
    shapes = [(6, 1, 3, 3), (5, 6, 3, 3), (7, 5, 4), (6, 7), (3, 6)]
    weights = [rng.normal(size=s) * (rng.random(s[:2]) < 0.3).reshape(*s[:2], *[1] * (len(s) - 2)) for s in shapes]
    found = find_connected([torch.from_numpy(w) for w in weights])
    expected = reachable(weights)
    assert [set(mask.nonzero().flatten().tolist()) for mask in found] == expected
    assert any(len(e) < s[0] for e, s in zip(expected, shapes))


@pytest.mark.slow
def test_selection_is_smaller_than_the_layer_for_a_task_that_old_units_serve():
    """A second task with the same images as the first needs few of the old units: an l1-fitted head drops the rest."""
    parts = parts_of(
        "scenario.train_per_class=40", "trainer.epochs=25", "method.l1=3e-3", "method.tau=1000", f"seed={SEED}"
    )
    first = parts.scenario.tasks[0]
    labels = first.train.labels + 5
    again = type(first)(
        1, range(5, 10), type(first.train)(first.train.images, labels, first.train.index), first.val, first.test
    )
    parts.scenario.tasks = [first, again]
    trainer = trainer_of(parts, Checkpoint)
    for task in (first, again):
        for number, phase in enumerate(parts.method.learn(task)):
            trainer.run_phase(task, number, phase, None)
            parts.method.eval()
    method = method_of(parts)
    selected, units = method.history[1]["selected"], method.history[0]["units"]
    assert all(0 < s < n for s, n in zip(selected, units)), (selected, units)
    assert method.measure_loss(again.train) < 0.5  # five classes: log 5 = 1.6 is chance


def test_selected_sub_network_is_all_that_changes():
    net = mlp(8, 6)
    net.add_head(5)
    with torch.no_grad():
        for layer in net.list_path():
            layer.weight *= torch.rand_like(layer.weight) < 0.15
    chosen = find_connected([layer.weight.detach() for layer in net.list_path()])
    outputs = net.answer(IMAGES, 0)
    disturbed = [layer.weight.detach().clone() for layer in net.list_path()]
    for (mask, _), layer, weight in zip(select_between(net.list_path(), chosen), net.list_path(), disturbed):
        assert (layer.weight[mask] != 0).all()  # only connections that are there
        weight[~mask] = 0
        layer.weight.data = weight
    assert not chosen[0].all()
    torch.testing.assert_close(net.answer(IMAGES, 0), outputs)  # and the rest carries nothing to this head


# -- expansion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: mlp(7, 6), convolutional], ids=["mlp", "conv"])
def test_old_tasks_answer_identically_after_an_expansion(make, doubles):
    net, images = make().eval(), IMAGES.double()
    net.add_head(4)
    disturb(net)
    net.add_head(3)
    old = net.answer(images, 0)
    before = net.widths
    net.grow(3)
    assert net.widths == [w + 3 for w in before]
    assert net.get_widths_at(0) == before
    assert net.get_widths_at(1) == net.widths
    grown = net.answer(images, 0)
    torch.testing.assert_close(grown, old, rtol=DOUBLE, atol=DOUBLE)  # a wider layer may be multiplied in another order
    new = net.answer(images, 1)
    with torch.no_grad():  # whatever the new units learn
        for layer, n, m in zip(net.list_hidden(), before, [net.list_hidden()[0].weight.shape[1], *before]):
            layer.weight[n:] += 1
            layer.weight[:, m:] += 1
            layer.bias[n:] += 1
    assert torch.equal(net.answer(images, 0), grown)
    assert not torch.equal(net.answer(images, 1), new)
    assert torch.equal(net(images)[:, :4], grown)
    assert torch.isinf(net(images)[:, 7:]).all()


def test_each_phase_of_a_task_trains_its_own_weights_and_expansion_keeps_old_answers_bit_equal():
    # even an optimizer that decays weights; an l1 that leaves the first network sparse, so that S is a part of it
    parts = parts_of("method.group_lasso=0.01", "method.l1=0.05", "optimizer.weight_decay=0.1")
    method, net, trainer = method_of(parts), method_of(parts).net, trainer_of(parts, Checkpoint)
    x = parts.scenario.transform.normalise(parts.scenario.tasks[0].test.images)
    seen = set()
    for task in parts.scenario.tasks:
        method.eval()
        for number, phase in enumerate(method.learn(task)):
            before = snapshot(net)
            answers = answers_to_the_first_task(net, x)
            trainer.run_phase(task, number, phase, None)
            method.eval()
            if task.id != 1:
                continue
            seen.add(number)
            if number == 0:  # the head alone
                for layer, (w, b) in zip(net.list_hidden(), before):
                    assert torch.equal(layer.weight, w)
                    assert torch.equal(layer.bias, b)
                assert torch.equal(answers_to_the_first_task(net, x), answers)
            elif number == 1:  # the selected part, W_S
                masks = method._chosen[:-1]
                assert not all(mask.all() for mask, _ in masks)
                for layer, (w, b), (mask, row) in zip(net.list_hidden(), before, masks):
                    assert torch.equal(layer.weight[~mask], w[~mask])
                    assert torch.equal(layer.bias[~row], b[~row])
                assert any(not torch.equal(layer.weight, w) for layer, (w, _) in zip(net.list_hidden(), before))
            elif number == 2:  # what was added
                n = [w - method.units for w in net.widths]
                for layer, (w, b), rows, columns in zip(net.list_hidden(), before, n, [1, *n]):
                    assert torch.equal(layer.weight[:rows, :columns], w[:rows, :columns])
                    assert torch.equal(layer.bias[:rows], b[:rows])
                    assert not torch.equal(layer.weight[rows:], w[rows:])
                assert torch.equal(answers_to_the_first_task(net, x), answers)
    assert seen >= {0, 1, 2}


@pytest.mark.parametrize(("tau", "expands"), [(0.0, True), (1000.0, False)])
def test_expands_only_above_tau_by_at_most_k(tau, expands):
    parts = parts_of(f"method.tau={tau}", "method.sigma=1000", "method.units=3")
    method = run(parts)
    first, second = method.history
    assert first["expanded"] is False
    assert first["loss"] is None
    assert second["expanded"] is expands
    assert (second["loss"] > tau) is expands
    gained = [b - a for a, b in zip(first["units"], second["units"])]
    assert gained == [a - r for a, r in zip(second["added"], second["removed"])]
    assert all(0 <= g <= 3 for g in gained)
    assert any(gained) is expands


def test_units_whose_group_is_zero_are_removed():
    """gamma large: nothing that was added survives, and the network is as wide as before."""
    method = run(parts_of("method.group_lasso=10", "method.sigma=1000"))
    second = method.history[1]
    assert second["expanded"]
    assert second["removed"] == second["added"] == [2, 2]
    assert second["units"] == method.history[0]["units"]


def test_removal_takes_exactly_the_useless_units():
    method = method_of(parts_of())
    net = method.net
    net.add_head(5)
    net.add_head(5)
    net.grow(2)
    n = net.widths
    with torch.no_grad():
        net.layers[0].weight[n[0] - 2] = 0
        net.layers[0].weight[0] = 0  # an old unit without weights stays
        net.layers[1].weight[:, n[0] - 2] = 0  # what it feeds
        net.layers[1].weight[n[1] - 1] = 0
        net.heads[1].weight[:, n[1] - 1] = 0
    useless = method.find_useless()
    assert [u.tolist() for u in useless] == [[n[0] - 2], [n[1] - 1]]
    answers = net(IMAGES)
    net.remove(useless)
    assert net.widths == [n[0] - 1, n[1] - 1]
    torch.testing.assert_close(net(IMAGES), answers)


# -- split -------------------------------------------------------------------------------------------------------------


def test_split_takes_the_most_drifted():
    rho = torch.tensor([0.06, 0.5, 0.01, 0.2, 0.04, 0.3])
    assert find_most_drifted(rho, 0.05, None).tolist() == [0, 1, 3, 5]
    assert find_most_drifted(rho, 0.05, 2).tolist() == [1, 5]
    assert find_most_drifted(rho, 1.0, 2).tolist() == []


def test_drift_is_the_norm_over_incoming_weights():
    method = method_of(parts_of())
    net = method.net
    net.add_head(5)
    method._old = snapshot(net)
    net.add_head(5)
    net.grow(2)
    disturb(net)
    for rho, layer, (w, b) in zip(method.measure_drifts(), net.list_hidden(), method._old):
        assert len(rho) == len(b)
        for i in range(len(b)):
            d = np.concatenate(
                [
                    (array(layer.weight)[i, : w.shape[1]] - array(w)[i]).ravel(),
                    [array(layer.bias - 0)[i] - array(b)[i]],
                ]
            )
            assert rho[i].item() == pytest.approx(np.sqrt((d**2).sum()), rel=1e-5)


@pytest.mark.parametrize("make", [lambda: mlp(7, 6), convolutional], ids=["mlp", "conv"])
def test_splitting_every_drifted_unit_gives_the_old_answers_back(make, doubles):
    net, images = make().eval(), IMAGES.double()
    net.add_head(4)
    disturb(net)
    old, answers = snapshot(net), net.answer(images, 0)
    net.add_head(3)
    net.grow(2)
    disturb(net)
    drifted, now = net.answer(images, 0), net.answer(images, 1)
    assert (drifted - answers).abs().max() > 1e-3
    net.split([torch.arange(len(b)) for _, b in old], old)
    torch.testing.assert_close(net.answer(images, 0), answers, rtol=DOUBLE, atol=DOUBLE)
    for layer, (w, b) in zip(net.list_hidden(), old):
        assert torch.equal(layer.weight[: len(w), : w.shape[1]], w)
        assert torch.equal(layer.bias[: len(b)], b)
    assert net.widths == [2 * len(b) + 2 for _, b in old]
    # the new task goes on with the drifted copies
    torch.testing.assert_close(net.answer(images, 1), now, rtol=DOUBLE, atol=DOUBLE)


@pytest.mark.parametrize("make", [lambda: mlp(7, 6), convolutional], ids=["mlp", "conv"])
def test_a_split_of_some_units_restores_those_and_appends_their_drifted_copies(make, doubles):
    net, images = make().eval(), IMAGES.double()
    net.add_head(4)
    old = snapshot(net)
    net.add_head(3)
    disturb(net)
    before, widths = snapshot(net), net.widths
    which = [torch.tensor([1]), *(torch.tensor([0, 2]) for _ in widths[1:])]
    reference = make().eval()  # the old task's network with the split units put back by hand
    reference.add_head(4)
    reference.load_state_dict(
        {k: v for k, v in net.state_dict().items() if not k.startswith(("heads.1", "_extra"))}, strict=False
    )
    with torch.no_grad():
        for layer, units, (w, b) in zip(reference.list_hidden(), which, old):
            layer.weight[units], layer.bias[units] = w[units], b[units]
    net.split(which, old)
    torch.testing.assert_close(net.answer(images, 0), reference.answer(images, 0), rtol=DOUBLE, atol=DOUBLE)
    assert net.widths == [n + len(u) for n, u in zip(widths, which)]
    assert net.stamps[-1] == [0] * widths[-1] + [1, 1]
    for layer, units, (w, b), below in zip(net.list_hidden(), which, before, [None, *which]):
        n, m = w.shape[:2]
        kept = [i for i in range(n) if i not in units.tolist()]
        assert torch.equal(layer.weight[kept, :m], w[kept])  # the shared units are as they were
        assert (layer.weight[:n, m:] == 0).all()
        assert torch.equal(layer.bias[n:], b[units])
        columns = list(range(m))
        if below is not None:  # the drifted copies read the drifted copies below, with the same weights
            for place, i in enumerate(below.tolist()):
                columns[i] = m + place
                assert (layer.weight[n:, i] == 0).all()
        assert torch.equal(layer.weight[n:][:, columns], w[units])


def test_masks_are_duplicated_as_the_layers_are():
    net = mlp(4, 3)
    net.add_head(5)
    old = snapshot(net)
    with torch.no_grad():
        net.layers[1].weight[1, 2] = 0
    which = [torch.tensor([2]), torch.tensor([1])]
    masks = duplicate([select_connections(layer) for layer in net.list_path()], which)
    net.split(which, old)
    assert [w.shape for w, _ in masks] == [layer.weight.shape for layer in net.list_path()]
    assert [len(b) for _, b in masks] == [len(layer.bias) for layer in net.list_path()]
    missing = {tuple(place) for place in (~masks[1][0]).nonzero().tolist()}
    assert missing == {(1, 2), (1, 4), (3, 2), (3, 4)}  # every copy of the one connection that is not there


def test_split_runs_without_expansion():
    method = run(parts_of("method.tau=1000"))
    second = method.history[1]
    assert not second["expanded"]
    assert second["added"] == [0, 0]
    assert sum(second["split"]) > 0
    assert all(s <= min(2, d) for s, d in zip(second["split"], second["drifted"]))
    assert second["units"] == [a + s for a, s in zip(method.history[0]["units"], second["split"])]


# -- the whole ---------------------------------------------------------------------------------------------------------


def run(parts: Parts) -> DynamicallyExpandable:
    trainer = trainer_of(parts, Checkpoint)
    for task in parts.scenario.tasks:
        parts.method.eval()
        for number, phase in enumerate(parts.method.learn(task)):
            trainer.run_phase(task, number, phase, None)
            parts.method.eval()
    return method_of(parts)


def test_capacity_and_sparsity_against_counting():
    method = run(parts_of("method.l1=1e-2"))
    net = method.net
    base = 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10  # 64-32-16 and one head over ten classes
    count = zeros = weights = 0
    for name, p in net.named_parameters():
        for value in p.detach().flatten().tolist():
            count += value != 0
            if name.endswith("weight"):
                weights += 1
                zeros += value == 0
    assert method.capacity() == pytest.approx(count / base)
    last = method.history[-1]
    assert last["capacity"] == pytest.approx(count / base)
    assert last["nonzero_parameters"] == count
    assert last["sparsity"] == pytest.approx(zeros / weights)
    assert last["units"] == [len(layer.bias) for layer in net.list_hidden()]
    assert method.history[0]["sparsity"] > 0.05  # l1 in the first task
    assert method.facts()["tasks"] == method.history
    assert method.memory_bytes() == 8 * sum(last["units"])


def test_answers_with_and_without_a_task_id():
    method = run(parts_of())
    with torch.no_grad():
        heads = [method.net.answer(IMAGES, t) for t in (0, 1)]
        assert torch.equal(method.predict(IMAGES, None), torch.cat(heads, dim=1))
        known = method.predict(IMAGES, torch.tensor([0, 1, 0, 1, 1]))
    for i, task in enumerate([0, 1, 0, 1, 1]):
        own = slice(5 * task, 5 * task + 5)
        torch.testing.assert_close(known[i, own], heads[task][i])
        assert torch.isinf(known[i]).sum() == 5


def test_a_phase_ends_when_the_loss_has_converged():
    method = method_of(parts_of("method.window=4", "method.tolerance=0.1"))
    method.images.fill_(1.0)
    stops = []
    for loss in [3.0, 2.0, 1.0, 0.9, 0.85, 0.84, 0.83]:
        method.total.fill_(loss)
        method.images.fill_(1.0)
        stops.append(method._has_converged(len(stops)))
    # halves of the last four: (3, 2 | 1, .9), (2, 1 | .9, .85), (1, .9 | .85, .84) falls by 0.105, (.9, .85 | .84, .83)
    assert stops == [False, False, False, False, False, False, True]


def phases_of(parts: Parts) -> list[int]:
    """Steps after which each phase of the run begins."""
    begins, trainer = [], trainer_of(parts, Checkpoint)
    for task in parts.scenario.tasks:
        parts.method.eval()
        for number, phase in enumerate(parts.method.learn(task)):
            begins.append(trainer.steps_done)
            trainer.run_phase(task, number, phase, None)
            parts.method.eval()
    return begins


@pytest.mark.slow
def test_resumes_bit_equal_in_every_phase(tmp_path):
    """Also what is not a tensor: sizes, stamps, history."""
    begins = phases_of(parts_of())
    assert len(begins) == 6  # first task; head, selected, expansion, drift, after the split
    straight = parts_of()
    trainer_of(straight, tmp_path / "straight").run()
    expected = clone_state(straight.method.state_dict())
    assert sum(expected["_extra_state"]["history"][1]["split"]) > 0
    for begin in begins:
        folder = tmp_path / str(begin)
        steps = iter(range(1, 10**6))
        with pytest.raises(Interrupted):
            parts_of().build_trainer(Loggers([]), Checkpoint(folder), stop=lambda: next(steps) == begin + 3).run()  # noqa: B023
        resumed = parts_of()
        torch.manual_seed(99)
        trainer_of(resumed, folder).run()
        state = resumed.method.state_dict()
        assert state.keys() == expected.keys()
        for name, value in state.items():
            same = torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
            assert same, (begin, name)


def test_the_networks_are_the_papers():
    net = build_net("den", (3, 32, 32), 100)
    assert net.widths == [64, 128, 256, 256, 128, 384, 192]
    assert net.layers[5].weight.shape == (384, 128, 16)  # 32 -> 16 -> 8 -> 4 pixels
    net.add_head(10)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in net.parameters()) + 193 * 90 == 4_367_268  # 90 more classes
    assert build_net("den_mlp", (1, 28, 28), 10).widths == [312, 128]


def build_net(name: str, image_shape: tuple[int, int, int], num_classes: int) -> DEN:
    keys = {k: v for k, v in configure(f"backbone={name}").backbone.items() if k not in ("_target_", "weights")}
    return DEN(**keys, image_shape=image_shape, num_classes=num_classes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", ["method.window=3", "method.units=0", "method.l1=-1", "backbone.pool_after=[1]", "backbone.hidden=[]"]
)
def test_wrong_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        parts_of(wrong)


def test_another_network_is_refused():
    with pytest.raises(ConfigError, match="backbone=den"):
        build(configure("method=den", "backbone=mlp"))


def test_exponential_schedule():
    assert [Exponential(factor=0.5)(e, 3) for e in range(3)] == [1.0, 0.5, 0.25]
    with pytest.raises(ConfigError, match="factor"):
        Exponential(factor=0.0)
