"""Continual evaluation: it changes nothing, resumes exactly, and its curve is what a direct measurement gives."""

import json
import math

import numpy as np
import pytest
import torch
from helpers import METHODS, SUITS, TINY, Events, configure, find_run, parts_of, run_in_process, trainer_of

from cl_bench.config.build import build
from cl_bench.core.errors import ConfigError
from cl_bench.core.record import SETTINGS, Curve, Record
from cl_bench.engine.evaluate import draw_sample, evaluate
from cl_bench.engine.replicas import run_together
from cl_bench.engine.trainer import Interrupted
from cl_bench.loggers.dashboard import Series
from cl_bench.metrics.anytime import anytime_average_accuracy
from cl_bench.report.page import Run

pytestmark = pytest.mark.arithmetic

CURVE = ["trainer.evaluate_every=3", "trainer.evaluate_sample=7"]


def weights(trainer):
    return {name: v for name, v in trainer.method.state_dict().items() if isinstance(v, torch.Tensor)}


def assert_equal_runs(one, other):
    for setting in SETTINGS:
        matrices = (t.record.get_matrix(setting).correct for t in (one, other))
        np.testing.assert_array_equal(*matrices)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.steps_done == other.steps_done


@pytest.mark.parametrize("method", METHODS)
def test_the_training_is_that_without_it(method, tmp_path):
    plain = trainer_of(parts_of(method), tmp_path / "plain")
    plain.run()
    measured = trainer_of(parts_of(method, *CURVE), tmp_path / "measured")
    measured.run()
    assert_equal_runs(plain, measured)
    assert not plain.record.curves
    for setting in SETTINGS:
        curve = measured.record.curves[setting]
        in_steps = {step for step in range(1, measured.steps_done + 1) if step % 3 == 0}
        assert set(curve.step) >= in_steps
        points = list(zip(curve.step, curve.learning))
        assert points == sorted(set(points))
        assert set(curve.learning) == {0, 1}
        assert curve.step[-1] == measured.steps_done
        assert curve.count == [7, 7]
    answered = measured.record.curves["task_il"].accuracy[-1]
    assert not np.isnan(answered).any()
    generators = [g.get_state() for t in (plain, measured) for g in t.generators.values()]
    half = len(generators) // 2
    assert all(torch.equal(a, b) for a, b in zip(generators[:half], generators[half:]))


def test_a_point_is_what_a_direct_measurement_gives(tmp_path):
    """Without an optimizer step in between, the last point is the accuracy of the trained method on the sample."""
    parts = parts_of("er", *CURVE)
    trainer = trainer_of(parts, tmp_path)
    trainer.logger = Events()
    trainer.run()
    sample = draw_sample(parts.scenario, "test", 7)
    assert [len(task.test) for task in sample.tasks] == [7, 7]
    answers = evaluate(parts.method, sample, learned=2, split="test", autocast=parts.autocast)
    for setting in SETTINGS:
        assert trainer.record.curves[setting].correct[-1] == answers.count_correct(setting, 2)
    for task in sample.tasks:
        assert set(task.test.index.tolist()) <= set(parts.scenario.tasks[task.id].test.index.tolist())
    points = [e for e in trainer.logger.events if e["event"] == "sample"]
    # 16 steps of each task: every third one, and the end of the first and of the second task
    assert [(e["step"], e["task"]) for e in points] == [
        *((s, 0) for s in (3, 6, 8)), *((s, 1) for s in (9, 12, 15, 16)),
    ]  # fmt: skip
    events = trainer.logger.events
    series = Series(tmp_path)
    points = [series.extract(number, event) for number, event in enumerate(events)]
    (last,) = [point.values for point, event in zip(points, events) if event is events[-1]]
    for setting in SETTINGS:
        curve = trainer.record.curves[setting]
        assert last[f"{setting}/anytime_average_accuracy"] == pytest.approx(anytime_average_accuracy(curve))
    (sample,) = [point.values for point, event in zip(points, events) if event is events[-2]]
    assert set(sample) == {
        *(f"sample_{setting}_tasks/task_{t}" for setting in SETTINGS for t in (1, 2)),
        *(f"sample_{setting}/average_accuracy" for setting in SETTINGS),
    }
    cost = trainer.record.cost
    assert cost.curve_seconds > 0
    assert cost.train_seconds > 0


@pytest.mark.parametrize("method", ["er", "lwf"])
def test_the_curve_is_the_same_wherever_the_run_is_stopped(method, tmp_path):
    def run(folder, stop=lambda: False):
        trainer = trainer_of(parts_of(method, *CURVE), folder, stop)
        trainer.logger = Events()
        return trainer

    straight = run(tmp_path / "straight")
    straight.run()
    # a task asks before its first step and after each one: stopped at a measured step, after it, between the tasks,
    # and after the last step
    total = straight.steps_done
    for at in (4, 5, total // 2 + 1, total // 2 + 2, total + 1, total + 2):
        calls = iter(range(1, 10**6))
        stopped = run(tmp_path / f"stop{at}", stop=lambda at=at, calls=calls: next(calls) == at)
        with pytest.raises(Interrupted):
            stopped.run()
        resumed = run(tmp_path / f"stop{at}")
        resumed.events = 0
        kept = stopped.logger.events
        resumed.logger.events = kept
        resumed.logger.log_event = lambda number, event, kept=kept: kept.__setitem__(slice(number, None), [event])
        resumed.run()
        assert_equal_runs(straight, resumed)
        for setting in SETTINGS:
            ours, theirs = (t.record.curves[setting] for t in (resumed, straight))
            assert ours == theirs, at
        assert kept == straight.logger.events, at


def test_a_killed_run_measures_no_point_twice(tmp_path):
    """It goes on from a checkpoint before the last points."""
    keys = [*CURVE, "trainer.checkpoint_steps=5"]
    straight = trainer_of(parts_of("er", *keys), tmp_path / "straight")
    straight.run()
    killed = trainer_of(parts_of("er", *keys), tmp_path / "killed")
    calls = iter(range(10**6))

    def kill(progress):
        if next(calls) == 13:  # two points and three steps after the checkpoint
            raise KeyboardInterrupt

    killed.logger.log_step = kill
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = trainer_of(parts_of("er", *keys), tmp_path / "killed")
    resumed.run()
    assert resumed.record.curves == straight.record.curves


@pytest.mark.parametrize("method", ["er", "ewc"])
def test_replicas_computed_as_one_measure_and_learn_what_they_do_without(method, tmp_path):
    def side_by_side(*keys):
        trainers = []

        def steps(seed):
            trainer = trainer_of(parts_of(method, f"seed={seed}", *keys), tmp_path / f"{len(keys)}-{seed}")
            trainers.append(trainer)
            return (yield from trainer.generate_steps())

        for seed in range(2):
            (tmp_path / f"{len(keys)}-{seed}").mkdir(parents=True)
        run_together([steps(seed) for seed in range(2)])
        assert {t.executor.describe()["used"] for t in trainers} == {"joint"}
        return trainers

    plain, measured = side_by_side(), side_by_side(*CURVE)
    for one, other in zip(plain, measured):
        assert_equal_runs(one, other)
    first, second = (t.record.curves["class_il"] for t in measured)
    assert first.step == second.step
    assert first.correct != second.correct


def test_modes_of_modules_are_put_back(tmp_path):
    small = ["backbone=resnet18", "backbone.width=4", "trainer.evaluate_every=1", "trainer.epochs=1"]
    parts = build(configure(*TINY, "method=finetune", *small))
    trainer = trainer_of(parts, tmp_path)
    frozen = next(m for m in parts.method.modules() if isinstance(m, torch.nn.BatchNorm2d))
    modes = []

    def freeze(progress):
        modes.append((frozen.training, parts.method.net.training))
        frozen.eval()

    trainer.logger.log_step = freeze
    trainer.run()
    assert modes[:3] == [(True, True), (False, True), (False, True)]


def test_a_record_with_a_curve_survives_json_and_csv(tmp_path):
    record = Record.empty(2)
    record.add_to_curve(3, 0, "class_il", [4.0], [10, 5])
    record.add_to_curve(6, 0, "class_il", [5.0], [10, 5])
    record.add_to_curve(6, 0, "class_il", [6.0], [10, 5])  # the task was closed after its last step
    record.add_to_curve(9, 1, "class_il", [2.0, math.nan], [10, 5])
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again.to_json() == record.to_json()
    np.testing.assert_equal(again.curves["class_il"].accuracy, [[40, math.nan], [60, math.nan], [20, math.nan]])
    record.write_curve_csv(tmp_path / "curve.csv")
    assert (tmp_path / "curve.csv").read_text().splitlines() == [
        "setting,step,learning,task,correct,count,accuracy",
        "class_il,3,0,0,4,10,40.0",
        "class_il,6,0,0,6,10,60.0",
        "class_il,9,1,0,2,10,20.0",
        "class_il,9,1,1,,5,",
    ]


def test_the_command_leaves_a_curve_and_its_metrics_can_be_added_later(tmp_path, monkeypatch, capsys):
    small = [*TINY, *SUITS["finetune"], "method=finetune", "logger=none", *CURVE, "trainer.linear_probe=true"]
    later, at_once = tmp_path / "later", tmp_path / "at_once"
    for folder, keys in ((later, []), (at_once, ["metrics=online"])):
        folder.mkdir()
        assert run_in_process(*small, *keys, monkeypatch=monkeypatch, cwd=folder, report=not keys) == 0
    run, whole = find_run(later), find_run(at_once)
    assert (run / "curve.csv").read_text() == (whole / "curve.csv").read_text()
    before = json.loads((run / "summary.json").read_text())
    assert before["cost"]["curve_seconds"] > 0
    probe = before["alternatives"]["linear_probe"]
    assert probe["fitted_on"] == "100 training images of all tasks"
    assert probe["class_il"] > 50  # ten classes; a linear classifier of hidden units of digits
    page = (run / "report.html").read_text()
    assert "Accuracy while learning" in page
    assert "average accuracy by linear probe (fitted on 100 training images of all tasks: no continual learner)" in page
    names = ["anytime_average_accuracy", "minimum_accuracy", "worst_case_accuracy", "stability_gap", "forgetting"]

    assert run_in_process("metrics", str(run), "--add", *names, monkeypatch=monkeypatch, cwd=later, report=True) == 0
    after, expected = (json.loads((r / "summary.json").read_text()) for r in (run, whole))
    for setting in SETTINGS:
        assert after[setting] == expected[setting]
        assert list(after[setting])[: len(before[setting])] == list(before[setting])
    assert {k: v for k, v in after.items() if k not in SETTINGS} == {
        k: v for k, v in before.items() if k not in SETTINGS
    }
    assert "stability gap" in (run / "report.html").read_text()
    said = capsys.readouterr().err
    assert "stability_gap: Class-IL" in said
    assert "forgetting: " in said
    assert "has it already" in said
    record = Run.read(run).record
    assert record.curves["class_il"].step[-1] == 16
    assert not list(run.glob("*.partial"))


def test_what_cannot_be_added_is_said(tmp_path, monkeypatch, capsys):
    from helpers import make_run

    def add(*arguments):
        status = run_in_process("metrics", *arguments, monkeypatch=monkeypatch, cwd=tmp_path)
        return status, capsys.readouterr().err

    same = {"average_accuracy": 94.6, "average_incremental_accuracy": None, "forgetting": 2.5}
    run = make_run(tmp_path, task_il=same)
    before = (run / "summary.json").read_text()
    status, said = add(str(run), "--add", "forgeting_clipped")
    assert status == 2
    assert "--add: expected one of the metrics " in said
    assert "Did you mean forgetting_clipped?" in said
    status, said = add(str(run), "--add", "stability_gap")
    assert status == 2
    assert "no curve.csv" in said
    assert "trainer.evaluate_every=100" in said
    status, said = add(str(tmp_path / "nowhere"), "--add", "forgetting_clipped")
    assert status == 2
    assert "expected a file of a finished run" in said
    assert not (tmp_path / "nowhere").exists()
    known = {"tasks": [[8, 0]], "class_order": [8, 0], "task_il": {"average_accuracy": 100.0}}
    lone = make_run(tmp_path, name="lone", class_il=None, **known)
    (lone / "accuracy_matrix.csv").write_text("setting,after_task,task,correct,count,accuracy\ntask_il,0,0,4,4,100.0\n")
    status, said = add(str(lone), "--add", "forgetting_clipped")
    assert status == 2
    assert "a single task" in said
    assert (run / "summary.json").read_text() == before
    status, said = add(str(run), "--add", "forgetting_clipped")
    assert status == 0
    # best values of the columns of CLASS_IL, last row included, minus the last row
    assert json.loads((run / "summary.json").read_text())["class_il"]["forgetting_clipped"] == pytest.approx(
        ((95 - 60) + (90 - 58) + (92 - 64) + (88 - 70)) / 4
    )


def test_metrics_of_the_curve_need_one():
    with pytest.raises(ConfigError) as caught:
        build(configure("metrics=online"))
    assert caught.value.key == "metrics.anytime_average_accuracy"
    assert "trainer.evaluate_every=100" in caught.value.fix
    with pytest.raises(ConfigError, match=r"trainer\.evaluate_every: expected above 0"):
        build(configure("trainer.evaluate_every=0"))


def test_a_validation_run_never_measures_a_test_image(tmp_path):
    parts = parts_of("er", *CURVE, "trainer.evaluate_on=val", "scenario.val_fraction=0.3")
    for task in parts.scenario.tasks:
        task.test.images.fill_(0)
    trainer = trainer_of(parts, tmp_path)
    trainer.run()
    asked = trainer._sample.tasks
    for task, sampled in zip(parts.scenario.tasks, asked):
        assert set(sampled.test.index.tolist()) <= set(task.val.index.tolist())
        assert sampled.test.images.any()


def test_the_linear_probe_separates_what_can_be_separated(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from cl_bench.engine.probe import fit_linear_probe

    parts = parts_of("finetune", "scenario.train_per_class=40")
    state = {k: v.clone() for k, v in parts.method.state_dict().items()}
    rule = fit_linear_probe(parts.method, parts.scenario, parts.autocast)
    train = [task.train for task in parts.scenario.tasks]
    with torch.no_grad():
        features = [parts.method.net.features(parts.scenario.transform.normalise(d.images)) for d in train]
        x, y = torch.cat(features).numpy(), torch.cat([d.labels for d in train]).numpy()
        scaler = StandardScaler().fit(x)
        model = LogisticRegression(max_iter=1000, C=3).fit(scaler.transform(x), y)  # three equal passes weigh as C = 3
        test = parts.scenario.tasks[0].test
        images = parts.scenario.transform.normalise(test.images)
        ours = torch.log_softmax(rule(images, None), dim=1).numpy()
        theirs = model.predict_log_proba(scaler.transform(parts.method.net.features(images).numpy()))
    np.testing.assert_allclose(ours, theirs, atol=0.05)
    assert all(torch.equal(v, state[k]) for k, v in parts.method.state_dict().items())


def test_the_linear_probe_needs_features(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.linear_probe: expected false"):
        trainer_of(parts_of("supsup", "trainer.linear_probe=true"), tmp_path)


def test_a_dry_run_includes_both(monkeypatch):
    from cl_bench.runs.dry_run import Probe
    from cl_bench.runs.timing import Budget

    keys = [*TINY, *SUITS["finetune"], "method=finetune"]
    probe = Probe(build(configure(*keys, *CURVE)), Budget(1.0))
    probe.run()
    evaluations = 2 * (1 + 2 * 50 / 16 / 3)  # of each task's steps, and the one at its end
    answers = [task.answer[1] for task in probe.probed]
    low, high = min(answers), max(answers)
    images = (7 + 14) / 2
    assert evaluations * images * low <= probe.estimate_curve()[1] * 1.0001
    assert probe.estimate_curve()[1] <= evaluations * images * high * 1.0001
    assert not probe.trainer.record.curves
    without = Probe(build(configure(*keys)), Budget(1.0))
    without.run()
    assert without.estimate_curve().sum() == 0


def test_curves_by_hand():
    from cl_bench.metrics.minimum_accuracy import minimum_accuracy
    from cl_bench.metrics.stability_gap import stability_gap
    from cl_bench.metrics.worst_case_accuracy import worst_case_accuracy

    learning = [0, 0, 1, 1, 2, 2, 2]
    rows = [[30], [80], [40, 50], [60, 70], [20, 50, 40], [50, 65, 60], [55, 75, 90]]
    curve = Curve.from_accuracy(learning, rows)
    means = [30, 80, 45, 65, 110 / 3, 175 / 3, 220 / 3]
    assert anytime_average_accuracy(curve) == pytest.approx(sum(means) / 7)
    assert minimum_accuracy(curve) == pytest.approx((20 + 50) / 2)  # 30 was measured while task 0 was learned
    assert worst_case_accuracy(curve) == pytest.approx((20 + 50 + 90) / 3)
    assert worst_case_accuracy(curve) == pytest.approx(90 / 3 + (1 - 1 / 3) * minimum_accuracy(curve))
    # task 1: 80 -> 40 -> 60, of which 20 came back; task 2: 60 -> 20 -> 55 (35) and 70 -> 50 -> 75 (20)
    assert stability_gap(curve) == pytest.approx((20 + (35 + 20) / 2) / 2)

    steady = Curve.from_accuracy([0, 1, 1], [[80], [70, 50], [60, 90]])
    assert stability_gap(steady) == 0  # forgotten for good, so no gap
    single = Curve.from_accuracy([0, 0], [[30], [70]])
    assert anytime_average_accuracy(single) == 50
    assert worst_case_accuracy(single) == 70
    assert math.isnan(minimum_accuracy(single))
    assert math.isnan(stability_gap(single))
    silent = Curve.from_accuracy(learning, [*rows[:3], [math.nan, 70], *rows[4:]])
    for metric in (anytime_average_accuracy, minimum_accuracy, worst_case_accuracy, stability_gap):
        assert math.isnan(metric(silent))
