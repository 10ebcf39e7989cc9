"""The comparison of runs: rows, statistics, tests, published numbers, files, and the command."""

import base64
import hashlib
import io
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import FIVE_TASKS, ROOT, WIDTHS, load_script, make_run, needs_chromium, open_in_chromium

from cl_bench.core.errors import ConfigError
from cl_bench.report import compare as compare_module
from cl_bench.report import plots, tables
from cl_bench.report.compare import compare, make_csv, make_frame, make_tables, show, write
from cl_bench.report.rows import MAIN, LeftOut
from cl_bench.report.selection import Selection
from cl_bench.report.statistics import Stat, correct_by_holm
from cl_bench.report.tables import Column, Table, format_latex, format_markdown, format_stat
from cl_bench.runs.run_dir import note_failure
from cl_bench.system.atomic import hold_lock


def command():
    """``main`` of scripts/compare.py."""
    return load_script("compare").main


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


BASE = {"trainer.epochs": 3, "method.alpha": 0.5, "buffer.capacity": 20, "optimizer.lr": 0.1}


def labels_of(root: Path, *rows: dict) -> list[str]:
    """The labels of rows with one seed each, in the order given."""
    for i, row in enumerate(rows):
        row = {"comparable": BASE | row.pop("keys", {}), **row}
        make_run(root, fingerprint=f"f{i}", accuracy=90.0 - i, **row)
    return [row.label for row in compare([str(root)]).rows]


@pytest.mark.parametrize(
    ("rows", "labels"),
    {
        "one row": ([{}], ["er"]),
        "untyped": ([{}, {"keys": {"optimizer.lr": 0.05}}], ["lr=0.1", "lr=0.05"]),
        "typed, and what follows from it is not said": (
            [
                {"label": "buffer.capacity=100", "keys": {"buffer.capacity": 100, "method.batch": 100}},
                {"label": "buffer.capacity=200", "keys": {"buffer.capacity": 200, "method.batch": 200}},
            ],
            ["capacity=100", "capacity=200"],
        ),
        "two typed": (
            [
                {"label": f"optimizer.lr={lr} buffer.capacity={n}", "keys": {"optimizer.lr": lr, "buffer.capacity": n}}
                for lr, n in [(0.1, 20), (0.1, 100), (0.05, 20)]
            ],
            ["capacity=20, lr=0.1", "capacity=100, lr=0.1", "capacity=20, lr=0.05"],
        ),
        "a default that was typed in one row only": (
            [{"label": "optimizer.lr=0.1"}, {"label": "optimizer.lr=0.2", "keys": {"optimizer.lr": 0.2}}],
            ["lr=0.1", "lr=0.2"],
        ),
        "typed alike, but not all is told by it": (
            [{"label": "buffer.capacity=20"}, {"label": "buffer.capacity=20", "keys": {"trainer.epochs": 9}}],
            ["epochs=3", "epochs=9"],
        ),
        "an ambiguous short key": (
            [{"keys": {"method.lr": 1}}, {"keys": {"method.lr": 1, "optimizer.lr": 0.2}}],
            ["optimizer.lr=0.1", "optimizer.lr=0.2"],
        ),
        "a key of later runs": (
            [{}, {"label": "backbone.norm=layer", "keys": {"backbone.norm": "layer"}}],
            ["norm=default", "norm=layer"],
        ),
        "another optimizer": (
            [
                {"keys": {"optimizer._target_": "cl_bench.optim.sgd", "optimizer.momentum": 0.9}},
                {"keys": {"optimizer._target_": "torch.optim.AdamW", "optimizer.betas": [0.9, 0.99]}},
            ],
            ["optimizer=sgd", "optimizer=AdamW"],
        ),
        "names": ([{"name": "er"}, {"name": "lwf", "keys": {"optimizer.lr": 0.2}}], ["er", "lwf"]),
        "names and settings": (
            [{"name": "er"}, {"name": "er", "keys": {"optimizer.lr": 0.2}}, {"name": "lwf"}],
            ["er lr=0.1", "er lr=0.2", "lwf"],
        ),
        "experiments": ([{"experiment": "a"}, {"experiment": "b"}], ["a", "b"]),
        "a text of one's own": (
            [{"label": "my  idea"}, {"label": "optimizer.lr=0.2", "keys": {"optimizer.lr": 0.2}}],
            ["my idea", "lr=0.2"],
        ),
        "one text of several rows": (
            [{"label": "mine"}, {"label": "mine", "keys": {"optimizer.lr": 0.2}}],
            ["lr=0.1", "lr=0.2"],
        ),
        "the scale": (
            [{"scale": None}, {"scale": "mini", "keys": {"trainer.epochs": 1}}],
            ["scale=null", "scale=mini"],
        ),
        "nothing that is listed": ([{}, {}], ["er (f0)", "er (f1)"]),
    }.values(),
)
def test_a_label_is_what_differs(tmp_path, rows, labels):
    assert labels_of(tmp_path, *(dict(row) for row in rows)) == labels


def test_what_all_rows_have_in_common_stands_once_above_the_table(tmp_path, capsys):
    typed = "trainer.epochs=3 optimizer.lr="
    labels_of(
        tmp_path,
        {"label": f"{typed}0.1", "scale": "mini"},
        {"label": f"{typed}0.2", "scale": "mini", "keys": {"optimizer.lr": 0.2}},
    )
    common = "In all rows: experiment=digits, method=er, backbone=mlp, scenario=digits, buffer=reservoir, scale=mini, "
    common += "epochs=3, seed=0."
    comparison = compare([str(tmp_path)])
    assert comparison.common == common
    write(comparison, tmp_path / "out", "command")
    for file, first in {"table.md": "## Accuracy", "compare.html": "<h2>Accuracy"}.items():
        text = (tmp_path / "out" / file).read_text()
        assert text.count(common) == 1
        assert text.index(common) < text.index(first)
    show(comparison)
    assert capsys.readouterr().out.startswith(common)


def test_plots_and_all_tables_use_the_label(tmp_path, monkeypatch):
    for lr in (0.1, 0.2):
        seeds(tmp_path, [60 + lr, 61 + lr, 63 + lr], fingerprint=f"f{lr}", comparable=BASE | {"optimizer.lr": lr})
    drawn = []
    monkeypatch.setattr(plots, "draw_dots", lambda values, *_: drawn.extend(values))
    monkeypatch.setattr(plots, "draw_accuracy_by_row", lambda curves, *_: drawn.extend(curves["class_il"]))
    comparison = compare([str(tmp_path)])
    write(comparison, tmp_path / "out", "command")
    assert drawn == ["lr=0.2", "lr=0.1"] * 2
    assert "f0.1" not in json.dumps([table.lines for table in make_tables(comparison, interval=True)])


# ---- which runs, in which order, and which metrics


def sweep(root: Path) -> list[str]:
    """Six rows: methods er and lwf with three rates each, two seeds; returns the argument for the command."""
    means = {"er": (50.0, 70.0, 60.0), "lwf": (30.0, 10.0, 20.0)}
    for name, row in means.items():
        for rate, accuracy in zip((0.1, 0.01, 0.02), row):
            keys = BASE | {"optimizer.lr": rate}
            for seed in range(2):
                metrics = {"average_accuracy": accuracy + seed, "forgetting": 100 - accuracy - seed}
                make_run(root, name=name, method=name, fingerprint=f"{name}{rate}", seed=seed, comparable=keys)
                folder = root / "digits" / f"{name}-{name}{rate}" / f"seed{seed}"
                rewrite(folder, class_il=metrics, label=f"optimizer.lr={rate}")
    return [str(root)]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, ["er lr=0.01", "er lr=0.02", "er lr=0.1", "lwf lr=0.1", "lwf lr=0.02", "lwf lr=0.01"]),
        ({"where": ["method=er"]}, ["lr=0.01", "lr=0.02", "lr=0.1"]),
        ({"where": ["lr=0.10,1e-2", "method=lwf"]}, ["lr=0.1", "lr=0.01"]),
        ({"where": ["optimizer.lr=0.1"], "sort": "name"}, ["er", "lwf"]),
        ({"where": ["method=er"], "sort": "lr"}, ["lr=0.01", "lr=0.02", "lr=0.1"]),
        ({"where": ["method=er"], "sort": "class_il.forgetting"}, ["lr=0.01", "lr=0.02", "lr=0.1"]),
        (
            {"group": "lr"},
            ["er lr=0.01", "lwf lr=0.01", "er lr=0.02", "lwf lr=0.02", "er lr=0.1", "lwf lr=0.1"],
        ),
    ],
)
def test_runs_are_chosen_sorted_and_grouped(tmp_path, options, labels):
    assert [row.label for row in compare(sweep(tmp_path), Selection(**options)).rows] == labels


def test_one_seed_can_be_chosen(tmp_path):
    rows = compare(sweep(tmp_path), Selection(where=["seed=1"])).rows
    assert {run.summary["seed"] for row in rows for run in row.runs} == {1}


def test_metrics_are_chosen_and_the_best_is_marked(tmp_path):
    metrics = ["average_accuracy", "class_il/forgetting", "cost.parameters"]
    comparison = compare(sweep(tmp_path), Selection(where=["method=er"], metrics=metrics))
    (table,) = make_tables(comparison, interval=False)
    assert table.header[3:] == [
        "Class-IL accuracy [%]",
        "Task-IL accuracy [%]",
        "Class-IL forgetting [points]",
        "parameters [millions]",
        "differs in",
    ]
    assert sorted(table.best) == [(0, 3), (0, 5)]  # most accuracy, least forgetting; the others are all alike
    assert "| 1 | lr=0.01 | 2 | **70.50 ± 0.71 (2)** | 94.60 ± 0.00 (2) | **29.50" in format_markdown(table)


def test_the_best_of_each_group_is_marked(tmp_path):
    table = make_tables(compare(sweep(tmp_path), Selection(group="method", sort="lr")), interval=False)[0]
    assert table.header[:4] == ["row", "method", "run", "n"]
    best = [(table.lines[line][1], table.lines[line][2]) for line, column in sorted(table.best) if column == 4]
    assert best == [("er", "er lr=0.01"), ("lwf", "lwf lr=0.1")]


def test_values_that_look_alike_are_all_the_best(tmp_path):
    for name, accuracy in [("a", 50.001), ("b", 50.002), ("c", 40.0), ("d", None)]:
        make_run(tmp_path, name=name, accuracy=accuracy)
    table = make_tables(compare([str(tmp_path)]), interval=False)[0]
    assert sorted(table.best) == [(0, 3), (1, 3)]


@pytest.mark.parametrize("reference", ["er lr=0.1", "3", "ER LR=0.1"])
def test_differences_from_a_reference_row(tmp_path, reference):
    comparison = compare(sweep(tmp_path), Selection(reference=reference))
    table = make_tables(comparison, interval=False)[1]
    assert table.title == "Differences from er lr=0.1"
    assert [line[3] for line in table.lines][:4] == [
        "+20.00 ± 0.00 (2)",
        "+10.00 ± 0.00 (2)",
        "reference",
        "-20.00 ± 0.00 (2)",
    ]
    assert comparison.rows[2].differs == "reference"
    assert comparison.rows[0].differs == "row 3: optimizer.lr = 0.01 (0.1)"
    assert make_frame(comparison)[f"{MAIN}_difference"].tolist() == [20, 10, 0, -20, -30, -40]


def test_paired_tests_are_against_the_reference_or_of_many_rows_the_first(tmp_path, monkeypatch):
    for name, accuracy in [("a", 50.0), ("b", 40.0), ("c", 30.0)]:
        seeds(tmp_path, [accuracy, accuracy + 1.5, accuracy + 3], name=name)
    assert len(compare([str(tmp_path)]).pairs) == 3
    pairs = compare([str(tmp_path)], Selection(reference="b")).pairs
    assert pairs[["first", "second"]].to_numpy().tolist() == [["a", "b"], ["c", "b"]]
    assert pairs["mean_difference"].tolist() == [10.0, -10.0]
    monkeypatch.setattr(compare_module, "MOST_ROWS_PAIRED", 2)
    many = compare([str(tmp_path)])
    assert many.pairs["second"].tolist() == ["a", "a"]
    assert "Of more than 2 rows each is tested against the first only." in make_tables(many, interval=False)[-1].note


def test_long_tables_are_cut_on_the_terminal_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "MOST_LINES_SHOWN", 2)
    comparison = compare(sweep(tmp_path))
    show(comparison)
    printed = capsys.readouterr().out
    assert "er lr=0.02" in printed
    assert "lwf lr=0.01" not in printed
    assert "4 more lines" in printed
    show(comparison, "markdown")
    assert "lwf lr=0.01" in capsys.readouterr().out


def test_latex_csv_and_json(tmp_path, capsys):
    paths = sweep(tmp_path)
    rewrite(tmp_path / "digits" / "er-er0.1" / "seed1", label="optimizer.lr=0.1")
    assert command()([*paths, "--where", "method=er", "--reference", "lr=0.1", "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\begin{tabular}") == 3
    assert r"1 & lr=0.01 & 2 & \textbf{70.50 $\pm$ 0.71 (2)} & " in latex
    assert r"Class-IL accuracy [\%]" in latex
    assert "differs in" not in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {7, 9}  # as many cells as columns: accuracy, differences; cost

    assert command()([*paths, "--format", "csv", "--group", "lr"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert frame["lr"].tolist() == [0.01, 0.01, 0.02, 0.02, 0.1, 0.1]
    assert frame[f"{MAIN}_seed1"].tolist()[:2] == [71.0, 11.0]

    assert command()([*paths, "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["common"].startswith("In all rows: experiment=digits")
    assert [row["label"] for row in content["rows"]][:2] == ["er lr=0.01", "er lr=0.02"]
    assert content["rows"][0][f"{MAIN}_mean"] == 70.5
    assert content["rows"][0]["cost.energy_joules_mean"] is None
    assert content["left_out"] == []


def test_latex_escapes_what_has_a_meaning_there():
    table = Table("a_b", "50 % & more", ["run", "x"], [[r"{c}$^~#\d", "1 ± 2\n3"]], [1], {(0, 1)})
    assert [line for line in format_latex(table).splitlines() if line.endswith(r"\\")] == [
        r"run & x \\",
        r"\{c\}\$\textasciicircum{}\textasciitilde{}\#\textbackslash{}d & \textbf{1 $\pm$ 2 3} \\",
    ]
    assert r"\caption{a\_b. 50 \% \& more}" in format_latex(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "lrr=0.1"], "--where: expected a key of these runs; got lrr. Did you mean optimizer.lr?"),
        (["--where", "lr"], "--where: expected KEY=VALUE; got lr."),
        (["--where", "lr=7"], "--where: expected a value of optimizer.lr that a run has; got lr=7. There is 0.01, "),
        (["--group", "metod"], "--group: expected a key of these runs; got metod. Did you mean method?"),
        (["--group", "seed"], "--group: expected a key that a row has once; got seed."),
        (["--sort", "acuracy"], "--sort: expected a key of these runs; got acuracy."),
        (["--metrics", "forgeting"], "--metrics: expected a metric of these runs; got forgeting. Did you mean "),
        (
            ["--reference", "lr=0.1"],
            "--reference: expected the label of one row or its number, 1 to 6; got 'lr=0.1'",
        ),
        (
            ["--reference", "9"],
            "--reference: expected the label of one row or its number, 1 to 6; got '9', which ",
        ),
    ],
)
def test_a_wrong_option_gives_one_message_and_status_2(tmp_path, capsys, options, message):
    assert command()([*sweep(tmp_path), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"cl_bench: {message}")
    assert printed.err.count("\n") == 1


def test_a_short_key_of_two_is_refused(tmp_path, capsys):
    labels_of(tmp_path, {"keys": {"method.lr": 1}})
    assert command()([str(tmp_path), "--where", "lr=1"]) == 2
    assert (
        capsys.readouterr().err == "cl_bench: --where: expected the whole key; got lr. Use method.lr or optimizer.lr.\n"
    )


def test_an_imported_row_alone_is_no_reference(tmp_path, capsys):
    (tmp_path / "matrix.csv").write_text("90\n80,95\n")
    assert command()(["--import", str(tmp_path / "matrix.csv"), "--reference", "1"]) == 2
    assert "with the seeds of another program" in capsys.readouterr().err


def test_a_reference_without_a_seed_in_common_is_refused(tmp_path, capsys):
    make_run(tmp_path, name="a", seed=0)
    make_run(tmp_path, name="b", seed=1)
    make_run(tmp_path, name="c", seed=1)
    assert command()([str(tmp_path), "--reference", "a"]) == 2
    assert capsys.readouterr().err.startswith(
        "cl_bench: --reference: expected a row that has a seed in common with another one; got a with the seeds 0. "
    )
    table = make_tables(compare([str(tmp_path)], Selection(reference="b")), interval=False)[1]
    assert [line[2:4] for line in table.lines] == [["0", ""], ["1", "reference"], ["1", "+0.00 (1)"]]


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
    known = None if math.isnan(last[0]) else float(np.mean(last))
    make_run(root, class_il=class_il, **({"accuracy": known} | settings | options))


def order_lines(root: Path) -> list[list[str]]:
    shown = make_tables(compare([str(root)]), interval=False)
    return [line for table in shown if table.title == "Order robustness" for line in table.lines]


def test_rows_that_differ_in_the_order_of_tasks_have_a_disparity(tmp_path):
    in_order(tmp_path, [0, 1, 2, 3, 4])
    in_order(tmp_path, [4, 3, 2, 1, 0], [81.0, 70.0, 61.0, 62.0, 75.0])
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
    in_order(tmp_path, [0, 1, 2, 3, 4], [math.nan] * 5)
    in_order(tmp_path, [1, 0, 2, 3, 4], [math.nan] * 5)
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
    assert {round(y, 4) for x, y in band if x == 2} == {round(82 - math.sqrt(8), 4), round(82 + math.sqrt(8), 4)}


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
    assert markdown[0] == "Made by `cl_bench compare runs --out out`."
    cells = ["1", "new", "3", "**63.03 ± 3.66 (3)**", "80.72 ± 0.00 (3)", "28.25 ± 0.00 (3)", "94.60 ± 0.00 (3)"]
    assert f"| {' | '.join([*cells, '2.50 ± 0.00 (3)', 'reference'])} |" in markdown
    cells = ["1", "new", "3", "1.000 ± 0.000 (3)", "3.00 ± 0.00 (3)", "0.50 ± 0.00 (3)", "100.0 ± 0.0 (3)"]
    assert f"| {' | '.join([*cells, '50.0 ± 0.0 (3)', '', ''])} |" in markdown  # no peak, no energy
    table = pd.read_csv(out / "table.csv").set_index("label")
    assert table.loc["new", f"{MAIN}_mean"] == np.mean([60.0, 62.0, 67.1])  # full precision
    assert table.loc["new", [f"{MAIN}_seed{seed}" for seed in range(3)]].tolist() == [60.0, 62.0, 67.1]
    assert pd.read_csv(out / "pairs.csv")["mean_difference"].tolist() == [pytest.approx(189.1 / 3 - 51)]
    html = (out / "compare.html").read_text()
    assert html.count('<use href="#accuracy_over_tasks-figure"/>') == 1  # the second panel
    assert html.count('%" cy="50%"') == 6  # a dot per seed
    assert not re.search(r"https?:|<link|@import|url\((?!#)", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@needs_chromium
@pytest.mark.slow
def test_a_browser_shows_sorts_and_filters_sixteen_rows_at_both_widths(tmp_path):
    """The records of this checkout at mini scale; labels and settings as long as they are."""
    comparison = compare([str(ROOT / "results" / "mini" / "records")])
    assert len(comparison.rows) == 16
    write(comparison, tmp_path, "command")
    act = """(() => {
      const table = narrow.document.querySelector("table.rows");
      const labels = () => [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.cells[1].innerText);
      const told = [labels()];
      const heads = [...table.tHead.rows[0].cells];
      const column = heads.find((head) => head.innerText.startsWith("Task-IL accuracy"));
      for (const _ of "ab") { column.firstChild.click(); told.push(labels()); }
      const field = narrow.document.querySelector("#filter");
      field.value = "VIT- 38.45";
      field.dispatchEvent(new Event("input"));
      told.push(labels(), narrow.document.querySelector("#shown").innerText);
      told.push([...narrow.document.querySelectorAll(".dots svg")].every((svg) => svg.clientHeight < 60));
      narrow.document.querySelector(".scroll").scrollLeft = 300;
      const fixed = table.querySelector("tr:not([hidden]) td.fixed");
      told.push(column.getAttribute("aria-sort"), fixed.getBoundingClientRect().left > 0);
      told.push(narrow.document.querySelector("details").open);
      told.push(narrow.document.querySelectorAll(".dots .row:not([hidden]), .legend li:not([hidden])").length);
      return told;
    })()"""
    (widths, told), said = open_in_chromium(tmp_path / "compare.html", tmp_path, f"[{WIDTHS}, {act}]")
    assert said == ""
    assert widths[0] <= 390
    assert widths[1] <= 1280
    labels = [row.label for row in comparison.rows]
    key = "task_il.average_accuracy"
    upwards = [row.label for row in sorted(comparison.rows, key=lambda row: round(row.stat(key).mean, 2))]
    assert told[:3] == [labels, upwards, upwards[::-1]]
    assert told[3:] == [["joint-vit-none"], "1 of 16 rows", True, "descending", True, False, 2]


@needs_chromium
@pytest.mark.slow
def test_the_filter_leaves_tables_of_other_things_as_they_are(tmp_path):
    in_order(tmp_path, [0, 1, 2, 3, 4])
    in_order(tmp_path, [4, 3, 2, 1, 0])
    write(compare([str(tmp_path)]), tmp_path / "out", "command")
    act = """(() => {
      const field = narrow.document.querySelector("#filter");
      field.value = "no row says this";
      field.dispatchEvent(new Event("input"));
      const count = (table) => table.querySelectorAll("tbody tr:not([hidden])").length;
      return [...narrow.document.querySelectorAll("table.rows")].map(count);
    })()"""
    told, said = open_in_chromium(tmp_path / "out" / "compare.html", tmp_path, act)
    assert said == ""
    assert told == [0, 0, 1]  # accuracies, costs, order robustness


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
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.count("<script") == 1  # ours
    assert html.count("&lt;script&gt;a|b") >= 4
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


def test_runs_left_out_are_told_apart(tmp_path):
    make_run(tmp_path)
    folders = [make_run(tmp_path, seed=seed) for seed in (1, 2, 3)]
    for folder in folders:
        (folder / "summary.json").unlink()
    (folders[0] / "failure.txt").write_text("a loss that is not finite\n")
    with hold_lock(folders[1] / ".lock"):
        left_out = compare([str(tmp_path)]).left_out
    assert [(run.folder, run.state, run.why) for run in left_out] == [
        (folders[0], "failed", "a loss that is not finite"),
        (folders[1], "running", ""),
        (folders[2], "interrupted", ""),
    ]
    assert not (folders[2] / ".lock").exists()
    write(compare([str(tmp_path)]), tmp_path / "out", "command")
    line = f"Left out, failed (a loss that is not finite): {folders[0]}"
    for file in ("table.md", "compare.html"):
        assert line in (tmp_path / "out" / file).read_text()


def test_failure_txt_lasts_until_the_run_goes_on(tmp_path):
    with pytest.raises(ValueError, match="odd"), note_failure(tmp_path):
        raise ValueError("an odd error")
    assert (tmp_path / "failure.txt").read_text() == "ValueError: an odd error\n"
    with pytest.raises(SystemExit), note_failure(tmp_path):  # stopped by a signal
        sys.exit(143)
    assert not (tmp_path / "failure.txt").exists()


@pytest.mark.slow
def test_a_thousand_runs_are_compared_in_seconds(tmp_path):
    """A tenth of what issue 17 asks for. The bound is on processor time, ten times what was measured."""
    source = make_run(tmp_path / "one")
    summary = json.loads((source / "summary.json").read_text())
    for i in range(1000):
        folder = tmp_path / "many" / f"f{i // 3}" / f"seed{i % 3}"
        folder.mkdir(parents=True)
        keys = BASE | {"optimizer.lr": i // 3}
        content = summary | {"seed": i % 3, "fingerprint": f"f{i // 3}", "comparable": keys}
        (folder / "summary.json").write_text(json.dumps(content))
    began = time.process_time()
    comparison = compare([str(tmp_path / "many")])
    assert len(make_csv(comparison).splitlines()) == 335
    assert time.process_time() - began < 15


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "'nowhere', which is not there"),
        ("file", "'file', which is a file"),
        ("empty", "no run at all"),
        ("unfinished", "1 unfinished, the first being unfinished"),
        ("damaged", "breaks off or is damaged"),
        ("list", "expected a JSON object; got list"),
        ("half", "expected a whole summary; got one without seed"),
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
    shutil.copytree(good, "list")
    Path("list/summary.json").write_text("[]")
    shutil.copytree(good, "half")
    summary = json.loads(Path("half/summary.json").read_text())
    Path("half/summary.json").write_text(json.dumps({key: summary[key] for key in summary if key != "seed"}))
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
    assert capsys.readouterr().err == "cl_bench: --out: expected a folder; got 'out', a file. Name another folder.\n"
