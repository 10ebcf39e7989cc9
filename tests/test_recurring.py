"""Tasks that share classes: blurry borders and classes that come back; what is measured there, and who can learn it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    CONFIGS,
    METHODS,
    MLP_RESERVOIR,
    ROOT,
    SUITS,
    TINY,
    array,
    configure,
    cross_entropy,
    find_run,
    list_tiny,
    make_split,
    run_in_process,
    toy_images,
)

from cl_bench.commands.metrics import add_metrics
from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.core.types import list_seen_classes
from cl_bench.engine.evaluate import evaluate
from cl_bench.methods.base import ClassLoss, Method
from cl_bench.runs.audit import check_rehearsal
from cl_bench.scenarios.shared_labels import SharedLabels
from cl_bench.testing import compose_read, make_trainer


def make_stream(**keys):
    """Ten classes of 40 images in five tasks."""
    return make_split(toy_images(num_classes=10, per_class=40), num_tasks=5, **keys)


def count(scenario) -> np.ndarray:
    """(T, K) training images of each class in each task."""
    return np.stack([np.bincount(task.train.labels, minlength=10) for task in scenario.tasks])


def check_images(scenario) -> None:
    """Every training image comes in one task, with its label, and validation and test images stay by class."""
    index = torch.cat([task.train.index for task in scenario.tasks])
    assert sorted(index.tolist()) == sorted(set(index.tolist()))
    plain = make_stream(val_fraction=0.25 if len(scenario.tasks[0].val) else 0.0, class_order=scenario.class_order)
    assert sorted(index.tolist()) == sorted(torch.cat([task.train.index for task in plain.tasks]).tolist())
    source = toy_images(num_classes=10, per_class=40)
    for task, other in zip(scenario.tasks, plain.tasks):
        assert torch.equal(task.val.index, other.val.index)
        assert torch.equal(task.test.index, other.test.index)
        own = torch.tensor(scenario.class_order)[task.train.labels]
        assert own.tolist() == source.train_labels[task.train.index.numpy()].tolist()
        present = set(task.train.labels.tolist())
        assert set(task.other_classes) == present - set(task.classes)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_share_of_each_class_comes_in_the_other_tasks(share):
    """Blurry-M of Bang et al. 2021: M % of the images of a task are of the classes of other tasks."""
    scenario = make_stream(blurry=share, class_order=[5, 0, 3, 1, 4, 2, 9, 8, 7, 6])
    check_images(scenario)
    counts = count(scenario)
    own = np.array([counts[c // 2, c] for c in range(10)])
    assert (own == round(40 * (1 - share))).all()
    assert (counts.sum(axis=0) == 40).all()
    foreign = counts.sum(axis=1) - own.reshape(5, 2).sum(axis=1)
    assert abs(foreign - 80 * share).max() <= (0 if 10 * share % 1 else 4)
    moved = np.delete(counts[:, 0], 0)
    assert moved.max() - moved.min() <= 1  # evenly
    assert scenario.recurring
    assert list_seen_classes(scenario.tasks[:1]) == list(range(10))


def test_some_classes_stay_disjoint():
    """i-Blurry-50-25 of Koh et al. 2022."""
    scenario = make_stream(blurry=0.25, blurry_classes=0.5, val_fraction=0.25)
    check_images(scenario)
    counts = count(scenario)
    for c in range(10):
        assert (counts[:, c] > 0).sum() == (5 if c % 2 else 1)
    assert list_seen_classes(scenario.tasks[:2]) == [0, 1, 2, 3, 5, 7, 9]


def test_classes_come_back():
    """Class-incremental with repetition, Hemati et al. 2023: each later task has a class with probability P_r."""
    scenario = make_stream(repeat=0.5)
    check_images(scenario)
    counts = count(scenario)
    back = 0
    for c in range(10):
        assert (counts[: c // 2, c] == 0).all()
        assert counts[c // 2, c] > 0  # new in its own task
        parts = counts[counts[:, c] > 0, c]
        assert parts.max() - parts.min() <= 1
        back += len(parts) - 1
    assert 0 < back < 20
    always = count(make_stream(repeat=1.0))
    assert [(always[:, c] > 0).sum() for c in (0, 4, 9)] == [5, 3, 1]
    for task in scenario.tasks:  # the classes seen are those of the tasks begun
        assert list_seen_classes(scenario.tasks[: task.id + 1]) == list(range(task.classes.stop))


def test_the_data_seed_draws_the_stream_and_zero_leaves_the_split_as_it_was():
    for keys in ({"blurry": 0.2}, {"repeat": 0.4}):
        first, again, other = (make_stream(**keys, data_seed=seed) for seed in (0, 0, 1))
        assert all(torch.equal(a.train.index, b.train.index) for a, b in zip(first.tasks, again.tasks))
        assert not all(torch.equal(a.train.index, b.train.index) for a, b in zip(first.tasks, other.tasks))
    plain = make_stream()
    assert not plain.recurring
    assert [task.other_classes for task in plain.tasks] == [()] * 5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"blurry": 1.0}, r"blurry: expected a number in \[0, 1\)"),
        ({"blurry_classes": 1.5}, r"blurry_classes: expected a number in \[0, 1\]"),
        ({"repeat": -0.1}, r"repeat: expected a number in \[0, 1\]"),
        ({"repeat": 0.1, "blurry": 0.1}, "repeat: expected 0 beside blurry tasks"),
        ({"repeat": 0.1, "num_tasks": 1}, "repeat: expected 0, since there is one task only"),
        ({"blurry": 0.1, "num_tasks": 1}, "blurry: expected 0, since there is one task only"),
    ],
)
def test_wrong_keys_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_split(**keys)
    with pytest.raises(ConfigError, match="disjoint: expected tasks without images of other tasks' classes"):
        SharedLabels(disjoint=make_split(blurry=0.5))


# -- what is measured --------------------------------------------------------------------------------------------------


class LastClass(Method):
    """Answers with the last class that is allowed."""

    def learn(self, task):
        yield from ()

    def observe(self, batch):
        return {}

    def predict(self, x, task_id):
        return torch.arange(10.0).expand(len(x), 10)


@pytest.mark.parametrize(
    ("keys", "last"),
    [({}, 1), ({"repeat": 1.0}, 1), ({"blurry": 0.25}, 9), ({"blurry": 0.25, "blurry_classes": 0.5}, 9)],
)
def test_a_class_may_be_answered_once_it_was_seen(keys, last):
    off = torch.autocast("cpu", enabled=False)
    answers = evaluate(LastClass(), make_stream(**keys), learned=1, split="test", autocast=off)
    assert set(answers.class_il[answers.task == 0].tolist()) == {last}
    assert set(answers.class_il[answers.task == 1].tolist()) == {-1}  # its own task has not come yet
    assert set(answers.task_il[answers.task == 0].tolist()) == {1}  # the task of the class is known


def test_the_loss_over_classes_seen_leaves_out_gaps():
    scenario = make_stream(blurry=0.25, blurry_classes=0.5)
    z, y = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 7, 1])
    seen = [0, 1, 3, 5, 7, 9]
    expected = cross_entropy(array(z)[:, seen], np.array([seen.index(c) for c in y.tolist()]))
    assert ClassLoss(scenario, "seen")(z, y, 0).item() == pytest.approx(expected, rel=1e-5)


def can_learn(method: str) -> bool:
    """Whether the method says that it can learn such a stream; read and not imported, which takes seconds."""
    target = yaml.safe_load((CONFIGS / "method" / f"{method}.yaml").read_text())["_target_"]
    text = (ROOT / Path(*target.split(".")[:-1]).with_suffix(".py")).read_text()
    return "    shared_labels = True\n" in text and "    recurring_classes = False" not in text


ABLE = list(filter(can_learn, METHODS))


@pytest.mark.parametrize("method", ABLE)
def test_a_method_learns_the_stream(method, tmp_path):
    keys = [*list_tiny(method), "trainer.epochs=1"]
    if method == "ocs":  # its own buffer has quotas
        keys += ["buffer=reservoir", "buffer.capacity=20"]
    if "loss_classes" in (CONFIGS / "method" / f"{method}.yaml").read_text():
        keys.append("method.loss_classes=seen")
    record = make_trainer(
        build(compose_read([*keys, "scenario.blurry=0.1", "scenario.blurry_classes=0.5"])), tmp_path
    ).run()
    assert np.isfinite(record.class_il.accuracy[-1]).all()


@pytest.mark.parametrize("method", ["lwf", "supsup"])
def test_a_method_that_needs_new_classes_is_refused(method):
    assert len(ABLE) == 13
    with pytest.raises(ConfigError, match=r"method: expected one that can learn tasks that share classes"):
        build(configure(*TINY, *SUITS[method], f"method={method}", "scenario.repeat=0.3"))


def test_a_buffer_with_quotas_is_refused_and_a_ring_counts_what_comes_back():
    with pytest.raises(ConfigError, match="buffer: expected one without a quota per class"):
        build(configure(*TINY, "method=er", "buffer=herding", "scenario.repeat=0.5"))
    parts = build(configure(*TINY, "method=er", "buffer=ring", "buffer.capacity=60", "scenario.repeat=1"))
    assert parts.buffer.length == 60 // 15  # five classes in both tasks, and five in one


def test_the_audit_knows_the_classes_seen():
    keys = [*TINY, *MLP_RESERVOIR, "method=er", "scenario.blurry=0.1"]
    checks = {check.name: check for check in check_rehearsal(lambda: build(configure(*keys)))}
    assert all(check.passed in (True, None) for check in checks.values()), checks


def test_a_one_pass_run_over_a_blurry_stream_says_what_is_not_defined(tmp_path, monkeypatch, capsys):
    keys = [
        "scenario=digits", "scenario.blurry=0.1", "scenario.train_per_class=40", "scenario.test_per_class=4",
        "device=cpu", "method=er", "buffer=reservoir", "buffer.capacity=20", "backbone.hidden=[8]", "trainer.epochs=1",
        "logger=none", "trainer.batch_size=10", "trainer.evaluate_every=5", "metrics=online", "results_dir=r",
    ]  # fmt: skip
    assert run_in_process(*keys, monkeypatch=monkeypatch, cwd=tmp_path) == 0
    run = find_run(tmp_path / "r")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recurring_classes"]
    assert summary["cost"]["samples_seen"] == 400  # each image once
    undefined = {"learning_accuracy", "backward_transfer", "forward_transfer"}
    assert set(summary["undefined_metrics"]) == undefined
    assert set(summary["undefined_metrics"].values()) == {"a class has training images in several tasks"}
    for setting in ("class_il", "task_il"):
        for name, value in summary[setting].items():
            assert (value is None) == (name in undefined), name
    with pytest.raises(ConfigError, match="forgetting_first_last, which is not: a class has training"):
        add_metrics(run, ["forgetting_first_last"])
    assert set(add_metrics(run, ["forgetting_clipped"])) == {"forgetting_clipped"}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(event["recurring_classes"] for event in events if event["event"] == "task")


# -- unequal tasks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [10, 5])
def test_b50_is_fifty_classes_and_five_or_ten_more_tasks(later):
    """50 classes first, as Hou et al. 2019 (UCIR) and Douillard et al. 2020 (PODNet) have it."""
    sizes = [50, *[later] * (50 // later)]
    scenario = make_split(
        toy_images(num_classes=100, per_class=2), classes_per_task=sizes, class_order="random", class_order_seed=1993
    )
    assert [len(task.classes) for task in scenario.tasks] == sizes
    assert [len(task.train) for task in scenario.tasks] == [2 * size for size in sizes]
    assert scenario.class_order[:3] == [68, 56, 78]  # iCaRL's order


@pytest.mark.parametrize("method", ["icarl", "lwf"])
def test_unequal_tasks_are_learned(method, tmp_path):
    keys = [*TINY, *SUITS[method], f"method={method}", "scenario.classes_per_task=[5,2,2,1]", "trainer.epochs=1"]
    record = make_trainer(build(configure(*keys)), tmp_path).run()
    assert record.class_il.count.tolist() == [20, 8, 8, 4]
    assert np.isfinite(record.class_il.accuracy[-1]).all()
