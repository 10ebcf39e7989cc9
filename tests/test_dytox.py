"""DyTox: each loss term against numpy, the network's size and cost, and what is frozen when."""

import copy

import numpy as np
import pytest
import torch
from helpers import SEED, array, batch_of, buffer_context, configure, identity_transform, network_of, softmax

from cl_bench.backbones.dytox import DyTox
from cl_bench.buffers.herding import Herding
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Data, Task
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.loggers.group import Loggers
from cl_bench.methods.base import repeat_passes
from cl_bench.methods.dytox import DyToxRule, repeat_images
from cl_bench.optim import adamw

pytestmark = pytest.mark.arithmetic

NET = {
    "patch_size": 2, "dim": 8, "depth": 2, "heads": 2, "mlp_ratio": 2, "locality_strength": 1.0, "drop_path": 0.0,
    "task_tokens": True, "independent_classifiers": True,
}  # fmt: skip
RULE = {
    "divergence": 0.1, "distillation": True, "temperature": 1.0, "finetune_epochs": 2, "finetune_steps": None,
    "finetune_lr": 0.01, "mixup": 0.0, "label_smoothing": 0.1, "repeated_augmentation": 1, "batch_size": 3,
}  # fmt: skip
SHAPE = {"num_classes": 4, "image_shape": (1, 8, 8)}


def small_net(**changes) -> DyTox:
    torch.manual_seed(0)
    net = DyTox(**(NET | changes), **SHAPE)
    for p in net.parameters():  # away from gains of 1 and biases of 0
        p.data += 0.1 * torch.randn_like(p)
    return net


def rule(net: DyTox | None = None, capacity: int = 6, **changes) -> DyToxRule:
    buffer = Herding(capacity=capacity, context=buffer_context())
    return DyToxRule(net=net or small_net(), buffer=buffer, **(RULE | changes))


def task_of(number: int, per_class: int = 5, first: int = 2) -> Task:
    """The ``first`` of four classes, or in the second task the others; random images."""
    classes = range(first, 4) if number else range(first)
    labels = torch.tensor([c for c in classes for _ in range(per_class)])
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(256, (len(labels), 1, 8, 8), dtype=torch.uint8, generator=generator)
    data = Data(images, labels, torch.arange(len(labels)))
    return Task(number, classes, data, data.take(slice(0)), data)


def in_second_task(first: int = 2, **changes) -> tuple[DyToxRule, object, object]:
    """A rule inside the main phase of its second task, the phase, and the generator of the phases."""
    method = rule(**changes).eval()
    list(method.learn(task_of(0, first=first)))
    for p in method.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    phases = method.learn(task_of(1, first=first))
    return method, next(phases), phases


def bce(z: np.ndarray, targets: np.ndarray) -> float:
    """Mean over images and classes."""
    p = 1 / (1 + np.exp(-z))
    return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean())


# -- loss terms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "temperature"), [(2, 1.0), (2, 2.0), (1, 1.0), (3, 1.0)])
def test_the_terms_of_the_main_phase_are_the_equations(three_images, old, temperature):
    raw, _ = three_images
    y = torch.tensor([0, 3, 2])
    method, _, _ = in_second_task(old, temperature=temperature)
    for p in method.net.parameters():  # away from the teacher
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + 1))
    losses = method.observe(batch_of(raw, y, task=1))
    x = raw.float() / 255
    embeddings = method.net.compute_embeddings(x)
    z, teacher = array(method.net.classify(embeddings)), array(method.teacher(x))
    assert (teacher[:, old:] == -np.inf).all()
    teacher = teacher[:, :old]
    assert teacher.shape == (3, old)
    one_hot = np.eye(4)[y.numpy()]
    share = old / 4
    p, q = softmax(z[:, :old] / temperature), softmax(teacher / temperature)
    auxiliary = array(method.auxiliary(embeddings[-1]))
    assert auxiliary.shape == (3, 1 + 4 - old)
    places = np.maximum(y.numpy() - old + 1, 0)  # 0 any old class, then the new ones
    expected = {
        "clf": (1 - share) * bce(z, one_hot),
        "kd": share * temperature**2 * (q * np.log(q / p)).sum() / (3 * old),  # over images and old classes
        "div": 0.1 * bce(auxiliary, np.eye(1 + 4 - old)[places]),
    }
    assert expected["kd"] > 1e-6 or old == 1  # of one class the softmax is 1
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_the_first_task_and_fine_tuning_have_the_plain_term_alone(three_images):
    raw, y = three_images
    first = rule().eval()
    next(first.learn(task_of(0)))
    losses = first.observe(batch_of(raw, y))
    z = array(first.net(raw.float() / 255))[:, :2]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx({"clf": bce(z, np.eye(2)[y.numpy()])})

    method, _, phases = in_second_task()
    fine = next(phases)
    assert method.teacher is None
    assert method.auxiliary is None
    losses = fine.observe(batch_of(raw, y, task=1))
    z = array(method.net(raw.float() / 255))
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx({"clf": bce(z, np.eye(4)[y.numpy()])})


def test_mixup_mixes_images_and_smoothed_targets(three_images):
    """As timm's Mixup with a flipped batch, and soft targets for the auxiliary classifier: 0 gets all old classes."""
    from timm.data.mixup import mixup_target

    raw, _ = three_images
    y = torch.tensor([0, 3, 2])
    method, _, phases = in_second_task(mixup=0.8)
    torch.manual_seed(5)
    part = float(torch.distributions.Beta(0.8, 0.8).sample())
    assert 0.02 < part < 0.98
    targets = mixup_target(y, 4, part, 0.1)
    x = raw.float() / 255
    x = part * x + (1 - part) * x.flip(0)
    torch.manual_seed(5)
    losses = method.observe(batch_of(raw, y, task=1))
    embeddings = method.net.compute_embeddings(x)
    assert losses["clf"].item() == pytest.approx(
        0.5 * bce(array(method.net.classify(embeddings)), array(targets)), rel=1e-4
    )
    merged = np.concatenate([array(targets)[:, :2].sum(axis=1, keepdims=True), array(targets)[:, 2:]], axis=1)
    assert losses["div"].item() == pytest.approx(0.1 * bce(array(method.auxiliary(embeddings[-1])), merged), rel=1e-4)
    fine = next(phases)
    torch.manual_seed(5)
    loss = fine.observe(batch_of(raw, y, task=1))["clf"].item()
    assert loss == pytest.approx(
        bce(array(method.net.classify(method.net.compute_embeddings(x))), array(targets)), rel=1e-4
    )


def test_mixup_draws_beta_once_a_batch(three_images):
    raw, y = three_images
    method = rule(mixup=0.8)
    next(method.learn(task_of(0)))
    torch.manual_seed(0)
    parts = []
    for _ in range(2000):
        x, _ = method.apply_mixup(batch_of(raw, y))
        parts.append(((x - raw.flip(0) / 255) / (raw / 255 - raw.flip(0) / 255))[0].nanmedian().item())
    from scipy import stats

    assert stats.kstest(parts, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


# -- network ---------------------------------------------------------------------------------------------------------


def test_parameter_counts():
    """10.734, 10.745 and 10.780 M at 10, 20 and 50 steps, 10.723 M for the joint transformer."""
    net = network_of("backbone=dytox")

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(net) == 10_723_216
    assert [count(block) for block in net.sabs] == 5 * [1_773_372]
    assert (count(net.patches), net.positions.numel(), count(net.tab)) == (18_816, 24_576, 1_773_312)
    for steps, expected in {10: 10_733_584, 20: 10_745_104, 50: 10_779_664}.items():
        net.clear()
        for _ in range(steps):
            net.grow(100 // steps)
        assert count(net) == expected
    before = count(net)
    net.grow(10)
    assert count(net) - before == 5_002  # token 384, LayerNorm 768, Linear 385 x 10


def test_drop_path_rises_linearly_to_the_tab():
    net = network_of("backbone=dytox")
    rates = [0.0] + [block.drop_path.drop_prob for block in net.sabs[1:]] + [net.tab.drop_path.drop_prob]
    assert isinstance(net.sabs[0].drop_path, torch.nn.Identity)
    assert rates == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_a_task_costs_one_more_pass_of_the_tab_and_none_of_the_encoder(tasks):
    net = small_net()
    net.clear()
    for _ in range(tasks):
        net.grow(1)
    calls = {"encoder": 0, "tab": 0}

    def counter(name):
        return lambda *_: calls.update({name: calls[name] + 1})

    for sab in net.sabs:
        sab.register_forward_hook(counter("encoder"))
    net.tab.register_forward_hook(counter("tab"))
    net(torch.randn(3, 1, 8, 8))
    assert calls == {"encoder": len(net.sabs), "tab": tasks}


def test_the_tab_is_the_equation():
    """z = [theta; x], the token alone asks, and only the token is updated; one image and head at a time in numpy."""
    from scipy.special import erf

    tab = small_net().tab.eval()
    torch.manual_seed(2)
    token, x = torch.randn(1, 1, 8), torch.randn(2, 16, 8)

    def norm(v, layer):
        centred = v - v.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * array(layer.weight) + array(
            layer.bias
        )

    def linear(v, layer):
        return v @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))

    out = array(tab(token, tab.project_patches(x)))
    theta = array(token)[0, 0]
    for image, found in zip(array(x), out):
        u = norm(np.vstack([theta, image]), tab.norm1)
        q, k, v = linear(u[0], tab.q), linear(u, tab.k), linear(u, tab.v)
        asked = np.concatenate(
            [softmax((k[:, h] @ q[h] / np.sqrt(4))[None])[0] @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
        )
        c = theta + linear(asked, tab.out)
        hidden = linear(norm(c, tab.norm2), tab.mlp.fc1)
        expected = c + linear(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), tab.mlp.fc2)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_logits_of_a_task_come_from_its_own_embedding():
    net = small_net()
    net.clear()
    net.grow(2)
    net.grow(2)
    x = torch.randn(3, 1, 8, 8)
    before = net(x)
    net.tokens[1].data += torch.arange(8.0)
    after = net(x)
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] - after[:, 2:]).abs().min() > 0
    net.clear()
    net.grow(3)
    assert torch.equal(net(x)[:, 3], torch.full((3,), -torch.inf))
    assert net(x)[:, :3].isfinite().all()


def test_the_encoder_starts_local():
    block = small_net().sabs[0].attn
    block.local_init()
    assert torch.equal(block.v.weight, torch.eye(8))
    assert block.pos_proj.weight[0].tolist() == [2 * (0 - 0.0), 2 * (0 - 0.0), -1]  # one central head of two
    full = network_of("backbone=dytox", num_classes=10)
    centres = full.sabs[0].attn.pos_proj.weight[:9, :2] / 2
    assert {tuple(c) for c in centres.tolist()} == {(dx, dy) for dx in (-1.0, 0.0, 1.0) for dy in (-1.0, 0.0, 1.0)}
    assert full.sabs[0].attn.gating_param.tolist() == 12 * [1.0]


def test_a_new_token_is_no_copy():
    net = small_net()
    net.clear()
    for _ in range(3):
        net.grow(1)
    tokens = torch.cat(list(net.tokens)).flatten(1)
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 0.01
    assert tokens.abs().max() < 0.2  # trunc-normal 0.02


def test_a_grown_network_loads_into_a_new_one():
    method, _, _ = in_second_task()
    state = {"net": copy.deepcopy(method.net.state_dict())}
    fresh = rule()
    kept = fresh.net.tokens
    fresh.net.load_state_dict(state["net"])
    assert fresh.net.sizes == [2, 2]
    assert fresh.net.tokens is not kept
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh.net(x), method.net(x))
    objects = [id(p) for p in fresh.net.parameters()]
    fresh.net.load_state_dict(state["net"])
    assert [id(p) for p in fresh.net.parameters()] == objects  # an optimizer may hold them


# -- phases ----------------------------------------------------------------------------------------------------------


def moved(method: DyToxRule, phase, epochs: int = 3) -> set[str]:
    """Parameters of the network that a phase changes."""
    before = {name: p.detach().clone() for name, p in method.net.named_parameters()}
    optimizer = adamw(phase.params, lr=0.05, betas=[0.9, 0.999], weight_decay=0.1, decay_vectors=True)
    transform = identity_transform()
    for _ in range(epochs):
        batch = batch_of(phase.data.images, phase.data.labels, task=1)
        assert torch.equal(batch.x, transform.normalise(phase.data.images))
        method.zero_grad()
        sum(phase.observe(batch).values()).backward()
        optimizer.step()
    return {name for name, p in method.net.named_parameters() if not torch.equal(p, before[name])}


def test_what_moves_in_each_phase():
    method, main, phases = in_second_task()
    names = {name for name, _ in method.net.named_parameters()}
    old = {n for n in names if n.startswith(("tokens.0", "classifiers.0"))}
    encoder = {n for n in names if n.startswith(("patches", "positions", "sabs"))}
    assert len(old) == 5
    assert moved(method, main) == names - old
    assert moved(method, next(phases)) == names - encoder
    assert next(phases, None) is None
    assert all(p.requires_grad for p in method.parameters())


def test_the_teacher_is_the_network_before_and_stays_still(three_images):
    raw, _ = three_images
    method = rule().eval()
    list(method.learn(task_of(0)))
    x = raw.float() / 255
    with torch.no_grad():  # as a teacher answers: with gradients other kernels may round otherwise
        before = method.net(x)[:, :2]
    main = next(method.learn(task_of(1)))
    assert torch.equal(method.teacher(x)[:, :2], before)
    moved(method, main)
    assert torch.equal(method.teacher(x)[:, :2], before)
    assert not method.teacher(x).requires_grad
    assert not any("teacher" in name for name, _ in method.named_parameters())
    assert method.memory_bytes() == 4 * (sum(p.numel() for p in method.net.parameters()) - 8 - 2 * 8 - 2 * 9)


def test_memory_is_merged_and_then_alone():
    method, main, phases = in_second_task(capacity=6)
    assert len(method.buffer) == 6  # three a class of task 1
    assert torch.bincount(main.data.labels).tolist() == [3, 3, 5, 5]
    fine = next(phases)
    assert torch.bincount(fine.data.labels).tolist() == [1, 1, 1, 1]  # balanced: the new classes are in already
    assert torch.equal(fine.data.images, method.buffer.images[:4])
    assert (fine.epochs, fine.lr, fine.schedule(19, 20)) == (2, 0.01, 1.0)
    assert main.order is None
    assert fine.order is None


@pytest.mark.slow
def test_memory_is_chosen_by_all_embeddings_of_plain_images():
    """Herding sees the un-augmented images and the embeddings of every task, and holds 2,000 images at most."""
    method, _, phases = in_second_task()
    seen = []
    describe = method.describe
    method.describe = lambda x, y: seen.append((x, describe(x, y)["features"])) or describe(x, y)
    method.buffer.transform.apply = None  # must not be asked
    next(phases)
    x, features = seen[0]
    assert torch.equal(x, method.buffer.transform.normalise(task_of(1).train.images))
    with torch.no_grad():
        torch.testing.assert_close(features, torch.cat(method.net.compute_embeddings(x), dim=1))
    assert features.shape == (10, 2 * 8)
    for steps in (10, 20, 50):
        assert configure(f"+experiment=dytox_cifar100_{steps}step").buffer.capacity == 2000
        assert configure(f"+experiment=dytox_plus_cifar100_{steps}step").method.mixup == 0.8


@pytest.mark.parametrize(("size", "visits"), [(5000, 4864), (7000, 6912), (256, 256), (255, 255)])
def test_repeated_augmentation(size, visits):
    order = repeat_images(size, 3, torch.Generator().manual_seed(0))
    assert len(order) == visits
    counts = torch.bincount(order, minlength=size)
    assert int((counts > 0).sum()) == -(-visits // 3)
    assert (counts[counts > 0] == 3).sum() >= visits // 3
    assert torch.equal(order[0:3], order[0].expand(3))
    assert not torch.equal(order, repeat_images(size, 3, torch.Generator().manual_seed(1)))
    data = torch.zeros(3)
    method = rule(repeated_augmentation=3)
    assert len(next(method.learn(task_of(0))).order(torch.Generator())) == 10, data


# -- ablations, settings, refusals -----------------------------------------------------------------------------------


def test_fine_tuning_makes_as_many_steps_as_asked():
    _, _, phases = in_second_task(finetune_steps=4)
    fine = next(phases)
    order = fine.order(torch.Generator().manual_seed(0))
    assert (fine.epochs, len(fine.data), len(order)) == (2, 4, 12)  # four batches of three
    assert torch.bincount(order).tolist() == [3, 3, 3, 3]
    assert order.tolist() != order.sort().values.tolist()
    cut = repeat_passes(2000, 15 * 256, torch.Generator().manual_seed(0))
    assert len(cut) == 3840
    assert cut[:2000].sort().values.equal(torch.arange(2000))
    assert len(cut[2000:].unique()) == 1840
    with pytest.raises(ConfigError, match="finetune_steps: expected a number above 0; got 0"):
        rule(finetune_steps=0)


@pytest.mark.parametrize(
    ("change", "terms", "phases"),
    [
        ({"divergence": 0.0}, {"clf", "kd"}, 2),
        ({"distillation": False}, {"clf", "div"}, 2),
        ({"finetune_epochs": 0}, {"clf", "kd", "div"}, 1),
    ],
)
def test_ablations_of_the_rule(three_images, change, terms, phases):
    raw, y = three_images
    method, _, rest = in_second_task(**change)
    losses = method.observe(batch_of(raw, y, task=1))
    assert set(losses) == terms
    assert 1 + len(list(rest)) == phases
    assert len(method.buffer) == 4


@pytest.mark.parametrize(
    ("change", "tokens", "classifiers", "width"),
    [
        ({"task_tokens": False}, 1, 2, 8),
        ({"independent_classifiers": False}, 2, 1, 16),
        ({"task_tokens": False, "independent_classifiers": False}, 1, 1, 8),
    ],
)
def test_ablations_of_the_network(three_images, change, tokens, classifiers, width):
    method, main, phases = in_second_task(net=small_net(**change))
    net = method.net
    assert (len(net.tokens), len(net.classifiers), net.classifiers[0][1].in_features) == (tokens, classifiers, width)
    assert net(three_images[0].float()).shape == (3, 4)
    assert net(three_images[0].float()).isfinite().all()
    assert "tokens.0" in moved(method, main) or tokens == 2
    assert moved(method, next(phases))


@pytest.mark.slow
def test_published_settings():
    config = configure("+experiment=dytox_cifar100_10step")
    assert (config.trainer.epochs, config.trainer.batch_size, config.optimizer.lr) == (500, 256, 2.5e-4)
    assert config.schedule.warmup_factor * config.optimizer.lr == pytest.approx(1e-6)
    assert config.schedule.min_factor * config.optimizer.lr == pytest.approx(1e-5)
    assert (config.optimizer.weight_decay, config.optimizer.decay_vectors) == (1e-6, False)
    assert (config.method.finetune_epochs, config.method.finetune_lr) == (20, 2.5e-5)
    assert config.scenario.rand_augment == "rand-m9-mstd0.5-inc1"
    assert config.method.repeated_augmentation == 3
    published = {10: (67.33, 51.68), 20: (67.30, 48.45), 50: (64.39, 43.47)}
    for steps, (average, last) in published.items():
        held = configure(f"+experiment=dytox_cifar100_{steps}step")
        assert held.scenario.num_tasks == steps
        assert held.published.class_il_average_incremental_accuracy == average
        assert held.published.class_il_average_accuracy == last
        assert configure(f"+experiment=dytox_plus_cifar100_{steps}step").published is None


def test_averages_include_the_first_task():
    from cl_bench.core.record import Matrix
    from cl_bench.metrics.accuracy import average_incremental_accuracy

    assert average_incremental_accuracy(Matrix.from_accuracy([[90], [60, 80]])) == pytest.approx((90 + 70) / 2)


def test_one_dimensional_parameters_are_not_decayed():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = adamw([matrix, vector], lr=0.1, betas=[0.9, 0.999], weight_decay=0.5, decay_vectors=False)
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(vector, torch.ones(2))
    assert matrix.flatten().tolist() == pytest.approx(4 * [1 - 0.1 * 0.5])


def test_another_network_or_buffer_is_refused():
    with pytest.raises(
        ConfigError, match=r"backbone: expected a network of kind DyTox, .*method=dytox.*Use backbone=dytox"
    ):
        build(configure("method=dytox", "backbone=resnet18", "buffer=herding", "device=cpu"))
    with pytest.raises(ConfigError, match=r"buffer: expected a buffer of kind PerClassBuffer.*Use buffer=herding"):
        build(configure("backbone=dytox_digits", "buffer=reservoir", "device=cpu"))


@pytest.mark.slow
def test_new_classes_lead_before_fine_tuning_and_old_ones_gain_by_it(tmp_path):
    """On four digits: after the main phase the newest task is ahead, fine-tuning raises the old one."""
    parts = build(
        configure(
            "backbone=dytox_digits",
            "scenario.classes_per_task=[2,2,6]",  # the third task is not learned
            "scenario.train_per_class=100",
            "scenario.test_per_class=25",
            "buffer.capacity=12",
            "optimizer=adamw",
            "optimizer.lr=0.001",
            "optimizer.weight_decay=1e-6",
            "optimizer.decay_vectors=false",
            "schedule=cosine",
            "schedule.warmup_epochs=5",  # without it some seeds never leave chance
            "trainer.epochs=30",
            "trainer.batch_size=16",
            "method.finetune_lr=0.001",
            f"seed={SEED}",
            "device=cpu",
        )
    )
    trainer = parts.build_trainer(Loggers([]), Checkpoint(tmp_path), lambda: False)
    tasks, accuracy = parts.scenario.tasks, []
    for task in tasks[:2]:
        parts.method.eval()
        for phase in parts.method.learn(task):
            trainer.run_phase(task, 0, phase, None)
            parts.method.eval()
            right = []
            for asked in tasks[: task.id + 1]:
                x = parts.scenario.transform.normalise(asked.test.images)
                with torch.no_grad():
                    right.append(
                        float((parts.method.predict(x, None).argmax(dim=1) == asked.test.labels).float().mean())
                    )
            accuracy.append(right)
    assert len(accuracy) == 3
    (alone,), (old, new), (old_after, new_after) = accuracy
    assert alone > 0.8, accuracy
    assert new > old, accuracy
    assert old_after > old
    assert new_after < new
    assert (old_after + new_after) / 2 > 0.5  # four classes: chance is 0.25
