"""The comparison of runs: rows, statistics, tests, published numbers, files, and the command."""

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import FIVE_TASKS, make_run

from cl_bench.core.errors import ConfigError
from cl_bench.report import plots
from cl_bench.report.compare import compare, make_tables, show, write
from cl_bench.report.rows import MAIN, LeftOut
from cl_bench.report.statistics import Stat, correct_by_holm
from cl_bench.report.tables import Column, format_stat


def command():
    """``main`` of scripts/compare.py."""
    path = Path(__file__).parents[1] / "scripts" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def seeds(root: Path, accuracies: list, **options) -> None:
    """One run a seed, of the given Class-IL average accuracies."""
    for seed, accuracy in enumerate(accuracies):
        make_run(root, seed=seed, accuracy=accuracy, **options)


def rewrite(folder: Path, **entries) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---- rows and their statistics


def test_statistics_of_three_seeds(tmp_path):
    seeds(tmp_path, [60.0, 62.0, 67.0])
    (row,) = compare([str(tmp_path)]).rows
    stat = row.stat(MAIN)
    assert (stat.n, stat.mean) == (3, 63.0)
    assert stat.std == pytest.approx(math.sqrt(13))
    assert stat.ci95 == pytest.approx(4.302653 * math.sqrt(13 / 3), rel=1e-6)  # t quantile for 2 degrees of freedom
    assert format_stat(stat, Column(MAIN, ""), interval=False) == "63.00 ± 3.61 (3)"
    assert format_stat(stat, Column(MAIN, ""), interval=True) == "63.00 ± 3.61 (3)\n95 % ± 8.96"


def test_one_seed_has_no_spread_and_no_seed_no_number():
    assert Stat.of(pd.Series([61.5])) == Stat(1, 61.5, None, None)
    assert Stat.of(pd.Series([], dtype=float)) == Stat(0, None, None, None)
    assert format_stat(Stat(1, 61.5, None, None), Column(MAIN, ""), interval=True) == "61.50 (1)"
    assert format_stat(Stat(0, None, None, None), Column(MAIN, ""), interval=True) == ""


def test_unknown_values_are_left_out_of_the_mean_and_are_not_zero(tmp_path):
    seeds(tmp_path, [60.0, None, 62.0])
    seeds(tmp_path, [None], name="task_only", class_il=None)
    known, unknown = compare([str(tmp_path)]).rows
    assert (known.stat(MAIN).n, known.stat(MAIN).mean, len(known.runs)) == (2, 61.0, 3)
    assert unknown.stat(MAIN).mean is None
    write(compare([str(tmp_path)]), tmp_path / "out", "command")
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table[f"{MAIN}_mean"].isna().tolist() == [False, True]
    assert table[f"{MAIN}_seed1"].isna().all()
    line = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if "| task_only |" in line)
    assert line.startswith("| 2 | task_only | 1 |  |  |  | 94.60 (1) |")


def test_best_accuracy_first_and_unknown_last(tmp_path):
    for name, accuracy in [("zero", 0.0), ("none", None), ("high", 90.0), ("middle", 50.0)]:
        make_run(tmp_path, name=name, accuracy=accuracy)
    assert [row.label for row in compare([str(tmp_path)]).rows] == ["high", "middle", "zero", "none"]


def test_unlike_runs_stand_in_rows_of_their_own(tmp_path):
    seeds(tmp_path, [60.0, 62.0])
    seeds(tmp_path, [70.0], fingerprint="f1", comparable={"trainer.epochs": 5, "method.alpha": 0.5})
    first, second = compare([str(tmp_path)]).rows
    assert ([len(first.runs), len(second.runs)], first.label, second.label) == ([1, 2], "epochs=5", "epochs=3")
    assert (first.differs, second.differs) == ("reference", "row 1: trainer.epochs = 3 (5)")


def test_what_differs_is_said_once_without_the_free_groups(tmp_path):
    keys = {"trainer.epochs": 3, "method.alpha": 0.5, "buffer": "none", "methodical": 1, "scenario.val_fraction": 0.1}
    make_run(tmp_path, accuracy=90.0)
    make_run(tmp_path, name="other", accuracy=80.0, comparable=keys, evaluate_on="val")
    make_run(tmp_path, name="alike", accuracy=70.0, comparable={"trainer.epochs": 3, "method.alpha": 0.1})
    rows = compare([str(tmp_path)]).rows
    note = 'row 1: evaluate_on = "val" ("test"), methodical = 1 (absent), scenario.val_fraction = 0.1 (absent)'
    assert [row.differs for row in rows] == ["reference", note, "-"]


def test_a_namesake_says_every_key_that_differs(tmp_path):
    make_run(tmp_path, name="best", accuracy=90.0)
    make_run(tmp_path, name="er", fingerprint="f1", accuracy=80.0)
    make_run(
        tmp_path, name="er", fingerprint="f2", accuracy=70.0, comparable={"trainer.epochs": 9, "method.alpha": 0.1}
    )
    make_run(tmp_path, name="er", fingerprint="f3", accuracy=60.0)
    rows = compare([str(tmp_path)]).rows
    assert [row.differs for row in rows[2:]] == [
        "row 1: trainer.epochs = 9 (3); row 2: method.alpha = 0.1 (0.5), trainer.epochs = 9 (3)",
        "row 2: in the fingerprint, though in no listed key",
    ]


def test_a_namesake_in_the_first_row_is_said_once(tmp_path):
    make_run(tmp_path, fingerprint="f1", accuracy=90.0)
    keys = {"trainer.epochs": 9, "method.alpha": 0.1}
    make_run(tmp_path, fingerprint="f2", accuracy=80.0, comparable=keys)
    assert compare([str(tmp_path)]).rows[1].differs == "row 1: method.alpha = 0.1 (0.5), trainer.epochs = 9 (3)"


def test_long_values_are_cut_where_they_part(tmp_path):
    order = list(range(100))
    make_run(tmp_path, name="first", accuracy=90.0, comparable={"scenario.class_order": order})
    swapped = [*order[:50], 51, 50, *order[52:]]
    make_run(tmp_path, name="second", accuracy=80.0, comparable={"scenario.class_order": swapped})
    note = compare([str(tmp_path)]).rows[1].differs
    mine, theirs = re.fullmatch(r"row 1: scenario.class_order = …(.*)… \(…(.*)…\)", note).groups()
    assert mine.strip().startswith("48, 49, 51, 50, 52")
    assert theirs.strip().startswith("48, 49, 50, 51, 52")


def test_one_seed_twice_is_refused(tmp_path):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b")
    with pytest.raises(ConfigError, match="seed 0 in both") as error:
        compare([str(tmp_path)])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_a_run_reached_twice_counts_once(tmp_path):
    folder = make_run(tmp_path)
    (row,) = compare([str(tmp_path), str(folder), str(folder / ".." / "seed0")]).rows
    assert [run.folder for run in row.runs] == [folder]


def test_runs_of_other_images_are_refused_with_the_classes_that_differ(tmp_path):
    names = [f"class {c}" for c in range(9)]
    make_run(tmp_path, seed=0, class_names=[*names, "ant"], data="d0")
    make_run(tmp_path, seed=1, class_names=[*names, "bee"], data="d1")
    with pytest.raises(ConfigError, match=r"fingerprint: .*got class_names, data in .*; of one only: ant; .*: bee\. "):
        compare([str(tmp_path)])


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"comparable": {"trainer.epochs": 9, "method.alpha": 0.5}}, "trainer.epochs"),
        ({"class_order": list(range(10))}, "class_order"),
        ({"scale": "mini"}, "scale"),
        ({"evaluate_on": "val"}, "evaluate_on"),
    ],
)
def test_unlike_runs_with_one_fingerprint_are_refused(tmp_path, entries, key):
    make_run(tmp_path)
    rewrite(make_run(tmp_path, seed=1), **entries)
    with pytest.raises(ConfigError, match=f"got {key} in "):
        compare([str(tmp_path)])


def test_labels_are_as_short_as_they_can_be(tmp_path):
    make_run(tmp_path, experiment="a", name="er", accuracy=4.0)
    make_run(tmp_path, experiment="b", name="er", accuracy=3.0)
    make_run(tmp_path, experiment="b", name="lwf", accuracy=2.0)
    make_run(tmp_path, experiment="b", name="er", fingerprint="f1", accuracy=1.0)
    labels = [row.label for row in compare([str(tmp_path)]).rows]
    assert labels == ["a/er", "b/er (f0)", "lwf", "b/er (f1)"]


# ---- paired tests


def test_paired_test_over_the_seeds_in_common(tmp_path):
    seeds(tmp_path, [71.0, 74.0, 78.0, 99.0], name="new")  # seed 3 has no partner
    seeds(tmp_path, [70.0, 72.0, 75.0], name="old")
    (pair,) = compare([str(tmp_path)]).pairs.to_dict("records")
    assert (pair["first"], pair["second"], pair["seeds"]) == ("new", "old", 3)
    # differences 1, 2, 3: t = 2 sqrt(3), and with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    assert pair["mean_difference"] == pytest.approx(2.0)
    assert pair["p"] == pytest.approx(1 - math.sqrt(12 / 14))
    assert pair["ci95_low"] == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert pair["ci95_high"] == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert pair["p_holm"] == pair["p"]


def test_seeds_are_paired_by_number_not_by_place(tmp_path):
    for seed, accuracy in [(5, 50.0), (6, 60.0), (7, 70.0)]:
        make_run(tmp_path, name="new", seed=seed, accuracy=accuracy + seed)
    for seed, accuracy in [(4, 10.0), (5, 50.0), (6, 60.0), (7, 70.0)]:
        make_run(tmp_path, name="old", seed=seed, accuracy=accuracy)
    (pair,) = compare([str(tmp_path)]).pairs.to_dict("records")
    assert (pair["seeds"], pair["mean_difference"]) == (3, pytest.approx(6.0))


def test_two_seeds_in_common_are_not_tested(tmp_path):
    seeds(tmp_path, [71.0, 74.0], name="new")
    seeds(tmp_path, [70.0, 72.0, 75.0], name="old")
    comparison = compare([str(tmp_path)])
    assert comparison.pairs.empty
    assert "Paired tests" not in [table.title for table in make_tables(comparison, interval=True)]


def test_equal_differences_have_no_p(tmp_path):
    seeds(tmp_path, [71.0, 72.0, 74.0], name="new")
    seeds(tmp_path, [70.0, 71.0, 73.0], name="old")
    comparison = compare([str(tmp_path)])
    assert comparison.pairs["mean_difference"].tolist() == [1.0]
    assert comparison.pairs[["p", "p_holm"]].isna().all(axis=None)
    assert make_tables(comparison, interval=True)[-1].lines[0][-2:] == ["-", "-"]


def test_holm_counts_the_tests_and_never_falls():
    corrected = correct_by_holm(pd.Series([0.01, 0.04, 0.03, math.nan, 0.9]))
    np.testing.assert_allclose(corrected, [0.04, 0.09, 0.09, math.nan, 0.9])
    np.testing.assert_allclose(correct_by_holm(pd.Series([0.8, 0.7])), [1.0, 1.0])


# ---- order robustness

LAST = [60.0, 58.0, 64.0, 70.0, 91.0]
"""Final Class-IL accuracies of the tasks of ``make_run`` by position; Task-IL: 91, 93, 95, 96, 98."""


def in_order(root: Path, positions: list[int], last: list[float] = LAST, **options) -> None:
    """A run of the tasks of ``make_run`` in another order, with the given final Class-IL accuracies by position."""
    tasks = [FIVE_TASKS[position] for position in positions]
    order = [c for task in tasks for c in task]
    keys = {"trainer.epochs": 3, "method.alpha": 0.5, "scenario.class_order": order}
    settings = {
        "comparable": keys,
        "fingerprint": "o" + "".join(map(str, positions)),
        "class_order": order,
        "tasks": tasks,
    }
    class_il = [*[[50.0] * (i + 1) for i in range(4)], last]
    make_run(root, class_il=class_il, **(settings | options))


def order_lines(root: Path) -> list[list[str]]:
    shown = make_tables(compare([str(root)]), interval=False)
    return [line for table in shown if table.title == "Order robustness" for line in table.lines]


def test_rows_that_differ_in_the_order_of_tasks_have_a_disparity(tmp_path):
    in_order(tmp_path, [0, 1, 2, 3, 4], accuracy=68.0)
    in_order(tmp_path, [4, 3, 2, 1, 0], [81.0, 70.0, 61.0, 62.0, 75.0], accuracy=69.0)
    make_run(tmp_path, name="other", accuracy=90.0)
    # Class-IL: 60/75, 58/62, 64/61, 70/70, 91/81; Task-IL: 91/98, 93/96, 95/95, 96/93, 98/91
    (line,) = order_lines(tmp_path)
    assert line[:4] == ["digits/er", "2, 3", "2", "1"]
    assert line[4:] == ["6.40 (1)", "15.00 (1)", "4.00 (1)", "7.00 (1)"]
    comparison = compare([str(tmp_path)])
    write(comparison, tmp_path / "out", "command")
    frame = pd.read_csv(tmp_path / "out" / "orders.csv")
    assert len(frame) == 2 * 5
    first = frame[(frame["setting"] == "class_il") & (frame["classes"] == "0 8")].iloc[0]
    assert (first["lowest"], first["highest"], first["disparity"]) == (60, 75, 15)
    for file in ("table.md", "compare.html"):
        assert "Order robustness" in (tmp_path / "out" / file).read_text()


def test_disparities_are_taken_seed_by_seed_over_the_seeds_that_every_order_has(tmp_path):
    for seed, high in [(0, 70.0), (1, 80.0), (2, 99.0)]:
        in_order(tmp_path, [0, 1, 2, 3, 4], [60.0] * 5, seed=seed)
        if seed < 2:
            in_order(tmp_path, [1, 0, 2, 3, 4], [60.0, high, 60.0, 60.0, 60.0], seed=seed)
    (line,) = order_lines(tmp_path)
    assert line[2:6] == ["2", "2", "3.00 ± 1.41 (2)", "15.00 ± 7.07 (2)"]  # task 0: 10 and 20 points


@pytest.mark.slow
def test_no_disparity_of_other_tasks_other_settings_or_one_order(tmp_path):
    in_order(tmp_path, [0, 1, 2, 3, 4])
    regrouped = [[8, 7], [0, 1], *FIVE_TASKS[2:]]  # the same classes in other tasks
    in_order(tmp_path, [0, 1, 2, 3, 4], tasks=regrouped, fingerprint="f1", class_order=[8, 7, 0, 1, 3, 6, 2, 4, 5, 9])
    keys = {"trainer.epochs": 9, "method.alpha": 0.5, "scenario.class_order": list(range(10))}
    in_order(tmp_path, [1, 0, 2, 3, 4], fingerprint="f2", comparable=keys)
    in_order(tmp_path, [1, 0, 2, 3, 4], fingerprint="f3", experiment="elsewhere")
    in_order(tmp_path, [1, 0, 2, 3, 4], fingerprint="f4", seed=7)  # no seed in common
    # the same order, said in another way
    keys = {"trainer.epochs": 3, "method.alpha": 0.5, "scenario.class_order": "natural"}
    in_order(tmp_path, [0, 1, 2, 3, 4], fingerprint="f5", comparable=keys)
    assert order_lines(tmp_path) == []
    write(compare([str(tmp_path)]), tmp_path / "out", "command")
    assert not (tmp_path / "out" / "orders.csv").exists()


def test_a_setting_that_was_not_answered_has_no_disparity(tmp_path):
    in_order(tmp_path, [0, 1, 2, 3, 4], [math.nan] * 5, accuracy=None)
    in_order(tmp_path, [1, 0, 2, 3, 4], [math.nan] * 5, accuracy=None)
    (line,) = order_lines(tmp_path)
    assert line[4:] == ["", "", "0.80 (1)", "2.00 (1)"]  # 91 and 93 have changed places


# ---- published numbers

PUBLISHED = {"class_il_average_accuracy": 63.5, "tolerance": 1.0, "source": "A paper, table 1"}


def published_lines(root: Path) -> list[list[str]]:
    return next(
        table for table in make_tables(compare([str(root)]), interval=False) if table.title.startswith("Pub")
    ).lines


def test_published_number_beside_the_mean_over_seeds(tmp_path):
    seeds(tmp_path, [60.0, 62.0, 67.0], published=PUBLISHED)
    make_run(tmp_path, name="unpublished")
    line = ["er", "Class-IL average accuracy", "63.50", "63.00", "-0.50", "1.00", "yes", "A paper, table 1"]
    assert published_lines(tmp_path) == [line]


def test_outside_the_tolerance(tmp_path):
    seeds(tmp_path, [65.0], published=PUBLISHED)
    assert published_lines(tmp_path)[0][4:7] == ["+1.50", "1.00", "no"]


def test_a_mini_run_is_never_held_to_a_published_number(tmp_path):
    seeds(tmp_path, [63.5], published=PUBLISHED, scale="mini")
    (line,) = published_lines(tmp_path)
    assert line[2:7] == ["-", "63.50", "-", "-", "-"]
    assert line[7] == "A paper, table 1 (scale=mini: not compared with a published number)"


def test_an_unknown_value_gives_no_verdict(tmp_path):
    make_run(tmp_path, class_il=None, published=PUBLISHED)
    assert published_lines(tmp_path)[0][2:7] == ["63.50", "-", "-", "1.00", "-"]


# ---- pictures


def test_curves_have_a_band_of_one_standard_deviation():
    values = np.array([[90.0, 80.0], [90.0, 84.0]])
    axes = plots.draw_accuracy_by_row({"class_il": {"er": values}, "task_il": {}}).axes
    assert len(axes) == 1
    assert axes[0].lines[0].get_ydata().tolist() == [90.0, 82.0]
    band = axes[0].collections[0].get_paths()[0].vertices
    assert {round(y, 4) for x, y in band if x == 1} == {round(82 - math.sqrt(8), 4), round(82 + math.sqrt(8), 4)}


def test_one_seed_has_no_band_and_one_task_is_a_level():
    curves = {"class_il": {"er": np.array([[90.0, 80.0]]), "joint": np.array([[70.0]])}, "task_il": {}}
    (axes,) = plots.draw_accuracy_by_row(curves).axes
    assert not axes.collections
    assert [list(line.get_ydata()) for line in axes.lines] == [[90.0, 80.0], [70.0, 70.0]]
    assert plots.draw_accuracy_by_row({"class_il": {}, "task_il": {}}) is None


def test_dots_show_each_seed_and_the_mean():
    (axes,) = plots.draw_dots({"er": [60.0, 64.0], "none": []}, {"er": 25.4, "none": None}, "accuracy [%]").axes
    interval, mean, dots = (list(line.get_xdata()) for line in axes.lines)
    assert (interval, mean, dots) == ([62 - 25.4, 62 + 25.4], [62.0], [60.0, 64.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["er"]
    assert plots.draw_dots({"none": []}, {"none": None}, "accuracy [%]") is None


def test_a_setting_that_was_not_measured_has_no_picture(tmp_path):
    seeds(tmp_path, [None, None], class_il=None)
    write(compare([str(tmp_path)]), tmp_path / "out", "command")
    assert [file.name for file in (tmp_path / "out").glob("*.png")] == ["accuracy_over_tasks.png"]
    assert 'width="530"' in (tmp_path / "out" / "compare.html").read_text()  # one panel


# ---- files and the command


def test_written_files(tmp_path, monkeypatch, capsys):
    seeds(tmp_path / "runs", [60.0, 62.0, 67.1], name="new", published=PUBLISHED)
    seeds(tmp_path / "runs", [50.0, 51.0, 52.0], name="old")
    monkeypatch.chdir(tmp_path)
    assert command()(["runs", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "63.03 ± 3.66 (3)" in printed
    assert "[points]" in printed  # the unit is no markup
    out = tmp_path / "out"
    names = {"table.md", "table.csv", "pairs.csv", "compare.html", "final_accuracy.png", "accuracy_over_tasks.png"}
    assert {file.name for file in out.iterdir()} == names
    markdown = (out / "table.md").read_text().splitlines()
    assert markdown[0] == "Made by `python scripts/compare.py runs --out out`."
    cells = ["1", "new", "3", "**63.03 ± 3.66 (3)**", "80.72 ± 0.00 (3)", "28.25 ± 0.00 (3)", "94.60 ± 0.00 (3)"]
    assert f"| {' | '.join([*cells, '2.50 ± 0.00 (3)', 'reference'])} |" in markdown
    cells = ["1", "new", "3", "1.000 ± 0.000 (3)", "3.00 ± 0.00 (3)", "0.50 ± 0.00 (3)", "100.0 ± 0.0 (3)"]
    assert f"| {' | '.join([*cells, '50.0 ± 0.0 (3)', '', ''])} |" in markdown  # no peak, no energy
    table = pd.read_csv(out / "table.csv").set_index("label")
    assert table.loc["new", f"{MAIN}_mean"] == np.mean([60.0, 62.0, 67.1])  # full precision
    assert table.loc["new", [f"{MAIN}_seed{seed}" for seed in range(3)]].tolist() == [60.0, 62.0, 67.1]
    assert pd.read_csv(out / "pairs.csv")["mean_difference"].tolist() == [pytest.approx(189.1 / 3 - 51)]
    html = (out / "compare.html").read_text()
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)


@pytest.mark.slow
def test_regenerating_gives_the_same_bytes(tmp_path, monkeypatch):
    seeds(tmp_path, [60.0, 62.0, 67.0])
    monkeypatch.chdir(tmp_path)
    contents = []
    for _ in range(2):
        command()(["digits", "--out", "out"])
        contents.append({file.name: file.read_bytes() for file in Path("out").iterdir()})
        shutil.rmtree("out")
    assert len(contents[0]) == 6
    assert contents[0] == contents[1]


def test_names_are_escaped(tmp_path, capsys):
    evil = "<script>a|b</script>[bold]"
    make_run(tmp_path, experiment=evil, name=evil, published=PUBLISHED | {"source": evil})
    comparison = compare([str(tmp_path)])
    show(comparison)
    assert evil in re.sub(r"\s", "", capsys.readouterr().out)
    write(comparison, tmp_path / "out", f"command {evil}")
    assert "<script" not in (tmp_path / "out" / "compare.html").read_text()
    markdown = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert any(line.startswith(r"| 1 | &lt;script>a\|b&lt;/script>[bold] | 1 |") for line in markdown)


def test_unfinished_runs_are_left_out_and_named(tmp_path, capsys):
    make_run(tmp_path)
    unfinished = make_run(tmp_path, seed=1)
    (unfinished / "summary.json").unlink()
    comparison = compare([str(tmp_path)])
    assert (len(comparison.rows[0].runs), comparison.left_out) == (1, [LeftOut(unfinished, "interrupted")])
    show(comparison)
    assert f"Left out, interrupted: {unfinished}" in capsys.readouterr().out.replace("\n", "")
    write(comparison, tmp_path / "out", "command")
    assert f"Left out, interrupted: {unfinished}" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "'nowhere', which is not there"),
        ("file", "'file', which is a file"),
        ("empty", "no run at all"),
        ("unfinished", "1 unfinished, the first being unfinished"),
        ("damaged", "breaks off or is damaged"),
    ],
)
def test_a_wrong_path_gives_one_message_and_status_2(tmp_path, monkeypatch, capsys, path, message):
    monkeypatch.chdir(tmp_path)
    good = make_run(Path("good"))
    Path("file").write_text("")
    Path("empty").mkdir()
    shutil.copytree(good, "unfinished")
    Path("unfinished/summary.json").unlink()
    shutil.copytree(good, "damaged")
    Path("damaged/summary.json").write_text("{")
    assert command()(["good", path, "--out", "out"]) == 2  # one good path does not hide a wrong one
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not Path("out").exists()


def test_out_that_is_a_file_gives_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("good"))
    Path("out").write_text("")
    assert command()(["good", "--out", "out"]) == 2
    assert capsys.readouterr().err == "--out: expected a folder; got 'out', a file. Name another folder.\n"
