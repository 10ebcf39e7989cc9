"""The loop: schedules, clipping, order, logs, and what stops it."""

import contextlib
import math
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    Events,
    assert_equal_results,
    configure,
    find_run,
    network_of,
    parts_of,
    run_in_process,
    trainer_of,
)

from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import Batch, Phase, Task
from cl_bench.engine.trainer import Interrupted, Trainer
from cl_bench.methods.base import Method
from cl_bench.optim import Constant, Cosine, MultiStep, adamw, sgd, without_compiler
from cl_bench.report.page import Run


class Probe(Method):
    """Two phases a task; notes what it sees."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen, self.modes, self.rates = net, [], [], []

    def learn(self, task: Task) -> Iterator[Phase]:
        self.modes.append(("open", self.training))
        yield Phase(task.train, self.observe, self.net.parameters())
        self.modes.append(("between", self.training))
        yield Phase(
            task.train,
            self.observe,
            [self.net.head.weight],
            epochs=5,
            lr=0.5,
            optimizer=lambda params: torch.optim.Adam(params, lr=1.0),
            schedule=lambda epoch, epochs: 1 / (epoch + 1),
            after_epoch=lambda epoch: epoch == 2,
        )
        self.modes.append(("close", self.training))

    def observe(self, batch: Batch):
        assert self.training
        self.seen.append(batch)
        loss = torch.nn.functional.cross_entropy(self.net(batch.x), batch.y)
        return {"half": loss / 2, "other_half": loss / 2}

    def predict(self, x, task_id):
        assert not self.training
        return self.net(x)


def probe(tmp_path, *overrides):
    parts = build(configure(*TINY, *overrides))
    trainer = trainer_of(parts, tmp_path)
    trainer.method, trainer.logger = Probe(parts.method.net), Events()
    return trainer


def test_phases_epochs_rates_and_modes(tmp_path):
    trainer = probe(
        tmp_path, "optimizer.lr=0.2", "schedule=multistep", "schedule.milestones=[1]", "schedule.factor=0.5"
    )
    trainer.run()
    epochs = [e for e in trainer.logger.events if e["event"] == "epoch" and e["task"] == 0]
    assert [(e["phase"], e["epoch"]) for e in epochs] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]  # ended early
    assert [e["lr"] for e in epochs] == pytest.approx([0.2, 0.1, 0.5, 0.25, 0.5 / 3])
    assert trainer.method.modes == [("open", False), ("between", False), ("close", False)] * 2
    for e in epochs:
        assert e["loss"] == pytest.approx(2 * e["losses"]["half"])
    # 50 images in batches of 16: 16, 16, 16, 2
    assert [len(b) for b in trainer.method.seen[:4]] == [16, 16, 16, 2]
    assert trainer.steps_done == 2 * (2 + 3) * 4
    assert trainer.record.cost.samples_seen == 2 * (2 + 3) * 50
    last = trainer.logger.progress[7]
    assert (last.task, last.phase, last.epoch, last.epochs, last.step, last.steps) == (0, 0, 1, 2, 3, 4)


def test_every_epoch_visits_each_image_once_in_its_own_order(tmp_path):
    trainer = probe(tmp_path)
    trainer.run()
    batches = trainer.method.seen
    first, second = (torch.cat([b.raw for b in batches[i : i + 4]]) for i in (0, 4))
    assert not torch.equal(first, second)
    keys = [sorted(image.numpy().tobytes() for image in epoch) for epoch in (first, second)]
    train = trainer.scenario.tasks[0].train.images
    assert keys[0] == keys[1] == sorted(image.numpy().tobytes() for image in train)


def test_a_phase_trains_its_parameters_only(tmp_path):
    trainer = probe(tmp_path)
    task = trainer.scenario.tasks[0]
    before = {n: p.detach().clone() for n, p in trainer.method.named_parameters()}
    trainer.run_phase(task, 0, Phase(task.train, trainer.method.observe, [trainer.method.net.head.bias]), None)
    changed = {n for n, p in trainer.method.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"net.head.bias"}


def test_clipping_bounds_the_step(tmp_path):
    def moved(*overrides):
        trainer = probe(tmp_path, "optimizer.lr=1", "trainer.batch_size=50", "trainer.epochs=1", *overrides)
        task, params = trainer.scenario.tasks[0], list(trainer.method.net.parameters())
        before = [p.detach().clone() for p in params]
        trainer.run_phase(task, 0, Phase(task.train, trainer.method.observe, params), None)
        return torch.cat([(a - b).flatten() for a, b in zip(params, before)]).norm().item()

    assert moved() > 0.2
    assert moved("trainer.clip_norm=0.1") == pytest.approx(0.1, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = probe(tmp_path, "optimizer.lr=1e30", "trainer.epochs=20")
    with pytest.raises(
        FloatingPointError, match=r"not finite by step \d+ \(task 1, phase 1, epoch \d+\).*optimizer.lr"
    ):
        trainer.run()


def test_schedules():
    assert [Constant()(e, 3) for e in range(3)] == [1, 1, 1]
    assert [MultiStep(milestones=[2, 3], factor=0.1)(e, 5) for e in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    cosine = Cosine(warmup_epochs=2, warmup_factor=0.5, min_factor=0.1)
    assert [cosine(e, 6) for e in (0, 1, 2, 4)] == pytest.approx([0.5, 0.75, 1.0, 0.55])
    assert cosine(6, 6) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_without_the_compiler_computes_the_same(kind):
    keys = {"lr": 0.1, "weight_decay": 0.01} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    pairs = [(ours, without_compiler(kind)([ours], **keys)), (theirs, kind([theirs], **keys))]
    for step in range(4):
        for parameter, optimizer in pairs:
            optimizer.zero_grad()
            (parameter * (parameter - step)).sum().backward()
            assert optimizer.step() is None
    assert torch.equal(ours, theirs)
    assert not ours.equal(torch.linspace(-1, 1, 6))
    one, other = (optimizer.state_dict() for _, optimizer in pairs)
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys() == {0}
    assert all(
        torch.equal(torch.as_tensor(one["state"][0][n]), torch.as_tensor(v)) for n, v in other["state"][0].items()
    )
    again = without_compiler(kind)([torch.nn.Parameter(torch.zeros(6))], **keys)
    again.load_state_dict(other)
    assert isinstance(again, kind)
    assert again.state_dict()["state"].keys() == {0}


def test_optimizers_are_torchs():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = sgd([p], lr=0.1, momentum=0.0, weight_decay=0.5, nesterov=False)
    p.grad = torch.tensor([2.0])
    optimizer.step()
    assert p.item() == pytest.approx(1 - 0.1 * (2 + 0.5))
    q = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = adamw([q], lr=0.1, betas=[0.9, 0.999], weight_decay=0.5, decay_vectors=True)
    q.grad = torch.tensor([2.0])
    optimizer.step()
    assert q.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, rel=1e-5)  # decoupled decay, then a unit step


@pytest.mark.parametrize("keys", [{"lr": 0}, {"lr": -1}, {"lr": float("nan")}, {"weight_decay": -1}, {"momentum": 1}])
def test_wrong_optimizer_values_are_refused(keys):
    good = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    with pytest.raises(ConfigError, match=next(iter(keys))):
        sgd([torch.nn.Parameter(torch.zeros(1))], **(good | keys))


@pytest.mark.slow
def test_the_buffer_leaves_the_stream_as_it_was(tmp_path):
    """Changing what is remembered changes neither the order of the stream nor its augmentation."""

    def stream(*overrides):
        parts = build(configure(*TINY, "scenario.flip=true", "scenario.crop_padding=1", *overrides))
        seen = []
        observe = parts.method.observe
        parts.method.observe = lambda batch: seen.append(batch.x) or observe(batch)
        trainer_of(parts, tmp_path / "-".join(overrides)).run()
        return torch.cat(seen)

    alone = stream("method=finetune")
    assert torch.equal(alone, stream("method=er", "buffer=reservoir"))
    assert torch.equal(alone, stream("method=er", "buffer=fixed_memory"))
    assert not torch.equal(alone, stream("method=finetune", "seed=1"))


# -- several steps on each batch -----------------------------------------------------------------------------------

ONLINE = ["method=er", "buffer=reservoir", "trainer.epochs=1", "trainer.steps_per_batch=3", "trainer.batch_size=16"]


@pytest.mark.parametrize("speed", ["eager", "compile"])
def test_each_batch_is_trained_on_several_times_and_offered_once(tmp_path, speed):
    """50 images in batches of 16: 4 batches, 12 steps a task; the buffer is offered 50 images after their last step."""
    keys = ["scenario.flip=true", "scenario.crop_padding=1", "backbone=mlp", "backbone.hidden=[8]"]
    parts = build(configure(*TINY, *ONLINE, *keys, f"trainer.speed={speed}"))
    inputs, offered = parts.method.inputs, []

    def look(batch: Batch):
        offered.append((batch, int(parts.buffer.offered)))
        return inputs(batch)

    parts.method.inputs = look
    trainer = trainer_of(parts, tmp_path)
    trainer.run()
    assert trainer.steps_done == 2 * 3 * 4
    assert trainer.record.cost.samples_seen == 2 * 3 * 50
    assert [number for _, number in offered[:13]] == [0, 0, 0, 16, 16, 16, 32, 32, 32, 48, 48, 48, 50]
    assert parts.buffer.offered == 100
    first, second, third, fourth = (batch for batch, _ in offered[:4])
    assert torch.equal(first.raw, second.raw)
    assert torch.equal(first.raw, third.raw)
    assert not torch.equal(first.raw, fourth.raw)
    assert not torch.equal(first.x, second.x)  # other crops and flips at each step


def test_a_run_stopped_between_two_steps_on_a_batch_ends_the_same(tmp_path, monkeypatch):
    arguments = [*TINY, *ONLINE, "backbone=mlp", "backbone.hidden=[4]", "scenario.flip=true", "logger=none"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    assert run_in_process(*arguments, "results_dir=r", monkeypatch=monkeypatch, cwd=tmp_path / "straight") == 0
    status, stops = None, 0
    make_batch = Trainer.make_batch
    while status != 0:  # five steps at a time: after the second step on a batch, after the first, after the third, ...
        left = iter(range(5))

        def stop_soon(self, *arguments, left=left, **named):
            if next(left, None) is None:
                signal.raise_signal(signal.SIGTERM)
            return make_batch(self, *arguments, **named)

        monkeypatch.setattr(Trainer, "make_batch", stop_soon)
        status = run_in_process(*arguments, "results_dir=r", monkeypatch=monkeypatch, cwd=tmp_path / "stopped")
        assert status in (0, 143)
        stops += status == 143
    assert stops >= 4
    assert_equal_results(find_run(tmp_path / "straight"), find_run(tmp_path / "stopped"))


# -- phases of a number of steps, and what is measured -------------------------------------------------------------


@pytest.mark.parametrize(("steps", "epochs"), [(3, [3]), (4, [4]), (9, [4, 4, 1]), (30, [4, 4, 4, 4])])
def test_a_phase_ends_after_its_steps_or_its_epochs(tmp_path, steps, epochs):
    """50 images in batches of 16: 4 steps an epoch, 4 epochs at most."""
    parts = build(configure(*TINY, "method=finetune", "trainer.epochs=4", f"trainer.max_steps={steps}"))
    trainer = trainer_of(parts, tmp_path)
    trainer.logger = Events()
    trainer.run()
    assert trainer.steps_done == 2 * sum(epochs)
    assert trainer.record.cost.samples_seen == 2 * sum({4: 50, 3: 48, 1: 16}[n] for n in epochs)
    ended = [e["step"] for e in trainer.logger.events if e["event"] == "epoch" and e["task"] == 0]
    assert ended == [sum(epochs[: i + 1]) for i in range(len(epochs))]
    means = [e["loss"] for e in trainer.logger.events if e["event"] == "epoch"]
    assert all(0 < mean < 10 for mean in means)  # means over the images that were visited


def test_a_limited_phase_resumes_where_it_was(tmp_path):
    overrides = [*TINY, "method=ewc", "trainer.epochs=4", "trainer.max_steps=9", "backbone.hidden=[4]"]
    whole = trainer_of(build(configure(*overrides)), tmp_path / "whole")
    whole.run()
    for _ in range(8):
        parts = build(configure(*overrides))
        stopped = trainer_of(parts, tmp_path / "stopped")
        begun = []
        stopped.stop = lambda begun=begun: begun.append(0) or len(begun) > 4
        with contextlib.suppress(Interrupted):
            stopped.run()
            break
    assert stopped.steps_done == 2 * 9
    state = whole.method.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in stopped.method.state_dict().items())


def test_a_limit_of_half_a_batch_is_refused():
    with pytest.raises(ConfigError, match=r"max_steps: expected a multiple of trainer\.steps_per_batch=3; got 10"):
        build(configure(*TINY, *ONLINE, "trainer.max_steps=10"))


@pytest.mark.parametrize("measured", [True, False])
def test_other_rules_are_measured_unless_they_are_left_out(tmp_path, measured):
    parts = parts_of("supsup", f"trainer.alternatives={measured}", "trainer.epochs=1")
    trainer = trainer_of(parts, tmp_path)
    trainer.run()
    assert bool(trainer.alternatives) == bool(parts.method.alternatives()) * measured
    assert parts.method.alternatives()


def test_only_the_last_row_is_measured(tmp_path, monkeypatch):
    arguments = [*TINY, "backbone.hidden=[4]", "logger=none"]
    for after in ("each_task", "last_task"):
        call = [*arguments, f"trainer.evaluate_after={after}", f"results_dir={after}"]
        assert run_in_process(*call, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    each, last = (Run.read(find_run(tmp_path / after)) for after in ("each_task", "last_task"))
    ours, theirs = (run.record.get_matrix("task_il") for run in (last, each))
    assert np.isnan(ours.correct[[0, 2]]).all()
    assert np.array_equal(ours.correct[1], theirs.correct[1])
    assert last.summary["class_il"]["average_accuracy"] == each.summary["class_il"]["average_accuracy"]
    assert last.summary["task_il"]["forgetting"] is None
    assert last.summary["task_il"]["forward_transfer"] is None
    assert last.summary["cost"]["capacity"] == each.summary["cost"]["capacity"] == 1


# -- batches of one image ------------------------------------------------------------------------------------------

SLIM = ["backbone=resnet18_slim", "backbone.width=2"]
"""On digits of 8 x 8 pixels its last maps are one pixel: one image is one value of each channel."""

DRAWS = ["method=derpp", "buffer=reservoir"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["trainer.batch_size=1"], "trainer.batch_size"),
        (["trainer.batch_size=1", "method=er", "buffer=reservoir"], "trainer.batch_size"),
        (["trainer.batch_size=1", "method=supsup"], "trainer.batch_size"),
        ([*DRAWS, "method.replay_size=1"], "method.replay_size"),
        ([*DRAWS, "buffer.capacity=1"], "buffer.capacity"),
    ],
)
def test_batches_that_batchnorm_cannot_normalise_are_refused(overrides, key):
    with pytest.raises(ConfigError, match=f"^{key}: expected 2 or more, since BatchNorm .*8 x 8.*; got 1"):
        build(configure(*TINY, *SLIM, *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.batch_size=1", "backbone=mlp"],
        [*SLIM, "method=er", "buffer=reservoir", "method.replay_size=1"],  # drawn images join the stream's
        [*SLIM, "method=er", "buffer=reservoir", "buffer.capacity=1"],
        [*DRAWS, "backbone=mlp", "method.replay_size=1", "buffer.capacity=1", "trainer.batch_size=1"],
        ["backbone=lvt_digits", "buffer.capacity=1", "buffer=reservoir", "method.replay_size=1"],
    ],
)
def test_single_images_that_can_be_learned_are(overrides, tmp_path):
    small = ["trainer.epochs=1", "scenario.train_per_class=2"]
    record = trainer_of(build(configure(*TINY, *overrides, *small)), tmp_path).run()
    assert record.cost.samples_seen == 2 * 10  # two tasks of five classes, each image once
    assert math.isfinite(record.task_il.accuracy[-1].mean())


def test_maps_of_several_pixels_are_normalised_image_by_image():
    from cl_bench.backbones.base import check_single_images

    net = network_of(*SLIM, image_shape=(3, 32, 32))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_single_images(net, (3, 32, 32), "trainer.batch_size")
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(torch.rand(1, 3, 32, 32))  # as torch has it
    with pytest.raises(ConfigError):
        check_single_images(net, (3, 8, 8), "trainer.batch_size")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("kind", [[], ["dry_run=true"], ["trainer.replicas=2"], ["method=icarl", "buffer=herding"]])
def test_a_task_of_one_image_is_told_in_one_message(kind, monkeypatch, tmp_path, capsys):
    arguments = [*SLIM, *kind, "scenario.num_tasks=10", "scenario.train_per_class=1", "scenario.test_per_class=2"]
    more = ["device=cpu", "logger=none", f"results_dir={tmp_path}/r"]
    assert run_in_process(*arguments, *more, monkeypatch=monkeypatch, cwd=tmp_path) == 2
    [said] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Replicas run one after")]
    assert said.startswith("cl_bench: scenario: expected training batches of two images or more")
    assert "(tasks with one training image: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)" in said
