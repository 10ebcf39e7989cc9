"""Each loss term against its equation, written out in numpy on three samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TwoTasks, array, batch_of, buffer_context, cross_entropy, network_of, softmax
from torch import nn

from cl_bench.backbones.lvt import LVT
from cl_bench.backbones.mlp import MLP
from cl_bench.backbones.resnet18 import ResNet18
from cl_bench.buffers.base import Buffer
from cl_bench.buffers.fixed_memory import FixedMemory
from cl_bench.buffers.reservoir import Reservoir
from cl_bench.core.types import Data, Task
from cl_bench.methods.base import ParameterSnapshot, Teacher
from cl_bench.methods.derpp import DERpp
from cl_bench.methods.er import ER
from cl_bench.methods.ewc import EWC
from cl_bench.methods.finetune import Finetune
from cl_bench.methods.icarl import ICaRL
from cl_bench.methods.lvt import LifelongViT
from cl_bench.methods.lwf import LwF

pytestmark = pytest.mark.arithmetic

SHAPE = {"num_classes": 4, "image_shape": (1, 8, 8)}
LVT_KEYS = {
    "alpha": 0.7, "beta": 0.3, "gamma": 2.0, "new_weight": 0.1, "new_weight_rule": "constant", "distillation": "kl",
    "temperature": 2.0, "replay_size": 3, "inter_task": True, "injection_head": True, "accumulation_head": True,
}  # fmt: skip


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(hidden=[8], norm="none", init="default", **SHAPE)


def small_lvt(dropout: float = 0.0) -> LVT:
    torch.manual_seed(0)
    keys = {"width": 8, "stem_layers": 1, "dims": [8, 16], "depths": [1, 1], "heads": [2, 2], "key_dim": 4}
    net = LVT(**keys, value_dim=4, mlp_ratio=2, dropout=dropout, **SHAPE)
    for p in net.parameters():  # away from the gains and biases that start at 0
        p.data += 0.1 * torch.randn_like(p)
    return net


def remembered(buffer: Buffer, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill the buffer with three images of their own."""
    generator = torch.Generator().manual_seed(8)
    raw = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=generator)
    y = torch.tensor([2, 3, 2])
    buffer.add(batch_of(raw, y), logits=logits)
    return raw, y


def reservoir() -> Buffer:
    return Reservoir(capacity=3, context=buffer_context())


STORED = torch.tensor([[1.0, -1.0, 0.5, 2.0], [0.0, 3.0, -2.0, 1.0], [0.3, 0.2, 0.1, 0.0]])


def test_finetune(three_images):
    raw, y = three_images
    method = Finetune(net=mlp(), scenario=TwoTasks(), loss_classes="all")
    losses = method.observe(batch_of(raw, y))
    z = array(method.net(raw.float() / 255))
    assert set(losses) == {"ce"}
    assert losses["ce"].item() == pytest.approx(cross_entropy(z, y.numpy()), rel=1e-5)


def er(**changes) -> ER:
    keys = {"replay_size": 3, "loss": "joint", "loss_classes": "all", "replay_current_task": True}
    return ER(net=mlp(), buffer=reservoir(), scenario=TwoTasks(), **(keys | changes))


def test_er(three_images):
    raw, y = three_images
    method = er()
    old, old_y = remembered(method.buffer, STORED)
    losses = method.observe(batch_of(raw, y))
    z = array(method.net(torch.cat([raw, old]).float() / 255))
    assert losses["ce"].item() == pytest.approx(cross_entropy(z, np.concatenate([y, old_y])), rel=1e-5)


def test_er_without_memory_is_finetuning(three_images):
    method = er()
    plain = Finetune(net=mlp(), scenario=TwoTasks(), loss_classes="all")
    assert method.observe(batch_of(*three_images))["ce"] == plain.observe(batch_of(*three_images))["ce"]
    assert len(method.buffer) == 3  # the batch was offered


def test_derpp(three_images):
    raw, y = three_images
    method = DERpp(net=mlp(), buffer=reservoir(), alpha=0.4, beta=0.6, replay_size=3)
    old, old_y = remembered(method.buffer, STORED)
    losses = method.observe(batch_of(raw, y))
    z, z_old = array(method.net(raw.float() / 255)), array(method.net(old.float() / 255))
    assert set(losses) == {"ce", "logit_mse", "replay_ce"}
    assert losses["ce"].item() == pytest.approx(cross_entropy(z, y.numpy()), rel=1e-5)
    assert losses["logit_mse"].item() == pytest.approx(0.4 * np.mean((z_old - array(STORED)) ** 2), rel=1e-5)
    assert losses["replay_ce"].item() == pytest.approx(0.6 * cross_entropy(z_old, old_y.numpy()), rel=1e-5)


@pytest.mark.parametrize(("beta", "expected"), [(1.0, {"ce", "logit_mse", "replay_ce"}), (0.0, {"ce", "logit_mse"})])
def test_derpp_draws_for_each_term_and_stores_the_streams_logits(beta, expected, three_images):
    raw, y = three_images
    method = DERpp(
        net=mlp(), buffer=Reservoir(capacity=6, context=buffer_context()), alpha=1.0, beta=beta, replay_size=1
    )
    remembered(method.buffer, STORED)
    draws = []
    sample = method.buffer.sample
    method.buffer.sample = lambda size: draws.append(sample(size)) or draws[-1]
    assert set(method.observe(batch_of(raw, y))) == expected
    assert len(draws) == len(expected) - 1
    torch.testing.assert_close(method.buffer.columns["logits"][3:6], method.net(raw.float() / 255).detach())


def lvt(**changes) -> LifelongViT:
    method = LifelongViT(net=small_lvt(), buffer=reservoir(), **(LVT_KEYS | changes))
    return method.eval()  # BatchNorm by running statistics, so that each head's logits can be recomputed alone


@pytest.mark.parametrize("distillation", ["kl", "mse"])
def test_lvt_terms(three_images, distillation):
    raw, y = three_images
    method = lvt(distillation=distillation)
    old, old_y = remembered(method.buffer, STORED)
    for i, p in enumerate(method.net.keys_and_biases()):
        method.get_buffer(f"importance_{i}").copy_(torch.randn(p.shape))
        method.get_buffer(f"old_{i}").copy_(p.detach() + torch.randn(p.shape))
    losses = method.observe(batch_of(raw, y, task=1))

    net = method.net
    features, features_old = net.features(raw.float() / 255), net.features(old.float() / 255)
    inject, accumulate = array(net.injection(features)), array(net.accumulation(features))
    replayed = array(net.accumulation(features_old))
    teacher, student = softmax(array(STORED) / 2.0), softmax(replayed / 2.0)
    kl = 4.0 * np.mean(np.sum(teacher * (np.log(teacher) - np.log(student)), axis=1))
    mse = np.mean((replayed - array(STORED)) ** 2)
    held = [
        np.abs(array(method.get_buffer(f"importance_{i}")) * (array(p) - array(method.get_buffer(f"old_{i}")))).ravel()
        for i, p in enumerate(net.keys_and_biases())
    ]
    expected = {
        "injection": cross_entropy(inject, y.numpy()),
        "accumulation": 0.1 * cross_entropy(accumulate, y.numpy()),
        "replay": 0.7 * cross_entropy(replayed, old_y.numpy()),
        "distillation": 0.3 * (kl if distillation == "kl" else mse),
        "attention": 2.0 * np.concatenate(held).mean(),
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stored", ["z'", "z_m"], ids=["derpp", "lvt"])
def test_stored_logits_are_compared_in_their_own_precision(stored, three_images):
    """Others would round the network's: replicas are held to single runs in double."""
    raw, y = three_images
    if stored == "z'":
        method = DERpp(net=mlp(), buffer=reservoir(), alpha=0.4, beta=0.6, replay_size=3).double()
        inputs, name, weight = {"x'": raw.double() / 255}, "logit_mse", 0.4
    else:
        method = lvt(distillation="mse", inter_task=False).double()
        inputs, name, weight = {"y_m": y}, "distillation", 0.3
    x = raw.double() / 255
    given = {"x": torch.cat([x, x]) if stored == "z_m" else x, "y": y, stored: STORED.double()}
    losses, _ = method.terms(inputs | given, 1)
    logits = array(method.predict(x, None))
    assert losses[name].item() == pytest.approx(weight * np.mean((logits - array(STORED)) ** 2), rel=1e-13)


def test_lvt_first_task_has_no_penalty_and_full_weight(three_images):
    raw, y = three_images
    method = lvt()
    losses = method.observe(batch_of(raw, y, task=0))
    assert set(losses) == {"injection", "accumulation"}
    z = array(method.net.accumulation(method.net.features(raw.float() / 255)))
    assert losses["accumulation"].item() == pytest.approx(cross_entropy(z, y.numpy()), rel=1e-5)


def test_lvt_weight_of_new_data():
    assert [lvt().get_new_weight(t) for t in range(4)] == [1.0, 0.1, 0.1, 0.1]
    decaying = lvt(new_weight_rule="decay")
    assert [decaying.get_new_weight(t) for t in (0, 1, 2, 30)] == pytest.approx([1.0, 0.9, 0.81, 0.1])


def test_lvt_penalty_is_zero_for_an_unchanged_net(three_images):
    raw, y = three_images
    method = lvt()
    data = Data(raw, y, torch.arange(3))
    list(method.learn(Task(0, range(2), data, data, data)))
    assert max(method.get_buffer(f"importance_{i}").abs().max() for i in range(2)) > 0
    assert method.compute_penalty().item() == 0.0
    method.net.keys_and_biases()[0].data += 0.1
    assert method.compute_penalty().item() > 0


def test_lvt_importance_is_the_mean_gradient_of_the_injection_loss(three_images):
    raw, y = three_images
    method = lvt()
    data = Data(raw, y, torch.arange(3))
    parameters = method.net.keys_and_biases()
    list(method.learn(Task(0, range(2), data, data, data)))
    for p in method.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    list(method.learn(Task(1, range(2), data, data, data)))  # its measure holds nothing of the first one's
    brute = [torch.zeros_like(p) for p in parameters]
    for image, label in zip(raw, y):  # one image at a time
        logits = method.net.injection(method.net.features(image[None].float() / 255))
        loss = torch.nn.functional.cross_entropy(logits, label[None])
        for total, gradient in zip(brute, torch.autograd.grad(loss, parameters)):
            total += gradient / 3
    for i, expected in enumerate(brute):
        torch.testing.assert_close(method.get_buffer(f"importance_{i}"), expected, rtol=1e-4, atol=1e-7)


def test_lvt_memory_sends_no_gradient_to_the_injection_head(three_images):
    method = lvt().train()
    remembered(method.buffer, STORED)
    losses = method.observe(batch_of(*three_images, task=1))
    head = method.net.injection.weight
    from_memory = losses["replay"] + losses["distillation"]
    assert torch.autograd.grad(from_memory, head, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(losses["injection"], head, retain_graph=True)[0].abs().max() > 0
    assert torch.autograd.grad(from_memory, method.net.accumulation.weight)[0].abs().max() > 0


def test_lvt_heads_who_answers_and_who_is_confident(three_images):
    method, x, y = lvt(), three_images[0].float() / 255, three_images[1]
    features = method.net.features(x)
    assert torch.equal(method.predict(x, None), method.net.accumulation(features))
    described = method.describe(x, y)
    probability = softmax(array(method.net.injection(features)))[np.arange(3), y.numpy()]
    assert array(described["confidence"]) == pytest.approx(probability, rel=1e-5)
    assert torch.equal(described["logits"], method.net.accumulation(features))


@pytest.mark.parametrize(
    ("switch", "terms"),
    [
        ("inter_task", {"injection", "accumulation", "replay", "distillation"}),
        ("injection_head", {"accumulation", "replay", "distillation", "attention"}),
        ("accumulation_head", {"injection", "replay", "distillation", "attention"}),
    ],
)
def test_lvt_ablation_switches(three_images, switch, terms):
    method = lvt(**{switch: False})
    remembered(method.buffer, STORED)
    losses = method.observe(batch_of(*three_images, task=1))
    assert set(losses) == terms
    sum(losses.values()).backward()
    trained = {id(p) for p in next(method.learn(_task(three_images))).params}
    for name, p in method.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name


def _task(three_images) -> Task:
    data = Data(*three_images, torch.arange(3))
    return Task(0, range(2), data, data, data)


def test_lvt_keys_do_not_depend_on_the_input():
    attention = small_lvt().eval().stages[0].attention
    seen = []
    attention.key.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for seed in (1, 2):
        torch.manual_seed(seed)
        attention(torch.randn(2, 8, 8, 8))
    (q1, s1), (q2, s2) = seen
    # Scores are linear in the queries with one and the same matrix K_w for every input; nothing of x reaches the key.
    weight = attention.key.weight[:, :, 0, 0]
    for q, s in ((q1, s1), (q2, s2)):
        torch.testing.assert_close(s, torch.einsum("kc,bchw->bkhw", weight, q))
    assert not torch.equal(q1, q2)


def test_lvt_attention_is_the_equation():
    """A = softmax(BN(K_w Q) + B sqrt(d_k)), out = BN0(W_o GELU(A V)), one query and head at a time in numpy."""
    from scipy.special import erf

    attention = small_lvt().eval().stages[1].attention  # the shrink: stride 2, 4 heads
    attention.bias.data.normal_()
    torch.manual_seed(4)
    x = torch.randn(1, 8, 8, 8)
    q, v = array(attention.query(x))[0], array(attention.value(x))[0]  # (h d_k, 4, 4), (h d_v, 8, 8)
    heads, keys, size = attention.heads, 64, 8
    norm = attention.norm
    gain, shift, mean, var = (array(t) for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scores = np.einsum("kc,cyx->kyx", array(attention.key.weight)[:, :, 0, 0], q)
    scores = (scores - mean[:, None, None]) / np.sqrt(var + norm.eps)[:, None, None]
    scores = scores * gain[:, None, None] + shift[:, None, None]
    bias, out = array(attention.bias), np.zeros((v.shape[0], 4, 4))
    per_head = v.shape[0] // heads
    for h in range(heads):
        values = v[h * per_head : (h + 1) * per_head].reshape(per_head, keys)
        for qy in range(4):
            for qx in range(4):
                row = np.zeros(keys)
                for ky in range(size):
                    for kx in range(size):
                        place = abs(2 * qy - ky) * size + abs(2 * qx - kx)
                        row[ky * size + kx] = scores[h * keys + ky * size + kx, qy, qx] + bias[place, h] * np.sqrt(4)
                weights = np.exp(row - row.max())
                out[h * per_head : (h + 1) * per_head, qy, qx] = values @ (weights / weights.sum())
    gelu = torch.from_numpy(out * 0.5 * (1 + erf(out / np.sqrt(2)))).float()[None]
    expected = attention.out[2](attention.out[1](gelu))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_parameter_counts():
    def count(net):
        return sum(p.numel() for p in net.parameters())

    for name, expected in {"lvt": 8_929_088, "lvt_3stage": 7_626_560, "resnet18": 11_220_132}.items():
        net = network_of(f"backbone={name}")
        assert count(net) == expected, name
        if name == "lvt":
            assert count(net.stem) == 2_775_104
            assert sum(p.numel() for p in net.keys_and_biases()) == 263_424


# iCaRL, LwF, EWC


def changed(net):
    """Other weights than the teacher's."""
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def icarl(mean_over: str = "seen") -> ICaRL:
    buffer = FixedMemory(capacity=4, context=buffer_context())
    return ICaRL(net=mlp(), buffer=buffer, scenario=TwoTasks(), mean_over=mean_over)


@pytest.mark.parametrize("mean_over", ["seen", "all"])
def test_icarl(three_images, mean_over):
    raw, _ = three_images
    y = torch.tensor([2, 3, 0])  # two new images and an exemplar
    method = icarl(mean_over)  # of the last task: every class is seen
    q = sigmoid(array(method.teacher(raw.float() / 255)))[:, :2]
    changed(method.net)
    losses = method.observe(batch_of(raw, y, task=1))
    g = sigmoid(array(method.net(raw.float() / 255)))
    targets = np.eye(4)[y.numpy()][:, 2:]
    new = -(targets * np.log(g[:, 2:]) + (1 - targets) * np.log(1 - g[:, 2:])).sum() / 12
    old = -(q * np.log(g[:, :2]) + (1 - q) * np.log(1 - g[:, :2])).sum() / 12
    assert set(losses) == {"classification", "distillation"}
    assert losses["classification"].item() == pytest.approx(new, rel=1e-5)
    assert losses["distillation"].item() == pytest.approx(old, rel=1e-5)


def test_icarl_first_task_has_its_own_classes_only(three_images):
    raw, y = three_images
    method = icarl()
    losses = method.observe(batch_of(raw, y, task=0))
    g, targets = sigmoid(array(method.net(raw.float() / 255)))[:, :2], np.eye(4)[y.numpy()][:, :2]
    expected = -(targets * np.log(g) + (1 - targets) * np.log(1 - g)).mean()
    assert set(losses) == {"classification"}
    assert losses["classification"].item() == pytest.approx(expected, rel=1e-5)


def test_icarl_over_all_outputs_expects_no_class_to_come(three_images):
    raw, y = three_images
    method = icarl("all")
    losses = method.observe(batch_of(raw, y, task=0))
    g, targets = sigmoid(array(method.net(raw.float() / 255))), np.eye(4)[y.numpy()]
    assert g.shape == (3, 4)
    expected = -(targets * np.log(g) + (1 - targets) * np.log(1 - g)).mean()
    assert losses["classification"].item() == pytest.approx(expected, rel=1e-5)


def test_icarl_answers_with_the_nearest_mean_of_exemplars():
    method = icarl()
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
    data = Data(images, torch.tensor([0, 1] * 6), torch.arange(12))
    method.net.eval()
    for _ in method.learn(Task(0, range(2), data, data.take(slice(0)), data)):
        changed(method.net)  # the means belong to the network after the phase

    def phi(raw):
        features = array(method.net.features(raw.float() / 255))
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    held = method.buffer.data()
    assert torch.bincount(held.labels).tolist() == [2, 2]
    means = np.stack([phi(held.images[held.labels == c]).mean(axis=0) for c in range(2)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = array(method.predict(images.float() / 255, None))
    assert np.isneginf(scores[:, 2:]).all()
    distances = np.linalg.norm(phi(images)[:, None] - means[None], axis=2)
    np.testing.assert_allclose(-scores[:, :2], distances, atol=1e-5)
    assert len(set(scores[:, :2].argmax(axis=1))) == 2


def test_icarl_trains_on_the_exemplars_too():
    method = icarl()
    data = Data(torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8), torch.tensor([0, 1] * 4), torch.arange(8))
    for _ in method.learn(Task(0, range(2), data, data.take(slice(0)), data)):
        pass
    new = Data(data.images, data.labels + 2, data.index)
    [phase] = method.learn(Task(1, range(2, 4), new, new.take(slice(0)), new))
    assert torch.bincount(phase.data.labels).tolist() == [2, 2, 4, 4]


def lwf(**changes) -> LwF:
    return LwF(net=mlp(), scenario=TwoTasks(), **({"alpha": 0.7, "temperature": 2.0, "warm_up_epochs": 1} | changes))


def test_lwf(three_images):
    raw, _ = three_images
    y = torch.tensor([2, 3, 3])
    method = lwf()
    old = array(method.teacher(raw.float() / 255))[:, :2]
    changed(method.net)
    losses = method.observe(batch_of(raw, y, task=1))
    z = array(method.net(raw.float() / 255))
    assert set(losses) == {"ce", "distillation"}
    assert losses["ce"].item() == pytest.approx(cross_entropy(z[:, 2:], y.numpy() - 2), rel=1e-5)
    kept = -(softmax(old / 2) * np.log(softmax(z[:, :2] / 2))).sum(axis=1).mean()
    assert losses["distillation"].item() == pytest.approx(0.7 * kept, rel=1e-5)
    assert set(method.observe(batch_of(raw, y - 2, task=0))) == {"ce"}


def test_lwf_warms_up_the_head_alone(three_images):
    raw, _ = three_images
    method = lwf(warm_up_epochs=3)
    data = Data(raw, torch.tensor([2, 3, 3]), torch.arange(3))
    warm_up, joint = method.learn(Task(1, range(2, 4), data, data.take(slice(0)), data))
    assert warm_up.epochs == 3
    assert {id(p) for p in warm_up.params} == {id(p) for p in method.net.head.parameters()}
    method.zero_grad()
    sum(warm_up.observe(batch_of(raw, data.labels, task=1)).values()).backward()
    assert all(p.grad is None for p in method.net.trunk.parameters())
    assert not method.net.head.weight.grad[:2].any()  # the old classes' rows stay
    assert {id(p) for p in joint.params} == {id(p) for p in method.net.parameters()}
    assert len(list(lwf(warm_up_epochs=0).learn(Task(1, range(2, 4), data, data.take(slice(0)), data)))) == 1


def test_lwf_distils_each_old_task_by_itself(three_images):
    raw, _ = three_images

    class ThreeTasks(TwoTasks):
        tasks = tuple(SimpleNamespace(classes=own, other_classes=()) for own in (range(1), range(1, 2), range(2, 4)))

    method = LwF(net=mlp(), scenario=ThreeTasks(), alpha=1.0, temperature=2.0, warm_up_epochs=0)
    losses = method.observe(batch_of(raw, torch.tensor([2, 3, 3]), task=2))
    assert losses["distillation"].item() == pytest.approx(0.0, abs=1e-7)  # a softmax over a single class is 1


def ewc(net, **changes) -> EWC:
    keys = {"strength": 3.0, "online": False, "decay": 0.5, "fisher": "empirical", "fisher_images": None}
    return EWC(net=net, scenario=TwoTasks(), **({"loss_classes": "all"} | keys | changes)).eval()


def brute_force_fisher(net, raw, y, weighted: bool = False) -> list[np.ndarray]:
    totals = [np.zeros(p.shape) for p in net.parameters()]
    for image, label in zip(raw, y):
        logits = net(image[None].float() / 255)
        weight = softmax(array(logits))[0, label] if weighted else 1.0
        loss = torch.nn.functional.cross_entropy(logits, label[None])
        for total, g in zip(totals, torch.autograd.grad(loss, list(net.parameters()))):
            total += weight * array(g) ** 2 / len(raw)
    return totals


def small_resnet() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(width=2, head="linear", variant="standard", **SHAPE).eval()


@pytest.mark.parametrize("fisher", ["empirical", "weighted"])
@pytest.mark.parametrize("make", [mlp, small_resnet])
def test_ewc_fisher_equals_a_brute_force_version(make, fisher, three_images, monkeypatch):
    raw, y = three_images
    method = ewc(make(), fisher=fisher)
    monkeypatch.setattr("cl_bench.methods.ewc.GRADIENT_BYTES", 1)  # one image at a time, and all at once
    data = Data(raw, y, torch.arange(3))
    task = Task(0, range(2), data, data.take(slice(0)), data)
    single = method.measure_fisher_information(task)
    monkeypatch.undo()
    expected = brute_force_fisher(method.net, raw, y, weighted=fisher == "weighted")
    for one, together, brute in zip(single, method.measure_fisher_information(task), expected):
        np.testing.assert_allclose(array(together), brute, rtol=2e-3, atol=1e-7)
        np.testing.assert_allclose(array(one), brute, rtol=2e-3, atol=1e-7)


def test_ewc_sampled_fisher_draws_labels_from_the_network(three_images):
    raw, y = three_images
    method = ewc(mlp(), fisher="sampled")
    data = Data(raw[:1].expand(4000, -1, -1, -1), y[:1].expand(4000), torch.arange(4000))
    measured = method.measure_fisher_information(Task(0, range(2), data, data.take(slice(0)), data))
    p = softmax(array(method.net(raw[:1].float() / 255)))[0]
    # exactly: the expectation over the network's own labels
    of_label = [brute_force_fisher(method.net, raw[:1], torch.tensor([c])) for c in range(4)]
    exact = [sum(p[c] * of_label[c][i] for c in range(4)) for i in range(len(measured))]
    for m, e in zip(measured, exact):
        assert np.abs(array(m) - e).sum() < 0.1 * np.abs(e).sum()


def test_ewc_penalty_is_the_sum_of_the_tasks_quadratics(three_images):
    raw, y = three_images
    method = ewc(mlp())
    anchors = []
    for seed in (1, 2):
        information = [
            torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) for p in method.net.parameters()
        ]
        anchors.append((information, [p.detach().clone() for p in method.net.parameters()]))
        method._consolidate(information)
        changed(method.net)
    losses = method.observe(batch_of(raw, y, task=1))
    params = list(method.net.parameters())
    got = torch.autograd.grad(losses["pull"], params)
    for i, p in enumerate(params):
        expected = sum(3.0 * array(f[i]) * array(p - old[i]) for f, old in anchors)
        np.testing.assert_allclose(array(got[i]), expected, rtol=1e-3, atol=1e-5)
    value = sum((array(f[i]) * array(p - old[i]) ** 2).sum() for f, old in anchors for i, p in enumerate(params))
    fixed = sum(
        (array(f[i]) * array(c - old[i]) ** 2).sum() for f, old in anchors for i, c in enumerate(centres(method))
    )
    assert losses["pull"].item() == pytest.approx(1.5 * (value - fixed), rel=1e-3)  # all but the constant


def centres(method: EWC) -> list[torch.Tensor]:
    return [method.get_buffer(f"centre_{i}") for i, _ in enumerate(method.net.parameters())]


def test_ewc_online_decays_and_moves_its_centre():
    method = ewc(mlp(), online=True)
    first, second = ([torch.full(p.shape, v) for p in method.net.parameters()] for v in (4.0, 1.0))
    method._consolidate(first)
    changed(method.net)
    method._consolidate(second)
    for i, p in enumerate(method.net.parameters()):
        assert torch.equal(method.get_buffer(f"precision_{i}"), torch.full(p.shape, 3.0))  # 0.5 * 4 + 1
        assert torch.equal(method.get_buffer(f"centre_{i}"), p)


def test_a_teacher_only_answers(three_images):
    raw, _ = three_images
    net = small_resnet().train()
    teacher = Teacher(net).train()
    assert not list(teacher.parameters())
    assert not teacher.training
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    answer = teacher(raw.float() / 255)
    assert not answer.requires_grad
    with torch.no_grad():  # as a teacher answers: with gradients other kernels may round otherwise
        assert torch.equal(answer, net.eval()(raw.float() / 255))
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    changed(net)
    assert torch.equal(answer, teacher(raw.float() / 255))
    teacher.take(net)
    with torch.no_grad():
        assert torch.equal(teacher(raw.float() / 255), net(raw.float() / 255))


def test_a_snapshot_is_state_of_its_method_under_the_names_that_checkpoints_have():
    net = nn.Linear(2, 1)
    owner = nn.Module()
    snapshot = ParameterSnapshot(owner, net.parameters(), importance="importance")
    assert list(owner.state_dict()) == ["old_0", "importance_0", "old_1", "importance_1"]
    snapshot.take(net.parameters(), [torch.full_like(p, 2.0) for p in net.parameters()])
    assert all(not drift.any() for drift in snapshot.drifts(net.parameters()))
    with torch.no_grad():
        net.weight += 0.5
    assert array(snapshot.drifts(net.parameters())[0]) == pytest.approx(np.full((1, 2), 0.5))
    assert [t.unique().tolist() for t in snapshot.importance] == [[2.0], [2.0]]
    assert snapshot.nbytes == 2 * 3 * 4
    bare = ParameterSnapshot(nn.Module(), net.parameters())
    bare.take(net.parameters())
    assert bare.importance == []
    assert torch.equal(bare.values[0], net.weight)


@pytest.mark.parametrize(
    ("method", "kinds"), [(lvt(), {"old", "importance"}), (ewc(mlp()), {"centre", "precision"})], ids=["lvt", "ewc"]
)
def test_a_snapshot_keeps_the_names_that_older_checkpoints_have(method, kinds):
    own = [name for name in method.state_dict() if "." not in name]
    assert {name.rpartition("_")[0] for name in own} == kinds
    assert {int(name.rpartition("_")[2]) for name in own} == set(range(len(own) // 2))
    assert method.memory_bytes() == sum(method.state_dict()[name].nbytes for name in own)
