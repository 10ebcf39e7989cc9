"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from cl_bench.core.record import BASELINE, Matrix, Record
from cl_bench.metrics.accuracy import (
    average_accuracy,
    average_incremental_accuracy,
    average_incremental_accuracy_micro,
    learning_accuracy,
)
from cl_bench.metrics.auroc import one_vs_rest
from cl_bench.metrics.forgetting import forgetting, forgetting_clipped, forgetting_first_last
from cl_bench.metrics.order_robustness import (
    average_order_disparity,
    final_accuracies,
    maximum_order_disparity,
    order_disparity,
)
from cl_bench.metrics.transfer import backward_transfer, forward_transfer

GOLDEN = [[95], [80, 90], [70, 75, 92], [72, 66, 78, 88], [60, 58, 64, 70, 91]]


def test_golden_case():
    matrix = Matrix.from_accuracy(GOLDEN)
    assert forgetting(matrix) == pytest.approx(28.25)
    assert backward_transfer(matrix) == pytest.approx(-28.25)
    assert average_accuracy(matrix) == pytest.approx((60 + 58 + 64 + 70 + 91) / 5)
    assert learning_accuracy(matrix) == pytest.approx((95 + 90 + 92 + 88 + 91) / 5)
    rows = [95, 85, 79, 76, 68.6]
    assert average_incremental_accuracy(matrix) == pytest.approx(sum(rows) / 5)


def test_forgetting_variants_differ_where_a_task_recovers():
    matrix = Matrix.from_accuracy([[50], [80, 60], [90, 70, 10]])
    assert forgetting(matrix) == pytest.approx(((80 - 90) + (60 - 70)) / 2)  # negative: both got better
    assert forgetting_first_last(matrix) == pytest.approx(((50 - 90) + (60 - 70)) / 2)
    assert forgetting_clipped(matrix) == 0


def test_forward_transfer_needs_the_row_above_and_the_untrained_network():
    matrix = Matrix.from_accuracy([[90, 30, 20], [80, 85, 50], [70, 75, 95]], baseline=[12, 10, 11])
    assert forward_transfer(matrix) == pytest.approx(((30 - 10) + (50 - 11)) / 2)
    assert math.isnan(forward_transfer(Matrix.from_accuracy(GOLDEN)))


def test_micro_weights_tasks_by_their_images():
    record = Record.empty(2)
    record.add(0, "class_il", [10, math.nan], [10, 90])
    record.add(1, "class_il", [5, 45], [10, 90])
    assert average_incremental_accuracy_micro(record.class_il) == pytest.approx((100 + 50) / 2)
    record.add(1, "class_il", [10, 9], [10, 90])
    assert average_incremental_accuracy(record.class_il) == pytest.approx((100 + 55) / 2)
    assert average_incremental_accuracy_micro(record.class_il) == pytest.approx((100 + 19) / 2)


def test_one_task_forgets_nothing_that_could_be_measured():
    matrix = Matrix.from_accuracy([[70]])
    assert average_accuracy(matrix) == 70
    for metric in (forgetting, forgetting_first_last, forgetting_clipped, backward_transfer, forward_transfer):
        assert math.isnan(metric(matrix))


def test_unmeasured_stays_unmeasured():
    matrix = Matrix.from_accuracy([[], [math.nan, 50], [10, 20, 30]])
    assert average_accuracy(matrix) == 20
    for metric in (average_incremental_accuracy, learning_accuracy, forgetting, backward_transfer):
        assert math.isnan(metric(matrix))


def test_record_survives_json_and_csv(tmp_path):
    record = Record.empty(2)
    record.add(BASELINE, "task_il", [3, 1], [4, 5])
    record.add(0, "task_il", [4, 2], [4, 5])
    record.cost.samples_seen = 7
    again = Record.from_json(record.to_json())
    assert again.to_json() == record.to_json()
    assert again.task_il.baseline.tolist() == [75.0, 20.0]
    record.write_csv(tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        "setting,after_task,task,correct,count,accuracy",
        "task_il,-1,0,3,4,75.0",
        "task_il,-1,1,1,5,20.0",
        "task_il,0,0,4,4,100.0",
        "task_il,0,1,2,5,40.0",
    ]


def test_order_robustness_by_hand():
    """Three tasks A = {0, 1}, B = {2, 3}, C = {4, 5} in three orders; a task is its classes, not its place."""
    a, b, c = [0, 1], [2, 3], [4, 5]
    in_orders = {
        # last rows: A 60, B 70, C 80
        (0, 1, 2): Matrix.from_accuracy([[90], [70, 75], [60, 70, 80]]),
        # C first: C 50, A 66, B 71
        (2, 0, 1): Matrix.from_accuracy([[88], [60, 70], [50, 66, 71]]),
        # B first: B 73, C 77, A 64
        (1, 2, 0): Matrix.from_accuracy([[99], [80, 78], [73, 77, 64]]),
    }
    tasks = [a, b, c]
    runs = [final_accuracies(matrix, [tasks[i] for i in order]) for order, matrix in in_orders.items()]
    a, b, c = map(frozenset, tasks)
    assert runs[1] == {a: 66, b: 71, c: 50}
    assert order_disparity(runs) == pytest.approx({a: 66 - 60, b: 73 - 70, c: 80 - 50})
    assert average_order_disparity(runs) == pytest.approx((6 + 3 + 30) / 3)
    assert maximum_order_disparity(runs) == pytest.approx(30)


def test_order_robustness_needs_the_same_tasks_and_their_answers():
    first = {frozenset([0, 1]): 60.0, frozenset([2, 3]): 70.0}
    with pytest.raises(ValueError, match="two or more runs"):
        order_disparity([first])
    with pytest.raises(ValueError, match="the same tasks"):
        order_disparity([first, {frozenset([0, 2]): 60.0, frozenset([1, 3]): 70.0}])
    unanswered = dict.fromkeys(first, math.nan)
    assert math.isnan(average_order_disparity([first, unanswered]))
    assert math.isnan(maximum_order_disparity([first, unanswered]))


# -- area under the ROC curve ------------------------------------------------------------------------------------------


def test_auroc_by_hand():
    # Positives score .8 and .4: against .6, .4, .1 they win 3 and 1.5 of 3 pairs.
    assert one_vs_rest(np.array([[0.8], [0.4], [0.6], [0.4], [0.1]]), np.array([0, 0, 1, 1, 1])) == pytest.approx(0.75)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("decimals", [1, 12])
def test_auroc_equals_that_of_scikit_learn(classes, decimals):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(classes)
    scores, labels = rng.dirichlet(np.ones(classes), 300), rng.integers(classes, size=300)
    scores = scores.round(decimals)  # with one decimal most of them are equal to others
    expected = [roc_auc_score(labels == c, scores[:, c]) for c in range(classes)]
    assert one_vs_rest(scores, labels) == pytest.approx(np.mean(expected), abs=1e-12)


def test_auroc_is_not_defined_without_an_answer_or_without_a_class():
    assert math.isnan(one_vs_rest(np.array([[0.2, 0.8], [math.nan, 0.5]]), np.array([0, 1])))
    assert math.isnan(one_vs_rest(np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([1, 1])))
