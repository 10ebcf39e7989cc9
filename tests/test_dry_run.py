"""The dry run: what it counts, what it expects of what it could not time, and that it ends."""

import json
import math
import time

import numpy as np
import pytest
import torch
from helpers import configure, make_split, toy_images
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.config.build import Parts, build
from cl_bench.engine.checkpoint import Checkpoint
from cl_bench.engine.evaluate import SINGLE_TASK_BATCH
from cl_bench.loggers.group import Loggers
from cl_bench.runs import dry_run as module
from cl_bench.runs.dry_run import Probe, dry_run
from cl_bench.runs.timing import SMALLEST, Budget, Measured, Operations, measure
from cl_bench.testing import compose_read


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Takes ``fixed`` seconds a call and ``each`` an image, and computes on ``drawn`` images beside its own."""

    def __init__(self, clock: Clock, fixed: float, each: float, drawn: int = 0) -> None:
        self.clock, self.fixed, self.each, self.drawn = clock, fixed, each, drawn
        self.sizes: list[int] = []

    def seconds(self, size: int) -> float:
        return self.fixed + self.each * (size + self.drawn)

    def __call__(self, size: int) -> int:
        torch.ones(size + self.drawn, 3) @ torch.ones(3, 2)
        self.clock.now += self.seconds(size)
        self.sizes.append(size)
        return self.drawn


def measured(work: Work, full: int, seconds: float, **options) -> Measured:
    return measure(work, full, Budget(seconds, work.clock), **options)


def test_what_fits_is_timed_whole():
    work = Work(Clock(), fixed=0.1, each=0.01)
    found = measured(work, full=64, seconds=10)
    assert found.size == 64
    assert found.seconds == pytest.approx(3 * [work.seconds(64)])
    assert work.clock.now < 10


@pytest.mark.parametrize("fixed", [0.0, 0.05, 0.5, 5.0])
@pytest.mark.parametrize("each", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("drawn", [0, 32])
def test_a_measurement_stays_in_its_budget_and_its_range_has_the_truth(fixed, each, drawn):
    work = Work(Clock(), fixed, each, drawn)
    found = measured(work, full=512, seconds=10)
    assert work.clock.now < 10 + work.seconds(SMALLEST)
    low, expected, high = found.seconds
    assert low <= expected <= high
    if found.size > SMALLEST:  # two sizes tell what a call costs without images
        assert low <= work.seconds(512) * (1 + 1e-9)
        assert work.seconds(512) <= high * (1 + 1e-9)


def test_images_that_a_step_draws_beside_its_own_are_counted_once():
    """Scaled by the batch alone, 4 + 32 would make 128 times as much of 512 + 32."""
    work = Work(Clock(), fixed=0.0, each=0.1, drawn=32)
    found = measured(work, full=512, seconds=40)
    assert SMALLEST < found.size < 512
    assert found.seconds == pytest.approx(3 * [work.seconds(512)], rel=1e-6)
    found = measured(work, full=512, seconds=1, gain=1.0)
    assert found.size == SMALLEST
    assert found.seconds[1:] == pytest.approx(2 * [work.seconds(512)])


def test_one_slow_call_is_scaled_by_what_was_found_before():
    work = Work(Clock(), fixed=20.0, each=1.0)
    found = measured(work, full=64, seconds=1, gain=0.6)
    assert work.sizes == [SMALLEST]
    assert found.seconds == pytest.approx(np.array([0.5, 0.6, 1.0]) * work.seconds(SMALLEST) * 16)


def test_a_step_that_is_compiled_is_timed_whole_only():
    work = Work(Clock(), fixed=0.0, each=1.0)
    measured(work, full=64, seconds=1, only_full=True)
    assert set(work.sizes) == {64}


def test_operations_are_those_of_torch():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
    x = torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as theirs:
        net(x).sum().backward()
    with Operations() as ours:
        net(x).sum().backward()
    assert ours.count == theirs.get_total_flops() > 0


def test_operations_are_counted_within_gradients_of_single_images():
    """Where torch's own counter raises: SupSup infers tasks so, EWC measures importance."""
    weight, x = torch.randn(5, 3), torch.randn(4, 3)
    with Operations() as operations:
        torch.func.vmap(torch.func.grad(lambda w, x: (w @ x).sum()), in_dims=(None, 0))(weight, x)
    assert operations.count > 0


STEPS = {
    "finetune": "method=finetune",
    "joint": "method=joint",
    "unequal tasks": "scenario.num_tasks=4 scenario.classes_per_task=[4,1,3,2]",
    "icarl": "method=icarl buffer=herding buffer.capacity=120",
    "dytox": "backbone=dytox_digits buffer.capacity=120 method.repeated_augmentation=1 method.finetune_epochs=1",
    "memory_vit": "backbone=memory_vit_digits method.warm_up_epochs=1 trainer.epochs=1",
    "slca": "method=slca method.alignment_draws=6",
    "without a step": "method=simplecil",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_steps_of_a_run_are_counted(name, monkeypatch):
    """With a second a step and no time between, the hours are at most the steps that a run takes."""
    config = compose_read([
        "scenario.num_tasks=5", "scenario.train_per_class=35", "scenario.test_per_class=2", "device=cpu",
        "trainer.epochs=2", "trainer.batch_size=16", *STEPS[name].split(),
    ])  # fmt: skip

    def a_second(work, full, budget, **options):
        work(SMALLEST)
        return Measured(np.ones(3), SMALLEST, full, 1.0)

    monkeypatch.setattr(module, "measure", a_second)
    probe = Probe(build(config), Budget(60, Clock()))
    probe.run()
    trainer = build(config).build_trainer(Loggers([]), Checkpoint(None), stop=lambda: False)
    monkeypatch.setattr(trainer, "_save", lambda *_: None)
    monkeypatch.setattr(trainer.checkpoint, "load", lambda: None)
    trainer.run()
    low, expected, high = probe.estimate_training()
    assert high == trainer.steps_done
    assert low == expected
    if name != "slca":  # its second phase has steps of another size
        assert expected == pytest.approx(trainer.record.cost.samples_seen / 16)


def slow_network(parts: Parts, monkeypatch, seconds_an_image: float) -> Clock:
    """A clock that only the passes of the network move."""
    clock = Clock()
    forward = parts.method.net.forward

    def slow(x: torch.Tensor) -> torch.Tensor:
        clock.now += seconds_an_image * len(x)
        return forward(x)

    monkeypatch.setattr(parts.method.net, "forward", slow)
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.mark.parametrize(("seconds_an_image", "error"), [(0.001, 0.01), (0.03, 0.01), (0.3, 0.3)])
def test_a_dry_run_of_a_slow_network_ends_in_time(seconds_an_image, error, monkeypatch, capsys):
    config = configure("method=finetune", "trainer.batch_size=128", "device=cpu")
    parts = build(config)
    clock = slow_network(parts, monkeypatch, seconds_an_image)
    dry_run(parts, {"experiment": "e", "name": "n"})
    monkeypatch.undo()
    assert clock.now < 25

    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = [(len(task.train), len(task.test)) for task in parts.scenario.tasks]
    asked = [test for _, test in sizes]
    answered = sum(asked) + sum(sum(asked[: t + 2]) for t in range(len(asked)))
    truth = seconds_an_image * (sum(parts.settings.epochs * train for train, _ in sizes) + answered) / 3600
    low, high = found["expected_hours_range"]
    assert low < truth < high
    assert low < found["expected_hours"] < high
    assert found["expected_hours"] == pytest.approx(truth, rel=error)


def test_batches_of_one_task_are_timed_whole(monkeypatch):
    """A batch of one task costs the same with one image as with 128, so a few images of each of many tasks mislead."""
    config = configure(
        "scenario=permuted_digits", "scenario.num_tasks=40", "scenario.val_fraction=0", "backbone=mlp", "method=supsup",
        "+method.deciding_images=1", "trainer.epochs=1", "trainer.evaluate_after=last_task",
        "trainer.alternatives=false", "device=cpu",
    )  # fmt: skip
    parts = build(config)
    clock = Clock()
    predict = parts.method.predict

    def answer_in_a_second(x: torch.Tensor, task_id: torch.Tensor | None) -> torch.Tensor:
        clock.now += 1
        return predict(x, task_id)

    def measure_whole(work, full, budget, **options):
        began = clock.now
        work(full)
        return Measured(np.full(3, clock.now - began), full, full, 1.0)

    monkeypatch.setattr(parts.method, "predict", answer_in_a_second)
    monkeypatch.setattr(module, "measure", measure_whole)
    probe = Probe(parts, Budget(60, clock))
    probe.run()
    tests = [len(task.test) for task in parts.scenario.tasks]
    calls = 2 * sum(math.ceil(images / SINGLE_TASK_BATCH) for images in tests)  # with a task id and without
    assert probe.estimate_evaluation()[1] == pytest.approx(calls, rel=0.2)


def test_nothing_is_compiled_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiles"))
    parts = build(configure("method=finetune", "trainer.speed=compile", "device=cpu"))
    dry_run(parts, {"experiment": "e", "name": "n"}, Budget(0.1))
    assert "eagerly" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_of_fifty_large_tasks_ends(capsys):
    """dytox_cifar100_50step, whose steps of 256 images take most of a minute on a CPU, on pictures of noise."""
    config = configure("+experiment=dytox_cifar100_50step", "device=cpu")
    values = {key: config.scenario[key] for key in ("num_tasks", "class_order", "rand_augment", "crop_padding", "flip")}
    scenario = make_split(toy_images(100, 30, 32, 3), **values).to(torch.device("cpu"))
    parts = build(config, scenario)
    began = time.process_time()  # of this process: other work on the machine does not count
    # No seconds: how much fits into one depends on the machine, and on what ran in this process before.
    dry_run(parts, {"experiment": "e", "name": "n"}, Budget(0.0, time.process_time))
    assert time.process_time() - began < 30
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert max(found["probe_batches"]) < 256
    assert any("counted operations" in text for text in found["assumptions"])
    assert any("No time was left after task 1 of 50" in text for text in found["assumptions"])
    low, high = found["expected_hours_range"]
    assert 0 < low < found["expected_hours"] < high
