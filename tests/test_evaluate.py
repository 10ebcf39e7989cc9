"""Evaluation: masks, mixed batches, and answers that are not given."""

import math

import pytest
import torch
from helpers import make_split

from cl_bench.engine import evaluate as module
from cl_bench.engine.evaluate import evaluate
from cl_bench.methods.base import Method
from cl_bench.metrics.auroc import one_vs_rest
from cl_bench.scenarios.shared_labels import SharedLabels

OFF = torch.autocast("cpu", enabled=False)


class Scores(Method):
    """Scores by a function of x and the task id; notes its batches."""

    def __init__(self, function):
        super().__init__()
        self.function, self.batches = function, []

    def learn(self, task):
        yield from ()

    def observe(self, batch):
        return {}

    def predict(self, x, task_id):
        assert not self.training
        self.batches.append((x, task_id))
        return self.function(x, task_id)


class NeedsId(Scores):
    """Cannot answer without the task id."""

    task_id = "needed"


def scenario():
    return make_split(num_tasks=2, class_order=[3, 2, 1, 0])


def test_unseen_classes_and_other_tasks_are_never_answered():
    # Class 3 of the order always scores highest, then 2, 1, 0: it is unseen after the first task.
    method = Scores(lambda x, t: torch.arange(4.0).expand(len(x), 4))
    answers = evaluate(method, scenario(), learned=1, split="test", autocast=OFF)
    assert set(answers.class_il[answers.task == 0].tolist()) == {1}
    assert set(answers.class_il[answers.task == 1].tolist()) == {-1}  # not learned: not asked in Class-IL
    assert set(answers.task_il[answers.task == 0].tolist()) == {1}
    assert set(answers.task_il[answers.task == 1].tolist()) == {3}
    assert answers.count_correct("class_il", 2)[0] == 6
    assert math.isnan(answers.count_correct("class_il", 2)[1])
    assert answers.count_correct("task_il", 2) == [6, 6]
    # Among the classes seen, 0 and 1 score 0 and 1.
    assert answers.confidence[answers.task == 0].tolist() == pytest.approx([math.e / (1 + math.e)] * 12)
    assert answers.confidence[answers.task == 1].isnan().all()


def test_task_il_is_class_il_restricted_to_the_task():
    torch.manual_seed(0)
    weight = torch.randn(64, 4)
    method = Scores(lambda x, t: x.flatten(1) @ weight)
    answers = evaluate(method, scenario(), learned=2, split="test", autocast=OFF)
    data = torch.cat([t.test.images for t in scenario().tasks])
    index = torch.cat([t.test.index for t in scenario().tasks])
    scores = scenario().transform.normalise(data).flatten(1) @ weight
    for i, row in zip(index.tolist(), scores):
        at = (answers.index == i).nonzero().item()
        assert answers.class_il[at] == row.argmax()
        first = 2 * int(answers.task[at])
        assert answers.task_il[at] == first + row[first : first + 2].argmax()


def test_batches_mix_tasks_and_one_pass_serves_both_settings(monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH", 8)
    method = Scores(lambda x, t: torch.zeros(len(x), 4))
    answers = evaluate(method, scenario(), learned=2, split="test", autocast=OFF)
    assert [len(x) for x, _ in method.batches] == [8, 8, 8]
    assert all(len(set(tasks.tolist())) == 2 for tasks in answers.task.split(8))


def test_batches_of_one_task_are_for_a_method_that_asks_for_them(monkeypatch):
    monkeypatch.setattr(module, "SINGLE_TASK_BATCH", 8)
    method = Scores(lambda x, t: torch.zeros(len(x), 4))
    method.test_batches = "single_task"
    answers = evaluate(method, scenario(), learned=2, split="test", autocast=OFF)
    assert [len(x) for x, _ in method.batches] == [8, 4, 8, 4]
    assert [set(tasks.tolist()) for tasks in answers.task.split([8, 4, 8, 4])] == [{0}, {0}, {1}, {1}]
    assert len(answers.index.unique()) == 24


def test_with_shared_labels_the_label_counts_whatever_the_task():
    method = Scores(lambda x, t: torch.arange(2.0).expand(len(x), 2))
    shared = SharedLabels(disjoint=scenario())
    answers = evaluate(method, shared, learned=1, split="test", autocast=OFF)
    assert answers.task.tolist().count(1) == 12  # known although no label tells it
    assert set(answers.class_il[answers.task == 0].tolist()) == {1}
    assert set(answers.class_il[answers.task == 1].tolist()) == {-1}  # not learned: not asked without the id
    assert answers.count_correct("class_il", 2)[0] == 6
    assert answers.count_correct("task_il", 2) == [6, 6]


def test_a_method_that_needs_the_id_has_no_class_il():
    seen = []
    method = NeedsId(lambda x, t: seen.append(t) or torch.nn.functional.one_hot(2 * t, 4).float())
    answers = evaluate(method, scenario(), learned=2, split="test", autocast=OFF)
    assert torch.equal(torch.cat(seen), answers.task)
    assert all(map(math.isnan, answers.count_correct("class_il", 2)))
    assert answers.count_correct("task_il", 2) == [6, 6]
    assert answers.confidence.isnan().all()


def test_areas_are_of_the_probabilities_among_the_classes_of_the_task():
    torch.manual_seed(0)
    weight = 0.1 * torch.randn(64, 4)  # small: where probabilities round to 1 they are ties, and rounding breaks them
    unequal = make_split(classes_per_task=[1, 3])
    method = Scores(lambda x, t: x.flatten(1) @ weight)
    answers = evaluate(method, unequal, learned=2, split="test", autocast=OFF)
    task = unequal.tasks[1].test
    p = torch.softmax((unequal.transform.normalise(task.images).flatten(1) @ weight)[:, 1:], dim=1).double().numpy()
    areas = answers.compute_auroc(unequal.tasks)
    assert math.isnan(areas[0])  # a single class has no others
    assert areas[1] == pytest.approx(100 * one_vs_rest(p, task.labels.numpy() - 1))
    assert answers.of_task[answers.task == 0, 1:].isnan().all()
    never = Scores(lambda x, t: torch.full((len(x), 4), -torch.inf))
    assert math.isnan(evaluate(never, unequal, learned=2, split="test", autocast=OFF).compute_auroc(unequal.tasks)[1])


def test_no_answer_is_not_a_wrong_answer():
    method = Scores(lambda x, t: torch.full((len(x), 4), -torch.inf))
    answers = evaluate(method, scenario(), learned=2, split="test", autocast=OFF)
    assert all(map(math.isnan, answers.count_correct("class_il", 2) + answers.count_correct("task_il", 2)))


def test_before_training_every_task_is_asked_in_task_il_only():
    method = Scores(lambda x, t: torch.arange(4.0).expand(len(x), 4))
    answers = evaluate(method, scenario(), learned=0, split="test", autocast=OFF)
    assert all(map(math.isnan, answers.count_correct("class_il", 2)))
    assert answers.count_correct("task_il", 2) == [6, 6]


def test_validation_images_in_place_of_test_images():
    held = make_split(num_tasks=2, val_fraction=0.5)
    method = Scores(lambda x, t: torch.zeros(len(x), 4))
    answers = evaluate(method, held, learned=2, split="val", autocast=OFF)
    assert sorted(answers.index.tolist()) == sorted(torch.cat([t.val.index for t in held.tasks]).tolist())
