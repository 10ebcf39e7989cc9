"""Methods on a frozen network: class means, ridge regression, prompts. Equations, choice by image, frozen weights."""

import hashlib
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SUITS, TINY, batch_of, configure, make_split, parts_of, toy_images, trainer_of

from cl_bench.backbones.prompt_vit import PromptViT
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import clone_state
from cl_bench.methods.coda_prompt import CodaPrompt
from cl_bench.methods.dualprompt import DualPrompt
from cl_bench.methods.l2p import L2P
from cl_bench.methods.ranpac import RIDGES, RanPAC, choose_ridge, measure_errors
from cl_bench.methods.simplecil import SimpleCIL
from cl_bench.runs.audit import check_answers, check_rehearsal

pytestmark = pytest.mark.arithmetic

KEYS = {
    "pretrained": False, "checkpoint": None, "model": "test_vit", "patch_size": 4, "dim": 16, "depth": 3, "heads": 2,
    "mlp_ratio": 2.0, "num_classes": 6, "image_shape": (1, 8, 8), "image_mean": [0.4], "image_std": [0.2],
}  # fmt: skip
WARM_UP = {"warm_up": "first_task", "warm_up_epochs": 1, "warm_up_lr": 0.001, "warm_up_weight_decay": 0.0}
RULE = {"prompts": True, "loss_classes": "task"} | WARM_UP
PROMPTS = {
    L2P: {"pool": 5, "length": 2, "top": 2, "pull": 0.1},
    DualPrompt: {"general_layers": [0], "expert_layers": [0, 2], "length": 2, "pull": 1.0},
    CodaPrompt: {"layers": [0, 1], "components": 2, "length": 4, "orthogonality": 0.0},
}


def network() -> PromptViT:
    torch.manual_seed(0)
    net = PromptViT(**KEYS).double().eval()
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net


def scenario():
    return make_split(source=toy_images(num_classes=6), num_tasks=3)


def method(kind, learned: int = 3, **keys):
    """In float64, with prompts that differ a lot, as after this number of tasks."""
    made = kind(net=network(), scenario=scenario(), **(PROMPTS[kind] | RULE | keys)).double().eval()
    torch.manual_seed(2)
    for p in made.list_prompts() if made.prompts else []:
        p.data = torch.randn_like(p)
    for task in scenario().tasks[:learned]:
        made.open_task(task)
    if kind is DualPrompt and made.prompts:
        for p in made.expert:
            p.data = torch.randn_like(p)
    return made


def images(count: int = 7) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# -- the network ---------------------------------------------------------------------------------------------------


def attend(net, x, tokens=None, prefixes=None):
    """The ViT in numpy, one image at a time: (n, D) after the last norm."""
    trunk, number = net.trunk, lambda t: t.detach().numpy()
    norm = lambda z, layer: (  # noqa: E731
        (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + layer.eps) * number(layer.weight)
        + number(layer.bias)
    )
    linear = lambda z, layer: z @ number(layer.weight).T + number(layer.bias)  # noqa: E731
    y = number(net.embed(x[None]))[0]
    if tokens is not None:
        y = np.concatenate([y[:1], tokens, y[1:]])
    for depth, block in enumerate(trunk.blocks):
        q, k, v = np.split(linear(norm(y, block.norm1), block.attn.qkv), 3, axis=1)
        if prefixes and depth in prefixes:
            k, v = (np.concatenate([before, own]) for before, own in zip(prefixes[depth], (k, v)))
        width = q.shape[1] // block.attn.num_heads
        read = []
        for head in range(block.attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
            read.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        y = y + linear(np.concatenate(read, axis=1), block.attn.proj)
        y = y + number(block.mlp(torch.from_numpy(norm(y, block.norm2))))
    return norm(y, trunk.norm)


def test_without_prompts_the_network_is_its_trunk():
    net, x = network(), images()
    assert (net.encode(x)[:, 0] - net.features(x)).abs().max() < 1e-12
    assert (net.encode(x)[0].detach().numpy() - attend(net, x[0])).__abs__().max() < 1e-12


# -- the equations -------------------------------------------------------------------------------------------------


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def numpy_of(made, name):
    return [p.detach().numpy() for p in getattr(made, name)]


def expect_l2p(made, x, query, task):
    pool, keys = made.pool.detach().numpy(), made.keys.detach().numpy()
    match = np.array([cosine(query, key) for key in keys])
    chosen = np.argsort(-match)[:2]
    outputs = attend(made.net, x, tokens=pool[chosen].reshape(-1, 16))
    return outputs[1:5].mean(0), {"pull": -0.1 * match[chosen].sum()}


def expect_dualprompt(made, x, query, task):
    keys = made.keys.detach().numpy()
    general, expert = numpy_of(made, "general"), numpy_of(made, "expert")
    match = [cosine(query, key) for key in keys]
    own = int(np.argmax(match)) if task is None else task
    prefixes = {0: np.concatenate([general[0], expert[0][own]], axis=1), 2: expert[1][own]}
    return attend(made.net, x, prefixes=prefixes)[0], {"pull": -match[own]}


def expect_coda(made, x, query, task):
    so_far, prefixes, penalty = 6 if task is None else 2 * (task + 1), {}, 0.0
    for layer in (0, 1):
        pool, keys, attention = (numpy_of(made, name)[layer][:so_far] for name in ("pool", "keys", "attention"))
        prompt = sum(cosine(query * a, k) * p.reshape(4, 16) for p, k, a in zip(pool, keys, attention))
        prefixes[layer] = (prompt[:2], prompt[2:])
        penalty += sum(np.square(r @ r.T - np.eye(so_far)).sum() for r in (pool, keys, attention))
    return attend(made.net, x, prefixes=prefixes)[0], {"orthogonality": 0.5 * penalty}


EXPECTED = {L2P: expect_l2p, DualPrompt: expect_dualprompt, CodaPrompt: expect_coda}


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_loss_and_answers_are_the_equations(kind, three_images):
    made = method(kind, **({"orthogonality": 0.5} if kind is CodaPrompt else {}))
    raw, y = three_images[0], np.array([3, 2, 3])
    x = raw.double() / 255
    batch = batch_of(raw, torch.from_numpy(y), task=1)
    losses = made.observe(batch.__class__(**(vars(batch) | {"x": x})))
    weight, bias = (p.detach().numpy() for p in made.net.head.parameters())
    ce, others, answers = [], {}, []
    for image, label in zip(x, y):
        query = made.net.features(image[None]).detach().numpy()[0]
        features, more = EXPECTED[kind](made, image, query, 1)
        logits = (weight @ features + bias)[2:4]  # the task's own classes
        ce.append(np.log(np.exp(logits).sum()) - logits[label - 2])
        for name, value in more.items():
            others.setdefault(name, []).append(value)
        answers.append(weight @ EXPECTED[kind](made, image, query, None)[0] + bias)
    expected = {"ce": np.mean(ce)} | {name: np.mean(values) for name, values in others.items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(made.predict(x, None).detach().numpy(), answers, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)
def test_with_all_prompts_off_the_head_reads_the_trunk(kind):
    made, x = method(kind, prompts=False), images()
    torch.testing.assert_close(made.predict(x, None), made.net(x))
    (phase,) = list(made.learn(scenario().tasks[1]))
    assert [id(p) for p in phase.params] == [id(p) for p in made.net.head.parameters()]
    assert made.facts()["prompt_parameters"] == 0


@pytest.mark.parametrize(("loss_classes", "compared"), [("task", slice(2, 4)), ("seen", slice(4)), ("all", slice(6))])
def test_head_masking_is_a_key(loss_classes, compared, three_images):
    made, y = method(L2P, prompts=False, loss_classes=loss_classes).float(), torch.tensor([3, 2, 3])
    batch = batch_of(three_images[0], y, task=1)
    logits = made.net(batch.x)[:, compared]
    assert made.observe(batch)["ce"].item() == pytest.approx(F.cross_entropy(logits, y - (compared.start or 0)).item())


def test_the_published_counts_of_parameters():
    wide = KEYS | {"dim": 768, "depth": 5, "heads": 12, "mlp_ratio": 0.01, "num_classes": 10}
    ten = make_split(source=toy_images(num_classes=10), num_tasks=10)
    counts = {L2P: 46_080, DualPrompt: 253_440, CodaPrompt: 3_840_000}
    paper = {
        L2P: {"pool": 10, "length": 5, "top": 5},
        DualPrompt: {"general_layers": [0, 1], "expert_layers": [2, 3, 4], "length": 5},
        CodaPrompt: {"layers": [0, 1, 2, 3, 4], "components": 10, "length": 8},
    }
    for kind, keys in paper.items():
        made = kind(net=PromptViT(**wide), scenario=ten, **(PROMPTS[kind] | RULE | keys))
        assert made.facts()["prompt_parameters"] == counts[kind]


# -- learning ------------------------------------------------------------------------------------------------------


def test_an_expert_prefix_starts_as_a_copy_and_only_learned_tasks_are_chosen():
    made = method(DualPrompt, learned=1)
    assert (made.choose(made.net.features(images(50))) == 0).all()
    old = [p[0].clone() for p in made.expert]
    made.open_task(scenario().tasks[1])
    assert all(torch.equal(p[1], before) for p, before in zip(made.expert, old))
    assert set(made.choose(made.net.features(images(50))).tolist()) == {0, 1}


def test_components_of_earlier_tasks_get_no_gradient(three_images):
    made = method(CodaPrompt).float()
    made.observe(batch_of(three_images[0], torch.tensor([3, 2, 3]), task=1))["ce"].backward()
    for p in made.list_prompts():
        rows = p.grad.abs().sum(1) > 0
        assert rows.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "coda_prompt"])
def test_the_trunk_is_bit_equal_after_a_task(name, tmp_path):
    parts = parts_of(name, "trainer.epochs=1", "method.warm_up_epochs=1")
    trunks, learn = [], parts.method.learn

    def watched(task):
        for number, phase in enumerate(learn(task)):
            if task.id > 0 or number > 0:
                trunks.append(clone_state(parts.method.net.trunk.state_dict()))
            yield phase

    parts.method.learn = watched
    trainer_of(parts, tmp_path).run()
    trunks.append(parts.method.net.trunk.state_dict())
    assert len(trunks) == 3
    assert all(torch.equal(trunk[name], value) for trunk in trunks for name, value in trunks[0].items())


# -- chosen for each image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [*EXPECTED, SimpleCIL, partial(RanPAC, projection=30)],
    ids=["L2P", "DualPrompt", "CODA-Prompt", "SimpleCIL", "RanPAC"],
)
def test_an_image_gets_the_same_answer_in_any_batch(kind):
    made, x, bound = (
        (method(kind), images(32), 1e-10) if kind in EXPECTED else (learned(kind)[0], images(32).float(), 1e-4)
    )
    together = made.predict(x, None)
    for size in (1, 16):
        apart = torch.cat([made.predict(part, None) for part in x.split(size)])
        assert (apart - together).abs().max() < bound
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert (made.predict(x[order], None) - together[order]).abs().max() < bound


class VotingL2P(L2P):
    """Replaces each image's choice by the commonest of its batch, as released codes do."""

    def choose(self, query):
        chosen, match = super().choose(query)
        votes = torch.bincount(chosen.flatten(), minlength=len(self.keys)).topk(self.top).indices
        return votes.expand(len(query), -1), match


class VotingDualPrompt(DualPrompt):
    """The same."""

    def choose(self, query):
        chosen = super().choose(query)
        return chosen.mode().values.expand(len(query))


@pytest.mark.parametrize(("name", "voting"), [("l2p", VotingL2P), ("dualprompt", VotingDualPrompt)])
def test_the_audit_catches_a_vote(name, voting):
    parts = parts_of(name, "scenario.test_per_class=5")
    torch.manual_seed(5)
    for task in parts.scenario.tasks:
        parts.method.open_task(task)
    for p in (*parts.method.list_prompts(), *parts.method.net.head.parameters()):
        p.data = torch.randn_like(p)
    keys = parts.method.keys
    for number, task in enumerate(parts.scenario.tasks):  # keys that different images choose
        x = parts.scenario.transform.normalise(task.test.images[: len(keys) // 2])
        keys.data[number::2] = parts.method.net.eval().features(x).detach()
    nothing = {of: np.zeros(50, dtype=np.int64) for of in ("class_il", "task_il")}
    names = ["one image a batch gives the same answers", "batches of a single task give the same answers"]

    def verdicts():
        return {check.name: check.passed for check in check_answers(parts, nothing) if check.name in names}

    assert verdicts() == dict.fromkeys(names, True)
    parts.method.__class__ = voting
    assert not verdicts()[names[0]]


def test_the_audit_allows_images_of_classes_that_are_in_no_task():
    held_out = ["scenario.pretrain_classes=4", "scenario.classes_per_task=[3,3]", "method.warm_up=half"]
    (check, *_) = check_rehearsal(lambda: parts_of("l2p", *held_out))
    assert check.name == "every phase trains on training images"
    assert check.passed


# -- without gradient descent --------------------------------------------------------------------------------------


def learned(kind, **keys):
    torch.manual_seed(0)
    net, parts = network().float(), scenario()
    made = kind(net=net, scenario=parts, **keys)
    for task in parts.tasks:
        assert list(made.learn(task)) == []
    return made, parts


def test_no_test_image_takes_part_in_a_choice():
    checks = {check.name: check for check in check_rehearsal(lambda: parts_of("ranpac"))}
    assert checks["training does not depend on the images it is measured on"].passed


def test_simplecil_against_numpy():
    made, parts = learned(SimpleCIL)
    x = images().float()
    h = lambda z: made.net.features(z).detach().double().numpy()  # noqa: E731
    means = []
    for c in range(6):
        data = parts.tasks[c // 2].train
        means.append(h(parts.transform.normalise(data.images[data.labels == c])).mean(0))
    expected = [[cosine(row, mean) for mean in means] for row in h(x)]
    np.testing.assert_allclose(made.predict(x, None).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projection", [0, 40])
def test_ranpac_is_scikit_learns_ridge_regression(projection):
    from sklearn.linear_model import Ridge

    made, parts = learned(RanPAC, projection=projection)
    train = [task.train for task in parts.tasks]
    h = torch.cat([made.project(parts.transform.normalise(data.images)) for data in train]).detach().double()
    y = F.one_hot(torch.cat([data.labels for data in train]), 6).double()
    ridge = float(made.ridges[-1])
    assert ridge in np.float32(RIDGES)
    theirs = Ridge(alpha=ridge, fit_intercept=False, solver="cholesky").fit(h.numpy(), y.numpy())
    x = images().float()
    expected = theirs.predict(made.project(x).detach().double().numpy())
    np.testing.assert_allclose(made.predict(x, None).detach().numpy(), expected, atol=2e-3)
    assert h.shape[1] == (projection or 16)


def test_the_order_of_tasks_changes_no_sum():
    made, parts = learned(RanPAC, projection=30)
    other = RanPAC(net=made.net, scenario=parts, projection=30)
    other.projection.copy_(made.projection)
    for task in reversed(parts.tasks):
        list(other.learn(task))
    for name in ("gram", "targets"):
        torch.testing.assert_close(getattr(made, name), getattr(other, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("images_of_task", "features"), [(40, 100), (200, 30)])
def test_one_decomposition_gives_the_errors_of_seventeen_solutions(images_of_task, features):
    draw = torch.Generator().manual_seed(1)
    h = torch.rand(images_of_task, features, generator=draw).double()
    y = F.one_hot(torch.randint(5, (images_of_task,), generator=draw), 5).double()
    first = int(0.8 * images_of_task)
    parts = (h[:first], y[:first], h[first:], y[first:])
    expected = []
    for ridge in RIDGES[5:]:
        solution = torch.linalg.solve(
            parts[0].T @ parts[0] + ridge * torch.eye(features).double(), parts[0].T @ parts[1]
        )
        expected.append(F.mse_loss(parts[2] @ solution, parts[3]))
    torch.testing.assert_close(torch.stack(measure_errors(*parts)[5:]), torch.stack(expected), rtol=1e-6, atol=0)
    assert choose_ridge(h, y) == RIDGES[int(torch.stack(measure_errors(*parts)).argmin())]


@pytest.mark.parametrize("name", ["simplecil", "ranpac"])
def test_a_run_without_a_step(name, tmp_path):
    parts = parts_of(name)
    trainer = trainer_of(parts, tmp_path)
    before = clone_state(parts.method.net.state_dict())
    record = trainer.run()
    assert trainer.steps_done == 0
    assert record.task_il.accuracy[-1].min() > 50
    assert all(torch.equal(value, before[key]) for key, value in parts.method.net.state_dict().items())


# -- where the trunk comes from ------------------------------------------------------------------------------------


def test_one_small_trunk_serves_every_network(tmp_path):
    """A file that trainer.keep_tasks of memory_vit writes, in both networks; then no warm-up is left."""
    digits = [*TINY, "scenario.pretrain_classes=0", "backbone=memory_vit_digits", "method.warm_up_epochs=1"]
    parts = build(configure(*digits, "trainer.epochs=1", "trainer.keep_tasks=true"))
    trainer_of(parts, tmp_path).run()
    file = f"backbone.checkpoint={tmp_path / 'task00.pt'}"
    x = parts.scenario.transform.normalise(parts.scenario.tasks[0].test.images)
    expected = parts.method.net.eval().features(x)
    weights = []
    for name, backbone in (("memory_vit", "memory_vit_digits"), ("l2p", "memory_vit_digits")):
        chosen = [f"backbone={'prompt_vit_digits' if name == 'l2p' else backbone}", f"method={name}"]
        sizes = ["backbone.dim=128", "backbone.depth=2"]
        again = build(configure(*TINY, *chosen, file, "backbone.model=small", *sizes)).method
        assert torch.equal(again.net.eval().features(x), expected)
        assert again.facts()["trunk"] == "weights of small from the file task00.pt"
        weights.append(again.facts()["weights"])
        assert len(list(again.learn(parts.scenario.tasks[0]))) == 1
    assert weights[0] == weights[1]
    digest = hashlib.sha256()
    for key, tensor in parts.method.net.trunk.state_dict().items():
        if not key.startswith("head."):  # of the warm-up
            digest.update(key.encode() + tensor.numpy().tobytes())
    transform = parts.scenario.transform
    expected = {"model": "small", "sha256": digest.hexdigest(), "images": "8 x 8, not cropped in testing"}
    assert weights[0] == expected | {"mean": transform.mean, "std": transform.std}
    wrong = configure(
        *TINY, "backbone=prompt_vit_digits", "method=l2p", file, "backbone.model=small", "backbone.dim=64"
    )
    with pytest.raises(ConfigError, match=r"backbone\.checkpoint: expected a file with the weights of small"):
        build(wrong)


def test_small_has_no_weights_to_fetch():
    with pytest.raises(ConfigError, match=r"pretrained: expected false with model=small"):
        PromptViT(**(KEYS | {"pretrained": True, "model": "small"}))


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"layers: expected different numbers from 0 to 2"):
        method(CodaPrompt, layers=[0, 3])


def test_each_is_tried_by_the_contract():
    assert {"simplecil", "ranpac", "l2p", "dualprompt", "coda_prompt"} < SUITS.keys()
