"""Learnable-memory ViT: who reads what, what a new task changes, and what the paper's identities say."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, batch_of, configure, make_split, network_of, toy_images

from cl_bench.backbones.layers.vit import build_small_vit
from cl_bench.backbones.memory_vit import MemoryViT, build_attention_rules
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.loggers.group import Loggers
from cl_bench.methods.memory_vit import LearnableMemory
from cl_bench.scenarios.split import Split

pytestmark = pytest.mark.arithmetic

KEYS = {
    "pretrained": False, "checkpoint": None, "model": "test_vit", "patch_size": 4, "dim": 16, "depth": 3, "heads": 2,
    "mlp_ratio": 2.0, "attention": "extension", "memory": 3, "class_token": True, "reads": None, "num_classes": 6,
    "image_shape": (1, 8, 8), "image_mean": [0.4], "image_std": [0.2],
}  # fmt: skip
RULE = {
    "rule": "argmax", "rehearsal": "all", "rehearsal_size": 32, "buffer": None, "warm_up": "first_task",
    "warm_up_epochs": 1, "warm_up_lr": 0.001, "warm_up_weight_decay": 0.0,
}  # fmt: skip


def network(tasks=(2, 2, 2), **keys) -> MemoryViT:
    """In float64, every weight well away from its start."""
    torch.manual_seed(0)
    net = MemoryViT(**(KEYS | keys)).double().eval()
    for size in tasks:
        net.add_task(size)
    net.double()
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net


def only(net: MemoryViT, tasks: list[int]) -> MemoryViT:
    """The same trunk with some of the tasks."""
    part = MemoryViT(**(KEYS | {"attention": net.attention, "memory": net.num_memory})).double().eval()
    part.trunk.load_state_dict(net.trunk.state_dict())
    for new, old in enumerate(tasks):
        part.add_task(net.sizes[old])
        part.double()
        part.memories[new].data, part.tokens[new].data = net.memories[old].data, net.tokens[old].data
        part.heads[new].load_state_dict(net.heads[old].state_dict())
    return part


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-12)


# -- who reads what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "earlier"), [("extension", True), ("concatenation", False)])
def test_attention_rules_are_the_papers_table(mode, earlier):
    inputs, tasks, memory = 5, 4, 3
    rules = build_attention_rules(inputs, tasks, memory, mode)
    assert rules.shape == (inputs + tasks, inputs + tasks + tasks * memory)  # memory has columns but no rows
    for query in range(inputs + tasks):
        for key in range(rules.shape[1]):
            if key < inputs:
                expected = True
            elif query < inputs:
                expected = False
            else:
                owner = key - inputs if key < inputs + tasks else (key - inputs - tasks) // memory
                task = query - inputs
                expected = owner == task or (earlier and owner < task)
            assert rules[query, key] == expected, (query, key)


@pytest.mark.parametrize("mode", ["extension", "concatenation"])
def test_outputs_are_one_masked_attention_over_input_class_tokens_and_memory(mode):
    """The layer as the paper writes it, with the whole table of rules, in one sequence."""
    net, x = network(attention=mode), images()
    trunk = net.trunk
    n, tasks = trunk.pos_embed.shape[1], len(net.tokens)
    rules = build_attention_rules(n, tasks, net.num_memory, mode)
    patches = trunk.patch_embed(x)
    y = torch.cat([trunk.cls_token.expand(len(x), -1, -1), patches], 1) + trunk.pos_embed
    c = torch.stack([token[0] + trunk.pos_embed[0, 0] for token in net.tokens]).expand(len(x), -1, -1)
    z = torch.cat([y, c], 1)
    for depth, block in enumerate(trunk.blocks):
        e = torch.cat([memory[depth] for memory in net.memories]).expand(len(x), -1, -1)
        normed = block.norm1(torch.cat([z, e], 1))
        heads = block.attn.num_heads
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in block.attn.qkv(normed).chunk(3, 2))
        scores = q[:, :, : n + tasks] @ k.transpose(2, 3) / math.sqrt(k.shape[3])
        weights = scores.masked_fill(~rules, -torch.inf).softmax(3)
        z = z + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))  # the residual carries no memory
        z = z + block.mlp(block.norm2(z))
    z = trunk.norm(z)
    assert same(net.compute_outputs(x), z[:, n:])
    assert same(net.features(x), z[:, 0])  # the trunk's own class token, among all the others


def test_input_tokens_are_those_of_timms_network_without_any_task():
    from timm.models.vision_transformer import VisionTransformer

    net, x = network(), images()
    plain = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=0, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2.0
    ).double()
    plain.load_state_dict(net.trunk.state_dict())
    seen = []
    for block in net.trunk.blocks:  # what our pass hands to each layer and what the last one makes of it
        block.norm1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.compute_outputs(x)
    layers = [y for y in seen if y.shape[1] == 5]
    expected = []
    for block in plain.blocks:
        block.register_forward_pre_hook(lambda module, inputs: expected.append(inputs[0]))
    plain(x)
    assert len(layers) == len(expected) == 3
    assert all(same(a, b) for a, b in zip(layers, expected))
    assert same(net.features(x), plain(x))


# -- what a new task changes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 1, 3, 20])
@pytest.mark.parametrize("mode", ["extension", "concatenation"])
def test_a_new_task_leaves_old_outputs_unchanged(mode, memory):
    net, x = network(attention=mode, memory=memory), images()
    assert same(only(net, [0, 1]).compute_outputs(x), net.compute_outputs(x)[:, :2])
    assert same(only(net, [0, 1])(x)[:, :4], net(x)[:, :4])


@pytest.mark.parametrize("memory", [0, 1, 3, 20])
def test_concatenated_tasks_are_as_run_on_their_own(memory):
    net, x = network(attention="concatenation", memory=memory), images()
    for task in range(3):
        assert same(only(net, [task]).compute_outputs(x)[:, 0], net.compute_outputs(x)[:, task])


def test_an_extended_task_reads_the_earlier_ones():
    net, x = network(attention="extension"), images()
    apart = network(attention="concatenation")
    apart.load_state_dict(net.state_dict())
    assert same(net.compute_outputs(x)[:, 0], apart.compute_outputs(x)[:, 0])
    assert (net.compute_outputs(x)[:, 2] - apart.compute_outputs(x)[:, 2]).abs().max() > 1e-3
    before = net.compute_outputs(x)
    net.memories[0].data += torch.randn_like(net.memories[0])
    assert (net.compute_outputs(x)[:, 2] - before[:, 2]).abs().max() > 1e-3


def test_every_class_token_has_position_zero():
    net, x = network(), images()
    before, shift = net.compute_outputs(x), torch.randn(16, dtype=torch.float64)
    net.trunk.pos_embed.data[:, 0] += shift
    assert (net.compute_outputs(x) - before).abs().amax((0, 2)).min() > 1e-3
    for token in (*net.tokens, net.trunk.cls_token):
        token.data -= shift
    assert same(net.compute_outputs(x), before)


def test_memory_passes_the_layers_norm():
    net, x = network(), images()
    before = net.compute_outputs(x)
    net.memories[1].data += 1.0  # a LayerNorm takes the same number in all channels away
    assert same(net.compute_outputs(x), before)
    net.memories[1].data[..., 0] += 1.0
    assert not same(net.compute_outputs(x), before)


@pytest.mark.parametrize(("memory", "classes"), [(3, 2), (1, 4), (0, 2)])
def test_parameters_of_a_task(memory, classes):
    net = network(tasks=(2,), memory=memory)
    before = sum(p.numel() for p in net.parameters())
    net.add_task(classes)
    added = sum(p.numel() for p in net.parameters()) - before
    assert added == 3 * memory * 16 + 16 + (16 + 1) * classes
    assert sum(p.numel() for p in net.list_newest()) == added
    assert {id(p) for p in net.parameters() if p.requires_grad and p.numel()} == {id(p) for p in net.list_newest()}


def test_the_papers_count_of_a_task():
    """ViT-B, m = 5, 100 classes: 46,080 memory parameters, 123,748 in all."""
    net = MemoryViT(
        **(KEYS | {"dim": 768, "depth": 12, "heads": 12, "mlp_ratio": 0.01, "memory": 5, "num_classes": 100})
    )
    net.add_task(100)
    assert net.memories[0].numel() == 46_080
    assert sum(p.numel() for p in net.list_newest()) == 123_748


def test_heads_alone_read_the_trunks_class_token():
    net, x = network(memory=0, class_token=False), images()
    assert len(net.tokens) == len(net.memories) == 0
    assert same(net(x)[:, 2:4], net.heads[1](net.features(x)))
    assert sum(p.numel() for p in net.list_newest()) == (16 + 1) * 2


# -- top-k reads -----------------------------------------------------------------------------------------------------


def with_reads(reads, **keys) -> MemoryViT:
    net = network(memory=4, **keys)
    net.reads = reads
    return net


@pytest.mark.parametrize("mode", ["extension", "concatenation"])
def test_all_reads_are_bit_equal_to_no_choice(mode):
    x = images()
    assert torch.equal(with_reads(4, attention=mode)(x), network(memory=4, attention=mode)(x))
    assert MemoryViT(**(KEYS | {"reads": 3})).reads == MemoryViT(**KEYS).reads == 3


@pytest.mark.parametrize("mode", ["extension", "concatenation"])
def test_a_class_token_attends_to_the_best_tokens_of_each_task(mode):
    """The layer in plain numpy, for each image, query and task by itself."""
    net, x = with_reads(2, attention=mode), images(3)
    trunk, heads, outputs = net.trunk, 2, []
    for image in x:
        y = net.embed(image[None])[0]
        c = torch.cat([token + trunk.pos_embed[0, :1] for token in net.tokens])
        for depth, block in enumerate(trunk.blocks):
            e = torch.cat([memory[depth] for memory in net.memories])
            qkv = block.attn.qkv(block.norm1(torch.cat([y, c, e]))).detach().numpy()
            q, k, v = np.split(qkv, 3, axis=1)
            rules = build_attention_rules(5, 3, 4, mode).numpy()
            for query in range(3):
                match = [q[5 + query] @ key for key in k[8:]]  # summed over heads
                for task in range(3):
                    rows = np.arange(4 * task, 4 * task + 4)
                    worst = sorted(rows, key=lambda row: match[row])[:2]
                    rules[5 + query, 8 + np.array(worst)] = False
            read = []
            for head in range(heads):
                part = slice(8 * head, 8 * head + 8)
                weights = np.where(rules, np.exp(q[:8, part] @ k[:, part].T / np.sqrt(8)), 0)
                read.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
            z = torch.cat([y, c]) + block.attn.proj(torch.from_numpy(np.concatenate(read, axis=1)))
            z = z + block.mlp(block.norm2(z))
            y, c = z[:5], z[5:]
        outputs.append(trunk.norm(c))
    assert same(net.compute_outputs(x), torch.stack(outputs))


@pytest.mark.parametrize("mode", ["extension", "concatenation"])
def test_with_reads_a_new_task_leaves_old_outputs_unchanged(mode):
    net, x = with_reads(1, attention=mode), images()
    part = MemoryViT(**(KEYS | {"attention": mode, "memory": 4, "reads": 1})).double().eval()
    part.trunk.load_state_dict(net.trunk.state_dict())
    for task in (0, 1):
        part.add_task(2)
        part.double()
        part.memories[task].data, part.tokens[task].data = net.memories[task].data, net.tokens[task].data
    assert same(part.compute_outputs(x), net.compute_outputs(x)[:, :2])
    apart = torch.cat([net.compute_outputs(image[None]) for image in x])
    assert same(apart, net.compute_outputs(x))  # chosen for each image


@pytest.mark.parametrize("reads", [0, 4])
def test_reads_are_one_to_all_tokens(reads):
    with pytest.raises(ConfigError, match=r"reads: expected 1 to memory=3, or null for all"):
        MemoryViT(**(KEYS | {"reads": reads}))


# -- rehearsal -------------------------------------------------------------------------------------------------------

REHEARSAL = ["backbone=memory_vit_digits", "method.warm_up_epochs=1", "trainer.epochs=1", "buffer=reservoir",
             "buffer.capacity=20", "method.rehearsal_size=8", "scenario.classes_per_task=[4,3,3]"]  # fmt: skip


@pytest.mark.parametrize("rehearsal", ["new", "all"])
def test_rehearsal_trains_what_its_key_says(rehearsal, tmp_path):
    parts = build(configure(*TINY, *REHEARSAL, f"method.rehearsal={rehearsal}"))
    method, changed = parts.method, []
    learn = method.learn

    def watched(task):
        for phase in learn(task):
            before = {name: p.detach().clone() for name, p in method.net.named_parameters()}
            yield phase
            changed.append({name for name, p in method.net.named_parameters() if not torch.equal(p, before[name])})

    method.learn = watched
    record = parts.build_trainer(Loggers([]), Checkpoint(tmp_path), lambda: False).run()
    own = {
        task: {f"memories.{task}", f"tokens.{task}", f"heads.{task}.weight", f"heads.{task}.bias"} for task in (0, 1, 2)
    }
    assert changed[1:] == (
        [own[0], own[0] | own[1], own[0] | own[1] | own[2]] if rehearsal == "all" else [*own.values()]
    )
    accuracy = record.task_il.accuracy
    forgets = any((accuracy[task:, task] != accuracy[task, task]).any() for task in range(3))
    assert forgets or rehearsal == "new" or len(parts.buffer) == 20
    if rehearsal == "new":
        assert not forgets


def test_the_loss_of_rehearsal_is_over_all_classes_so_far(three_images):
    parts = build(configure(*TINY, *REHEARSAL))
    method, task = parts.method, parts.scenario.tasks[0]
    method.net.add_task(4)
    method.net.add_task(3)
    assert len(method.inputs(batch_of(task.train.images[:3], task.train.labels[:3]))["y"]) == 3  # nothing to rehearse
    parts.buffer.add(batch_of(task.train.images, task.train.labels))
    inputs = method.inputs(batch_of(parts.scenario.tasks[1].train.images[:3], torch.tensor([4, 5, 6]), task=1))
    assert len(inputs["y"]) == 3 + 8
    assert (inputs["y"][3:] < 4).all()
    z, y = method.net(inputs["x"]).detach().double().numpy()[:, :7], inputs["y"].numpy()
    expected = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(11), y])
    assert method.terms(inputs, 1)[0]["ce"].item() == pytest.approx(expected, rel=1e-5)


# -- the rule --------------------------------------------------------------------------------------------------------


def scenario(**keys) -> Split:
    return make_split(**({"source": toy_images(num_classes=6), "num_tasks": 3} | keys))


def method(tasks=(2, 2, 2), **keys) -> LearnableMemory:
    learned = LearnableMemory(net=network(tasks=()).float(), scenario=scenario(), **(RULE | keys)).eval()
    for size in tasks:
        learned.net.add_task(size)
    for p in learned.net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return learned


def test_losses_are_cross_entropies_among_the_tasks_classes(three_images):
    raw, _ = three_images
    learned = method()
    y = np.array([4, 5, 5])
    losses = learned.observe(batch_of(raw, torch.from_numpy(y), task=2))
    z = learned.net(raw.float() / 255).detach().double().numpy()[:, 4:]
    expected = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(3), y - 4])
    assert list(losses) == ["ce"]
    assert losses["ce"].item() == pytest.approx(expected, rel=1e-5)

    fresh = method(tasks=())
    y = np.array([0, 1, 1])
    losses = fresh.observe_warm_up(batch_of(raw, torch.from_numpy(y)))
    z = fresh.net.trunk(raw.float() / 255).detach().double().numpy()
    assert z.shape == (3, 2)
    expected = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(3), y])
    assert list(losses) == ["warm_up_ce"]
    assert losses["warm_up_ce"].item() == pytest.approx(expected, rel=1e-5)


def test_only_the_newest_task_gets_a_gradient_and_the_trunk_stays_in_evaluation_mode(three_images):
    learned = method().train()
    assert not any(module.training for module in learned.net.trunk.modules())
    assert learned.net.heads.training
    losses = learned.observe(batch_of(three_images[0], torch.tensor([4, 5, 4]), task=2))
    losses["ce"].backward()
    trained = {id(p) for p in learned.net.list_newest()}
    for name, p in learned.named_parameters():
        assert (p.grad is not None) == (id(p) in trained), name


def test_energy_rule_against_numpy():
    learned = method(rule="energy")
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        z = learned.net(x).double().numpy()
        answered = learned.predict(x, None)
        known = learned.predict(x, torch.zeros(64, dtype=torch.int64))
    energy = np.stack([-np.log(np.exp(z[:, 2 * t : 2 * t + 2]).sum(1)) for t in range(3)], 1)
    task = energy.argmin(1)
    expected = np.array([2 * t + z[i, 2 * t : 2 * t + 2].argmax() for i, t in enumerate(task)])
    assert len(set(task)) == 3
    assert (answered.argmax(1).numpy() == expected).all()
    assert (expected != z.argmax(1)).any()  # it is a rule of its own
    outside = np.arange(6)[None] // 2 != task[:, None]
    assert (answered.numpy() == -np.inf)[outside].all()
    np.testing.assert_array_equal(known.double().numpy(), z)
    assert set(learned.alternatives()) == {"argmax", "nearest_mean"}


def test_energy_rule_never_chooses_a_task_that_is_not_learned():
    learned = method(tasks=(2,), rule="energy")
    scores = learned.predict(torch.randn(9, 1, 8, 8), None)
    assert (scores[:, 2:] == -torch.inf).all()
    assert scores[:, :2].isfinite().all()
    assert (method(tasks=(), rule="energy").predict(torch.randn(2, 1, 8, 8), None) == -torch.inf).all()


def test_nearest_mean_against_numpy():
    learned, parts = method(tasks=()), scenario()
    for task in parts.tasks:
        list(learned.learn(task))
    x = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        features = learned.net.features(x).double().numpy()
        train = [learned.net.features(parts.transform.normalise(t.train.images)).double().numpy() for t in parts.tasks]
        scores = learned.alternatives()["nearest_mean"](x, None).numpy()
    means = [train[c // 2][(parts.tasks[c // 2].train.labels == c).numpy()].mean(0) for c in range(6)]
    expected = -np.linalg.norm(features[:, None] - np.array(means)[None], axis=2)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["extension", "concatenation"])
def test_a_run_forgets_nothing_in_task_il_and_leaves_the_trunk_as_it_was(mode, tmp_path):
    parts = build(configure(*TINY, "backbone=memory_vit_digits", f"backbone.attention={mode}", "method.rule=energy",
                            "method.warm_up_epochs=1", "scenario.classes_per_task=[4,3,3]"))  # fmt: skip
    trainer = parts.build_trainer(Loggers([]), Checkpoint(tmp_path), lambda: False)
    trunks = []
    learn = parts.method.learn

    def watched(task):
        for number, phase in enumerate(learn(task)):
            if task.id > 0 or number > 0:
                trunks.append({k: v.clone() for k, v in parts.method.net.trunk.state_dict().items()})
            yield phase

    parts.method.learn = watched
    record = trainer.run()
    accuracy = record.task_il.accuracy
    for task in range(3):
        assert (accuracy[task:, task] == accuracy[task, task]).all()
    assert len(trunks) == 3
    for trunk in [*trunks[1:], parts.method.net.trunk.state_dict()]:
        assert all(torch.equal(trunk[name], value) for name, value in trunks[0].items())
    facts = parts.method.facts()
    assert facts["trunk"] == "warmed up on the first task"
    own = 2 * 2 * 128 + 128
    assert facts["parameters_per_task"] == [own + 129 * size for size in (4, 3, 3)]
    assert set(trainer.alternatives) == {"argmax", "nearest_mean"}
    json.dumps(facts)


# -- where the trunk comes from --------------------------------------------------------------------------------------


def test_warm_up_on_held_out_classes():
    held = scenario(pretrain_classes=2, num_tasks=2)
    learned = LearnableMemory(
        net=network(tasks=(), num_classes=4).float(), scenario=held, **(RULE | {"warm_up": "half"})
    )
    assert learned.net.trunk.head.out_features == 2
    warm_up, own = learned.learn(held.tasks[0])
    assert warm_up.data is held.pretrain
    assert own.data is held.tasks[0].train
    (second,) = learned.learn(held.tasks[1])
    assert second.data is held.tasks[1].train
    assert learned.facts()["trunk"] == "warmed up on 2 held-out classes"
    with pytest.raises(ConfigError, match=r"warm_up: .* Set scenario.pretrain_classes=50"):
        method(warm_up="half")


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=7).eval()
    path = tmp_path / "weights.pt"
    torch.save(theirs.state_dict(), path)
    keys = {"checkpoint": str(path), "image_shape": (3, 32, 32), "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4] * 3}
    net = MemoryViT(**(KEYS | keys)).eval()
    raw = torch.rand(2, 3, 32, 32)
    x = (raw - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.4
    side = theirs.patch_embed.img_size
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    expected = (F.interpolate(raw, size=side, mode="bicubic") - mean) / std  # resized, normalised as it was trained
    torch.testing.assert_close(net.fit_images(x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(net.features(x), theirs.forward_head(theirs.forward_features(expected), pre_logits=True))
    learned = LearnableMemory(net=net, scenario=scenario(), **RULE)
    assert learned.facts()["trunk"] == "weights of test_vit from the file weights.pt"
    (phase,) = learned.learn(scenario().tasks[0])  # no warm-up
    assert sum(p.numel() for p in phase.params) == 6 * 3 * 64 + 64 + 65 * 2


def test_weights_of_timm(monkeypatch):
    create, asked = timm.create_model, []

    def fetched(model, *, pretrained, **keys):
        asked.append((model, pretrained))
        return create(model, pretrained=False, **keys)

    monkeypatch.setattr(timm, "create_model", fetched)
    keys = {"pretrained": True, "image_shape": (3, 32, 32), "image_mean": [0.1] * 3, "image_std": [0.4] * 3}
    learned = LearnableMemory(net=MemoryViT(**(KEYS | keys)), scenario=scenario(), **RULE)
    assert asked == [("test_vit", True)]
    assert learned.facts()["trunk"] == "weights of test_vit"
    assert len(list(learned.learn(scenario().tasks[0]))) == 1  # no warm-up


@pytest.mark.parametrize("kind", ["missing", "pickled code", "another network", "not a state dict"])
def test_a_wrong_file_of_weights_is_refused(kind, tmp_path):
    path = tmp_path / "weights.pt"
    if kind == "pickled code":
        path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    elif kind == "another network":
        torch.save({"layer.weight": torch.zeros(3)}, path)
    elif kind == "not a state dict":
        torch.save([1, 2], path)
    with pytest.raises(ConfigError, match=r"checkpoint: expected a file with the weights of test_vit"):
        MemoryViT(**(KEYS | {"checkpoint": str(path), "image_shape": (3, 32, 32)}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model", ["resnet10t", "test_vit3"])  # no transformer; pools by attention, has registers
def test_a_model_that_is_no_plain_vit_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match=r"model: expected a plain ViT with a class token"):
        MemoryViT(**(KEYS | {"checkpoint": str(tmp_path / "any"), "model": model, "image_shape": (3, 32, 32)}))


def test_unreachable_weights_say_the_way_out(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConfigError, match=r"no route to host.*backbone.checkpoint=PATH.*backbone.pretrained=false"):
        MemoryViT(**(KEYS | {"pretrained": True}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"memory": -1}, "memory: expected 0 or more"),
        ({"class_token": False}, "class_token: expected true with memory tokens"),
        ({"pretrained": True, "checkpoint": "x"}, "checkpoint: expected null with pretrained=true"),
        ({"patch_size": 3}, "patch_size: expected a divisor"),
        ({"heads": 3}, "heads: expected a divisor of dim = 16"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        MemoryViT(**(KEYS | keys))


# -- the plain ViT ---------------------------------------------------------------------------------------------------


def test_plain_vit_is_timms_and_as_large_as_lvt():
    net = network_of("backbone=vit")
    assert sum(p.numel() for p in net.parameters()) == 8_955_748
    small = network_of("backbone=vit", "+scale=mini").eval()
    x = torch.randn(2, 3, 32, 32)
    logits = small(x)
    assert logits.shape == (2, 100)
    torch.testing.assert_close(small.head(small.features(x)), logits)
    whole = build_small_vit(
        patch_size=8, dim=96, depth=3, heads=3, mlp_ratio=4.0, num_classes=100, image_shape=(3, 32, 32)
    ).eval()
    head = {f"head.{name}": value for name, value in small.head.state_dict().items()}
    whole.load_state_dict(small.net.state_dict() | head)
    torch.testing.assert_close(whole(x), logits)
    torch.testing.assert_close(small.features(x), small.net.forward_features(x)[:, 0])
