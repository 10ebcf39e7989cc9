"""Avalanche's benchmarks and strategies under our command; docs/avalanche.md."""

import contextlib
import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, ROOT, TINY, configure, find_run, load_script, needs_mnist, run_in_process
from omegaconf import OmegaConf

from cl_bench.config.build import Parts, build, build_scenario
from cl_bench.core.errors import ConfigError, RunError
from cl_bench.core.record import SETTINGS
from cl_bench.engine.trainer import Interrupted
from cl_bench.report.imports import read_imports
from cl_bench.scenarios import avalanche as scenarios
from cl_bench.scenarios.avalanche import AvalancheBenchmark
from cl_bench.testing import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Avalanche's own warnings

KEYS = {
    "benchmark": "avalanche.benchmarks.classic.SplitMNIST", "arguments": {}, "root": str(DATA), "class_order_seed": 0,
    "data_seed": 0, "val_fraction": 0.0, "val_choice": "random", "train_per_class": None, "test_per_class": None,
}  # fmt: skip


def pixels(count: int, seed: int, classes: int = 6) -> torch.utils.data.Dataset:
    """Images of 1 x 4 x 4 whole numbers over 255, with labels 0, 1, ... in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 4, 4), generator=generator).float() / 255
    return torch.utils.data.TensorDataset(images, torch.arange(count) % classes)


def tensors(data: torch.utils.data.Dataset):
    from avalanche.benchmarks.utils import _make_taskaware_classification_dataset

    return _make_taskaware_classification_dataset(data, targets=data.tensors[1].tolist())


def make_nc(**keys):
    from avalanche.benchmarks import nc_benchmark

    keys = {"n_experiences": 3, "task_labels": False, "seed": 3} | keys
    return nc_benchmark(tensors(pixels(48, 0)), tensors(pixels(18, 1)), **keys)


def convert(benchmark, monkeypatch, **keys) -> AvalancheBenchmark:
    """Our scenario of a benchmark that is there already."""
    pipeline = scenarios.Pipeline(None, [0.5], [0.25], 0, False)
    monkeypatch.setattr(scenarios, "build_benchmark", lambda *_: (benchmark, pipeline))
    return AvalancheBenchmark(**KEYS | keys)


def assert_same(scenario, benchmark, streams=("train", "test")):
    """Images, labels and tasks are those of Avalanche's own streams, in their order."""
    for name in streams:
        stream = getattr(benchmark, f"{name}_stream")
        assert len(stream) == len(scenario.tasks)
        for task, experience in zip(scenario.tasks, stream):
            data = getattr(task, name)
            theirs = [experience.dataset[i] for i in range(len(experience.dataset))]
            x = torch.stack([image for image, *_ in theirs])
            torch.testing.assert_close(scenario.transform.normalise(data.images), x, rtol=0, atol=2e-6)
            assert [scenario.class_order[c] for c in data.labels.tolist()] == [y for _, y, *_ in theirs]
            assert set(scenario.list_class_ids(task)) == set(experience.classes_in_this_experience)


def test_tasks_are_the_experiences(monkeypatch):
    from torchvision.transforms import Normalize

    normalise = Normalize((0.5,), (0.25,))
    benchmark = make_nc(train_transform=normalise, eval_transform=normalise)
    scenario = convert(make_nc(), monkeypatch)
    assert scenario.class_order == benchmark.classes_order
    assert scenario.tasks[0].train.images.dtype == torch.uint8
    assert not scenario.shared_labels
    assert_same(scenario, benchmark)
    joined = torch.cat([task.train.index for task in scenario.tasks])
    assert sorted(joined.tolist()) == list(range(48))
    unequal = convert(make_nc(per_exp_classes={0: 3, 1: 2, 2: 1}), monkeypatch)
    assert [task.classes for task in unequal.tasks] == [range(3), range(3, 5), range(5, 6)]


def test_validation_images_are_held_out_of_each_class(monkeypatch):
    scenario = convert(make_nc(), monkeypatch, val_fraction=0.25, test_per_class=2)
    for task in scenario.tasks:
        assert torch.bincount(task.val.labels, minlength=6)[list(task.classes)].tolist() == [2, 2]
        assert len(task.train) == 12
        assert len(task.test) == 4
        assert not set(task.val.index.tolist()) & set(task.train.index.tolist())


def test_the_same_classes_in_all_experiences_are_shared_labels(monkeypatch):
    from avalanche.benchmarks import ni_benchmark

    benchmark = ni_benchmark(
        [tensors(pixels(12, s, 2)) for s in (0, 1)], [tensors(pixels(6, s, 2)) for s in (2, 3)], n_experiences=2
    )
    with pytest.raises(ConfigError, match="2 experiences with the same classes, and 1 test sets"):
        convert(benchmark, monkeypatch)
    scenario = convert(make_nc(class_ids_from_zero_in_each_exp=True), monkeypatch)
    assert scenario.shared_labels
    assert scenario.num_classes == 2
    assert [task.classes for task in scenario.tasks] == [range(2)] * 3
    assert [len(task.test) for task in scenario.tasks] == [6] * 3


def test_what_is_no_class_incremental_stream_is_refused(monkeypatch):
    from avalanche.benchmarks import dataset_benchmark

    mixed = dataset_benchmark([tensors(pixels(6, 0, 2)), tensors(pixels(6, 1, 3))], [tensors(pixels(6, 2, 3))] * 2)
    with pytest.raises(ConfigError, match=r"scenario|benchmark: .*got experiences that share some of their classes"):
        convert(mixed, monkeypatch)
    noise = torch.utils.data.TensorDataset(torch.randn(6, 1, 4, 4), torch.arange(6))
    with pytest.raises(ConfigError, match="got images that are not 8 bits per channel"):
        convert(dataset_benchmark([tensors(noise)], [tensors(noise)]), monkeypatch)
    vectors = torch.utils.data.TensorDataset(torch.zeros(6, 4), torch.arange(6))
    with pytest.raises(ConfigError, match=r"got inputs of the shape \(4,\)"):
        convert(dataset_benchmark([tensors(vectors)], [tensors(vectors)]), monkeypatch)
    with pytest.raises(ConfigError, match="got one without test_stream"):
        convert(type("Stream", (), {"train_stream": make_nc().train_stream}), monkeypatch)


@pytest.mark.parametrize(
    ("path", "got"),
    [
        ("os.system", "os.system"),
        ("avalanche.benchmarks.classic.cmnist.get_mnist_dataset", "get_mnist_dataset"),
        ("avalanche.benchmarks.classic.cmnist.Compose", "Compose"),
        ("avalanche.benchmarks.classic.cmnist.PixelsPermutation", "PixelsPermutation"),
        ("avalanche.checkpointing.maybe_load_checkpoint", "maybe_load_checkpoint"),
        ("avalanche.benchmarks.classic.Nothing", "Nothing"),
        (None, "None"),
    ],
)
def test_only_benchmarks_can_be_named(path, got):
    with pytest.raises(ConfigError, match=f"benchmark: expected .*{got}"):
        AvalancheBenchmark(**KEYS | {"benchmark": path})


@needs_mnist
def test_wrong_arguments_are_one_message():
    with pytest.raises(ConfigError, match=r"arguments: expected .*n_experiences.*got .*TypeError"):
        AvalancheBenchmark(**KEYS | {"arguments": {"n_tasks": 5}})
    with pytest.raises(ConfigError, match=r"arguments\.train_transform: expected null"):
        AvalancheBenchmark(**KEYS | {"arguments": {"n_experiences": 5, "train_transform": "x"}})


@needs_mnist
def test_split_mnist_is_avalanches_own():
    from avalanche.benchmarks.classic import SplitMNIST

    scenario = build_scenario(
        configure(
            "scenario=avalanche",
            f"data_dir={DATA}",
            f"scenario.benchmark={KEYS['benchmark']}",
            "+scenario.arguments.n_experiences=5",
            "+scenario.arguments.seed=7",
        )
    )
    benchmark = SplitMNIST(n_experiences=5, seed=7, dataset_root=DATA)
    assert scenario.class_order == benchmark.classes_order
    assert (scenario.transform.mean, scenario.transform.std) == ([0.1307], [0.3081])
    assert scenario.class_names[3] == "3 - three"
    assert sum(len(task.train) for task in scenario.tasks) == 60_000
    assert_same(scenario, benchmark, ["test"])
    for task, experience in zip(scenario.tasks, benchmark.train_stream):
        ids = np.array(scenario.class_order)[task.train.labels]
        assert ids.tolist() == list(experience.dataset.targets)


def test_crops_and_flips_are_read_from_the_benchmarks_transforms():
    from avalanche.benchmarks.classic import ccifar100
    from torchvision import transforms as tv

    found = scenarios._read_transforms(
        ccifar100._default_cifar100_train_transform, ccifar100._default_cifar100_eval_transform
    )
    assert found[1:] == ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762], 4, True)
    assert repr(found.read) == repr(tv.Compose([tv.ToTensor()]))
    with pytest.raises(ConfigError, match="got the training transform RandomRotation"):
        scenarios._read_transforms(tv.RandomRotation(10), None)


def test_an_order_without_a_seed_follows_the_class_order_seed(monkeypatch):
    def draw(seed):
        with scenarios._seed_everything(seed):
            return make_nc(seed=None).classes_order

    before = torch.get_rng_state()
    assert draw(0) == draw(0) != draw(1)
    assert torch.equal(torch.get_rng_state(), before)


# -- strategies --------------------------------------------------------------------------------------------------------

SUPERVISED = "avalanche.training.supervised"
PLUGINS = "avalanche.training.plugins"
RUN = [*TINY, "method=avalanche", "backbone=mlp", "backbone.hidden=[32]"]

STRATEGIES = {
    "replay": [f"method.plugins=[{{class:{PLUGINS}.ReplayPlugin,mem_size:20}}]"],
    "ewc": [f"method.strategy={SUPERVISED}.EWC", "+method.arguments.ewc_lambda=1"],
    "agem": [
        f"method.strategy={SUPERVISED}.AGEM", "+method.arguments.patterns_per_exp=10",
        "+method.arguments.sample_size=8",
    ],
    "icarl": [
        f"method.strategy={SUPERVISED}.ICaRL", "+method.arguments.memory_size=20",
        "+method.arguments.buffer_transform=null", "+method.arguments.fixed_memory=true",
    ],
}  # fmt: skip


def parts_of(*overrides: str) -> Parts:
    return build(configure(*RUN, *overrides))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stopped_run_goes_on_to_the_same_bits(name, tmp_path, capsys):
    straight = parts_of(*STRATEGIES[name], "scenario.crop_padding=1")
    trainer = make_trainer(straight, tmp_path / "straight")
    record = trainer.run()
    total = trainer.steps_done
    first = 2 * 4  # two epochs of four steps of 16 images
    assert total >= 2 * first
    for stop_after in (1, first, first + 3, total):
        calls = iter(range(total + 10))
        with pytest.raises(Interrupted):
            make_trainer(
                parts_of(*STRATEGIES[name], "scenario.crop_padding=1"),
                tmp_path / str(stop_after),
                lambda calls=calls, last=stop_after: next(calls) == last,
            ).run()
        parts = parts_of(*STRATEGIES[name], "scenario.crop_padding=1")
        torch.manual_seed(99)
        capsys.readouterr()
        resumed = make_trainer(parts, tmp_path / str(stop_after))
        again = resumed.run()
        assert ("learned again first" in capsys.readouterr().err) == (stop_after > first)
        for setting in SETTINGS:
            np.testing.assert_array_equal(again.get_matrix(setting).correct, record.get_matrix(setting).correct)
        assert resumed.steps_done == total
        expected = straight.method.state_dict()
        assert expected.keys() == parts.method.state_dict().keys()
        for key, value in parts.method.state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_a_run_on_a_machine_that_rounds_differently_is_not_gone_on_with(tmp_path):
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        make_trainer(parts_of(), tmp_path, lambda: next(calls) == 12).run()
    parts = parts_of()
    next(iter(parts.method._first_weights.values())).mul_(1.001)
    with pytest.raises(RunError, match="tasks 1 to 1 gave other weights"):
        make_trainer(parts, tmp_path).run()


def test_the_whole_command_and_a_loaded_run(tmp_path, monkeypatch):
    import cl_bench

    words = [*RUN, *STRATEGIES["icarl"], f"results_dir={tmp_path}", "trainer.evaluate_every=5", "metrics=online"]
    assert run_in_process(*words, monkeypatch=monkeypatch, cwd=tmp_path, report=True) == 0
    folder = find_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method_facts"]["strategy"] == f"{SUPERVISED}.ICaRL"
    assert summary["cost"]["method_bytes"] is None
    assert summary["cost"]["samples_seen"] > 2 * 2 * 50
    assert summary["task_il"]["average_accuracy"] > 20
    assert (folder / "report.html").exists()
    assert (folder / "curve.csv").exists()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["task"] for e in events if e["event"] == "epoch"] == [0, 0, 1, 1]
    run = cl_bench.load(folder)
    order = np.array(run.scenario.class_order)
    right = sum(int((run.predict(t.test.images) == order[t.test.labels.cpu()]).sum()) for t in run.scenario.tasks)
    stored = np.load(folder / "predictions.npz")
    assert right == int((stored["class_il"] == stored["label"]).sum())


def test_a_strategy_learns_as_ours_does(tmp_path):
    more = ["scenario.train_per_class=100", "scenario.test_per_class=20", "trainer.epochs=8"]
    parts = parts_of(f"method.plugins=[{{class:{PLUGINS}.ReplayPlugin,mem_size:100}}]", *more)
    record = make_trainer(parts, tmp_path).run()
    assert record.task_il.accuracy[-1].mean() > 45
    assert record.class_il.accuracy[-1, -1] > 35


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.strategy=os.system"], "method.strategy: expected the dotted path of something that avalanche"),
        ([f"method.strategy={PLUGINS}.ReplayPlugin"], "method.strategy: expected the dotted path"),
        (["method.strategy=avalanche.training.supervised.der.CrossEntropyLoss"], "method.strategy: expected"),
        ([f"method.plugins=[{{class:{PLUGINS}.CheckpointPlugin}}]"], r"method.plugins\[0\].class: expected"),
        ([f"method.plugins=[{PLUGINS}.ReplayPlugin]"], r"method.plugins\[0\]: expected {class: PATH"),
        ([f"method.plugins=[{{class:{PLUGINS}.ReplayPlugin,size:3}}]"], r"method.plugins\[0\]: expected arguments of"),
        ([f"method.strategy={SUPERVISED}.EWC"], "method.arguments: expected arguments of EWC: .*ewc_lambda"),
        (["+method.arguments.train_epochs=3"], "method.arguments.train_epochs: expected an argument of"),
        (["trainer.clip_norm=1"], "trainer.clip_norm: expected null, since method=avalanche has a training loop"),
        (["schedule=cosine"], "schedule: expected cl_bench.optim.Constant"),
        (["precision=bf16"], "precision: expected fp32"),
        (["dry_run=true"], "dry_run: expected False"),
        (["buffer=reservoir"], "buffer: expected none"),
        (["scenario=permuted_digits_shared"], "method: expected one that can learn tasks with shared labels"),
    ],
)
def test_what_avalanche_cannot_do_here_is_one_message(words, message):
    with pytest.raises(ConfigError, match=message):
        build(configure("method=avalanche", "backbone.hidden=[8]", "device=cpu", *words))


@pytest.mark.parametrize("key", ["strategy", "arguments", "plugins"])
def test_no_value_of_a_key_gives_a_traceback(key):
    config = configure("method=avalanche", "backbone.hidden=[8]", "device=cpu")
    usual = {"arguments": {}, "plugins": []}.get(key)
    for value in (0, 1.5, True, None, "", "abc", "avalanche.", "a\0b", [], [1], [[]], {}, {"a": 1}, [{"class": 3}]):
        OmegaConf.update(config, f"method.{key}", value, merge=False, force_add=True)
        if value is not None and value == usual:
            assert build(config).method.own_loop
        else:
            with pytest.raises(ConfigError, match=rf"^method\.{key}"):
                build(config)


def test_a_loss_and_a_storage_policy_are_parts():
    parts = parts_of(
        f"method.plugins=[{{class:{PLUGINS}.ReplayPlugin,mem_size:20,storage_policy:"
        "{class:avalanche.training.storage_policy.ReservoirSamplingBuffer,max_size:20}}]",
        "+method.arguments.criterion={class:avalanche.training.losses.MaskedCrossEntropy,mask:new}",
    )
    strategy = parts.method.strategy
    assert type(strategy._criterion).__name__ == "MaskedCrossEntropy"
    replay = next(p for p in strategy.plugins if type(p).__name__ == "ReplayPlugin")
    assert type(replay.storage_policy).__name__ == "ReservoirSamplingBuffer"


def test_a_strategy_that_fails_says_where(tmp_path):
    parts = parts_of(f"method.strategy={SUPERVISED}.JointTraining")
    with pytest.raises(RunError, match="JointTraining failed in task 2"):
        make_trainer(parts, tmp_path).run()


# -- the comparison ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison():
    """scripts/compare_avalanche.py as a module."""
    return load_script("compare_avalanche")


def list_lines(comparison):
    return [line for row in comparison.ROWS.values() for line in [row.theirs, *row.others]]


def test_all_lines_begin_with_the_same_weights(comparison):
    small = [word for word in comparison.SETTING if not word.startswith("scenario")]
    assert len(comparison.ROWS) == 8
    weights, scenario = [], build(configure(*small)).scenario
    for line in list_lines(comparison):
        parts = build(configure(*small, *line.overrides, "seed=3"), scenario)
        weights.append([p.clone() for p in parts.method.net.parameters()])
    for others in weights[1:]:
        assert all(map(torch.equal, others, weights[0]))


@pytest.mark.parametrize("image_by_image", [False, True])
def test_what_avalanches_fisher_information_is(comparison, image_by_image):
    """Squared gradients of the mean loss of each batch; image by image they are those of our ``empirical``."""
    size = 20
    parts = parts_of(*comparison.name_strategy("EWC", ewc_lambda=1.0), f"trainer.batch_size={size}")
    strategy, task = parts.method.strategy, parts.scenario.tasks[0]
    data = parts.method._experiences[0].dataset
    plugin = next(p for p in strategy.plugins if hasattr(p, "compute_importances"))
    with comparison.measure_fisher_image_by_image() if image_by_image else contextlib.nullcontext():
        theirs = plugin.compute_importances(
            strategy.model, strategy._criterion, strategy.optimizer, data, strategy.device, size
        )
    if image_by_image:
        ours = build(
            configure(*TINY, "method=ewc", "backbone=mlp", "backbone.hidden=[32]", "method.fisher=empirical")
        ).method
        expected = ours.measure_fisher_information(task)
    else:
        net = parts.method.net
        images = torch.stack([data.eval()[i][0] for i in range(len(data))])
        labels = torch.tensor(list(data.targets))
        batches = list(zip(images.split(size), labels.split(size)))
        expected = [torch.zeros_like(p) for p in net.parameters()]
        for x, y in batches:
            gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(net(x), y), list(net.parameters()))
            expected = [e + g**2 / len(batches) for e, g in zip(expected, gradients)]
    for mine, other in zip(expected, theirs.values(), strict=True):
        torch.testing.assert_close(other.data, mine, rtol=1e-4, atol=1e-8)


def test_mir_has_the_same_loss_on_the_same_candidates(comparison):
    from cl_bench.core.types import Batch

    theirs = parts_of(*comparison.name_plugin("MIRPlugin", mem_size=20, batch_size_mem=4, subsample=10)).method.strategy
    ours = build(
        configure(
            *TINY, "method=mir", "buffer=fixed_memory", "buffer.capacity=20", "backbone=mlp", "backbone.hidden=[32]",
            "method.replay_size=4", "method.candidates=10",
        )
    )  # fmt: skip
    data, normalise = ours.scenario.tasks[0].train, ours.scenario.transform.normalise
    stream, drawn = data.take(slice(0, 16)), data.take(slice(16, 26))
    x, y = normalise(stream.images), stream.labels
    batch = Batch(x, y, stream.images, 1)
    candidates = Batch(normalise(drawn.images), drawn.labels, drawn.images, 1)
    ours.method.draw = lambda *_: candidates
    found = ours.method.inputs(batch)
    expected = sum(ours.method.terms(found, 1)[0].values())

    plugin = next(p for p in theirs.plugins if type(p).__name__ == "MIRPlugin")
    plugin.replay_loader = iter([(candidates.x, candidates.y, torch.zeros(10, dtype=torch.int64))])
    theirs.mbatch = [x, y, torch.zeros(16, dtype=torch.int64)]
    theirs.loss = theirs._criterion(theirs.model(x), y)
    plugin.before_backward(theirs)
    torch.testing.assert_close(theirs.loss, expected)


def test_the_table_says_where_the_seeds_differ(comparison):
    naive = comparison.ROWS["naive"]

    def seeds(*values):
        return {str(i): {"class_il": v, "task_il": v} for i, v in enumerate(values)}

    table = comparison.make_table(
        {"naive": {naive.theirs.name: seeds(10, 12, 14), naive.others[0].name: seeds(20, 22.5, 24)}}
    )
    lines = table.splitlines()[2:]
    assert lines[1] == "| 1. Avalanche `Naive` |  | 3 | 12.0 ± 2.0 |  | 12.0 ± 2.0 |  |"
    assert lines[2].startswith("| 2. ours, `finetune` | 1 | 3 | 22.2 ± 2.0 | +10.2 [+9.4, +10.9] * |")
    for row in comparison.ROWS.values():
        names = [line.name for line in [row.theirs, *row.others]]
        assert {line.against for line in row.others} <= {None, *names}


def test_the_page_has_the_table_of_the_records(comparison):
    records = json.loads((ROOT / comparison.OUT / "records.json").read_text())
    table = comparison.make_table(records)
    assert (ROOT / comparison.OUT / "table.md").read_text() == table
    assert f"<!-- table -->\n{table}<!-- end of table -->" in (ROOT / comparison.PAGE).read_text()


def test_a_comparison_goes_on_where_it_stopped(comparison, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        comparison,
        "run_line",
        lambda line, seed, *_: ran.append((line.name, seed)) or {"class_il": 1.0, "task_il": 2.0},
    )
    monkeypatch.setattr(comparison, "SETTING", ["device=cpu", "backbone.hidden=[8]"])
    words = ["compare", "--rows", "er", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "0"])
    assert comparison.main() == 143
    assert not ran
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", words)
        assert comparison.main() == 0
    assert len(ran) == 2 * 3
    assert "1.0 ± 0.0" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("name", "also"),
    [("distil_each_task", None), ("leave_images_unmirrored", None), ("replay_the_last_task_too", None),
     ("pick_no_image_twice", "leave_images_unmirrored"), ("draw_candidates_anew", "replay_the_last_task_too")],
)  # fmt: skip
def test_a_replaced_part_changes_its_strategy_and_only_while_it_is_replaced(comparison, name, also):
    """``also``: another part that is replaced with it, with which the strategy is compared."""
    without = getattr(comparison, also) if also else contextlib.nullcontext
    (line,) = [line for line in list_lines(comparison) if line.patch.__name__ == name]
    small = [*TINY, "backbone=mlp", "backbone.hidden=[32]", "scenario.classes_per_task=[2,2,6]"]
    sizes = {":200": ":20", "_mem:32": "_mem:4", "subsample:100": "subsample:10"}
    words = [functools.reduce(lambda word, size: word.replace(*size), sizes.items(), word) for word in line.overrides]
    line = dataclasses.replace(line, overrides=words)
    answers = []
    for patch in (without, line.patch, without):
        parts = build(configure(*small, *line.overrides))
        with tempfile.TemporaryDirectory() as folder, patch():
            make_trainer(parts, Path(folder)).run()
        answers.append(
            parts.method.predict(parts.scenario.transform.normalise(parts.scenario.tasks[0].test.images), None)
        )
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_what_avalanches_csv_logger_writes_is_a_row_of_a_comparison(tmp_path):
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
    from avalanche.logging import CSVLogger
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    torch.manual_seed(0)
    benchmark, logger = make_nc(), CSVLogger(str(tmp_path / "csvlogs"))
    measured = (accuracy_metrics(experience=True), loss_metrics(experience=True), forgetting_metrics(experience=True))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6))
    strategy = Naive(
        model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.5), criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=8, train_epochs=2, eval_mb_size=18, evaluator=EvaluationPlugin(*measured, loggers=[logger]),
    )  # fmt: skip
    after = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        result = strategy.eval(benchmark.test_stream)
        after.append([value for name, value in sorted(result.items()) if name.startswith("Top1_Acc_Exp")])
    logger.close()
    (run,), left_out = read_imports([str(tmp_path / "csvlogs")])
    assert left_out == []
    np.testing.assert_allclose(run.record.class_il.accuracy, 100 * np.array(after), atol=0.01)
    values = run.summary["class_il"]
    assert values["forgetting_reported"] == pytest.approx(values["forgetting_first_last"], abs=0.01)
    assert values["forgetting_reported"] != 0
