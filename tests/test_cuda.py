"""What a GPU computes, held on a real one where there is one, and as far as a CPU can go elsewhere.

    CL_BENCH_TEST_DEVICE=cuda python -m pytest tests/test_cuda.py

takes the GPU only; without the variable every body runs on the CPU as well, where a capture is played by hand, or the
tensors only say that they are on the GPU (``stand_ins.py``).
"""

import contextlib
import json
import os
import runpy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import (
    FUNCTIONAL,
    METHODS,
    ROOT,
    find_run,
    largest_difference,
    needs_cifar100,
    needs_mnist,
    parts_of,
    run_in_process,
    trainer_of,
)
from stand_ins import CPU, CUDA, LowestCalls, Played, Pretence

from cl_bench.buffers.herding import compute_herding_order
from cl_bench.config.build import choose_device
from cl_bench.core.errors import ConfigError, RunError
from cl_bench.core.images import HostImages
from cl_bench.core.types import Data
from cl_bench.engine.replicas import find_obstacle, run_together
from cl_bench.engine.step import StepExecutor
from cl_bench.engine.trainer import Interrupted, Trainer, run_alone
from cl_bench.methods import ewc, supsup
from cl_bench.runs import run as run_module
from cl_bench.runs.run_dir import collect_cuda_facts

REAL = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
DEVICES = [
    *(["cpu"] if os.environ.get("CL_BENCH_TEST_DEVICE", "cpu") == "cpu" else []),
    pytest.param("cuda", marks=needs_cuda),
]

TOLERANCE = 1e-3
"""Largest difference of a score of a test image, relative to 1 + the largest of all, after 30 to 60 steps on a GPU. A
graph has the kernels of the eager step, but some of them add up in an order of their own in each run; noise of 1e-6 in
the first weights moves a score by 2e-4 at most (memory_vit)."""

SUITED = {"lvt": ["optimizer.lr=0.01"], "gdumb": ["buffer.capacity=60"]}
"""At the rate of the other runs any noise in LVT's weights grows by five orders of magnitude in 40 steps. GDumb
learns only what it stores: 20 images would be 20 steps."""

SOME_EAGER = {"coda_prompt", "dualprompt", "l2p", "lwf", "memory_vit", "scr", "slca"}
"""Methods that have a phase with a step of its own beside the functional one."""


def settings_of(method: str, device: str, speed: str) -> list[str]:
    """Two tasks of 20 steps or so; graphs are played by hand on the CPU."""
    speed = speed if device == "cuda" else "eager"
    return ["trainer.epochs=5", f"device={device}", f"trainer.speed={speed}", *SUITED.get(method, [])]


def trained(method: str, folder, device: str, speed: str, *overrides: str, stop=lambda trainer: False) -> Trainer:
    """The trainer of a tiny run after its end, or where it was stopped."""
    trainer = trainer_of(parts_of(method, *settings_of(method, device, speed), *overrides), folder)
    trainer.stop = lambda: stop(trainer)
    if speed == "graph" and device == "cpu":
        trainer.executor = StepExecutor("graph", CPU, Played(trainer.method))
    with contextlib.suppress(Interrupted):
        trainer.run()
    return trainer


def distance(first: Trainer, second: Trainer) -> float:
    """Between the scores of the test images, relative to the largest of them."""
    scores = []
    for trainer in (first, second):
        images = torch.cat([task.test.images[:] for task in trainer.scenario.tasks])
        with torch.no_grad():
            scores.append(trainer.method.eval().predict(trainer.scenario.transform.normalise(images), None))
    ours, theirs = scores
    finite = ours.isfinite()
    assert torch.equal(finite, theirs.isfinite())
    return float((ours - theirs)[finite].abs().max() / (1 + theirs[finite].abs().max()))


def assert_same(first: Trainer, second: Trainer, device: str) -> None:
    """Bit for bit on the CPU, which adds up in the same order either way; there every weight is looked at."""
    assert first.steps_done == second.steps_done >= 30
    if device == "cpu":
        assert largest_difference(first, second) == 0.0
    else:
        assert distance(first, second) < TOLERANCE


@pytest.fixture
def pretence(monkeypatch) -> Iterator[Pretence]:
    """A CUDA device that is the CPU."""
    LowestCalls(monkeypatch)
    with Pretence() as pretence:
        yield pretence


# -- a device and its index ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "auto", "cuda:0"])
def test_a_device_has_its_index_and_torch_takes_it(name, monkeypatch):
    log = LowestCalls(monkeypatch).log
    assert choose_device(name) == CUDA
    torch.cuda.set_device(choose_device(name))  # torch's own check of the index is what refused cuda
    assert log == ["set device 0"]


def test_every_accelerator_has_its_index_and_a_wrong_one_is_refused(monkeypatch):
    assert choose_device("cpu") == CPU
    LowestCalls(monkeypatch)
    with pytest.raises(ConfigError, match=r"device: expected auto, or .* cuda, cuda:0, cpu; got cuda:1"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("mps") == torch.device("mps", 0)


@pytest.mark.slow
def test_the_command_reaches_its_steps_on_a_cuda_device(tmp_path, monkeypatch, pretence):
    """As far as a CPU can go: to its end, but a replay computes nothing, so the accuracies mean nothing."""
    monkeypatch.setattr(run_module, "write_report", lambda place: None)
    arguments = ["+experiment=quickstart", "device=cuda", "logger=none"]
    few = ["scenario.num_tasks=2", "scenario.train_per_class=20", "scenario.test_per_class=4", "trainer.epochs=2"]
    assert run_in_process(*arguments, *few, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    run = find_run(tmp_path)
    summary, environment = (json.loads((run / name).read_text()) for name in ("summary.json", "env.json"))
    assert summary["speed"] == {"asked": "auto", "used": "graph", "why": None, "replicas": 1}
    assert environment["device"] == "stand-in"
    assert environment["cuda"] == {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "convolutions": "tf32",
        "matrix_products": "highest",
        "cudnn_benchmark": False,
        "cudnn_deterministic": False,
    }
    pace = [json.loads(line) for line in (run / "pace.jsonl").read_text().splitlines()]
    assert [(line["task"], line["epoch"], line["step"]) for line in pace[:3]] == [(0, 0, 4), (0, 1, 8), (1, 0, 12)]
    assert all(line["steps_per_second"] > 0 for line in pace)


ONLINE = {
    # measured on held-out images, fifty of each class
    "online_er_cifar100_20split": "scenario.num_tasks=2 scenario.val_fraction=0.002",
    "online_er_ace_cifar100_20split": "scenario.num_tasks=2 scenario.val_fraction=0.002",
    "online_mir_cifar100_20split": "scenario.num_tasks=2 scenario.val_fraction=0.002",
    "online_er_cifar100_20split_survey": "scenario.num_tasks=2",
    "agem_cifar100_17split": "scenario.num_tasks=5 buffer.capacity=85",
    "agem_permuted_mnist_17": "scenario.num_tasks=2",
    "gdumb_mnist_5split": "scenario.num_tasks=2",
}
"""The published online protocols, and what makes them small."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_mnist if "mnist" in name else needs_cifar100) for name in ONLINE]
)
def test_an_online_experiment_reaches_its_end_on_a_cuda_device(name, tmp_path, monkeypatch, pretence):
    """With the answers on the way, as far as a CPU can go (see above)."""
    monkeypatch.setattr(run_module, "write_report", lambda place: None)
    arguments = [f"+experiment={name}", "device=cuda", "logger=none", "trainer.evaluate_every=3", "metrics=online"]
    few = ["scenario.test_per_class=2", "trainer.max_steps=3", "trainer.evaluate_sample=4", *ONLINE[name].split()]
    assert run_in_process(*arguments, *few, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    summary = json.loads((find_run(tmp_path) / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["cost"]["curve_seconds"] > 0


def test_cudnn_tries_its_algorithms_where_it_is_asked_to(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # as it was, afterwards
    parts_of("er", "trainer.cudnn_benchmark=true")
    assert collect_cuda_facts()["cudnn_benchmark"]


def test_the_device_of_the_tests_small_runs_can_be_chosen(monkeypatch):
    monkeypatch.setenv("CL_BENCH_TEST_DEVICE", "cuda:0")
    assert "device=cuda:0" in runpy.run_path(str(ROOT / "tests" / "helpers.py"))["TINY"]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_the_device(method, device, tmp_path, request):
    pretence = request.getfixturevalue("pretence") if device == "cpu" else None
    trainer = trainer_of(parts_of(method, "device=cuda", "trainer.speed=eager", "trainer.epochs=1"), tmp_path / "cuda")
    record = trainer.run()
    assert all(parameter.device == REAL for parameter in trainer.method.parameters())
    assert all(parameter.isfinite().all() for parameter in trainer.method.parameters())
    if pretence is None:
        assert np.isfinite(record.get_matrix("task_il").correct[-1]).all()
        return
    on_cpu = trainer_of(parts_of(method, "device=cpu", "trainer.epochs=1"), tmp_path / "cpu")
    on_cpu.run()
    assert on_cpu.record.to_json()["task_il"] == record.to_json()["task_il"]


def test_the_pretence_tells_what_a_gpu_would_refuse_or_wait_for(pretence):
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device=CUDA) + torch.ones(3)
    with pytest.raises(TypeError):
        torch.zeros(3, device=CUDA).numpy()
    assert not pretence.waits
    bool(torch.zeros(3, device=CUDA)[torch.tensor(1, device=CUDA)] > 0)
    assert pretence.waits == ["__getitem__", "__bool__"]


def test_the_pretence_leaves_torch_as_it_was():
    before = dict(vars(torch.Tensor))
    with Pretence():
        assert torch.nn.Parameter(torch.zeros(3, device=CUDA)).device == CUDA
    assert dict(vars(torch.Tensor)) == before


# -- a step and the bus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "copies"), [("er", 3), ("derpp", 4), ("dytox", 1)])
def test_a_step_copies_each_draw_once_out_of_pinned_memory_and_waits_for_nothing(method, copies, tmp_path, pretence):
    augmented = ["scenario.crop_padding=1", "scenario.flip=true"]
    trainer = trainer_of(parts_of(method, "device=cuda:0", "trainer.speed=eager", *augmented), tmp_path)
    task = trainer.scenario.tasks[0]
    steps = trainer.generate_phase_steps(task, 0, next(trainer.method.learn(task)), None)
    step, executor = next(steps)
    step, executor = steps.send(executor.perform(step))  # the reservoir has images by now
    pretence.copies.clear()
    pretence.waits.clear()
    steps.send(executor.perform(step))
    assert not pretence.waits
    assert len(pretence.copies) == copies
    assert all(pinned for _, pinned in pretence.copies)


def test_herding_waits_for_no_pick(pretence):
    features = torch.nn.functional.normalize(torch.rand(20, 5), dim=1)
    expected = compute_herding_order(features)
    ours = compute_herding_order(features.to(CUDA))
    assert not pretence.waits
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "module"), [("ewc", ewc), ("supsup_nns", supsup)])
def test_gradients_of_single_images_come_in_larger_pieces_on_a_card(method, module, tmp_path, monkeypatch, pretence):
    """A 32nd of the 8 GiB that it says it has, where the host takes one image at a time here."""
    monkeypatch.setattr(module, "GRADIENT_BYTES", 1, raising=False)
    sizes: dict[str, set[int]] = {"cpu": set(), "cuda:0": set()}
    split, vmap = Data.split, torch.func.vmap
    for device, seen in sizes.items():
        parts = parts_of(method, f"device={device}", "trainer.speed=eager", "trainer.epochs=1")
        if method == "ewc":
            monkeypatch.setattr(Data, "split", lambda data, size, seen=seen: (seen.add(size), split(data, size))[1])
        else:
            counted = lambda *a, seen=seen, **k: (seen.add(k["chunk_size"]), vmap(*a, **k))[1]  # noqa: E731
            monkeypatch.setattr(torch.func, "vmap", counted)
        trainer_of(parts, tmp_path / device).run()
    assert sizes["cpu"] == {1}
    assert min(sizes["cuda:0"]) > 100


# -- graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", FUNCTIONAL)
def test_a_graph_that_is_captured_and_replayed_trains_as_eager_does(method, device, tmp_path):
    """Two shapes or more, a change of phase; LVT with dropout. No gradient lies where another one does: clipping, which
    changes them in place, would change it twice."""
    graph, eager = (trained(method, tmp_path / speed, device, speed) for speed in ("graph", "eager"))
    assert eager.executor.used == "eager"
    assert graph.executor.used == "graph"
    why = graph.executor.describe()["why"]
    assert why.startswith("some steps are eager") if method in SOME_EAGER else why is None
    if device == "cpu":
        capture = graph.executor.graphs.capture
        assert capture.captured > 1
        assert capture.replayed > 4 * capture.captured
        assert graph.record.to_json()["class_il"] == eager.record.to_json()["class_il"]
    assert_same(graph, eager, device)
    places = [p.grad.untyped_storage().data_ptr() for p in graph.method.parameters() if p.grad is not None]
    assert len(places) == len(set(places)) > 0
    if method == "derpp":
        ours, theirs = (run.method.buffer.columns["logits"].cpu() for run in (graph, eager))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if device == "cpu" else TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_takes_images_from_the_host(device, tmp_path):
    host, resident = (
        trained("er", tmp_path / place, device, "graph", f"images={place}") for place in ("host", "device")
    )
    assert isinstance(host.scenario.tasks[0].train.images, HostImages)
    assert host.executor.used == "graph"
    assert_same(host, resident, device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_with_graphs_stops_and_goes_on(device, tmp_path):
    straight = trained("lvt", tmp_path / "straight", device, "graph")
    stopped = trained("lvt", tmp_path / "resumed", device, "graph", stop=lambda trainer: trainer.steps_done == 27)
    assert stopped.steps_done == 27
    resumed = trained("lvt", tmp_path / "resumed", device, "graph")
    assert resumed.executor.used == "graph"
    assert_same(resumed, straight, device)


@pytest.mark.slow
@pytest.mark.arithmetic
@pytest.mark.parametrize("device", DEVICES)
def test_replicas_are_a_graph_together(device, tmp_path):
    seeds = range(3)

    def trainers(name: str, speed: str) -> list[Trainer]:
        settings = settings_of("derpp", device, speed)
        return [trainer_of(parts_of("derpp", *settings, f"seed={n}"), tmp_path / f"{name}{n}") for n in seeds]

    joint, alone = trainers("joint", "graph"), trainers("alone", "eager")
    if device == "cpu":
        capture = Played(*(trainer.method for trainer in joint))
        for trainer in joint:
            trainer.executor = StepExecutor("graph", CPU, capture)
    else:
        assert find_obstacle(joint[0].method, joint[0].executor.device) is None
    run_together([trainer.generate_steps() for trainer in joint])
    for trainer, expected in zip(joint, alone):
        run_alone(expected.generate_steps())
        assert trainer.steps_done == expected.steps_done >= 30
        assert trainer.executor.describe()["used"] == "joint"
        assert "as a CUDA graph" in trainer.executor.describe()["why"]
        assert distance(trainer, expected) < TOLERANCE
    assert distance(joint[0], joint[1]) > 10 * TOLERANCE


@needs_cuda
@pytest.mark.parametrize("method", ["er", "lvt"])
def test_a_capture_that_fails_leaves_the_device_as_it_was_or_says_so(method, tmp_path, capsys):
    """The steps of LVT draw: a generator that a failed capture keeps would refuse."""
    trainer = trainer_of(parts_of(method, "device=cuda"), tmp_path)
    terms = trainer.method.terms
    trainer.method.terms = lambda inputs, task: (float(inputs["x"].sum()), terms(inputs, task))[1]  # waits
    before = torch.cuda.current_stream()
    with contextlib.suppress(RunError):  # where it cannot be as it was, the run says so and ends
        trainer.run()
        assert trainer.executor.used == "eager"
        assert "could not be captured" in capsys.readouterr().err
    assert torch.cuda.current_stream() == before
