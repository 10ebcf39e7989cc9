"""The report of one run: its numbers, its pictures, its page."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import CLASS_IL, CLASS_ORDER, FIVE_TASKS, TASK_IL, WIDTHS, make_run, needs_chromium, open_in_chromium
from matplotlib.axes import Axes

from cl_bench.core.errors import ConfigError
from cl_bench.core.record import Cost, Matrix, Record
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.metrics.forgetting import forgetting
from cl_bench.report import page, plots


def golden_record() -> Record:
    return Record(Matrix.from_accuracy(CLASS_IL), Matrix.from_accuracy(TASK_IL))


def numbers_in(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# ---- numbers


def test_metrics_over_tasks_are_those_of_the_first_tasks():
    golden = Matrix.from_accuracy(CLASS_IL)
    np.testing.assert_allclose(plots.compute_over_tasks(forgetting, golden), [math.nan, 15, 20, 61 / 3, 28.25])
    np.testing.assert_allclose(plots.compute_over_tasks(average_accuracy, golden), [95, 85, 79, 76, 68.6])


def test_first_tasks_keep_the_untrained_row():
    part = plots.take_first_tasks(Matrix.from_accuracy(CLASS_IL, [1, 2, 3, 4, 5]), 2)
    np.testing.assert_equal(part.accuracy, [[95, math.nan], [80, 90]])
    np.testing.assert_equal(part.baseline, [1, 2])


def test_the_matrix_is_read_as_it_was_written(tmp_path):
    written = Matrix.from_accuracy(TASK_IL, [50, 51, 52, 53, 54])
    written.count[:] = [100, 200, 300, 400, 500]
    folder = make_run(tmp_path, accuracy=None, task_il={"average_accuracy": average_accuracy(written)})
    Record(Matrix.empty(5), written).write_csv(folder / "accuracy_matrix.csv")
    record = page.Run.read(folder).record
    np.testing.assert_equal(record.task_il.correct, written.correct)
    np.testing.assert_equal(record.task_il.count, written.count)
    assert np.isnan(record.class_il.accuracy).all()


def test_confusion_shares_follow_the_task_order():
    label = np.array([5, 5, 5, 5, 2, 2])
    answer = np.array([5, 5, 5, 2, 5, 2])
    np.testing.assert_equal(plots.compute_confusion([5, 2], label, answer), [[75, 25], [50, 50]])


def test_no_answer_has_a_column_of_its_own_and_an_unseen_class_no_number():
    shares = plots.compute_confusion([2, 0, 1], np.array([2, 2, 0, 0]), np.array([-1, 2, 0, -1]))
    np.testing.assert_equal(shares, [[50, 0, 0, 50], [0, 50, 0, 50], [math.nan] * 4])


# ---- pictures


def test_accuracy_matrix_has_a_number_in_each_measured_cell():
    class_il, task_il, _ = plots.draw_accuracy_matrix(golden_record()).axes
    assert class_il.get_title() == "Class-IL"
    assert numbers_in(class_il) == [f"{value:.1f}" for row in CLASS_IL for value in row]
    assert numbers_in(task_il) == [f"{value:.1f}" for row in TASK_IL for value in row]


def test_untrained_row_stands_first_in_both_panels():
    record = Record(Matrix.from_accuracy(CLASS_IL), Matrix.from_accuracy(TASK_IL, [50] * 5))
    class_il, task_il, _ = plots.draw_accuracy_matrix(record).axes
    assert numbers_in(task_il)[:6] == ["50.0"] * 5 + ["96.0"]
    for axes in (class_il, task_il):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["untrained", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(("num_tasks", "numbers"), [(20, 210), (21, 0)])
def test_numbers_up_to_20_tasks(num_tasks, numbers):
    matrix = Matrix.from_accuracy([[50.0] * (i + 1) for i in range(num_tasks)])
    axes = plots.draw_accuracy_matrix(Record(matrix, Matrix.empty(num_tasks))).axes
    assert len(axes) == 2  # one setting and the colour bar: Task-IL was not measured
    assert numbers_in(axes[0]) == ["50"] * numbers


def test_curves_show_both_metrics_of_both_settings():
    accuracies, forgettings = plots.draw_over_tasks(golden_record()).axes
    np.testing.assert_allclose(accuracies.lines[0].get_ydata(), [95, 85, 79, 76, 68.6])
    np.testing.assert_allclose(accuracies.lines[1].get_ydata()[-1], 94.6)
    np.testing.assert_allclose(forgettings.lines[0].get_ydata(), [math.nan, 15, 20, 61 / 3, 28.25])
    assert [text.get_text() for text in accuracies.get_legend().get_texts()] == ["Class-IL", "Task-IL"]


def test_one_task_has_no_curve_and_nothing_measured_no_picture():
    assert plots.draw_over_tasks(Record(Matrix.from_accuracy([[90]]), Matrix.empty(1))) is None
    assert plots.draw_accuracy_matrix(Record.empty(3)) is None
    assert plots.draw_over_tasks(Record.empty(3)) is None


def test_confusion_names_classes_up_to_20_and_tasks_beyond():
    few = np.arange(10)
    axes = plots.draw_confusion(
        FIVE_TASKS, [f"digit_{i}" for i in range(10)], {"label": few, "class_il": few, "task_il": few}
    ).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [f"digit_{i}" for i in CLASS_ORDER]
    many = np.arange(100)
    tasks = np.split(many, 10)
    names = [f"class_{i}" for i in many]
    axes = plots.draw_confusion(tasks, names, {"label": many, "class_il": many, "task_il": many}).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [f"task {i}" for i in range(1, 11)]
    assert axes[0].get_yticks()[:2].tolist() == [4.5, 14.5]


def test_confusion_leaves_out_a_setting_without_answers():
    label = np.arange(10)
    predictions = {"label": label, "class_il": np.full(10, -1), "task_il": label}
    first, _colour_bar = plots.draw_confusion(FIVE_TASKS, [str(i) for i in label], predictions).axes
    assert first.get_title() == "Task-IL"
    assert plots.draw_confusion(FIVE_TASKS, [], predictions | {"task_il": np.full(10, -1)}) is None


def test_tasks_that_share_classes_show_each_class_once():
    label = np.array([0, 1, 1])
    figure = plots.draw_confusion(
        [[1, 0], [1, 0]], ["no", "yes"], {"label": label, "class_il": label, "task_il": label}
    )
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["yes", "no"]
    assert not figure.axes[0].lines  # no line between tasks: they are not apart


def test_loss_lines_break_between_phases_and_mark_the_ends_of_tasks():
    def epoch(step, task, phase, **losses):
        return {"event": "epoch", "step": step, "task": task, "phase": phase, "epoch": 0, "losses": losses}

    events = [epoch(5, 0, 0, ce=2.0), epoch(10, 0, 0, ce=1.0), {"event": "task", "step": 10, "task": 0}]
    events += [epoch(15, 1, 0, ce=3.0, kd=None), epoch(20, 1, 1, ce=1.5), {"event": "task", "step": 20, "task": 1}]
    ce, kd = plots.draw_losses(events).axes
    assert (ce.get_title("left"), kd.get_title("left")) == ("ce", "kd")
    assert [list(line.get_xdata()) for line in ce.lines[:3]] == [[5, 10], [15], [20]]
    assert [list(line.get_ydata()) for line in ce.lines[:3]] == [[2.0, 1.0], [3.0], [1.5]]
    assert [list(line.get_xdata()) for line in ce.lines[3:]] == [[10, 10], [20, 20]]
    assert math.isnan(kd.lines[0].get_ydata()[0])
    assert plots.draw_losses([{"event": "start", "step": 0}]) is None


def test_names_with_dollars_and_underscores_are_drawn_as_they_are():
    label = np.arange(2)
    names = [r"$\frac$", r"_$\frac$"]  # not a formula that could be parsed
    plots.render_png(plots.draw_confusion([[0], [1]], names, {"label": label, "class_il": label, "task_il": label}))
    event = {"event": "epoch", "step": 1, "task": 0, "phase": 0, "epoch": 0, "losses": {names[0]: 1.0}}
    plots.render_png(plots.draw_losses([event, {"event": "task", "step": 1, "task": 0}]))
    figure = plots.draw_accuracy_by_row({"class_il": {name: np.array([[1.0, 2.0]]) for name in names}, "task_il": {}})
    plots.render_png(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    plots.render_png(plots.draw_dots({name: [1.0] for name in names}, dict.fromkeys(names), "accuracy [%]"))


@pytest.mark.slow
def test_pyplot_is_never_imported():
    code = "import sys, cl_bench.report.compare; sys.exit('matplotlib.pyplot' in sys.modules)"
    root = Path(page.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- page


@pytest.mark.slow
def test_page_holds_the_numbers_and_the_pictures(tmp_path):
    folder = make_run(tmp_path, published={"class_il_average_accuracy": 70.0, "tolerance": 1.5, "source": "A paper"})
    path = page.write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text()
    assert '<div class="card"><b>68.60%</b><span>Class-IL average accuracy</span></div>' in text
    assert '<div class="card"><b>28.25</b><span>Class-IL forgetting (points)</span></div>' in text
    assert '<td>forgetting</td><td class="number">28.25</td><td class="number">2.50</td>' in text
    assert '<td>forward transfer</td><td class="number">-</td><td class="number">-</td>' in text  # null is not 0
    assert '<td>replay buffer</td><td class="number">3.0 MiB</td>' in text
    assert '<td>peak memory</td><td class="number">-</td>' in text
    assert re.search(r">70.00</td>\s*<td[^>]*>68.60</td><td[^>]*>-1.40</td>\s*<td[^>]*>1.50</td>", text)
    assert '<span class="good">yes</span>' in text
    assert "packages.torch" in text
    names = ["accuracy_matrix", "over_tasks", "confusion", "losses"]
    assert sorted(file.stem for file in (folder / "plots").iterdir()) == sorted(names)
    assert all((folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    panels = {
        name: text.count(f'<use href="#{name}-figure"/>') + text.count(f'<g id="{name}-figure"') for name in names
    }
    assert panels == {"accuracy_matrix": 2, "over_tasks": 2, "confusion": 2, "losses": 2}
    assert re.findall(r'<td class="narrow">(\d)</td>', text) == ["1", "2", "3", "4", "5"]  # tasks


@pytest.mark.slow
def test_page_asks_for_nothing_from_outside(tmp_path):
    text = page.write_report(make_run(tmp_path)).read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", text)
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', text))


@pytest.mark.slow
def test_text_from_the_configuration_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = make_run(
        tmp_path,
        experiment=evil,
        method=evil,
        class_names=[evil] * 10,
        scale=evil,
        loss_terms=(evil,),
        published={"class_il_average_accuracy": 70.0, "tolerance": 1.5, "source": evil},
    )
    (folder / "env.json").write_text(json.dumps({evil: evil}))
    text = page.write_report(folder).read_text()
    assert "<script" not in text
    page_only = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    # title, experiment, method, scale twice (badge, verdict), 10 classes, source, config.yaml, environment twice
    assert page_only.count("&lt;script&gt;alert(1)") == 19
    assert text.count("&lt;script&gt;alert(1)") == 19 + 1 + 4 * 10  # a loss term, classes on four axes


@needs_chromium
@pytest.mark.slow
def test_a_browser_shows_the_page_at_both_widths(tmp_path):
    folder = make_run(tmp_path, class_names=[f"a_class_with_a_long_name_{i}" for i in range(10)])
    widest = "[narrow, wide].map((view) => view.document.querySelector('.panels svg').getBoundingClientRect().width)"
    (widths, panels), said = open_in_chromium(page.write_report(folder), tmp_path, f"[{WIDTHS}, {widest}]")
    assert said == ""
    assert widths[0] <= 390
    assert widths[1] <= 1280
    assert 320 < panels[0] < 390
    assert panels[1] > 400


@pytest.mark.slow
def test_regenerating_gives_the_same_bytes_and_touches_nothing_else(tmp_path):
    folder = make_run(tmp_path)

    def content() -> dict[str, bytes]:
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    before = content()
    page.write_report(folder)
    first = content()
    page.write_report(folder)
    assert content() == first
    assert {name: data for name, data in first.items() if name in before} == before
    assert all(name == "report.html" or name.startswith("plots") for name in first.keys() - before.keys())


@pytest.mark.slow
def test_a_method_without_class_il_shows_dashes(tmp_path):
    text = page.write_report(make_run(tmp_path, class_il=None)).read_text()
    assert '<div class="card"><b>-</b><span>Class-IL average accuracy</span></div>' in text
    assert '<td>average accuracy</td><td class="number">-</td><td class="number">94.60</td>' in text


def test_page_says_which_pictures_are_missing(tmp_path):
    folder = make_run(tmp_path)
    (folder / "predictions.npz").unlink()
    (folder / "metrics.jsonl").unlink()
    text = page.write_report(folder).read_text()
    assert "There is no confusion matrix" in text
    assert "There are no loss curves" in text
    assert text.count("<figure>") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "note"),
    [({"scale": "mini"}, "scale=mini: not compared"), ({"evaluate_on": "val"}, "measured on val images: not compared")],
)
def test_a_reduced_or_validation_run_is_not_held_to_a_published_number(tmp_path, override, note):
    published = {"class_il_average_accuracy": 68.0, "tolerance": 1.0, "source": "A paper"}
    folder = make_run(tmp_path, published=published, **override)
    run = page.Run.read(folder)
    (verdict,) = page.judge(run, run.value)
    assert (verdict.published, verdict.difference, verdict.within, verdict.ours) == (None, None, None, 68.6)
    text = page.write_report(folder).read_text()
    assert note in text
    assert "68.00" not in text


@pytest.mark.parametrize(
    ("published", "ours", "within"), [(57.1, 57.7, True), (57.09, 57.7, False), (58.4, 57.7, False), (58.0, None, None)]
)
def test_verdict_looks_both_ways_and_at_the_edge(published, ours, within):
    verdict = page.Verdict("Class-IL average accuracy", published, ours, 0.6, "A paper", "")
    assert verdict.within is within


def test_several_published_numbers_are_told_apart(tmp_path):
    published = {"class_il_average_accuracy": 68.0, "task_il_forgetting": 9.0, "tolerance": 1.0, "source": "A paper"}
    run = page.Run.read(make_run(tmp_path, published=published))
    lines = page.judge(run, run.value)
    assert [(line.metric, line.ours, line.within) for line in lines] == [
        ("Class-IL average accuracy", 68.6, True),
        ("Task-IL forgetting", 2.5, False),
    ]


@pytest.mark.parametrize(
    ("average", "forgetting", "transfer", "told"),
    [
        (68.6, 28.25, -28.25, None),
        (68.6, -0.01, 0.5, "Class-IL forgetting is below 0: "),
        (68.6, 0.2, 0.5, "Class-IL backward transfer is above 0: "),
        (10.0, 0.2, -0.5, "Class-IL average accuracy is not above 10.0 %, "),
        (95.0, 0.2, -0.5, "Task-IL accuracy is below Class-IL accuracy, "),
        (None, None, None, None),
    ],
)
def test_a_number_that_looks_odd_is_explained(tmp_path, average, forgetting, transfer, told):
    class_il = {"average_accuracy": average, "forgetting": forgetting, "backward_transfer": transfer}
    folder = make_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    lines = list(page._explain_odd_numbers(page.Run(folder, summary | {"class_il": class_il})))
    assert [line[: len(told or "")] for line in lines] == ([told] if told else [])


def test_average_precision_is_not_held_against_guessing(tmp_path):
    folder = make_run(tmp_path, measure="AP", task_il=None)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(page._explain_odd_numbers(page.Run(folder, summary | {"class_il": {"average_accuracy": 1.0}}))) == []


def test_every_cost_has_a_label():
    assert set(page.COSTS) == {field.name for field in dataclasses.fields(Cost)}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min"), (3599.0, "1 h 00 min"), (4211.3, "1 h 10 min")],
)
def test_durations(seconds, text):
    assert page.COSTS["train_seconds"][1](seconds) == text


@pytest.mark.parametrize("value", [None, math.nan])
def test_unknown_is_a_dash(value):
    assert page.format_number(value) == page.format_signed(value) == "-"


def test_numbers_have_no_negative_zero():
    assert (page.format_number(-0.001), page.format_signed(-0.001), page.format_signed(1.005)) == (
        "0.00",
        "+0.00",
        "+1.00",
    )


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("accuracy_matrix.csv", 0),  # without its last line, without one sign more, in the middle of it
        ("accuracy_matrix.csv", -1),
        ("accuracy_matrix.csv", -9),
        ("curve.csv", 0),
        ("curve.csv", -1),
        ("metrics.jsonl", -9),
        ("env.json", -1),
    ],
)
def test_a_file_that_breaks_off_is_named(tmp_path, name, cut):
    folder = make_run(tmp_path)
    record = Record.empty(5)
    for step in (1, 2):
        record.add_to_curve(step, 1, "class_il", [3.0, 4.0], [5, 5])
    record.write_curve_csv(folder / "curve.csv")
    page.Run.read(folder).record.get_matrix("class_il")  # whole files are read
    text = (folder / name).read_text()
    (folder / name).write_text(text[: text.rindex("\n", 0, -1) + 1] if cut == 0 else text[:cut])
    with pytest.raises(ConfigError) as error:
        page.write_report(folder)
    assert error.value.key == str(folder / name)
    assert not (folder / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "accuracy_matrix.csv", "config.yaml", "env.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = make_run(tmp_path)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match="no such file") as error:
        page.write_report(folder)
    assert error.value.key == str(folder / name)
    assert not (folder / "plots").exists()


@pytest.mark.parametrize(
    ("text", "got"),
    [('{"schema": 1,', "breaks off"), ('{"schema": 2}', "schema 2"), ('{"schema": 1, "status": "failed"}', "failed")],
)
def test_a_summary_of_no_finished_run_is_refused(tmp_path, text, got):
    folder = make_run(tmp_path)
    (folder / "summary.json").write_text(text)
    with pytest.raises(ConfigError, match=got):
        page.write_report(folder)


@pytest.mark.parametrize("missing", ["rich.console", "rich.table"])
def test_a_finished_run_does_without_the_packages_of_its_report(tmp_path, monkeypatch, capsys, missing):
    from cl_bench.runs.run import show_result

    monkeypatch.setitem(sys.modules, missing, None)
    show_result(make_run(tmp_path), {}, report=False)
    assert "rich" in (said := capsys.readouterr().err)
    assert "not installed" in said
